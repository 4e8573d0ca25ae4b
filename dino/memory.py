"""Memory of freed tensors, kept for the next ones."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT_BYTES = 1 << 30  # a tensor larger than this still goes back to the system


def keep_freed_memory() -> None:
    """Let glibc hand out freed memory again instead of returning it to the system; elsewhere nothing.

    A step on a CPU makes and frees gigabytes of tensors. Fresh pages for those of 32 MiB and more, a fault each 4 KiB,
    cost up to a fifth of it. The price is memory: the process keeps its largest need until it ends.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
