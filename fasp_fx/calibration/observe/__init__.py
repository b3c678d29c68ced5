"""Calibration batches on their way through a graph, and what is decided as they pass."""
