"""The commands of ``cupybn``, a file for each, and what they share."""
