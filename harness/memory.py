"""The allocator of the C library, told to keep what training will want again a moment later.

glibc gives every large block back to the kernel when it is freed and takes a fresh one for the next
activation or gradient, which the kernel has to fill with zeros page by page. A training step frees
and takes the same sizes each time, so to keep them costs no memory beyond the step's own peak.
"""

from __future__ import annotations

import ctypes
import os

# mallopt's parameter numbers in malloc.h of glibc, and the largest values it takes.
_M_TRIM_THRESHOLD, _TRIM = -1, 2**31 - 1
_M_MMAP_THRESHOLD, _MMAP = -3, 2**30


def keep_freed_memory() -> bool:
    """Let this process keep freed memory; returns whether its C library can be told so (glibc).

    What the user has set by MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ stays.
    """
    if os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM))
