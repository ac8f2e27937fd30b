"""A training run of the study."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning import LightningModule

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.method._schedules import EstDgm, Phase
from lightning_estdgm.tools.study._tasks import task_named

DENSE = "dense"

_PLACES = {
    "block_size": ("units", "size"),
    "distribution": ("units", "distribution"),
    "step_exponent": ("step_size", "exponent"),
    "scale_init": ("step_size", "scale_initial_weights"),
    "scale_decay": ("step_size", "scale_weight_decay"),
    "include": ("selection", "include"),
    "exclude": ("selection", "exclude"),
    **{name: ("update_rule", name) for name in ("keep", "grow", "gamma", "drop_fraction")},
}
"""Settings by the short names in the tables of the study, and their places in `DGMConfig`."""

_PARTS = ("", "model", "schedule", "with")


@dataclass(frozen=True)
class StudyRun:
    """A training run of the study; two equal ones train the same network on the same batches.

    Attributes:
        task: Name of a task.
        method: ``"dense"``, or a preset's name.
        lr: Peak learning rate.
        seed: Seed of initial weights, batches and masks.
        density: Final density; 1 for dense.
        length: Number of steps as a multiple of the task's.
        settings: Differences from the preset in plain types: arguments of the preset; fields of `EstDgm` as
            ``"schedule.<field>"`` (a phase as ``[start, end, length]``), or the name of a schedule as ``"schedule"``;
            arguments of the task's model as ``"model.<argument>"``; arguments of a callback of
            `_variants.VARIANTS` as ``"with.<name>"``.

    Raises:
        ValueError: A setting is of another part.

    """

    task: str
    method: str
    lr: float
    seed: int
    density: float = 1.0
    length: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.settings if name.rpartition(".")[0] not in _PARTS]:
            raise ValueError(f"settings: got {unknown}, expected names without a dot, or of model, schedule or with")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(1, round(self.length * task_named(self.task).steps))

    @property
    def variant(self) -> str:
        """Settings in one line, sorted; empty where there are none."""
        return json.dumps(self.settings, sort_keys=True) if self.settings else ""

    @property
    def key(self) -> tuple[str, ...]:
        """Identity of the run in a table of text."""
        numbers = (f"{self.lr:g}", str(self.seed), f"{self.density:g}", f"{self.length:g}")
        return (self.task, self.method, *numbers, self.variant)

    @property
    def arm_id(self) -> str:
        """Name by which a command asks for all runs that differ from it in the seed only."""
        key = (*self.key[:3], *self.key[4:])
        return hashlib.sha256("|".join(key).encode()).hexdigest()[:8]

    @property
    def id(self) -> str:
        """Name by which a command asks for this run: that of its arm, and the seed."""
        return f"{self.arm_id}-{self.seed}"

    def settings_of(self, part: str) -> dict[str, Any]:
        """Return the settings named ``<part>.<name>`` by that name; those without a part for an empty one."""
        split = ((name.rpartition("."), value) for name, value in self.settings.items())
        return {name: value for (prefix, _, name), value in split if prefix == part}

    def model(self) -> LightningModule:
        """Return the model with its first weights, from the global random state."""
        return task_named(self.task).model(self.lr, **self.settings_of("model"))

    def callback(self) -> DGMCallback | None:
        """Return the callback that makes it sparse; ``None`` for dense."""
        if self.method == DENSE:
            return None
        overrides, schedule = self.settings_of(""), self.settings_of("schedule")
        if "schedule" in overrides:
            overrides["phases"] = overrides.pop("schedule")
        if schedule:
            phases: dict[str, Any] = {
                k: Phase(*value) if isinstance(value, list) else value for k, value in schedule.items()
            }
            overrides["schedule"] = EstDgm(**phases)
        return DGMCallback.from_preset(self.method, density=self.density, seed=self.seed, **_nested(overrides))


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by short names as overrides of a preset."""
    overrides: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _PLACES:
            part, field_name = _PLACES[name]
            overrides.setdefault(part, {})[field_name] = value
        else:
            overrides[name] = value
    return overrides
