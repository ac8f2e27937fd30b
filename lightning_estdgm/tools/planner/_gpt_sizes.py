"""GPTs of published sizes, without storage: shapes to be counted, not run."""

from __future__ import annotations

import math

import torch
from torch import nn

from lightning_estdgm.recipes._decoder_block import DecoderBlock

GPT_SIZES: dict[str, tuple[int, int]] = {
    "125M": (12, 768), "350M": (24, 1024), "760M": (24, 1536), "1.3B": (24, 2048), "2.7B": (32, 2560),
    "6.7B": (32, 4096), "13B": (40, 5120), "70B": (80, 8192),
}  # fmt: skip
"""Decoder blocks and width: GPT-3's table 2.1 (arXiv 2005.14165); 70B as Chinchilla (arXiv 2203.15556)."""

_VOCABULARY, _CONTEXT = 50_257, 2048
_SIZE_TOLERANCE = 0.08  # a published shape stands for sizes this close to it


class CountedGpt(nn.Module):
    """The recipe's decoder blocks between embeddings and a head that shares their weight; it has no forward.

    Attributes:
        width: width of the residual stream.

    """

    def __init__(self, layers: int, width: int, vocabulary: int = _VOCABULARY, context: int = _CONTEXT) -> None:
        super().__init__()
        self.width = width
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(DecoderBlock(width, max(1, width // 128)) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    @classmethod
    def on_meta(cls, layers: int, width: int) -> CountedGpt:
        """Make one without storage."""
        with torch.device("meta"):
            return cls(layers, width)


def gpt(parameters: float) -> nn.Module:
    """Return a GPT of about so many parameters on the meta device: shapes, no storage."""
    return CountedGpt.on_meta(*gpt_shape(parameters))


def gpt_shape(parameters: float) -> tuple[int, int]:
    """Return decoder blocks and width of a GPT of about so many parameters.

    A published shape where one is within 8 %; else the width of the nearest, with as many blocks as it takes.

    Raises:
        ValueError: for fewer parameters than one block takes, and for anything but a positive number.

    >>> gpt_shape(13e9), gpt_shape(30e9)
    ((40, 5120), (37, 8192))
    """
    if not (parameters > 0 and math.isfinite(parameters)):
        raise ValueError(f"params must be a positive number such as 13e9, got {parameters!r}")

    def distance(shape: tuple[int, int]) -> float:
        return abs(math.log(_parameters(*shape) / parameters))

    layers, width = min(GPT_SIZES.values(), key=distance)
    if distance((layers, width)) > math.log1p(_SIZE_TOLERANCE):
        one = _parameters(1, width) - _parameters(0, width)
        layers = round((parameters - _parameters(0, width)) / one)
    if layers < 1:
        raise ValueError(
            f"params must be at least {_parameters(1, width):.3g}, one block of width {width} with its embeddings, "
            f"got {parameters:.3g}"
        )
    return layers, width


def _parameters(layers: int, width: int) -> int:
    return layers * (12 * width**2 + 4 * width) + (_VOCABULARY + _CONTEXT + 2) * width
