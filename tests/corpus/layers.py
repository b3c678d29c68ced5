"""Layers of every kind: convolutions, norms, recurrent layers, flexible attention, weights that are computed
from others, and weights that no module multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import linear, made, parameter, wide
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.utils import parametrizations, parametrize
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from . import Entry, Make, drawn, entries, images, rows, sequences

# --- convolutions, norms that keep channels apart, and what stands between them


def excited(channels: int) -> nn.Module:
    """Squeeze and excite."""
    return made(
        lambda self, x: x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid(),
        down=nn.Conv2d(channels, 3, 1),
        up=nn.Conv2d(3, channels, 1),
    )


def residual(inner: nn.Module) -> nn.Module:
    return made(lambda self, x: x + self.inner(x), inner=inner)


def _chain(*middle: nn.Module, channels: int = 8, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *middle, nn.Conv2d(out or channels, 5, 1))


CONVOLUTIONS: dict[str, Make] = {
    "batch norm": lambda: _chain(
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1, dilation=2)
    ),
    "instance norm": lambda: _chain(nn.InstanceNorm2d(8, affine=True), nn.PReLU(8)),
    "grouped": lambda: _chain(nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.GELU(), out=12),
    "depthwise": lambda: _chain(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)),
    # those of the last group stay, so those of the first do
    "grouped, the last one by one": lambda: _chain(
        nn.Conv2d(8, 4, 1, groups=2),
        made(
            lambda self, x: x[:, :2] * self.one(x[:, 2:3]) * self.other(x[:, 3:]),
            one=nn.Conv2d(1, 2, 1),
            other=nn.Conv2d(1, 2, 1),
        ),
        out=2,
    ),
    "transposed": lambda: _chain(
        nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1), nn.ReLU(), out=6
    ),
    "transposed grouped": lambda: _chain(
        nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.ReLU(), out=6
    ),
    "pools": lambda: _chain(
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=2),
    ),
    "channel shuffle": lambda: _chain(made(lambda self, x: F.channel_shuffle(x, 2)), nn.ReLU()),
    "pixel shuffle": lambda: _chain(nn.PixelShuffle(2), nn.ReLU(), channels=24, out=6),
    "pixel unshuffle": lambda: _chain(nn.PixelUnshuffle(2), nn.ReLU(), out=32),
    "squeeze and excite": lambda: _chain(nn.BatchNorm2d(8), excited(8)),
    "concatenation": lambda: _chain(
        made(lambda self, x: torch.cat([x, self.conv(x)], dim=1), conv=nn.Conv2d(8, 6, 3, padding=1)),
        nn.ReLU(),
        out=14,
    ),
    "residual": lambda: _chain(
        residual(nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1))),
        nn.BatchNorm2d(8),
    ),
    "gated": lambda: _chain(nn.GLU(dim=1), out=4),
    "flattened into a linear layer": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 25, 5)
    ),
}


def over_image(self: Any, x: Tensor) -> Tensor:
    """The weight of a grouped convolution depends on the input; its image is a parameter that stores two of
    three sides as one dimension. No channel takes the whole of one block of it.
    """
    y = F.conv3d(self.image.view(4, 2, 2, 2), self.weight * x, stride=(1, 2, 2), groups=2)
    return y.movedim(0, -1) @ self.out


def computed_kernel(self: Any, x: Tensor, seed: Tensor) -> Tensor:
    """The taps of a kernel are channels elsewhere, and stay."""
    kernel = self.make(seed).tanh()
    return self.last(F.conv1d(x, kernel.view(3, 1, 6), groups=3).mean(-1) + self.read(kernel))


def frequencies(self: Any, x: Tensor) -> Tensor:
    """Convolutions over times and frequencies, laid side by side for each time, as speech models begin: the
    frequencies that strides leave are as many as the next weight is wide for; times and samples still vary.
    """
    hidden = self.conv(x.unsqueeze(1)).relu().transpose(1, 2)
    return self.out(self.project(hidden.flatten(2)).relu())


def positioned(self: Any, x: Tensor) -> Tensor:
    """What a table of positions allows is a length, and no channel is laid out by it."""
    return self.mix((self.conv(x) + self.positions).relu())


def _frequencies() -> nn.Module:
    conv = nn.Conv2d(1, 5, 3, stride=2, padding=1)
    return made(frequencies, conv=conv, **linear(project=(15, 7), out=(7, 2)))


# --- recurrent layers

HIDDEN = 6


def looped(kind: str, **options: Any) -> nn.Module:
    """A cell called step by step."""

    def forward(self: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], HIDDEN)
        state = (state, state) if kind == "LSTMCell" else state
        for step in range(x.shape[1]):
            state = self.cell(self.up(x[:, step]), state)
        return self.down(state[0] if kind == "LSTMCell" else state)

    cell = getattr(nn, kind)(5, HIDDEN, **options)
    return made(forward, cell=cell, **linear(up=(3, 5), down=(HIDDEN, 2)))


def recurrent(kind: str, learned: bool = False, **options: Any) -> nn.Module:
    """A recurrent layer between two linear ones; it may begin with learned states."""
    layer = getattr(nn, kind)(5, HIDDEN, batch_first=True, **options)
    ways = 2 if layer.bidirectional else 1

    def forward(self: Any, x: Tensor) -> Tensor:
        state = self.learned.expand(-1, x.shape[0], -1).contiguous() if learned else None
        return self.down(self.layer(self.up(x), (state, state) if learned and kind == "LSTM" else state)[0])

    states = {"learned": parameter(layer.num_layers * ways, 1, HIDDEN)} if learned else {}
    width = (layer.proj_size or HIDDEN) * ways
    return made(forward, layer=layer, **linear(up=(3, 5), down=(width, 2)), **states)


def translating(kind: str) -> nn.Module:
    """An encoder whose last states start a decoder; the answer is read from outputs and last states."""

    def forward(self: Any, x: Tensor) -> Tensor:
        output, state = self.decoder(x, self.encoder(x)[1])
        last = state[1] if isinstance(state, tuple) else state
        return self.read(output) + self.sum(torch.cat([last[-1], last[0]], -1))[:, None]

    encoder, decoder = (getattr(nn, kind)(3, HIDDEN, num_layers=2, batch_first=True) for _ in range(2))
    return made(forward, encoder=encoder, decoder=decoder, **linear(read=(HIDDEN, 2), sum=(2 * HIDDEN, 2)))


def _bounded(self: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States that the caller gives and gets stay."""
    output, last = self.returned(self.given(x, state)[0])
    return self.down(output), last


