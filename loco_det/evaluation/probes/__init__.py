"""Probes: what a backbone's frozen features are worth, stage by stage, on labelled images."""
