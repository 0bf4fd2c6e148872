"""Keep freed memory blocks in the process, since the next step asks for the same blocks again."""

import ctypes
import os

# Parameters of glibc's mallopt, and the largest threshold it accepts; `measure.LARGE_BLOCK` is the same size.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_THRESHOLD = -1, -3, 32 * 2**20
# glibc's own environment variables for the same settings.
GLIBC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_blocks() -> bool:
    """Make glibc's malloc keep freed blocks of up to 32 MiB instead of returning their pages to the system.

    Otherwise a language model's forward pass on a CPU may have page faults for its matrices at every call. Returns whether this call set
    the limits: it does nothing without glibc, or if glibc's own environment variables are set, which take precedence.
    """
    if any(name in os.environ for name in GLIBC_VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
