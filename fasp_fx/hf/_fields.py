"""What a configuration says: which of its fields say which sizes, found by building the class of the model
at other sizes; whether a Llama's says all that a model reads of its own; and whether what was built from one
computes the same.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from fasp_fx.analysis import Group
from fasp_fx.base import (
    FakeTensorMode,
    device_of,
    distance,
    generator_of,
    pytree,
    quiet_transformers,
    tensors_in,
    tolerable,
    tolerance,
)
from fasp_fx.errors import ArgumentError, VerificationError, first_line
from fasp_fx.pruning import widened

#: where a value stands in a config: keys of nested configs, positions of lists
Place = tuple[str | int, ...]
#: values to put in places of a config
Assignment = Mapping[Place, Any]
Shapes = Mapping[str, tuple[int, ...]]
#: by how much dimensions of parameters and buffers shrink
Losses = dict[tuple[str, int], int]


def written(path: Place) -> str:
    """A place as text: ``text_config.intermediate_size[3]``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


class Experiments:
    """Builds a model's class from changed configs on the meta device and compares shapes.

    Buffers count: half as many heads and heads of half the size have the same weights, but not the same table
    of positions. Every config goes through its own text form on the way, as it will when it is loaded from a
    file.

    Args:
        kind: the class.
        config: what the class makes a dense model of.

    Attributes:
        dense: the config.
        base: it as a dictionary.
        values: what stands at each place of it.
        shapes: of the parameters and buffers that the class makes of the config, under all their names.
        layers: what the names begin with in each of the layers that the config counts.

    Raises:
        ArgumentError: the class cannot be built from the config.
    """

    def __init__(self, kind: Any, config: PreTrainedConfig) -> None:
        self.kind, self.dense = kind, config
        self.base: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        if self.base.get("num_attention_heads") and self.base.get("hidden_size"):
            # Left out, it is computed of the number of heads, which then cannot be lowered alone.
            self.base.setdefault("head_dim", self.base["hidden_size"] // self.base["num_attention_heads"])
        self.layers: tuple[str, ...] = ()
        self.values = dict(leaves(self.base))
        self._found: dict[str, Shapes | str] = {}
        shapes = self.build({})
        if isinstance(shapes, str):
            raise ArgumentError(
                f"{self.kind.__name__} cannot be built from its own config: {shapes}; this format needs that"
            )
        self.shapes = shapes

    @property
    def name(self) -> str:
        """The name of the config's class."""
        return type(self.dense).__name__

    def config(self, values: Assignment) -> PreTrainedConfig:
        """The config with other values in some places, as it will come back from a file."""
        data = copy.deepcopy(self.base)
        for path, value in values.items():
            place: Any = data
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
        kind = type(self.dense)
        return kind.from_dict(json.loads(kind.from_dict(data).to_json_string()))

    def build(self, assignment: Assignment) -> Shapes | str:
        """The shapes that the class gives its parameters and buffers, or why it cannot be built."""
        key = repr(sorted(assignment.items(), key=repr))
        if key not in self._found:
            with quiet_transformers(), torch.random.fork_rng(devices=[]):
                try:
                    config = self.config(assignment)
                    with torch.device("meta"):
                        model = self.kind(config)
                    self._found[key] = {
                        name: tuple(tensor.shape)
                        for named in (model.named_parameters, model.named_buffers)
                        for name, tensor in named(remove_duplicate=False)
                    }
                    self.layers = self.layers or tuple(_layers(model, config))
                except tolerable(Exception) as error:  # a class raises what it likes about sizes
                    self._found[key] = first_line(error)
        return self._found[key]

    def losses(self, assignment: Assignment) -> Losses | None:
        """By how much each dimension of each parameter and buffer shrinks, where it does; ``None`` where
        that cannot be said.
        """
        shapes = self.build(assignment)
        return None if isinstance(shapes, str) or shapes.keys() != self.shapes.keys() else self.lost(shapes)

    def lost(self, shapes: Shapes) -> Losses | None:
        """By how much each dimension of some parameters and buffers is less than the class makes it;
        ``None`` where there are more dimensions or fewer.
        """
        pairs = {name: (self.shapes[name], shape) for name, shape in shapes.items()}
        if any(len(old) != len(new) for old, new in pairs.values()):
            return None
        return {
            (name, dim): was - now
            for name, (old, new) in pairs.items()
            for dim, (was, now) in enumerate(zip(old, new, strict=True))
            if was != now
        }


@dataclass(frozen=True)
class Field:
    """A number of a config that says sizes.

    Attributes:
        path: where it stands.
        value: what it says of the dense model.
        moves: by how much each dimension shrinks where the number is lower by one.
    """

    path: Place
    value: int
    moves: Losses

    def within(self, scope: str) -> Losses:
        """What it moves of tensors whose names begin so."""
        return {place: by for place, by in self.moves.items() if place[0].startswith(scope)}


def find_fields(experiments: Experiments, lost: Iterable[tuple[str, int]]) -> list[Field]:
    """The fields of a config that say how long some dimensions are.

    Numbers that divide such a length are lowered, by one and to half, as far as the class can be built then;
    a field that is not set stands for one of the lengths.
    """
    sizes = sorted({experiments.shapes[name][dim] for name, dim in lost})
    fields = [
        _moved(experiments, path, value)
        for path, value in experiments.values.items()
        if type(value) is int and value > 1 and any(size % value == 0 for size in sizes)
    ]
    fields += [
        _moved(experiments, path, size)
        for path in [path for path, value in experiments.values.items() if value is None]
        for size in sizes
        if experiments.losses({path: size}) == {}
    ]
    return [field for field in fields if field.moves]


def _moved(experiments: Experiments, path: Place, value: int) -> Field:
    """A field; it moves nothing where the class takes no other number, or sizes do not follow it evenly."""
    seen = [
        {place: by / steps for place, by in lost.items()}
        for steps in {1, value // 2}
        if (lost := experiments.losses({path: value - steps})) is not None
    ]
    even = bool(seen) and seen[0] == seen[-1] and all(by > 0 and by == int(by) for by in seen[0].values())
    return Field(path, value, {place: int(by) for place, by in seen[0].items()} if even else {})


def lowered(
    lost: Losses, fields: Iterable[Field], scope: str = "", *, partly: bool = False
) -> tuple[dict[Place, int], Losses]:
    """By how much fields are lower where some dimensions of tensors in a scope have shrunk.

    Args:
        lost: by how much.
        partly: whether more shrinks than is said here.

    Returns:
        That, and what of ``lost`` no field says.
    """
    steps_of: dict[Place, int] = {}
    left = dict(lost)
    for field in fields:
        moves = field.within(scope)
        places = [place for place in moves if not partly or place in left]
        by = {left.get(place, 0) / moves[place] for place in places}
        steps = by.pop() if len(by) == 1 else 0
        if steps > 0 and steps == int(steps):
            steps_of[field.path] = int(steps)
            left = {place: loss for place, loss in left.items() if place not in places}
    return steps_of, left


def units(group: Group) -> Losses:
    """By how much each dimension of each member shrinks for each channel set that every block of the group
    loses.
    """
    return {
        (member.name, member.dim): len(member.indices) // (group.width * member.blocks)
        for member in (*group.producers, *group.consumers)
    }


def arrange(groups: Sequence[Group], fields: Sequence[Field], scopes: Sequence[str]) -> list[int | None]:
    """Which groups shrink together, as fields say them.

    Args:
        groups: the groups that may be pruned; their members are named as in the experiments.
        scopes: within each of which the fields have values of their own.

    Returns:
        For each group a number, the same for those that shrink alike; ``None`` where no field can say it.
    """
    every = [units(group) for group in groups]
    first: dict[int, int] = {}
    for scope in scopes:
        inside = {
            number: lost
            for number, lost in enumerate(every)
            if all(name.startswith(scope) for name, _ in lost)
        }
        touched = {place for lost in inside.values() for place in lost}
        usable = [field for field in fields if field.within(scope).keys() <= touched]
        said: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, lost in inside.items():
            steps_of, left = lowered(lost, usable, scope, partly=True)
            if steps_of and not left:
                said[tuple(steps_of.items())].append(number)
        for steps, members in said.items():
            together = {at: by for number in members for at, by in every[number].items()}
            if lowered(together, usable, scope) == (dict(steps), {}):
                first |= dict.fromkeys(members, members[0])
    places = {number: place for place, number in enumerate(sorted(set(first.values())))}
    return [places[first[number]] if number in first else None for number in range(len(groups))]


def _layers(model: nn.Module, config: Any) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == getattr(config, "num_hidden_layers", 0):
            yield from (f"{path}.{index}." for index in range(len(module)))


def leaves(value: Any) -> list[tuple[Place, Any]]:
    """What stands in a config as JSON has it, each with its place."""

    def step(key: Any) -> str | int:
        return int(key.idx) if isinstance(key, pytree.SequenceKey) else str(key.key)

    return [(tuple(map(step, path)), leaf) for path, leaf in pytree.tree_leaves_with_path(value)]


# --- What a format may claim of a model.

#: what the config of a Llama has that those of its like have under the same names
_LLAMA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)
#: what says nothing of what is predicted: how weights were drawn, what is dropped in training, what a call
#: returns, how a file was stored
_SILENT = {
    *("_name_or_path", "architectures", "auto_map", "model_type", "per_layer_config", "quantization_config"),
    *("initializer_range", "use_cache", "pretraining_tp", "transformers_version", "return_dict"),
    *("output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type"),
    *("attention_dropout", "hidden_dropout", "resid_dropout", "resid_pdrop", "embd_pdrop"),
}
#: what other fields say, at each of their places, where they change nothing
_NEUTRAL: dict[str, Any] = {
    **{"layer_types": "full_attention", "no_rope_layers": 1, "rope_parameters.partial_rotary_factor": 1},
    **{"use_sliding_window": False, "use_bias": False},
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), 1),
}
#: what each kind of positions of a Llama is said with, beside its name and its base
_POSITIONS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": (
        *("factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor"),
    ),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
