"""For processes that capture many small models, once each."""

from __future__ import annotations

import logging

import torch
from torch._subclasses import FakeTensor


def capture_quickly() -> None:
    """Let torch keep and write down less of a capture, of which nobody here has any use."""
    # Pytest listens to loggers that do not propagate, and for whoever listens torch writes down every step of
    # a capture, which takes a tenth of the time.
    logging.getLogger("torch.__trace").propagate = True
    # The cache of what operators make of fake tensors pays where a graph is run again, and takes a third of
    # the capture of few layers (and is left out by itself where it fails).
    original = torch.export.export

    def export(*args: object, **kwargs: object) -> torch.export.ExportedProgram:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            made = original(*args, **kwargs)
        for value in (node.meta.get("val") for node in made.graph.nodes):
            if isinstance(value, FakeTensor):
                value.fake_mode.cache_enabled = True
        return made

    torch.export.export = export
    # Nobody reads which line of a model made a node, and to find that for each takes a tenth of a capture.
    if hasattr(torch.fx.config, "do_not_emit_stack_traces"):  # not in every version
        torch.fx.config.do_not_emit_stack_traces = True
