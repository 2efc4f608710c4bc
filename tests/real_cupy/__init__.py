"""Comparison of the stand-in for CuPy, and of all uses of CuPy in this repository, with an installed CuPy.

No GPU is needed. `inventory` lists the names of a package, CuPy or the stand-in; it runs in a process of its own for
each, since both are called ``cupy``. `names` compares the two lists. `uses` looks up in the list of CuPy what the files
of this repository call. `meant` has the differences that are meant.
"""
