"""Hold a rule against the operator it describes (private parts of :mod:`fasp_fx.testing.rule`)."""
