#!/usr/bin/env python
"""Train and evaluate a detector: tools/train_net.py --config-file configs/coco_loco_r50.yaml [KEY VALUE ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout without installing it

from loco_det.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("train"))
