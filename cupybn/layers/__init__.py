"""The layers, and what they hold between calls. Users import them from `cupybn`."""
