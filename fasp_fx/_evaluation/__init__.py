"""Zero-shot tasks (mechanism of :mod:`fasp_fx.evaluation`)."""
