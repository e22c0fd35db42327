"""Converts trained weights between code bases, with an account of every tensor and a numeric proof."""

from loco_det.convert.conversion import convert, read_backbone, read_backbone_tensors, read_checkpoint
from loco_det.convert.stated import Stated

__all__ = ["Stated", "convert", "read_backbone", "read_backbone_tensors", "read_checkpoint"]
