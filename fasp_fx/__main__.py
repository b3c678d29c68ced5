"""``python -m fasp_fx`` is ``fasp-fx``."""

from fasp_fx.cli import main

main()
