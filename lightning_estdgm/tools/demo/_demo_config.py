"""Configuration of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.recipes.gpt import ByteGPT
from lightning_estdgm.recipes.stdlib_text import StdlibText
from lightning_estdgm.tools.demo._records import DENSE, DGM, SMALL

MIN_STEPS = 20
"""Fewest steps of a run."""


@dataclass(frozen=True)
class DemoConfig:
    """Model, data and training of the demo.

    Attributes:
        steps: Optimizer steps of dense and EST-DGM, at least 20.
        seeds: Number of rounds of runs; seed s gives the initial weights, the batches and the masks of round s.
        batch_size: Windows a step.
        context: Bytes a window.
        width: Width of the model.
        layers: Number of decoder blocks.
        heads: Number of attention heads.
        lr_dense: Peak learning rate of the dense runs.
        lr_dgm: Peak learning rate of the EST-DGM runs, before the density-aware step size.
        lr_small: Peak learning rate of the smaller dense runs.
        weight_decay: Weight decay of the matrices.
        dgm: Configuration of EST-DGM; its seed is replaced by the round's. Blocks of 64 learn fastest in so few steps.
        text: Text file to learn; None for Python's standard library.
        val_windows: Number of validation windows of ``context`` bytes.
        validations: Number of validations a run, roughly; the last one is at its end.
        profile_steps: Steps of the profile taken after the timed runs; 0 for none.
        out: Folder for the PNG, the JSON, the report and the TensorBoard runs.

    Raises:
        ValueError: A value is out of range; the message names it.
    """

    steps: int = 300
    seeds: int = 1
    batch_size: int = 16
    context: int = 128
    width: int = 512
    layers: int = 2
    heads: int = 8
    lr_dense: float = 1e-3
    lr_dgm: float = 1e-3
    lr_small: float = 4e-3
    weight_decay: float = 0.1
    dgm: DGMConfig = field(default_factory=lambda: DGMConfig(units=Units(size=64)))
    text: Path | None = None
    val_windows: int = 256
    validations: int = 6
    profile_steps: int = 4
    out: Path = Path("runs/demo")

    def __post_init__(self) -> None:
        for name, least in (("steps", MIN_STEPS), ("seeds", 1), ("validations", 1), ("profile_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: got {str(self.out)!r}, which is a file; expected a folder or a free name")
        with torch.device("meta"):  # the model's own checks of sizes and rates, without its weights
            for mode in (DENSE, DGM, SMALL):
                self.model(self.lr(mode))
        self.data(seed=0)

    def lr(self, mode: str) -> float:
        """Peak learning rate of a mode."""
        return {DENSE: self.lr_dense, DGM: self.lr_dgm, SMALL: self.lr_small}[mode]

    def model(self, lr: float) -> ByteGPT:
        """A model with weights from the global random state."""
        return ByteGPT(self.width, self.layers, self.heads, self.context, lr, self.weight_decay)

    def data(self, seed: int) -> StdlibText:
        """Data: the text, with batches drawn from ``seed``."""
        return StdlibText(self.context, self.batch_size, seed, self.val_windows, path=self.text)

    def val_interval(self) -> int:
        """Steps between validations: the divisor of ``steps`` nearest to the wish, so that one comes at the end."""
        wish = self.steps / self.validations
        return min(
            (d for d in range(1, self.steps + 1) if self.steps % d == 0 and 2 * d >= wish),
            key=lambda d: abs(d - wish),
        )

    def as_dict(self) -> dict[str, Any]:
        """The configuration in plain types; other values (a predicate, a path) as their text."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, type(None))) else str(value)
