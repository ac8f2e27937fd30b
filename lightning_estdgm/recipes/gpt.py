"""A GPT over bytes or tokens, in the published shapes, and the LightningModule that trains it."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_estdgm._checks import expect_fraction, expect_int, expect_positive
from lightning_estdgm.recipes._decoder_block import DecoderBlock
from lightning_estdgm.recipes._optimizers import decay_groups, with_cosine
from lightning_estdgm.recipes._windows import Batch


class GPT(LightningModule):
    """A GPT, trained by AdamW with warm-up and a cosine to 10 % of ``lr`` over the run's steps.

    Input: int64 tokens [batch, time], time <= context. Output: logits [batch, time, vocabulary].
    Weights start as N(0, 0.02^2), the two that write to the residual stream divided by sqrt(2 * layers).
    Weight decay reaches matrices only.
    Source: Radford et al. 2019 (GPT-2); the optimizer's settings are those of nanoGPT.

    Args:
        width: Width of the residual stream.
        layers: Number of decoder blocks.
        heads: Number of attention heads of each.
        context: Longest input, in tokens.
        lr: Learning rate after warm-up.
        weight_decay: Weight decay of matrices.
        warmup: Share of the run in which the rate rises.
        vocabulary: Number of tokens; 256 for bytes.
        tied: Whether the head is the embedding, as in GPT-2.

    Raises:
        ValueError: ``heads`` does not divide the width, or a size or rate is not positive.

    """

    def __init__(
        self,
        width: int = 512,
        layers: int = 2,
        heads: int = 8,
        context: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup: float = 0.05,
        vocabulary: int = 256,
        tied: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "layers": layers, "heads": heads, "context": context, "vocabulary": vocabulary}
        for name, value in sizes.items():
            expect_int(name, value, at_least=1)
        if width % heads:
            raise ValueError(f"width: got {width}, expected a multiple of heads={heads}")
        expect_positive("lr", lr)
        expect_fraction("warmup", warmup)
        self.save_hyperparameters()
        self.context, self.lr, self.weight_decay, self.warmup = context, lr, weight_decay, warmup
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(DecoderBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Give a module its first values, which is done layer by layer where the model lies on the meta device."""
        is_tied = module is self.head and self.head.weight is self.tokens.weight
        if isinstance(module, nn.Linear | nn.Embedding) and not is_tied:
            blocks = cast("list[DecoderBlock]", list(self.blocks))
            writes_residual = any(module is block.proj or module is block.out for block in blocks)
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * len(blocks)) if writes_residual else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next token at each position."""
        h = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(h)))

    @torch.inference_mode()
    def generate(self, prompt: Tensor, count: int) -> Tensor:
        """Continue a text by the likeliest token at each position; keys and values of positions before are kept.

        Args:
            prompt: int64 tokens [batch, time].
            count: number of tokens to add; with the prompt at most ``context``.

        Returns:
            Prompt and continuation, int64 [batch, time + count].

        Raises:
            ValueError: The text would be longer than ``context``, or the prompt is empty.

        """
        batch, time = prompt.shape
        if not 0 < time <= time + count <= self.context:
            raise ValueError(f"got a prompt of {time} tokens and count={count}, expected 1 to {self.context} in all")
        text = torch.cat([prompt, prompt.new_empty(batch, count)], dim=1)
        blocks = cast("list[DecoderBlock]", list(self.blocks))
        width = self.tokens.embedding_dim
        sizes = (2, len(blocks), batch, blocks[0].heads, time + count, width // blocks[0].heads)
        keys, values = self.positions.weight.new_empty(sizes)
        begin = 0
        for end in range(time, time + count):
            h = self.tokens(text[:, begin:end]) + self.positions.weight[begin:end]
            for block, k, v in zip(blocks, keys, values, strict=True):
                h = block.extend(h, k, v, begin)
            text[:, end] = self.head(self.norm(h[:, -1])).argmax(-1)
            begin = end
        return text

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy of the next token, in nats a token, mean over all positions."""
        x, y = batch
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step's loss."""
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean validation loss as ``val/loss``."""
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only; the learning rate moves every step."""
        # Lightning clips no gradients for a fused optimizer under mixed precision.
        clips_mixed = self.trainer.gradient_clip_val and isinstance(self.trainer.precision_plugin, MixedPrecision)
        fused = self.device.type in ("cpu", "cuda") and not clips_mixed
        optimizer = torch.optim.AdamW(decay_groups(self, self.weight_decay), lr=self.lr, betas=(0.9, 0.95), fused=fused)
        return with_cosine(self, optimizer, self.warmup, floor=0.1)


class ByteGPT(GPT):
    """A GPT over bytes, with a head of its own: input bytes [batch, time], output logits [batch, time, 256].

    >>> ByteGPT(width=32, layers=1, heads=2, context=16)(torch.zeros(1, 16, dtype=torch.long)).shape
    torch.Size([1, 16, 256])
    """
