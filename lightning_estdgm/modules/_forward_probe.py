"""Probe of a layer's forward: positions, dtype and image that its weight is applied to."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.modules._kinds import activations, as_images


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor lies in channels-last memory, and not in contiguous memory just as well."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@dataclass(frozen=True)
class Image:
    """Size of a convolution's input, one of length L as of height 1, and its memory format.

    Attributes:
        batch: Number of images.
        height: Height of the input.
        width: Width of the input.
        channels_last: Whether the output lies in channels-last memory, as it does if input or weight do.

    """

    batch: int
    height: int
    width: int
    channels_last: bool


class ForwardProbe:
    """Forward hook that notes how many positions a layer's weight is applied to, and in which dtype.

    Silent while torch.compile traces; `probe_forward` has it see each forward, hooks or not. It refers to nothing, so
    that a model under way can be copied and pickled.

    Attributes:
        positions: Tokens or pixels of the last forward; 0 before one.
        all_positions: Sum over all forwards in training, without those that a checkpoint's backward computes again.
        dtype: Dtype of its output, of experts that of their products; ``None`` before one.
        image: Its input, for a convolution that has an operator.

    """

    def __init__(self, candidate: Candidate) -> None:
        self._count = candidate.kind.positions
        self._is_stack = candidate.kind.experts > 0
        self._sees_images = candidate.is_convolution and candidate.has_operator
        self.positions = self.all_positions = 0
        self.dtype: torch.dtype | None = None
        self.image: Image | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note one forward."""
        if torch.compiler.is_compiling():
            return
        with contextlib.suppress(Exception):  # a forward of the user's own may return anything: then no more is known
            self._note(module, (*args, *kwargs.values()), output)

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.positions = max(1, self._count(module, inputs, output))
        if module.training and torch._C._current_graph_task_id() == -1:  # not in a sanity check, nor in a backward
            self.all_positions += self.positions
        out = activations((output, inputs))[0]
        self.dtype = out.dtype
        if self._is_stack and torch.is_autocast_enabled(out.device.type):  # whose outputs are cast back
            self.dtype = torch.get_autocast_dtype(out.device.type)
        if self._sees_images:
            batch, _, height, width = as_images(module, activations(inputs)[0]).shape
            self.image = Image(max(1, batch), height, width, is_channels_last(as_images(module, out)))
