"""Counts what a kernel executes, without a GPU, by executing its machine code on NumPy. See ``README.md``."""
