"""What the commands do, and how they speak (mechanism of :mod:`fasp_fx.cli`)."""
