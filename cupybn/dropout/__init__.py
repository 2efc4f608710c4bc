"""Dropout: the functions, and the generators that say what is dropped."""
