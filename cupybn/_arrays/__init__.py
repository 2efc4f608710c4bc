"""Arrays: of which kind they are, on which device, of which dtype."""
