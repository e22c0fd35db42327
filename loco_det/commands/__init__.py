"""One file per command: `add_arguments` and `run`."""
