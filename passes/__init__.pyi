from ._pruned_module import (
    Origin as Origin,  # What a pruned module was made of, without the values of its weights
    PrunedModule as PrunedModule,  # A program behind the caller's signature
    finish as finish,  # The module of a rewritten program
    program_now as program_now,  # The program of a PrunedModule, with the weights and constants that the module holds now
    wrap as wrap,  # The module of an exported program behind the caller's signature
)
from ._remove_channels import (
    remove_channels as remove_channels,  # Leave no channel that goes in any weight, nor in an input that holds state
)
from ._run import (
    Pipeline as Pipeline,  # Runs a plan among foreign passes
    Prune as Prune,  # Apply a plan: Prune(plan)(exported) is an exported program without the plan's channels
    remove as remove,  # The analysed program without some channels: it computes what the dense one computes with the removed activations at zero
    split_fused as split_fused,  # Split fused producers that stand in the way; None if there is nothing to do
)
from ._split import (
    fused_weights as fused_weights,  # The weights of a model that a result holds in parts, put together again
)
from ._verify import (
    verify as verify,  # Check program against the analysis of its origin
)

__all__ = [
    "Pipeline",
    "Prune",
    "remove",
    "split_fused",
    "verify",
]
