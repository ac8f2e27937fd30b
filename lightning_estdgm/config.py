"""`DGMConfig`: every setting of the method, in a few frozen dataclasses that check their values at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from lightning_estdgm._checks import check_number
from lightning_estdgm._flat_settings import new_places, refuses_flat_names
from lightning_estdgm.method import _distributions as distributions
from lightning_estdgm.method._backward_set import BackwardSet
from lightning_estdgm.method._schedules import EstDgm, ScheduleConfig
from lightning_estdgm.method._update_rule import AUTO, UpdateRule
from lightning_estdgm.modules._candidates import Selector
from lightning_estdgm.modules._expert_adapter import ExpertAdapter
from lightning_estdgm.modules._mask_unit import check_unit_size
from lightning_estdgm.sparse.backends._protocol import get_backend


@dataclass(frozen=True)
class Units:
    """Mask units, and their distribution over layers.

    Attributes:
        size: side of a unit: 1 (single weights), 4, 8, 16, 32, 64, 128; a pair of outputs that share an input, (2, 1),
            (4, 1), (8, 1), (16, 1), (32, 1); or chosen for each layer by timing it: ``"auto"``, the unit of the least
            cost to a loss, which is the time of a step times the steps that the unit needs; ``"finest"``, the finest
            that is computed faster than dense; ``"fastest"``, that of the fastest step. With a pattern or a forced
            backend nothing is timed, and these are the largest block that fits; single weights where there is none.
        distribution: rule for the densities of layers: ``"erk"``, ``"uniform"``, or a function
            ``(shapes, density) -> densities``.

    Raises:
        ValueError: for another size or an unknown distribution.

    Example:
        >>> Units(size=64)
        Units(size=64, distribution='erk')

    """

    size: int | tuple[int, int] | Literal["auto", "finest", "fastest"] = "auto"
    # Names first, then functions; see `UpdateRule.keep`.
    distribution: distributions.DistributionName | Callable[[Sequence[Sequence[int]], float], list[float]] | str = "erk"

    def __post_init__(self) -> None:
        if isinstance(self.size, list):  # as files give a pair
            object.__setattr__(self, "size", tuple(self.size))
        check_unit_size("units.size", self.size)
        if not callable(self.distribution) and self.distribution not in distributions.DISTRIBUTIONS:
            known = sorted(distributions.DISTRIBUTIONS)
            raise ValueError(f"units.distribution must be one of {known} or a function, got {self.distribution!r}")


@dataclass(frozen=True)
class StepSize:
    r"""Density-aware step size: a layer at density :math:`\rho` takes steps :math:`\rho^{-e}` times as large.

    While it steps, the optimizer sees the layer's learning rate multiplied by :math:`\rho^{-e}`; parameter groups stay
    as the user made them. Where an optimizer does not step by the ``lr`` of each parameter's group, which is found by
    trial, its layers are not scaled, and the printed table says why.

    Attributes:
        exponent: :math:`e`, at least 0; 0 leaves the optimizer's steps as they are.
        scale_initial_weights: whether the initial weights of a layer are scaled by :math:`1/\sqrt\rho` (not with a
            dense warm-up, nor with frozen inactive weights).
        scale_weight_decay: whether weight decay is scaled as the rest of the step is. Where not, the optimizer sees the
            layer's ``weight_decay`` divided by the factor, so that ``lr * weight_decay`` stays what you set.

    Raises:
        ValueError: for a negative or infinite exponent.

    """

    exponent: float = 1.0
    scale_initial_weights: bool = True
    scale_weight_decay: bool = True

    def __post_init__(self) -> None:
        check_number("step_size.exponent", self.exponent, at_least=0)


@dataclass(frozen=True)
class Selection:
    """Layers whose weights are masked; by default all linear and convolution layers but the output head.

    Attributes:
        include: layers to mask although they look like the output head: globs over module names, or predicates of a
            name and a module.
        exclude: layers to leave dense.
        experts: globs over names of parameters of shape ``(experts, rows, columns)`` that stack one matrix an expert;
            an `ExpertAdapter` says besides how a class of modules computes with them, for sparse products. Those of
            transformers, and of modules with a number of experts (``num_experts``), are found without.

    Raises:
        TypeError: for anything but sequences of globs and predicates, or of globs and adapters.

    """

    include: Sequence[Selector] = ()
    exclude: Sequence[Selector] = ()
    experts: Sequence[str | ExpertAdapter] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "experts"):
            selectors = getattr(self, name)
            if isinstance(selectors, str) or not isinstance(selectors, Sequence):
                raise TypeError(f"selection.{name} must be a sequence of selectors, got {selectors!r}")
            for selector in selectors:
                if name == "experts" and not isinstance(selector, (str, ExpertAdapter)):
                    raise TypeError(
                        f"selection.experts takes globs over names of parameters and ExpertAdapters, got {selector!r}"
                    )
                if name != "experts" and not (isinstance(selector, str) or callable(selector)):
                    raise TypeError(f"selection.{name} takes globs over names and predicates, got {selector!r}")


@refuses_flat_names
@dataclass(frozen=True)
class DGMConfig:
    """Settings of the method.

    Attributes:
        schedule: phases, densities and update times; by default those of `EstDgm`.
        units: mask units and their distribution over layers.
        update_rule: choice of the active units at a mask update.
        step_size: correction of steps and initial weights for the density.
        selection: layers that are masked.
        inactive: treatment of inactive weights. ``"zero"``: they are 0; ``"frozen"``: they keep their value and are not
            updated; a `BackwardSet`: they go on learning outside the forward, masks are chosen among all weights by
            `update_rule.keep`, and nothing is dropped or grown (not for sharded weights).
        backend: backend of the layers: ``"auto"`` measures and takes the faster; ``"dense"`` or a backend's name forces
            it for every layer that has an operator.
        seed: seed of the initial masks and of random scores.
        method: name of the method, for reports; empty: that of the schedule.
        storage: what is stored of masked weights. ``"dense"``: all, so that parameters, gradients and optimizer state
            have the size of the dense network; ``"packed"``: the active units alone, so that these shrink with the
            density (one device and DDP; see the guide on memory).

    Raises:
        TypeError: for a part of another type.
        ValueError: for a value out of range, or parts that do not fit together.

    Example:
        >>> DGMConfig(units=Units(size=1), step_size=StepSize(exponent=0.5)).units.size
        1

    """

    # None as the default: jsonargparse would hand the values of an EstDgm on to a schedule of another class that has
    # settings of these names. EstDgm first: settings without a class path are its own.
    schedule: EstDgm | ScheduleConfig = None  # type: ignore[assignment]
    units: Units = field(default_factory=Units)
    update_rule: UpdateRule = field(default_factory=UpdateRule)
    step_size: StepSize = field(default_factory=StepSize)
    selection: Selection = field(default_factory=Selection)
    inactive: Literal["zero", "frozen"] | BackwardSet = "zero"
    backend: str = "auto"
    seed: int = 0
    method: str = ""
    storage: Literal["dense", "packed"] = "dense"

    def __post_init__(self) -> None:
        if self.schedule is None:
            object.__setattr__(self, "schedule", EstDgm())
        if isinstance(self.schedule, type) or not isinstance(self.schedule, ScheduleConfig):
            raise TypeError(f"schedule must have resolve() and to_dict(), such as EstDgm(), got {self.schedule!r}")
        for name, kind in _PARTS.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        if self.update_rule.redistribute is not None and isinstance(self.units.size, str):
            raise ValueError(
                f"update_rule.redistribute={self.update_rule.redistribute!r} needs units of one size in all layers, "
                f"got units.size={self.units.size!r}"
            )
        if not isinstance(self.inactive, BackwardSet) and self.inactive not in ("zero", "frozen"):
            raise ValueError(f"inactive must be 'zero', 'frozen' or a BackwardSet, got {self.inactive!r}")
        if type(self.seed) is not int:
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        if self.backend not in ("auto", "dense"):
            get_backend(self.backend)
        if self.storage not in ("dense", "packed"):
            raise ValueError(f"storage must be 'dense' or 'packed', got {self.storage!r}")
        if self.storage == "packed":
            self._check_packed()

    def _check_packed(self) -> None:
        """Raise ValueError for settings that need inactive weights to be there, or a choice of the product."""
        refused = {
            "inactive": self.inactive if self.inactive != "zero" else None,
            "update_rule.pattern": self.update_rule.pattern,
            "backend": self.backend if self.backend != "auto" else None,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"storage='packed' stores active units alone and multiplies with them: it does not work with "
                    f"{name}={value!r}; leave that out, or use storage='dense'"
                )

    def merged(self, **changes: Any) -> DGMConfig:
        """Return these settings with some fields changed; of a part given as a mapping, only the named fields.

        Args:
            changes: new values by field.

        Raises:
            TypeError: for an unknown field.

        Example:
            >>> DGMConfig(seed=1).merged(step_size={"exponent": 0.5}).step_size == StepSize(exponent=0.5)
            True

        """
        known = [field.name for field in fields(self)]
        if unknown := sorted(changes.keys() - set(known)):
            way = new_places(unknown) or "settings of a part go as part={'name': value}"
            raise TypeError(f"DGMConfig takes {known}, got {unknown}: {way}")
        return replace(self, **{name: _part(self, name, value) for name, value in changes.items()})

    @property
    def trains_inactive_weights(self) -> bool:
        """Whether inactive weights go on learning outside the forward."""
        return isinstance(self.inactive, BackwardSet)

    @property
    def resolved_update_rule(self) -> UpdateRule:
        """The update rule, with ``keep="auto"`` resolved to magnitude if inactive weights learn."""
        if self.trains_inactive_weights and self.update_rule.keep == AUTO:
            return replace(self.update_rule, keep="magnitude")
        return self.update_rule


_PARTS = {"units": Units, "update_rule": UpdateRule, "step_size": StepSize, "selection": Selection}


def _part(config: DGMConfig, name: str, value: Any) -> Any:
    """Return a field's new value; for a mapping, the present part with the mapping's fields changed."""
    part = getattr(config, name, None)
    if not isinstance(value, Mapping) or not is_dataclass(part) or isinstance(part, type):
        return value
    known = [f.name for f in fields(part)]
    if unknown := sorted(value.keys() - set(known)):
        raise TypeError(f"{name} takes {known}, got {unknown}")
    return replace(part, **value)
