"""Ranks: several processes whose batches are one batch."""
