"""Probes: how well a backbone's frozen features classify labelled images, stage by stage."""
