"""What a backend of ``torch.compile`` learns of the frame that is compiled."""

import torch
import torch._dynamo
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext, tracing

#: the function that a graph calls where gradients are switched on or off
SET_GRAD = torch._C._set_grad_enabled


def traces_recurrent() -> bool:
    """Whether dynamo traces recurrent layers, rather than running the frame that calls one as it is."""
    return bool(torch._dynamo.config.allow_rnn)


__all__ = [
    "SET_GRAD",
    "InstructionTranslator",
    "TracingContext",
    "aot_export_module",
    "lookup_backend",
    "traces_recurrent",
    "tracing",
]
