"""loco_det: how good is this backbone for detection and segmentation?"""

__version__ = "0.1.0"
