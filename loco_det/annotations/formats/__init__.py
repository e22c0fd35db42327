"""Data sets as annotation tools write them, read into COCO's format: what `loco-det data convert` knows."""
