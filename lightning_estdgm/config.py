"""Everything a user can set about the method, refused at once where it cannot be meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lightning_estdgm.method import distributions as densities
from lightning_estdgm.method.backward_set import Reserve
from lightning_estdgm.method.patterns import Pattern
from lightning_estdgm.method.redistribution import REDISTRIBUTIONS, Redistribution
from lightning_estdgm.method.schedules import EstDgm, ScheduleConfig
from lightning_estdgm.method.scores import SCORES, Evidence
from lightning_estdgm.method.update_rule import AUTO, Rule
from lightning_estdgm.modules.candidates import Selector
from lightning_estdgm.modules.mask_unit import BLOCK_SIZES
from lightning_estdgm.sparse.backends.protocol import get_backend

__all__ = ["DGMConfig"]


@dataclass(frozen=True)
class DGMConfig:
    """Everything a user can set about the method.

    Attributes:
        schedule: phases, densities and update times; see `EstDgm`.
        block_size: side of a mask unit: 1 (single weights), 16, 32, 64, 128, or ``"auto"``: for each layer the largest
            block that its sparse operator can use, single weights where there is none.
        distribution: how one budget becomes layer densities: ``"erk"``, ``"uniform"``, or a function
            ``(shapes, density) -> densities``.
        gamma: exponent of the directional consistency in the growth score, at least 0.
        drop_fraction: share of a layer's active units given up for new ones at an update, in [0, 1); annealed to 0 by a
            half cosine over the run. Or a function ``(progress, density) -> share``, such as `StagedDrop`.
        keep: score by which active units stay: a name in `scores.SCORES`, or a function of a `scores.Evidence`.
            ``"auto"``: single weights, and all with a `reserve`, by ``"magnitude"``, else blocks by
            ``"weight_and_gradient"``.
        grow: score by which units are grown, likewise.
        regrow: whether an update may grow back the units that it has just dropped; they then keep their weight.
        pattern: of the active units of a layer, such as `NofM` or `FanIn`; ``None``: anywhere. It needs `regrow`.
        redistribute: moves units between layers at updates: ``"global"``, ``"growth"``, or a function as those in
            `redistribution.py`; ``None``: `distribution` holds throughout. It needs one `block_size` for all layers.
        reserve: have inactive weights go on learning outside the forward; masks are then chosen among all weights by
            `keep`, and nothing is dropped or grown. Not with "frozen", nor for sharded weights.
        method: name of the method, for reports; empty: that of the schedule.
        inactive: ``"zero"``: inactive weights are 0; ``"frozen"``: they keep their value and only stop being updated.
        step_exponent: a layer at density rho takes steps ``rho**-step_exponent`` times as large; 0 turns it off.
        scale_init: scale the initial weights of a layer by ``1/sqrt(rho)`` (not with a dense warm-up, nor "frozen").
        include: layers to mask although they look like the output head: globs over names, or predicates.
        exclude: layers to leave dense.
        backend: ``"auto"`` measures and takes the faster; ``"dense"`` or a backend's name forces it for every layer
            that has an operator.
        seed: of the initial masks.

    """

    schedule: ScheduleConfig = field(default_factory=EstDgm)
    block_size: int | Literal["auto"] = "auto"
    distribution: str | Callable[[Sequence[Sequence[int]], float], list[float]] = "erk"
    gamma: float = 1.0
    drop_fraction: float | Callable[[float, float], float] = 0.3
    keep: str | Callable[[Evidence], Tensor] = AUTO
    grow: str | Callable[[Evidence], Tensor] = "consistency"
    regrow: bool = False
    pattern: Pattern | None = None
    redistribute: str | Redistribution | None = None
    reserve: Reserve | None = None
    method: str = ""
    inactive: Literal["zero", "frozen"] = "zero"
    step_exponent: float = 1.0
    scale_init: bool = True
    include: Sequence[Selector] = ()
    exclude: Sequence[Selector] = ()
    backend: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.schedule, type) or not isinstance(self.schedule, ScheduleConfig):
            raise TypeError(f"schedule must have resolve() and to_dict(), such as EstDgm(), got {self.schedule!r}")
        if self.block_size != "auto" and (type(self.block_size) is not int or self.block_size not in (1, *BLOCK_SIZES)):
            raise ValueError(f"block_size must be 'auto', 1 or one of {BLOCK_SIZES}, got {self.block_size!r}")
        if not callable(self.distribution) and self.distribution not in densities.DISTRIBUTIONS:
            known = sorted(densities.DISTRIBUTIONS)
            raise ValueError(f"distribution must be one of {known} or a function, got {self.distribution!r}")
        for name in ("gamma", "step_exponent"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        if not callable(self.drop_fraction) and not 0.0 <= self.drop_fraction < 1.0:
            raise ValueError(f"drop_fraction must lie in [0, 1), got {self.drop_fraction!r}")
        for name in ("keep", "grow"):
            score = getattr(self, name)
            known = [AUTO, *sorted(SCORES)] if name == "keep" else sorted(SCORES)
            if not callable(score) and score not in known:
                raise ValueError(f"{name} must be one of {known} or a function, got {score!r}")
        if self.pattern is not None and (isinstance(self.pattern, type) or not isinstance(self.pattern, Pattern)):
            raise TypeError(f"pattern must be None or a Pattern such as NofM(4), got {self.pattern!r}")
        if self.pattern is not None and not self.regrow:
            raise ValueError(f"pattern={self.pattern!r} needs regrow=True: each group has to be filled up")
        if not (self.redistribute is None or callable(self.redistribute) or self.redistribute in REDISTRIBUTIONS):
            known = sorted(REDISTRIBUTIONS)
            raise ValueError(f"redistribute must be None, one of {known} or a function, got {self.redistribute!r}")
        if self.redistribute is not None and self.block_size == "auto":
            raise ValueError(
                f"redistribute={self.redistribute!r} needs units of one size in all layers, got block_size='auto'"
            )
        if self.inactive not in ("zero", "frozen"):
            raise ValueError(f"inactive must be 'zero' or 'frozen', got {self.inactive!r}")
        if self.reserve is not None and not isinstance(self.reserve, Reserve):
            raise TypeError(f"reserve must be None or a Reserve, got {self.reserve!r}")
        if self.reserve is not None and self.inactive == "frozen":
            raise ValueError(
                "reserve has inactive weights go on learning, and inactive='frozen' has not: leave one out"
            )
        for name in ("include", "exclude"):
            selectors = getattr(self, name)
            if isinstance(selectors, str) or not isinstance(selectors, Sequence):
                raise TypeError(f"{name} must be a sequence of selectors, got {selectors!r}")
            for selector in selectors:
                if not (isinstance(selector, str) or callable(selector)):
                    raise TypeError(f"{name} takes globs over names and predicates, got {selector!r}")
        if type(self.seed) is not int:
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        if self.backend not in ("auto", "dense"):
            get_backend(self.backend)

    @property
    def rule(self) -> Rule:
        """How mask updates choose."""
        name = self.redistribute
        redistribute = REDISTRIBUTIONS[name] if isinstance(name, str) else name
        keep = "magnitude" if self.keep == AUTO and self.reserve is not None else self.keep
        return Rule(keep, self.grow, self.gamma, self.regrow, self.pattern, redistribute, self.seed)

    def drop_share(self, progress: float, density: float) -> float:
        """Return the share of active units that an update gives up.

        Raises:
            ValueError: if the function given as `drop_fraction` returns none in [0, 1).

        """
        if not callable(self.drop_fraction):
            return self.drop_fraction * 0.5 * (1.0 + math.cos(math.pi * progress))
        share = self.drop_fraction(progress, density)
        if not 0.0 <= share < 1.0:
            raise ValueError(f"drop_fraction must return a share in [0, 1), got {share!r} from {self.drop_fraction!r}")
        return share
