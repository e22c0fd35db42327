"""LoCo, Greedy InfoMax and end-to-end SimCLR as three lists of units."""
