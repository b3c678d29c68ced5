"""How a model becomes a functional graph (mechanism of :mod:`fasp_fx.capture`)."""
