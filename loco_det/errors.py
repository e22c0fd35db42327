"""The one exception for bad input, and the status of a command that was interrupted."""

INTERRUPTED = 130  # as a shell reports SIGINT


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence that names the file, key or tensor and says what to do. The command line
    prints it and exits with status 2; everything else that is raised is a bug and keeps its traceback.
    """
