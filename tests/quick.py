"""For processes that capture many small models, once each."""

from __future__ import annotations

import logging

import torch


def capture_quickly() -> None:
    """Let torch keep and write down less of a capture, of which nobody here has any use."""
    # Pytest listens to loggers that do not propagate, and for whoever listens torch writes down every step of
    # a capture, which takes a tenth of the time.
    logging.getLogger("torch.__trace").propagate = True
    # The cache of what operators make of fake tensors pays where many layers are alike. Of a few it takes
    # a third of the capture (and is left out by itself where it fails).
    torch._dynamo.config.fake_tensor_cache_enabled = False
    # Nobody reads which line of a model made a node, and to find that for each takes a tenth of a capture.
    if hasattr(torch.fx.config, "do_not_emit_stack_traces"):  # not in every version
        torch.fx.config.do_not_emit_stack_traces = True
