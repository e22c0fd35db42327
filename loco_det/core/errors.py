"""The one exception for bad input, how it leaves a loader's workers, and the status of an interrupted command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

_Batch = TypeVar("_Batch")

INTERRUPTED = 130  # as a shell reports SIGINT
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence that names the file, key or tensor and says what to do. The command line
    prints it and exits with status 2; everything else that is raised is a bug and keeps its traceback. Whatever a
    name in it holds, it stays one line: what cannot be printed is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if message.isprintable() else "".join(map(_printable, message)))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def raising(batches: Iterable[_Batch | UserError]) -> Iterator[_Batch]:
    """The batches of a loader whose data set returns its UserErrors, as a batch or as a sample in a list of them.

    A DataLoader would wrap one that is raised in a worker in the worker's traceback.

    Raises:
        UserError: the first that comes.
    """
    for batch in batches:
        for part in batch if isinstance(batch, list) else (batch,):
            if isinstance(part, UserError):
                raise part
        yield batch


def out_of_memory(error: BaseException) -> UserError | None:
    """What to tell of an error that says there is no memory left, of torch on any device or of NumPy; else None."""
    # Told by name and text, for this must work where torch does not.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _CPU_ALLOCATOR in str(error):
        reason = str(error).partition("\n")[0] or "MemoryError"
        return UserError(f"memory is short; use smaller batches or images, or fewer workers ({reason})")
    return None
