"""The part of ``cupyx`` that the stand-in for CuPy has."""
