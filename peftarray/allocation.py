"""glibc's allocator, told to keep what is freed: temporaries of a tile are then reused, still warm, and not returned.

Without it each large NumPy temporary is mapped anew and faulted in page by page. A program's whole process is
concerned, so only commands and training loops call this, never an import. `PEFTARRAY_MALLOC=0` turns it off.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory(nbytes: int = 1 << 25, *, held: int | None = None) -> bool:
    """Keep freed memory in the process; whether the C library could be told so.

    Args:
        nbytes: of the largest array that is taken from it; 32 MiB is the most.
        held: how much of it is kept; four such arrays if None.
    """
    if not sys.platform.startswith("linux") or os.environ.get("PEFTARRAY_MALLOC") == "0":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, nbytes) and mallopt(_TRIM_THRESHOLD, 4 * nbytes if held is None else held))
