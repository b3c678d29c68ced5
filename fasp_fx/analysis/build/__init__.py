"""From channel numbers to coupled groups (mechanism of :mod:`fasp_fx.analysis`)."""
