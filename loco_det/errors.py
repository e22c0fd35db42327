"""The one exception for bad input, and the status of a command that was interrupted."""

from __future__ import annotations

INTERRUPTED = 130  # as a shell reports SIGINT
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence that names the file, key or tensor and says what to do. The command line
    prints it and exits with status 2; everything else that is raised is a bug and keeps its traceback.
    """


def out_of_memory(error: BaseException) -> UserError | None:
    """What to tell of an error that says there is no memory left, of torch on any device or of NumPy; else None."""
    # Told by name and text, for this must work where torch does not.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _CPU_ALLOCATOR in str(error):
        reason = str(error).partition("\n")[0] or "MemoryError"
        return UserError(f"memory is short; use smaller batches or images, or fewer workers ({reason})")
    return None
