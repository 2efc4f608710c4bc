"""Facts about arrays: kind (NumPy or CuPy), device and dtype. The lowest floor, which imports none of the others."""
