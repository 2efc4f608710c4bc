"""What a kernel executes, counted without a GPU: its machine code, executed on NumPy. See ``README.md``."""
