"""What the suite changes of torch, to be quicker and to compare exactly; the slow profile changes nothing."""

import datetime
import logging
import os

import torch
from torch._subclasses import FakeTensor

PROFILE = os.environ.get("FASP_FX_PROFILE", "fast")
#: The fast profile takes other cases of the many each day. A day that failed is run again by its number, and
#: the processes of one run have the same.
DAY = int(os.environ.setdefault("FASP_FX_DAY", str(datetime.date.today().toordinal())))


def patch_torch() -> None:
    """For processes that capture many small models, once each, and hold oracles that are exact."""
    if PROFILE == "slow":
        return
    # Pytest listens to loggers that do not propagate, and for whoever listens torch writes down every step of
    # a capture, which takes a tenth of the time.
    logging.getLogger("torch.__trace").propagate = True
    # The cache of what operators make of fake tensors pays where a graph is run again, and takes a third of
    # the capture of few layers (and is left out by itself where it fails).
    original = torch.export.export

    def export(*args: object, **kwargs: object) -> torch.export.ExportedProgram:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            program = original(*args, **kwargs)
        for value in (node.meta.get("val") for node in program.graph.nodes):
            if isinstance(value, FakeTensor):
                value.fake_mode.cache_enabled = True
        return program

    torch.export.export = export
    # Nobody reads which line of a model made a node, and to find that for each takes a tenth of a capture.
    if hasattr(torch.fx.config, "do_not_emit_stack_traces"):  # not in every version
        torch.fx.config.do_not_emit_stack_traces = True
    # Processors that multiply bfloat16 faster round by themselves; tests/test_precision.py holds that.
    if hasattr(torch.cpu, "get_capabilities"):
        able = torch.cpu.get_capabilities
        torch.cpu.get_capabilities = lambda: {**able(), "amx_bf16": False, "avx512_bf16": False}
