"""Workloads of ``estdgm bench train``: a GPT or a ResNet-50, its batch, and which of its parts are compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightning_estdgm._checks import expect_int
from lightning_estdgm.recipes._decoder_block import DecoderBlock
from lightning_estdgm.recipes.gpt import ByteGPT
from lightning_estdgm.recipes.resnet import Bottleneck, ImageClassifier

_RATE = 1e-5  # the batch is always the same: at a rate for learning it would be learned by heart, and weights run away


@dataclass(frozen=True)
class GptWorkload:
    """A byte-level GPT (recipes/gpt.py) by AdamW, gradients clipped at 1.

    Attributes:
        width: width of the model; heads are 64 wide, 128 from a width of 2048 on.
        layers: number of decoder blocks.
        context: tokens a sequence.
        batch_size: sequences a step.

    """

    width: int
    layers: int
    context: int
    batch_size: int

    model = "gpt"
    unit = "tokens"
    clip = 1.0
    without_blocks: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("width", "layers", "context", "batch_size"):
            expect_int(name, getattr(self, name), at_least=1)
        if self.width % self.head_width:
            raise ValueError(f"width: got {self.width}, expected a multiple of the head's {self.head_width}")

    @property
    def name(self) -> str:
        """Name for people."""
        return f"GPT, width {self.width}, {self.layers} layers, {self.batch_size} x {self.context} tokens"

    @property
    def items(self) -> int:
        """Tokens a step."""
        return self.batch_size * self.context

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return min(self.width, 64 if self.width < 2048 else 128)

    def module(self) -> LightningModule:
        """Return a model with fresh weights, on the device of an enclosing ``with torch.device(...)``."""
        return ByteGPT(self.width, self.layers, self.width // self.head_width, self.context, lr=_RATE)

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return random bytes and their targets."""
        x, y = torch.randint(256, (2, self.batch_size, self.context), device=device)
        return x, y

    def describe(self) -> dict[str, Any]:
        """Return all of it in plain types."""
        return {"model": self.model, **asdict(self), "unit": self.unit, "items_per_step": self.items}


@dataclass(frozen=True)
class ResNetWorkload:
    """A ResNet (recipes/resnet.py) in channels-last memory, by SGD with momentum.

    Attributes:
        image_size: height and width of an image, in pixels.
        batch_size: images a step.
        blocks: number of blocks of the four stages; those of ResNet-50 by default.
        width: channels of the first stage.

    """

    image_size: int
    batch_size: int
    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64

    model = "resnet50"
    unit = "images"
    clip = None
    without_blocks: ClassVar[tuple[str, ...]] = ("model.conv1",)  # three input channels: dense where blocks are forced

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "width"):
            expect_int(name, getattr(self, name), at_least=1)

    @property
    def name(self) -> str:
        """Name for people."""
        return f"ResNet-50, {self.batch_size} images of {self.image_size} x {self.image_size}"

    @property
    def items(self) -> int:
        """Images a step."""
        return self.batch_size

    def module(self) -> LightningModule:
        """Return a model with fresh weights, on the device of an enclosing ``with torch.device(...)``."""
        return ImageClassifier(layers=self.blocks, width=self.width, lr=_RATE)

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return random images and classes."""
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=device)
        return images.contiguous(memory_format=torch.channels_last), torch.randint(
            0, 1000, (self.batch_size,), device=device
        )

    def describe(self) -> dict[str, Any]:
        """Return all of it in plain types."""
        return {"model": self.model, **asdict(self), "unit": self.unit, "items_per_step": self.items}


Workload = GptWorkload | ResNetWorkload


def compile_blocks(module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile each decoder block or bottleneck in place by one of torch's backends, and return how many there are.

    One block is compiled and its code serves all others of its kind: minutes less than the whole model at once, at
    about the same speed.
    """
    blocks = [part for part in module.modules() if isinstance(part, (DecoderBlock, Bottleneck))]
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)
