"""The snippets of docs/deploy.md, each a route: the last line of each runs again on three batches, for a
fresh result and for a loaded one. scripts/test-runtimes has what they need.
"""

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import error

import fasp_fx

_PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
START, *ROUTES = re.findall(r"^```python\n(.*?)^```$", _PAGE, flags=re.MULTILINE | re.DOTALL)
#: the same arithmetic in another order, and int8
CLOSE, ROUGH = 1e-5, 0.1


def _missing(text: str) -> str | None:
    """The first package that a snippet imports and that is not installed."""
    packages = re.findall(r"^(?:import|from) (\w+)", text, flags=re.MULTILINE)
    return next((name for name in packages if importlib.util.find_spec(name) is None), None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ROUTES, ids=lambda text: text.splitlines()[-1])
def test_route(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := _missing(text):
        pytest.skip(f'{missing} is missing: pip install "fasp_fx[runtimes]"')
    monkeypatch.chdir(tmp_path)
    start: dict[str, Any] = {}
    exec(START, start)
    saved = start["result"].save("result")
    for result in (start["result"], fasp_fx.load(saved)):
        names = start | {"result": result, "program": result.program}
        (*_, last) = ast.parse(text).body
        with torch.no_grad():
            exec(text, names)
            for count in (1, 3, 32):
                names["images"] = torch.randn(count, 3, 32, 32)
                exec(ast.unparse(last), names)
                away = error(torch.as_tensor(names["logits"]), result.module(names["images"]))
                assert away <= (ROUGH if "uantise" in text or "quantize_" in text else CLOSE)
