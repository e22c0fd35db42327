"""Trained weights from one code base to another, with an account and a proof."""
