"""The decoder block of the GPTs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DecoderBlock(nn.Module):
    """One pre-norm decoder block: x + attention(norm(x)), then x + mlp(norm(x)); [batch, time, width] throughout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.gelu = nn.GELU()
        self.out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions by causal attention, then channels by the two-layer perceptron."""
        q, k, v = self._projections(x)
        return self._add(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def extend(self, x: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """Return the output at new positions only, those before from a cache; at the first call any number, then one.

        Args:
            x: new positions, [batch, new, width].
            keys: cache of the block's keys, [batch, heads, context, width / heads]; the new ones are written to it.
            values: the same of its values.
            position: number of positions before.

        """
        q, k, v = self._projections(x)
        end = position + x.shape[1]
        keys[:, :, position:end], values[:, :, position:end] = k, v
        mixed = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], is_causal=position == 0)
        return self._add(x, mixed)

    def _projections(self, x: Tensor) -> list[Tensor]:
        """Return queries, keys and values, each [batch, heads, time, width / heads]."""
        h = self.norm_attention(x)
        layers = (self.query, self.key, self.value)
        return [layer(h).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for layer in layers]

    def _add(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.out(self.gelu(self.fc(self.norm_mlp(x))))