RECURRENT: dict[str, Make] = {
    "LSTM both ways": lambda: recurrent("LSTM", num_layers=2, bidirectional=True, dropout=0.5),
    "LSTM with projections": lambda: recurrent("LSTM", num_layers=2, proj_size=4),
    "GRU without biases": lambda: recurrent("GRU", bias=False),
    "RNN of rectified units, both ways": lambda: recurrent(
        "RNN", nonlinearity="relu", bidirectional=True, num_layers=2
    ),
    "GRU from learned states": lambda: recurrent("GRU", True, num_layers=2, bidirectional=True),
    "LSTM states handed on": lambda: translating("LSTM"),
}
MORE_RECURRENT: dict[str, Make] = {
    "LSTM from learned states": lambda: recurrent("LSTM", True, num_layers=2, bidirectional=True),
    "GRU states handed on": lambda: translating("GRU"),
}
CELLS: dict[str, Make] = {
    "LSTM cell": lambda: looped("LSTMCell"),
    "GRU cell": lambda: looped("GRUCell", bias=False),
    "RNN cell": lambda: looped("RNNCell", nonlinearity="relu"),
}

# --- flex attention

HEADS, SHARED, WIDTH = 4, 2, 8


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def local_but_first(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (head == 0) | (query - key < 2)


def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return 3.0 * torch.tanh(score / 3.0) + 0.1 * (query - key)


def flexible(
    score: Callable[..., Tensor] | None = None,
    mask: Callable[..., Tensor] | None = None,
    mask_heads: int | None = None,
    more: bool = False,
    turn: Callable[[Tensor], Tensor] = lambda x: x,
) -> nn.Module:
    """Grouped-query attention with functions of scores and of what is masked.

    Args:
        score: of the model, whose ``bias`` is a table of relative positions for each head, and the rest.
        mask_heads: of how many heads the block mask has an entry for each.
        more: return the log-sum-exp as well.
        turn: stands between projections and attention, as rotary embeddings do.
    """

    def forward(m: Any, x: Tensor) -> Any:
        batch, length, _ = x.shape
        q, k, v = (turn(layer(x).view(batch, length, -1, WIDTH).transpose(1, 2)) for layer in (m.q, m.k, m.v))
        blocks = mask and create_block_mask(mask, None, mask_heads, length, length, device="cpu")
        scored = score and (lambda *given: score(*given) if score is capped else score(m, *given))
        aux = AuxRequest(lse=True) if more else None
        found = flex_attention(q, k, v, score_mod=scored, block_mask=blocks, enable_gqa=True, return_aux=aux)
        mixed, extra = found if more else (found, None)
        result = m.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return (result, extra.lse) if more else result

    sizes = {"q": (12, HEADS * WIDTH), "k": (12, SHARED * WIDTH), "v": (12, SHARED * WIDTH)}
    return made(forward, bias=torch.randn(HEADS, 64), **linear(**sizes, out=(HEADS * WIDTH, 12)))


def by_head(m: Any, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score + m.bias[head, query - key + 32]


FLEXIBLE: dict[str, Make] = {
    "bias by head": lambda: flexible(by_head),
    "mask by head": lambda: flexible(mask=local_but_first),
    "a block mask for each head": lambda: flexible(mask=causal, mask_heads=HEADS),
    "capped and causal": lambda: flexible(capped, causal),
    "log-sum-exp": lambda: flexible(capped, causal, more=True),
}

# --- weights that a model computes from parameters: folded into parameters


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def _symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def _sounds(first: Callable[[nn.Module], nn.Module], second: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers = first(nn.Conv1d(4, 16, 3, padding=1)), second(nn.Conv1d(16, 16, 4, padding=2, groups=2))
    return nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), nn.Conv1d(16, 5, 1))


def vectors(up: nn.Module, down: nn.Module, middle: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(up, nn.Tanh(), middle or nn.Linear(16, 16), nn.Tanh(), down)


SQUARE = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))


