"""Readers of annotation tools' formats, for conversion to COCO's by `loco-det data convert`."""
