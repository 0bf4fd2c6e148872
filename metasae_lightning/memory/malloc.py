"""Keep freed memory blocks in the process, since the next step asks for the same blocks again."""

import ctypes
import os

# glibc's names for what mallopt sets, and the largest threshold that it takes; footprint.KEPT is the same size.
TRIM, MMAP, LARGEST = -1, -3, 32 * 2**20


def keep_freed() -> bool:
    """Make glibc's malloc keep freed blocks of up to 32 MiB instead of returning their pages to the system.

    Otherwise a language model's forward pass on a CPU may fault its matrices in again at every call. glibc's own environment variables
    take precedence. Without glibc nothing happens.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP, LARGEST) and mallopt(TRIM, 2**31 - 1))