def functional(compute: Callable[..., Tensor], **weights: Tensor) -> nn.Module:
    """Two linear layers, and between them one with a weight that is computed, of the module and the input."""
    held = {
        name: nn.Parameter(tensor.clone()) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    return wide(
        lambda self, x: self.down(F.linear(self.up(x).tanh(), compute(self, x)).tanh()), hidden=16, **held
    )


def counting(model: Any, x: Tensor) -> Tensor:
    model.count.add_(1)
    return model.w * model.count


def counted(compute: Callable[..., Tensor]) -> nn.Module:
    model = functional(compute, w=SQUARE)
    # not a number alone: what is written to one in float64 is lost when torch compiles it
    model.register_buffer("count", torch.ones(1))
    return model


def gained() -> nn.Module:
    """A gain is part of a weight, and stands elsewhere under another name."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.middle.weight * self.gain[:, None]
        return self.down(F.linear((self.up(x) * self.again).tanh(), weight, self.middle.bias).tanh())

    gain = parameter(16)
    return wide(forward, hidden=16, middle=nn.Linear(16, 16), gain=gain, again=gain)


def taken() -> nn.Module:
    """The name that a folded weight would have is taken."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(F.linear(self.up(x).tanh() * self.weight, F.normalize(self.weight_v)).tanh())

    return wide(forward, hidden=16, weight=parameter(16), weight_v=nn.Parameter(SQUARE.clone()))


def frozen() -> nn.Module:
    model = vectors(parametrizations.weight_norm(nn.Linear(6, 16)), nn.Linear(16, 6))
    for weight in model[0].parametrizations.parameters():
        weight.requires_grad_(False)
    return model


#: of vectors; the notes say what is folded, and why others are not
COMPUTED: dict[str, Make] = {
    "symmetric": lambda: vectors(nn.Linear(6, 16), nn.Linear(16, 6), _symmetric(nn.Linear(16, 16))),
    "spectral norm": lambda: vectors(
        parametrizations.spectral_norm(nn.Linear(6, 16)), parametrizations.spectral_norm(nn.Linear(16, 6))
    ),
    "by constants that forward makes": (
        lambda: functional(lambda m, x: m.w * torch.tensor(2.0) + torch.tensor([0.5] * 16), w=SQUARE)
    ),
    # moved and cast weights stay the parameters that they were
    "turned": lambda: functional(lambda m, x: m.w.t(), w=SQUARE),
    "cast": lambda: functional(lambda m, x: m.w.double(), w=SQUARE),
    "moved": lambda: functional(lambda m, x: m.w.flip(0), w=SQUARE),
    # what is larger, or not of parameters alone, is not folded
    "low rank": lambda: functional(lambda m, x: m.u @ m.v, u=torch.randn(16, 2), v=torch.randn(2, 16)),
    "integers": lambda: functional(
        lambda m, x: m.q.double() * m.scale,
        q=torch.randint(-9, 9, (16, 16), dtype=torch.int8),
        scale=torch.rand(16, 1),
    ),
    "needed elsewhere": lambda: wide(
        lambda self, x: self.down(
            F.linear(F.linear(self.up(x).tanh(), F.normalize(self.w)).tanh(), self.w).tanh()
        ),
        hidden=16,
        w=nn.Parameter(SQUARE.clone()),
    ),
    "a fixed transform": lambda: counted(lambda m, x: torch.outer(m.count.expand(16), torch.ones(16)).cos()),
    "chance": lambda: counted(lambda m, x: m.w * torch.rand(16, 16)),
    "an input": lambda: counted(lambda m, x: m.w * x.mean()),
    # what is folded has a name of its own
    "a gain elsewhere": gained,
    "a name that is taken": taken,
    "frozen parameters": frozen,
}
SOUNDS: dict[str, Make] = {
    "weight norm by rows and by positions": lambda: _sounds(
        parametrizations.weight_norm, lambda layer: parametrizations.weight_norm(layer, dim=2)
    ),
    "weight and spectral norm by hooks": lambda: _sounds(nn.utils.weight_norm, nn.utils.spectral_norm),
}


def _standardised() -> nn.Module:
    convolutions = WeightStandardizedConv2d(3, 12, 3), WeightStandardizedConv2d(12, 10, 3)
    return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), nn.Conv2d(10, 4, 1))


