#!/usr/bin/env python
"""Convert a ResNet checkpoint to Detectron2 weights: tools/convert_to_d2.py INPUT OUTPUT.pkl"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout without installing it

from loco_det.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("convert"))
