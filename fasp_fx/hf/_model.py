"""What pruned decoders and pruned encoder-decoders have in common: shared weights, programs, and the checks
around them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel

from fasp_fx.analysis import PruningPlan
from fasp_fx.base import CACHE, mark_as_given
from fasp_fx.capturing import copy_graph
from fasp_fx.errors import ArgumentError
from fasp_fx.passes import Origin
from fasp_fx.pruning import Report
from fasp_fx.storage import program_to_json

from ._arguments import opened, read_cache, write_cache
from ._config import PrunedConfig
from ._flat import FlatProgram, share_heads, without_checks

CONSTANTS = "_constants"


@dataclass(frozen=True)
class StoredProgram:
    """One program: as it is written to disk, and as it runs, with its weights under the model's names.

    Attributes:
        source: the program as it is written, or what it is made of when it is written.
    """

    source: Mapping[str, Any] | Origin
    flat: FlatProgram

    @property
    def data(self) -> Mapping[str, Any]:
        """The program as JSON.

        Raises:
            StoreError: it holds something that cannot be stored; names it.
        """
        return program_to_json(self.source.program) if isinstance(self.source, Origin) else self.source

    def __deepcopy__(self, memo: Any) -> StoredProgram:
        return self  # nobody changes it


@dataclass(frozen=True)
class Parts:
    """What a pruned model is made of.

    Attributes:
        programs: by name.
        weights: parameters and persistent buffers by the names of the original model; tied ones are one
            object.
        constants: for each program, its constants and other buffers by the names in its graph.
        plan: what was removed.
        report: what it cost.
    """

    programs: Mapping[str, StoredProgram]
    weights: Mapping[str, Tensor]
    constants: Mapping[str, Mapping[str, Tensor]]
    plan: PruningPlan
    report: Report


class Branch(nn.Module):
    """A part of the tree of weights; nothing is computed by it."""

    main_input_name = "input_ids"  # generate() asks an encoder for it


def place(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter or buffer where its dotted name says, making the modules on the way; constants stay
    outside of the state dict.
    """
    path, _, leaf = name.rpartition(".")
    owner = root
    for part in path.split(".") if path else ():
        if part not in dict(owner.named_children()):
            owner.add_module(part, Branch())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor, persistent=path != CONSTANTS)


class PrunedModel(PreTrainedModel, GenerationMixin):
    """A model whose forward is a captured and pruned program with a cache; made by :func:`fasp_fx.hf.prune`
    or ``from_pretrained``.

    The programs share the parameters of this module, which have the names of the original model. Dropout and
    the like are as they were at capture, in evaluation mode; ``train()`` and ``eval()`` change nothing.
    """

    config_class = PrunedConfig
    program_names: ClassVar[frozenset[str]] = frozenset()
    _supports_sdpa = True
    _supports_flash_attn = False

    def __init__(self, config: PrunedConfig, parts: Parts) -> None:
        super().__init__(config)
        self.plan, self.report = parts.plan, parts.report
        for name, tensor in parts.weights.items():
            place(self, name, tensor)
        self._stored = parts.programs
        self._constant_names: dict[str, dict[str, str]] = {}
        self._programs: dict[str, FlatProgram] = {}
        for program, stored in parts.programs.items():
            names = {name: f"{CONSTANTS}.{program}{i}" for i, name in enumerate(parts.constants[program])}
            for name, tensor in parts.constants[program].items():
                place(self, names[name], tensor.clone())
            graph = copy_graph(stored.flat.graph)
            for node in graph.find_nodes(op="get_attr"):
                node.target = names.get(str(node.target), node.target)
            without_checks(graph)
            share_heads(graph)
            self._constant_names[program] = names
            self._programs[program] = stored.flat.rewritten(graph)
        self._cache_sizes = {name: program.cache_sizes() for name, program in self._programs.items()}
        self._bounds = {name: program.bounds() for name, program in self._programs.items()}
        self.eval()

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers' own, without what ``generate`` hands on to the loop around the model, and without
        positions where the original model takes none.
        """
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if self.config.positions is None:
            inputs.pop("position_ids", None)
        return inputs

    def _run(self, name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        for bound in self._bounds[name]:
            bound.check(values)
        return self._programs[name](self, values)

    def _like(self) -> Tensor:
        """A parameter that shows dtype and device."""
        return next(parameter for parameter in self.parameters() if parameter.is_floating_point())

    def _cached(self, program: str, cache: Any, batch: int) -> dict[str, Tensor]:
        """The cache tensors that a program takes."""
        return read_cache(cache, self._cache_sizes[program], batch, self._like())

    def _opened(self, cache: Any) -> Any:
        """The caller's cache, or an empty one."""
        return opened(cache, EncoderDecoderCache if self.config.is_encoder_decoder else DynamicCache)

    def _extended(self, cache: Any, results: dict[str, Tensor], use_cache: bool | None) -> Any:
        """Write what a program returned into the cache; ``None`` if the output shall not hold it."""
        write_cache(cache, {name: value for name, value in results.items() if name.startswith("cache.")})
        wanted = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        return cache if wanted else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight = self._like()
        moved = fn(weight.detach().new_empty(0))
        if moved.dtype != weight.dtype:
            raise ArgumentError(
                f"the programs were captured in {weight.dtype} and cannot be made {moved.dtype}; load the"
                " dense model in that dtype and prune it again"
            )
        super()._apply(fn, recurse)
        if moved.device != weight.device:
            for program in self._programs.values():
                program.to_device(moved.device)
        return self

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """A cache that holds every token of every layer, as the programs take it."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ArgumentError(
                f"cache_implementation={kind!r} is not served: the programs take a cache that grows; leave"
                " it out"
            )
        cache = model_kwargs.get(CACHE)
        if cache is not None:
            mark_as_given(self._opened(cache))
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = self._opened(None)
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible: it needs a cache in pages, which the programs do not take.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(
            "continuous batching needs a paged cache, which a pruned model's programs do not take; call"
            " generate() on padded batches"
        )