# --- weights that no module multiplies


def _assigns(self: Any, x: Tensor) -> Tensor:
    """Values are assigned to positions of a sequence, wherever a mask is true, and to channels of an empty
    tensor.
    """
    hidden = self.up(x).clone()
    hidden[:, 1:] += self.mix(hidden[:, :-1])
    hidden[:, 0] = hidden[:, 0] * 2
    hidden[:, -1] = 0
    hidden[hidden > 1] = 0.5
    hidden[x.sum(-1) > 3] = 1
    shifted = torch.zeros_like(hidden)
    shifted[:, 1:, :4] = hidden[:, :-1, :4]
    shifted[:, :, 4:] = hidden[:, :, 4:]
    return self.down(torch.relu(shifted))


def _modes(self: Any, x: Tensor) -> Tensor:
    """The lowest frequencies are mixed by complex weights and assigned to an empty spectrum."""
    spectrum = torch.fft.rfft(self.up(x).transpose(1, 2))
    out = torch.zeros_like(spectrum)
    out[..., :3] = torch.einsum("bim,iom->bom", spectrum[..., :3], self.weight)
    return self.down(F.gelu(torch.fft.irfft(out, n=x.shape[1]).transpose(1, 2)))


def _mixed_by_head(self: Any, x: Tensor) -> Tensor:
    """Tokens mixed by a matrix for every head, each scaled by a factor."""
    heads = self.up(x).unflatten(-1, (3, 4))
    return self.down((torch.einsum("hts,bshd->bthd", self.mix, heads) * self.scale).flatten(-2))


def _plane(self: Any, x: Tensor) -> Tensor:
    """A matrix for every position of a plane."""
    return self.last(torch.relu(torch.einsum("bixy,ioxy->boxy", self.first(x).relu(), self.weight)))


BARE: dict[str, Entry] = {
    "a matrix for every position of a plane": Entry(
        lambda: made(_plane, first=nn.Conv2d(3, 6, 1), last=nn.Conv2d(8, 2, 1), weight=parameter(6, 8, 3, 3)),
        images(3, (2, 3, 3), (4, 3, 3)),
    ),
    "assignments to slices": Entry(
        lambda: wide(_assigns, hidden=12, mix=nn.Linear(12, 12)), sequences(6, (3, 5), (2, 7))
    ),
    "a bilinear layer": Entry(
        lambda: made(
            lambda self, x: self.down(torch.relu(self.both(x, x.tanh()))),
            both=nn.Bilinear(6, 6, 12),
            down=nn.Linear(12, 6),
        ),
        rows(6, 3, 7),
    ),
    "a Fourier layer": Entry(
        lambda: wide(_modes, hidden=8, weight=parameter(8, 8, 3, scale=1 / 3, dtype=torch.complex64)),
        sequences(6, (3, 8), (2, 8)),
        std=None,
        double=False,
    ),
    "tokens mixed by head": Entry(
        lambda: wide(_mixed_by_head, hidden=12, mix=parameter(3, 5, 5), scale=parameter(3, 1)),
        sequences(6, (3, 5), (2, 5)),
    ),
}


def _shared_mask(dims: int) -> nn.Module:
    """Four heads of queries over two of keys and values, with one mask for all heads and the whole batch."""

    def forward(self: Any, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in layers)
        attended = F.scaled_dot_product_attention(query, key, value, self.mask, enable_gqa=True)
        return self.out(attended.transpose(1, 2).flatten(2))

    mask = torch.ones(5, 5).tril().bool()[(None,) * (dims - 2)]
    return made(forward, mask=mask, **linear(query=(6, 16), key=(6, 8), value=(6, 8), out=(16, 3)))


