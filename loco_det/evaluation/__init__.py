"""Metrics from predictions; independent of the engine."""
