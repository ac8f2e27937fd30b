"""Variants of the study beside the settings of the method: changes of its GPT, and callbacks. No part of the method."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_estdgm.recipes import ByteGPT
from lightning_estdgm.recipes._decoder_block import DecoderBlock
from lightning_estdgm.recipes._windows import Batch
from lightning_estdgm.tools.study._ramp import RampGrown, controller_of


class LowRankCompanion(nn.Module):
    """A linear layer and a dense product of low rank beside it, 0 at first: ``linear(x) + up(down(x))``.

    Args:
        linear: Layer, ``[..., in] -> [..., out]``.
        rank: Rank of the dense product.

    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        return self.linear(x) + self.up(self.down(x))


class StudyGPT(ByteGPT):
    """The recipe's GPT over bytes, with the variants of the study.

    It starts from N(0, 1 / width) in embeddings and head and N(0, 1 / (3 width)) in the blocks: GPT-2's deviation of
    0.02 suits a width of 768, and at 96 it held the dense network back by 0.25 nats after 400 steps.

    Args:
        companion_rank: Rank of a `LowRankCompanion` beside each linear layer of the blocks; 0 for none.
        sizes: Arguments of `ByteGPT`.

    Attributes:
        teacher: Network set by `Distill`, or an empty tuple.
        distill: Share of the training loss that is the divergence from the teacher.
        teacher_density: Active share of the teacher's weights, for counting FLOPs.
        taught_steps: Number of steps with a teacher.

    """

    def __init__(self, companion_rank: int = 0, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.teacher: tuple[ByteGPT, ...] = ()  # a tuple, so that it is no part of the network, its state or parameters
        self.distill, self.teacher_density, self.taught_steps = 0.0, 1.0, 0
        scale = 1.0 / (0.02 * math.sqrt(self.hparams["width"]))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    parameter.mul_(scale / math.sqrt(3.0) if name.startswith("blocks") else scale)
        for block in self.blocks if companion_rank else ():
            for name, linear in [(n, m) for n, m in block.named_children() if isinstance(m, nn.Linear)]:
                setattr(block, name, LowRankCompanion(linear, companion_rank))

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy of the next token; in training with a teacher, mixed with the divergence from it."""
        if not (self.teacher and self.training):
            return super().loss(batch)
        x, y = batch
        logits = self(x).flatten(0, 1)
        with torch.no_grad():
            taught = self.teacher[0](x).flatten(0, 1).log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), taught, log_target=True, reduction="batchmean")
        self.taught_steps += 1
        return (1.0 - self.distill) * F.cross_entropy(logits, y.flatten()) + self.distill * divergence


class _AtEndOf(Callback):
    """Callback that acts once, after the last step of a phase and before the masks are updated next."""

    is_first = True
    phase = ""
    done = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Act at the phase's last step."""
        controller = controller_of(trainer)
        (last,) = (s.last for s in controller.schedule.segments if (s.phase, s.cycle) == (self.phase, 0))
        if not self.done and controller.steps >= last - 1:
            self.done = True
            self.act(trainer, pl_module)

    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do it."""
        raise NotImplementedError


class Distill(_AtEndOf):
    """Distils a `StudyGPT`, after exploration, from itself as it was when exploration ended.

    Args:
        share: Share of the loss that is the divergence from the teacher, in (0, 1).

    """

    phase = "exploration"

    def __init__(self, share: float) -> None:
        self.share = share

    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a copy of the network."""
        assert isinstance(pl_module, StudyGPT)
        teacher = ByteGPT(**{k: v for k, v in pl_module.hparams.items() if k != "companion_rank"})
        teacher.blocks = copy.deepcopy(pl_module.blocks)  # with its masks, and companions if there are
        teacher.load_state_dict(pl_module.state_dict())
        pl_module.teacher = (teacher.eval().requires_grad_(False),)
        pl_module.distill, pl_module.teacher_density = self.share, controller_of(trainer).density


class GroupHidden(_AtEndOf):
    """Sorts the hidden units of every feed-forward layer by their weights' norms when a dense warm-up ends.

    The network computes the same, but heavy units then lie in blocks with heavy ones, which the masks that come next
    can keep together.
    """

    phase = "warmup"

    @torch.no_grad()
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Permute weights and optimizer state."""
        (optimizer,) = trainer.optimizers
        for block in (module for module in pl_module.modules() if isinstance(module, DecoderBlock)):
            fc, out = block.fc.weight, block.out.weight
            order = (fc.norm(dim=1) * out.norm(dim=0)).argsort(descending=True)
            for weight, dim in ((fc, 0), (out, 1)):
                state = [x for x in optimizer.state[weight].values() if x.shape == weight.shape]
                for tensor in (weight, *state):
                    tensor.copy_(tensor.index_select(dim, order))


class SeedSecondMoment(Callback):
    """Gives single weights that an update of the masks has grown their layer's mean second moment of Adam, not 0."""

    is_first = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a run: the first masks come after its first step."""
        self._masks: dict[str, Tensor] = {}
        self._updates = 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look for grown weights after an update."""
        controller = controller_of(trainer)
        if not self._masks:
            self._masks = controller.masks()
        if controller.updates == self._updates:
            return
        before, self._masks, self._updates = self._masks, controller.masks(), controller.updates
        (optimizer,) = trainer.optimizers
        for name, old in before.items():
            weight, new = pl_module.get_parameter(f"{name}.weight"), self._masks[name]
            moment = optimizer.state[weight]["exp_avg_sq"]
            moment[(new & ~old).view_as(moment)] = moment[(new & old).view_as(moment)].mean()


VARIANTS: dict[str, type[Distill | GroupHidden | RampGrown | SeedSecondMoment]] = {
    "distill": Distill,
    "group_hidden": GroupHidden,
    "ramp": RampGrown,
    "seed_second_moment": SeedSecondMoment,
}
"""Callbacks by the name that `StudyRun.settings` gives them, as ``with.<name>`` and their arguments."""
