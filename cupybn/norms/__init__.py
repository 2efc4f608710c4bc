"""Instance, group, layer and RMS norm as functions: users import them from `cupybn.functional`."""
