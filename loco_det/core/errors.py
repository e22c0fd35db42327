"""`UserError` for bad input, and the exit status of an interrupted command."""

from __future__ import annotations

LONGEST = 2000  # characters of a sentence
INTERRUPTED = 130  # as a shell reports SIGINT
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


class UserError(Exception):
    """Invalid input from the user.

    The message is one sentence that names the file, key or tensor and the remedy. The command line prints it and exits
    with status 2; any other exception is a bug and keeps its traceback. A hostile name or value in it changes neither
    its one line (unprintable characters are escaped) nor its length (the middle beyond `LONGEST` is left out).

    Attributes:
        add: arguments after which the command works, if that is all it takes; the command line prints the whole line.
    """

    def __init__(self, message: str, add: str = "") -> None:
        super().__init__(message if message.isprintable() else "".join(map(_printable, message)))
        self.add = add

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def said(error: BaseException) -> str:
    """Return the message of an exception of another's code on one line, at most 200 characters; else its type."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def out_of_memory(error: BaseException) -> UserError | None:
    """Convert an out-of-memory error of torch (any device) or NumPy to a UserError; None for other errors."""
    # Matches by name and text, because this must work without torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _CPU_ALLOCATOR in str(error):
        reason = str(error).partition("\n")[0] or "MemoryError"
        return UserError(f"memory is short; use smaller batches or images, or fewer workers ({reason})")
    return None
