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
        batch, time, width = x.shape
        h = self.norm_attention(x)
        q, k, v = (
            project(h).view(batch, time, self.heads, -1).transpose(1, 2)  # each [batch, heads, time, width / heads]
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.out(self.gelu(self.fc(self.norm_mlp(x))))