#: fields of a configuration that say behind which position something changes
_MARKS = re.compile(r"window|chunk_size|original_max_position_embeddings")
#: a row is so many tokens longer than that, but no longer than this, and has no more numbers of output: twice
#: that of a model of 7 billion weights is the work of calibrating on four texts of 2048 tokens
_BEHIND, _LONGEST, _NUMBERS = 8, 2**12 + 8, 2**29


def llama_of(config: Any) -> LlamaConfig:
    """The configuration of the Llama that a model may be."""
    fields = config.to_dict()
    return LlamaConfig(**{name: fields[name] for name in _LLAMA if name in fields})


def refuse_unsaid(name: str, kind: Any, config: Any) -> None:
    """Refuse what a class reads of its configuration and a Llama's does not say.

    Args:
        name: of the format.
        kind, config: the model's.

    Raises:
        ArgumentError: names all of it.
    """
    fields, llama = config.to_dict(), llama_of(config).to_dict()
    turns = dict(fields.get("rope_parameters") or {})
    turn = turns.get("rope_type")
    known = ("rope_theta", "type", *(("rope_type", *_POSITIONS[turn]) if turn in _POSITIONS else ()))
    said = {
        key: fields[key] for key in sorted(_fields_read(kind, config) & fields.keys() - _SILENT.union(_LLAMA))
    }
    said |= {f"rope_parameters.{key}": value for key, value in turns.items() if key not in known}
    unsaid = [
        f"{key}={value!r:.80}"
        for key, value in said.items()
        if value is not None and value != llama.get(key)
        if any(at != _NEUTRAL.get(key) for at in (value if isinstance(value, (list, tuple)) else [value]))
    ]
    if unsaid:
        raise ArgumentError(
            f"the format {name!r} has no place for what {type(config).__name__} says with"
            f" {', '.join(unsaid)}; choose another format"
        )


