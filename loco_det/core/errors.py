"""The one exception for bad input, how it leaves a loader's workers, and the status of an interrupted command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

_Batch = TypeVar("_Batch")

LONGEST = 2000  # characters of a sentence
INTERRUPTED = 130  # as a shell reports SIGINT
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence that names the file, key or tensor and says what to do. The command line
    prints it and exits with status 2; everything else that is raised is a bug and keeps its traceback. Of one that is
    longer than `LONGEST`, since a hostile file has a name or a value of any length, the middle is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


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
