"""The commands of ``python -m cupybn``, a file for each, and what they share."""
