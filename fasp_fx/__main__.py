"""``python -m fasp_fx`` is ``fasp-fx``."""

from .cli._app import main

main()
