"""Records of the demo's runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

DENSE, DGM, SMALL = "dense", "dgm", "small"
"""Modes of a run."""

TITLES = {DENSE: "Dense", DGM: "EST-DGM", SMALL: "Smaller dense"}
"""Name of each mode for the reader."""


@dataclass(frozen=True)
class StepLog:
    """One entry per training step, in columns.

    Attributes:
        wall_s: Seconds of the whole step, from the end of the one before: data, forward, backward, optimizer, every
            callback; not validation.
        clock_s: Seconds from the start of training to the step's end, validation included.
        loss: Training loss in nats a byte.
        train_j: Joules until the step's end without validation; None where no energy source could be read.
        total_j: Joules until the step's end with validation, likewise.
        density: Active share of the masked weights.
        phase: Phase of the schedule.
        observed: Whether gradients of inactive units were collected.
        updated: Whether masks were updated at the step's end.
    """

    wall_s: list[float] = field(default_factory=list)
    clock_s: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    train_j: list[float | None] = field(default_factory=list)
    total_j: list[float | None] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    phase: list[str] = field(default_factory=list)
    observed: list[bool] = field(default_factory=list)
    updated: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.wall_s)


@dataclass(frozen=True)
class Validation:
    """One validation.

    Attributes:
        step: Number of training steps before it.
        clock_s: Seconds from the start of training to its end.
        train_j: Joules until then without validations; None where no energy source could be read.
        loss: Mean validation loss in nats a byte.
    """

    step: int
    clock_s: float
    train_j: float | None
    loss: float


@dataclass(frozen=True)
class MaskMoment:
    """The mask of one layer at the start of a step.

    Attributes:
        layer: Name of the layer.
        step: Step.
        phase: Phase of the schedule.
        density: Active share of the layer's weights.
        cells: Active shares of parts of the weight, in rows of the (out, in) matrix.
    """

    layer: str
    step: int
    phase: str
    density: float
    cells: list[list[float]]


@dataclass(frozen=True)
class RunRecord:
    """All that is kept of one run.

    Attributes:
        mode: `DENSE`, `DGM` or `SMALL`.
        seed: Seed of initial weights, batches and masks.
        lr: Peak learning rate.
        width: Width of the model.
        parameters: Number of parameters.
        setup_s: Seconds from the call of fit to the first step.
        steps: Columns with an entry per training step.
        validation: Validations in order.
        initial: Digest of the initial weights.
        batches: Digest of every training batch in order.
        energy: The EnergyMonitor's summary at the end of training.
        layers: Decisions of the callback by layer.
        masks: Masks of one layer at the ends of phases.
        masked_weights: Number of weights in masked layers.
        active_weights: Number of weights inside the masks at the end.
        nonzero_outside: Number of weights outside the masks that are not exactly zero.
        flops_ratio: Training FLOPs of linear layers that the masks ask for, over dense.
        token_s: Seconds to generate a token with the trained network, packed where it is sparse; None where that could
            not be done here.
    """

    mode: str
    seed: int
    lr: float
    width: int
    parameters: int
    setup_s: float
    steps: StepLog
    validation: list[Validation]
    initial: str
    batches: str
    energy: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    masks: list[MaskMoment] = field(default_factory=list)
    masked_weights: int = 0
    active_weights: int = 0
    nonzero_outside: int = 0
    flops_ratio: float = 1.0
    token_s: float | None = None

    @property
    def served_weights(self) -> int:
        """Number of weights that the trained network needs: those inside the masks, and all that have none."""
        return self.parameters - self.masked_weights + self.active_weights

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RunRecord:
        """The inverse of dataclasses.asdict, for a record read from JSON."""
        return cls(
            **{
                **plain,
                "steps": StepLog(**plain["steps"]),
                "validation": [Validation(**v) for v in plain["validation"]],
                "masks": [MaskMoment(**m) for m in plain["masks"]],
            }
        )


def records(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The runs as plain types."""
    return [asdict(run) for run in runs]
