#!/usr/bin/env python3
"""Convert a ResNet checkpoint to Detectron2 weights: convert_to_d2.py INPUT OUTPUT.pkl (docs/conversion.md)."""

from __future__ import annotations

import sys

from loco_det.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
