"""``python -m fasp_fx`` is ``fasp-fx``."""

from .cli import main

main()
