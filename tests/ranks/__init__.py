"""Tests that ranks run together, by ``mpiexec -n 3 python -m mpi4py -m tests.ranks``; see ``test_syncbatchnorm.py``."""
