"""Images on disk, decoded and augmented, and batches of them."""
