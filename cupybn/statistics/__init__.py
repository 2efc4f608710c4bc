"""Statistics without a layer: moments of one array, and of arrays that come one after the other."""
