"""The stand-in for CuPy, and every use of CuPy in this repository, held against an installed CuPy without a driver.

`inventory` lists what a package has; it runs under either package, in a process of its own, for both have one name.
`names` holds the list of the stand-in against that of CuPy, and `uses` what the files of this repository call against
the latter. `meant` has what is meant to differ.
"""
