"""An allocation that failed, whoever says so."""

WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "could not create a primitive",
    "can't start new thread",  # no room for its stack
)
CURE = "free memory, or take a machine with more; nothing half-written stays"


def lacks_memory(error: BaseException) -> bool:
    """Whether memory was short: Python, NumPy and Arrow raise MemoryError, torch a RuntimeError on any device."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in WORDS)


def in_short(error: BaseException) -> str:
    """What the allocator said, in a line."""
    lines = str(error).strip().splitlines() or ["an allocation failed"]
    return lines[0].rpartition("DefaultCPUAllocator: ")[2][:200]


class MemoryShortError(MemoryError):
    """Told with its cure."""


def told(error: BaseException) -> str:
    """The whole message."""
    return str(error) if isinstance(error, MemoryShortError) else f"out of memory ({in_short(error)}); {CURE}"
