"""Differences between the stand-in and CuPy that are meant, each with its reason."""

MEANT = {
    "cupy.emulator": "the control panel of the stand-in, by which the two are told apart",
    "cupy.cuda.nccl.TOKEN_BYTES": "how the ranks of the stand-in find each other",
    "cupyx.distributed._nccl_comm.DEFAULT_HOST": "private in CuPy",
    "cupyx.distributed._nccl_comm.DEFAULT_PORT": "private in CuPy",
    "cupyx.distributed._nccl_comm.PATIENCE": "how long the ranks of the stand-in wait for each other",
    "cupy.ufunc": "made of NumPy's: nobody but the stand-in makes any",
}
