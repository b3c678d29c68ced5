"""Whether a model that was built from a configuration is the one that it ought to be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..base._device import device_of
from ..base._tolerable import tolerable
from ..base._undisturbed import generator_of
from ..base.compare import distance, tolerance
from ..base.compat import pytree
from ..calibration.losses import output_tensors
from ..errors import CaptureError, VerificationError, first_line
from ..pruning.check._compare import widened
from ._fields import leaves

#: fields of a configuration that say behind which position something changes
_MARKS = re.compile(r"window|chunk_size|original_max_position_embeddings")
#: a row is so many tokens longer than that, but no longer than this, and has no more numbers of output: twice
#: that of a model of 7 billion weights is the work of calibrating on four texts of 2048 tokens
_BEHIND, _LONGEST, _NUMBERS = 8, 2**12 + 8, 2**29


def check_equal(made: PreTrainedModel, other: nn.Module, example: Mapping[str, Any]) -> tuple[str, ...]:
    """Hold a model that was built from a config against what it ought to compute, at each position of a few
    rows of tokens.

    Both are computed in float32, whatever their types: in 16 bits a layer without positions is no further
    from another model than that is from itself. Weights are widened one by one as they are used, so this
    takes the memory of the largest. Where float32 leaves a doubt (a router's choice, say), float64 decides.

    Args:
        other: the model, or a program, which may take rows of fewer lengths.
        example: keyword arguments of a call.

    Returns:
        Notes: on buffers that a cast of the other has rounded. They are compared as they were, which is how
        they will be when the model is loaded again.

    Raises:
        VerificationError: they differ, or it does not run.
        CaptureError: the other does not.
    """
    own, fresh = dict(other.named_buffers()), list(made.buffers())
    buffers = {
        name: made
        for name, rounded in own.items()
        for made in fresh
        if made.dtype != rounded.dtype and torch.equal(made.to(rounded), rounded)
    }
    for number, call in enumerate(_calls(made, other, example)):
        for precision in (torch.float32, torch.float64):
            try:
                expected = _outputs(other, call, precision, buffers)
            except tolerable(Exception) as error:
                if number == 0:
                    raise CaptureError(
                        f"{type(other).__name__} does not run ({', '.join(call)}): {first_line(error)}; give it"
                        " other data"
                    ) from error
                break  # a program of one length, say
            found = _found(made, call, precision)
            if not expected or [own.shape for own in found] != [own.shape for own in expected]:
                raise unlike(type(made), "its outputs are others")
            pairs = zip(found, expected, strict=True)
            deviation = max(distance(own, wanted, dim=-1) for own, wanted in pairs)
            if deviation <= max(tolerance("checkpoint", own.dtype) for own in expected):
                break
        else:
            raise unlike(type(made), f"its outputs differ by {deviation:.1e}")
    if not buffers:
        return ()
    said = ", ".join(f"'{name}'" for name in buffers)
    return (f"a cast of the model has rounded {said}; the result has them as its configuration says",)


def unlike(kind: type, fault: str) -> VerificationError:
    """What is said of a model that is not the one that it ought to be."""
    return VerificationError(
        f"{kind.__name__} with these weights is not the model that it ought to be: {fault}; nothing is"
        " returned; choose another format"
    )


def _found(made: nn.Module, call: dict[str, Any], precision: torch.dtype) -> list[Tensor]:
    try:
        return _outputs(made, call, precision, {})
    except tolerable(Exception) as error:
        raise unlike(type(made), f"it does not run: {first_line(error)}") from error


def _outputs(
    module: nn.Module, inputs: dict[str, Any], precision: torch.dtype, buffers: dict[str, Tensor]
) -> list[Tensor]:
    """The floating-point outputs of a call with other values of some buffers."""
    with torch.no_grad(), _Widened(precision):
        found = functional_call(module, buffers, (), inputs)
    return [leaf for leaf in output_tensors(found) if leaf.is_floating_point()]


def _calls(made: PreTrainedModel, other: nn.Module, example: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The example, with other tokens in its second half, or in all of it if it has but one: zeros, say, would
    look alike wherever they stand. A row that ends behind the last position at which the configurations say
    that something changes, as far as that can be afforded. And where both take positions, a row of those
    beside each number that the configurations hold, whatever it means.
    """
    table, device = made.get_input_embeddings(), device_of(other)
    given = {name: own.to(device) if isinstance(own, Tensor) else own for name, own in example.items()}
    ids = given.get("input_ids")
    if not (isinstance(ids, Tensor) and isinstance(table, nn.Embedding)):
        yield given
        return
    generator, size = generator_of("format"), table.num_embeddings

    def drawn(*shape: int) -> Tensor:
        return torch.randint(0, size, shape, generator=generator, device="cpu").to(ids)

    length = ids.shape[-1]
    first = drawn(*ids.shape)
    if bool((ids != ids.flatten()[0]).any()):
        first[..., : length // 2] = ids[..., : length // 2]
    yield {**given, "input_ids": first}
    configs = [own.config for own in (made, other) if isinstance(own, PreTrainedModel)]
    numbers = [
        (str(path[-1]), value)
        for config in configs
        for path, value in leaves(config.to_dict())
        if type(value) is int
    ]
    marks = (value + _BEHIND for name, value in numbers if _MARKS.search(name))
    long = max((mark for mark in marks if mark <= min(_LONGEST, _NUMBERS // size)), default=0)
    if long > length:
        tiled = {
            name: own.repeat(1, long // length + 1)[:1, :long]
            for name, own in given.items()
            if isinstance(own, Tensor) and own.dim() == 2
        }
        yield {**given, **tiled, "input_ids": drawn(1, long)}
    last = getattr(made.config.get_text_config(), "max_position_embeddings", None) or 0
    end = last * (2 if getattr(made.config, "rope_parameters", None) else 1)
    if end and all("position_ids" in inspect.signature(own.forward).parameters for own in (made, other)):
        beside = {at for _, value in numbers for at in range(value - 1, value + 2)}
        places = sorted(at for at in {*range(_BEHIND), *beside, end - 2, end - 1} if 0 <= at < end)
        positions = torch.tensor([places], device=device)
        # With a mask, positions that are not one behind the other are still those of one text.
        shown = {"attention_mask": torch.ones_like(positions), "position_ids": positions}
        yield {"input_ids": drawn(1, len(places)), **shown, "use_cache": False}


class _Widened(TorchFunctionMode):
    """Within it, nothing is computed in a lower precision than this one."""

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        real = [own for own in tensors if own.is_floating_point()]
        if all(self._is_narrow(own) for own in real):
            made = func(*args, **kwargs)  # of weights: their views and sizes are taken as they are
            if not (isinstance(made, Tensor) and self._is_narrow(made)):
                return made
            if made.untyped_storage().data_ptr() in {own.untyped_storage().data_ptr() for own in real}:
                return made
        if func is Tensor.float:
            func = Tensor.to
            args = (*args, torch.float32)
        args, kwargs = pytree.tree_map(lambda leaf: widened(leaf, self.precision), (args, kwargs))
        return func(*args, **kwargs)

    def _is_narrow(self, tensor: Tensor) -> bool:
        return widened(tensor.dtype, self.precision) != tensor.dtype
