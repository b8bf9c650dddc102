"""Keep the memory that tensors free on a CPU, instead of giving it back between two operations.

glibc maps every large allocation anew and unmaps it when it is freed, so each activation of a step
costs a page fault and a zeroed page for every 4 KB, before anything is computed: up to 54,000
faults and 5 to 9 % of the time of a frozen step of 512 tokens (LOG.md). Told to map nothing and to
trim nothing, it reuses what was freed; memory goes back when the process ends.
"""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # as malloc.h numbers them
GROWTH_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Tell the C library's allocator, for this process and all its libraries.

    Returns:
        Whether it took the settings; another C library has none, and nothing changes then.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, GROWTH_BYTES)
    return all(mallopt(name, value) == 1 for name, value in settings)
