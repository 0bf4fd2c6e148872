"""What a process has freed it keeps: the next step asks for the same blocks again."""

import ctypes
import os

# glibc's names for what mallopt sets, and the largest threshold that it takes; footprint.KEPT is the same size.
TRIM, MMAP, LARGEST = -1, -3, 32 * 2**20


def keep_freed() -> bool:
    """Have glibc's malloc keep freed blocks of up to 32 MiB instead of giving their pages back and faulting them in again, step by step.

    By default it depends on the order of earlier requests whether a language model's forward pass on a CPU takes its matrices from the
    heap or from the system. Who has set glibc's own variables keeps them, and where there is no glibc nothing happens.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP, LARGEST) and mallopt(TRIM, 2**31 - 1))
