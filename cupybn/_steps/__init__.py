"""The steps of batch norm: on NumPy arrays, and as launches of kernels on CuPy arrays."""