def _side_by_side(self: Any, x: Tensor) -> Tensor:
    """A fused weight whose rows are a query, a key and a value in turn: the three of one go together."""
    heads = self.fused(x).view(*x.shape[:2], 3, 4, 3).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(*heads.unbind(-1), scale=0.5)
    return self.out(mixed.transpose(1, 2).flatten(2))


EXEMPT: dict[str, Any] = {"options": {"include": ("exempt",)}, "masking": {"producers": True}}
#: take long, and differ little from others
SLOWLY = ("mask by head", "a block mask for each head", "log-sum-exp")
FIVE, FLEX = sequences(6, (2, 5), (3, 5)), sequences(12, (2, 6), (3, 9))

ENTRIES: dict[str, Entry] = {
    **entries(CONVOLUTIONS, images(3)),
    "over an image": Entry(
        lambda: made(
            over_image, image=parameter(4, 4, 2), weight=parameter(2, 2, 2, 2, 2), out=parameter(2, 2)
        ),
        ((torch.tensor(1.5),),),
        invariants=("mask-exact", "steps"),
    ),
    "a computed kernel": Entry(
        lambda: made(computed_kernel, **linear(make=(5, 18), last=(3, 4), read=(18, 3))),
        (drawn((2, 3, 9), (5,)), drawn((3, 3, 9), (5,))),
    ),
    **{
        f"{width} frequencies": Entry(
            _frequencies, tuple(drawn((2, n, w)) for n, w in ((7, width), (12, width), (21, width), (7, 9)))
        )
        for width in (5, 6)
    },
    "positions from a table": Entry(
        lambda: made(
            positioned,
            conv=nn.Conv1d(3, 6, 3, stride=2, padding=1),
            mix=nn.Conv1d(6, 4, 1),
            positions=parameter(1, 6, 4),
        ),
        tuple(drawn((n, 3, length)) for n, length in ((2, 8), (3, 7), (3, 8))),
    ),
    # the loop is captured with as many steps as the example has
    **entries(CELLS, sequences(3, (2, 3), (5, 3), (2, 5)), std=0.8),
    **entries(RECURRENT, sequences(3, (2, 4), (5, 4), (3, 2), (3, 12))),
    **entries(MORE_RECURRENT, sequences(3, (2, 4), (5, 4)), slow=True),
    "states of the caller": Entry(
        lambda: made(
            _bounded,
            given=nn.GRU(3, HIDDEN, batch_first=True),
            returned=nn.GRU(HIDDEN, HIDDEN, batch_first=True),
            down=nn.Linear(HIDDEN, 2),
        ),
        tuple(drawn((n, 4, 3), (1, n, HIDDEN)) for n in (2, 5)),
    ),
    **{
        name: Entry(make, FLEX, std=None, double=False, slow=name in SLOWLY)
        for name, make in FLEXIBLE.items()
    },
    **{
        f"{name}, heads": Entry(
            FLEXIBLE[name], FLEX, {"granularity": ("head",)}, None, False, slow=name == "bias by head"
        )
        for name in ("bias by head", "capped and causal")
    },
    "narrower queries and keys": Entry(
        FLEXIBLE["capped and causal"], FLEX, std=None, double=False, slow=True, **EXEMPT
    ),
    **entries(COMPUTED, rows(6, 5, 8)),
    "a buffer that changes": Entry(lambda: counted(counting), rows(6, 5, 8), times=2),
    "rounded weights": Entry(
        lambda: functional(lambda m, x: m.w.bfloat16().float(), w=SQUARE), rows(6, 5, 8), double=False
    ),
    **entries(SOUNDS, tuple(drawn((n, 4, length)) for n, length in ((3, 20), (2, 15)))),
    "weight standardisation": Entry(_standardised, images(3, (3, 9, 9), (2, 11, 8))),
    **BARE,
    **{
        f"one mask of {dims} dimensions": Entry(lambda dims=dims: _shared_mask(dims), FIVE)
        for dims in (2, 3, 4)
    },
    "one mask, heads as well": Entry(lambda: _shared_mask(3), FIVE, {"granularity": ("channel", "head")}),
    "queries, keys and values side by side": Entry(
        lambda: made(_side_by_side, **linear(fused=(6, 36), out=(12, 6))),
        sequences(6, (2, 5), (2, 8)),
        **EXEMPT,
    ),
}
