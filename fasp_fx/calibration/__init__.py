"""What is seen of a model on calibration batches: which channels go, and what repairs the rest."""
