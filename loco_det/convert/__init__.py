"""Converts trained weights between code bases, with an account of every tensor and a numeric proof."""

from loco_det.convert.conversion import convert, load_any_backbone, load_backbone_weights, load_checkpoint
from loco_det.convert.stated import Stated

__all__ = ["Stated", "convert", "load_any_backbone", "load_backbone_weights", "load_checkpoint"]
