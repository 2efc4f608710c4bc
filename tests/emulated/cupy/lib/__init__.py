"""The part of ``cupy.lib`` that the stand-in has."""

from cupy.lib import stride_tricks

__all__ = ["stride_tricks"]
