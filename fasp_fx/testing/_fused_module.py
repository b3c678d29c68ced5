"""Attention over what becomes of a fused projection, in plain torch: tokens are put into windows, cut or
reordered before its parts are taken out.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ._odd_blocks import Fused

#: the tokens of a window: some examples fill no more than one, others more
_WINDOW = 3


class FusedAttention(nn.Module):
    """Attention whose queries, keys and values are parts of one product; what it returns has the shape of
    what it is given.
    """

    def __init__(self, block: Fused, channels: int) -> None:
        super().__init__()
        self.kind, self.heads, self.width = block.kind, block.heads, block.width
        self.qkv = nn.Linear(channels, 3 * block.heads * block.width)
        self.out = nn.Linear(block.heads * block.width, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        windows = (tokens + _WINDOW - 1) // _WINDOW
        if self.kind in ("windows", "batch", "across"):
            x = F.pad(x, (0, 0, 0, windows * _WINDOW - tokens))
        q, k, v = self.parts(self.laid_out(self.qkv(x), windows))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
        if self.kind in ("windows", "batch"):
            mixed = mixed.reshape(batch, windows * _WINDOW, self.heads * self.width)
        found = self.out(mixed)
        if self.kind in ("cut", "half"):  # nothing comes of what was cut off
            found = F.pad(found, (0, 0, 0, tokens))
        return found[:, :tokens] if self.kind in ("windows", "batch", "across", "cut", "half") else found

    def laid_out(self, fused: Tensor, windows: int) -> Tensor:
        """The product with its tokens moved: ``[batch, …, tokens, channels]``, tokens first where they are
        ``turned``.
        """
        batch, tokens, channels = fused.shape
        quarter = tokens // 4
        if self.kind == "turned":
            return fused.transpose(0, 1)
        if self.kind == "flat":
            return fused.flatten(0, 1).view(batch, tokens, channels)
        if self.kind == "windows":
            return fused.view(batch, windows, _WINDOW, channels)
        if self.kind == "batch":
            return fused.view(batch * windows, _WINDOW, channels)
        if self.kind == "across":
            return fused.view(batch, windows, _WINDOW, channels).transpose(1, 2).reshape(fused.shape)
        if self.kind == "cut":
            return fused[:, : tokens - quarter]
        if self.kind == "half":
            return fused[:, : tokens // 2]
        if self.kind == "shifted":
            return F.pad(fused, (0, 0, quarter, -quarter))
        return fused.flip(1) if self.kind == "backwards" else fused

    def parts(self, fused: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each ``[batch, …, heads, tokens, width]``."""
        if self.kind == "stacked":
            return fused.unflatten(-1, (3, self.heads, self.width)).permute(2, 0, 3, 1, 4).unbind(0)
        apart = fused.unflatten(-1, (self.heads, 3, self.width))
        if self.kind == "turned":
            return apart.permute(3, 1, 2, 0, 4).unbind(0)
        return apart.transpose(-4, -3).unbind(-2)
