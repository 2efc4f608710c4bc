"""The layers, and what they hold between calls."""
