"""One file per command, with `run`; its arguments are in `loco_det/arguments.py`."""
