"""What malloc keeps in the processes that judge."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Have glibc's malloc keep up to 256 MiB that were freed; does nothing where there is another malloc.

    It would return them to the system after each large array, and the next one would be a page fault for every 4 KiB: up to
    a tenth of the processor time of a law. A subject's process keeps its settings: what it cannot allocate must show.

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, size in ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**28), (_M_TOP_PAD, 2**24)):
        mallopt(parameter, size)
