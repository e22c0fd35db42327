#!/usr/bin/env python
"""Pretrain a backbone: tools/pretrain_net.py --config-file configs/pretrain/loco_r50.yaml [KEY VALUE ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout without installing it

from loco_det.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("pretrain"))