def _fields_read(kind: Any, config: Any) -> set[str]:
    """Which fields of a configuration a class reads when it is built and called; all where it cannot be
    called without weights.

    Others are of other programs, which cannot change what the model computes.
    """
    read: set[str] = set()

    class Watched(type(config)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    watched = copy.deepcopy(config)
    watched.__class__ = Watched
    try:
        with quiet_transformers(), FakeTensorMode(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            kind(watched).eval()(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=False)
    except tolerable(Exception):
        return set(config.to_dict())
    return read


def check_equal(model: PreTrainedModel, other: nn.Module, example: Mapping[str, Any]) -> tuple[str, ...]:
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
        VerificationError: they differ, or one does not run.
    """
    buffers = {
        name: fresh
        for name, buffer in other.named_buffers()
        for fresh in model.buffers()
        if fresh.dtype != buffer.dtype and torch.equal(fresh.to(buffer), buffer)
    }
    for number, call in enumerate(_calls(model, other, example)):
        for precision in (torch.float32, torch.float64):
            try:
                expected = _outputs(other, call, precision, buffers)
            except VerificationError:
                if not number:
                    raise
                break  # a program of one length, say
            outputs = _outputs(model, call, precision)
            alike = [output.shape for output in outputs] == [output.shape for output in expected]
            pairs = zip(outputs, expected, strict=True)
            deviation = max(distance(*pair, dim=-1) for pair in pairs) if alike and outputs else math.inf
            if deviation <= tolerance("checkpoint", precision):
                break
        else:
            raise unlike(type(model), f"its outputs differ by {deviation:.1e}")
    said = ", ".join(f"'{name}'" for name in buffers)
    return (f"a cast of the model has rounded {said}; here they are as its configuration says",) * bool(said)


def unlike(kind: type, fault: str) -> VerificationError:
    """What is said of a model that is not the one that it ought to be."""
    return VerificationError(
        f"{kind.__name__} with these weights is not the model that it ought to be: {fault}; nothing is"
        " returned; choose another format"
    )


def _outputs(
    module: nn.Module, call: dict[str, Any], precision: torch.dtype, buffers: Mapping[str, Tensor] = {}
) -> list[Tensor]:
    """The floating-point outputs of a call, with other values of some buffers.

    Raises:
        VerificationError: it does not run.
    """
    try:
        with torch.no_grad(), _Widened(precision):
            output = functional_call(module, dict(buffers), (), call)
    except tolerable(Exception) as error:
        raise unlike(type(module), f"it does not run: {first_line(error)}") from error
    return [leaf for leaf in tensors_in(output) if leaf.is_floating_point()]


def _calls(model: PreTrainedModel, other: nn.Module, example: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The example, with other tokens in its second half: zeros, say, would look alike wherever they stand. A
    row that ends behind the last position at which the configurations say that something changes, as far as
    that can be afforded. And where both take positions, a row of those beside each number that the
    configurations hold, whatever it means.
    """
    table, device = model.get_input_embeddings(), device_of(other)
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in example.items()
    }
    ids = arguments.get("input_ids")
    if not (isinstance(ids, Tensor) and isinstance(table, nn.Embedding)):
        yield arguments
        return
    generator, size, length = generator_of("format"), table.num_embeddings, ids.shape[-1]

    def drawn(*shape: int) -> Tensor:
        return torch.randint(0, size, shape, generator=generator, device="cpu").to(ids)

    half = length // 2
    yield {**arguments, "input_ids": torch.cat([ids[:, :half], drawn(len(ids), length - half)], 1)}
    numbers = [
        (str(path[-1]), value)
        for each in (model, other)
        for path, value in (leaves(each.config.to_dict()) if isinstance(each, PreTrainedModel) else ())
        if type(value) is int
    ]
    marks = (value + _BEHIND for name, value in numbers if _MARKS.search(name))
    long = max((mark for mark in marks if mark <= min(_LONGEST, _NUMBERS // size)), default=0)
    if long > length:
        tiled = {
            name: value.repeat(1, long // length + 1)[:1, :long]
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.dim() == 2
        }
        yield {**arguments, **tiled, "input_ids": drawn(1, long)}
    last = max((value for name, value in numbers if name == "max_position_embeddings"), default=0)
    end = last * 2 if getattr(model.config, "rope_parameters", None) else last
    if end and all("position_ids" in inspect.signature(each.forward).parameters for each in (model, other)):
        beside = {value + by for _, value in numbers for by in (-1, 0, 1)} | {*range(_BEHIND), end - 1}
        positions = torch.tensor([sorted(at for at in beside if 0 <= at < end)], device=device)
        # With a mask, positions that are not one behind the other are still those of one text.
        mask, tokens = torch.ones_like(positions), drawn(*positions.shape)
        yield {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "use_cache": False}


class _Widened(TorchFunctionMode):
    """Within it, nothing is computed in a lower precision than this one."""

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, precision = kwargs or {}, self.precision
        tensors = tensors_in((args, kwargs))
        real = [tensor for tensor in tensors if tensor.is_floating_point()]
        if all(widened(tensor.dtype, precision) != tensor.dtype for tensor in real):
            result = func(*args, **kwargs)  # of weights: their sizes and views are taken as they are
            places = {tensor.untyped_storage().data_ptr() for tensor in real}
            if (
                not isinstance(result, Tensor)
                or widened(result.dtype, precision) == result.dtype  # written in place: once
                or result.untyped_storage().data_ptr() in places
            ):
                return result
        if func is Tensor.float:
            func, args = Tensor.to, (*args, torch.float32)
        args, kwargs = pytree.tree_map(lambda leaf: widened(leaf, precision), (args, kwargs))
        return func(*args, **kwargs)
