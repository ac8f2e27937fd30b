"""One short real run of a LightningModule with `DGMCallback`, and the invariants that every such run has to keep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor

from helpers.models import ResumableLoader, assert_final, assert_masked, leftovers, make_trainer
from helpers.runs import SaveAt, differences, end_of, load
from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase
from lightning_estdgm.modules._candidates import unlisted_weights

# Masks change before steps 3, 6, 9 and 12; the step before each is observed.
STEPS, STOP = 16, 7
SCHEDULE = EstDgm(
    exploration=Phase(0.7, 0.6, 4),
    consolidation=Phase(0.3, 0.2, 4),
    refinement=Phase(0.15, 0.1, 8),
    update_every=3,
    observe_steps=1,
    freeze=0.4,
)
CHECKED = (
    "weights are zero outside the masks after every step",
    "the masks have exactly the units of the schedule's budget",
    "every loss is finite",
    "state-dict keys are those of the model without the callback",
    "the checkpoint loads into a plain model that gives the same loss",
    "a deep copy in mid-run gives the same loss",
    "a resumed run ends with the weights, masks and optimizer states of the straight one, to the bit",
    "no hook or class is left behind",
)


class Trained(Protocol):
    """A LightningModule that tests of compatibility train: it has its own data and one loss.

    ``batches(n)`` are `n` batches in a fixed order, ``loss(batch)`` draws nothing at random.
    """

    def batches(self, n: int) -> list[Any]: ...

    def loss(self, batch: Any) -> Tensor: ...


@dataclass(frozen=True)
class Outcome:
    """What a run has masked, and what not.

    Attributes:
        trainable: number of trainable weights.
        masked: number of those that are masked.
        layers: names of the masked layers.
        sparse: names of those that a sparse operator computed at the end.
        dense: reason by the name of each linear or convolution layer that stayed dense.
        unlisted: trainable weights of two or more dimensions that belong to no such layer, by name.
        callback: the callback of the straight run.
        module: its module.

    """

    trainable: int
    masked: int
    layers: tuple[str, ...]
    sparse: tuple[str, ...]
    dense: dict[str, str]
    unlisted: dict[str, int]
    callback: DGMCallback
    module: Any

    @property
    def share(self) -> float:
        """Masked share of the trainable weights."""
        return self.masked / self.trainable


@contextmanager
def _quiet(module: Any) -> Any:
    """Evaluate, without Trainer (which a copy would copy) and without gradients."""
    training = {m: m.training for m in module.modules()}
    trainer, module._trainer = module._trainer, None
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        module._trainer = trainer
        for m, was in training.items():
            m.training = was


def evaluated(module: Any, batch: Any) -> Tensor:
    """Return the loss of one batch in evaluation."""
    with _quiet(module):
        return module.loss(batch).detach().clone()


class _Watch(pl.Callback):
    """Checks masks and losses after every step, and a deep copy in mid-run."""

    def __init__(self, callback: DGMCallback, copied_at: int) -> None:
        self.callback, self.copied_at, self.seen, self.copied = callback, copied_at, 0, False

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)  # for dropout: Lightning's checkpoints hold no state of generators

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        assert_masked(module, self.callback)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        assert loss is None or torch.isfinite(loss), f"loss {loss} in step {self.seen}"
        if trainer.global_step >= self.copied_at and not self.copied:
            self.copied = True
            with _quiet(module):
                twin = copy.deepcopy(module)
            torch.testing.assert_close(evaluated(twin, batch), evaluated(module, batch))


def check(
    make: Callable[[], Any],
    folder: Path,
    *,
    callbacks: Callable[[], Sequence[pl.Callback]] = tuple,
    config: DGMConfig | None = None,
    steps_per_batch: int = 1,
    resumes: bool = True,
    copies: bool = True,
    **trainer: Any,
) -> Outcome:
    """Train for `STEPS` optimizer steps with `DGMCallback`, stop and resume, and check all of `CHECKED`.

    Args:
        make: Makes the module anew, see `Trained`; seeded here.
        folder: Empty folder for checkpoints.
        callbacks: Makes other callbacks of the Trainer anew for each run.
        config: Settings; by default `SCHEDULE`, with the ``cpu`` backend wherever a sparse operator can be used.
        steps_per_batch: What ``trainer.global_step`` counts for one batch (the optimizers of manual optimization).
        resumes: Whether to compare with a resumed run; only what cannot resume exactly by itself leaves it out.
        copies: Whether to take a deep copy in mid-run; only modules that cannot be copied by themselves leave it out.
        trainer: Further arguments of the Trainer.

    Raises:
        AssertionError: An invariant does not hold.

    """
    config = config or DGMConfig(schedule=SCHEDULE, backend="cpu")
    stopped = folder / "stopped.ckpt"

    def fit(*extra: pl.Callback, ckpt: Path | None = None) -> tuple[Any, DGMCallback, pl.Trainer]:
        pl.seed_everything(0, verbose=False)
        module, callback = make(), DGMCallback(config)
        copied_at = STOP * steps_per_batch if copies else 10**9
        limits = {"max_steps": STEPS * steps_per_batch, "max_epochs": -1, "default_root_dir": folder}
        fitted = make_trainer(*callbacks(), callback, _Watch(callback, copied_at), *extra, **limits | trainer)
        fitted.fit(module, ResumableLoader(module.batches(STEPS)), ckpt_path=ckpt)
        assert fitted.global_step == STEPS * steps_per_batch
        return module, callback, fitted

    pl.seed_everything(0, verbose=False)
    plain = make()
    straight = fit(SaveAt("on_train_batch_end", STOP * steps_per_batch, stopped))
    module, callback, fitted = straight
    assert_final(module, callback)
    assert not [left for left in leftovers(module, fitted) if "torch.nn.utils." not in left]  # the user's own stay

    assert list(module.state_dict()) == list(plain.state_dict())
    fitted.save_checkpoint(folder / "end.ckpt")
    plain.load_state_dict(load(folder / "end.ckpt")["state_dict"])
    batch = module.batches(1)[0]
    torch.testing.assert_close(evaluated(plain, batch), evaluated(module, batch))

    if resumes:
        resumed = fit(ckpt=stopped)
        different = differences(end_of(*straight), end_of(*resumed))
        assert not different, f"the resumed run ends differently: {different[:5]}"
    return outcome_of(module, callback)


def outcome_of(module: Any, callback: DGMCallback) -> Outcome:
    """Return what a finished run has masked, and what not."""
    assert callback.controller is not None
    masked = {c.name: c for c in callback.controller.candidates if c.name in callback.masks()}
    decisions = callback.decisions()
    return Outcome(
        trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        masked=sum(c.weight.numel() for c in masked.values()),
        layers=tuple(masked),
        sparse=tuple(d.name for d in decisions if d.masked and d.backend != "dense"),
        dense={d.name: d.why for d in decisions if not d.masked},
        unlisted=unlisted_weights(module, callback.controller.candidates),
        callback=callback,
        module=module,
    )
