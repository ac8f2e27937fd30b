"""Presets: settings of published methods, each a schedule, two scores, a distribution, a pattern.

`preset` returns the `DGMConfig` of a method by name, `DGMCallback.from_preset` its callback. docs/methods/published.md
lists the methods side by side. All mask single weights (``Units(size=1)``) and take the optimizer's own steps
(``StepSize(exponent=0.0, scale_initial_weights=False)``), as their papers do; both can be overridden, as can any other
setting.

Common to all, and different from the papers' own code: gradients are those of the step just before an update, and that
step is taken too; grown weights start at 0 with cleared optimizer state; ties go to the lowest index; the output head
stays dense; and without `update_every` masks change every 200 steps, or every 25th of a shorter run.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal

from lightning_estdgm._flat_settings import new_places
from lightning_estdgm.config import DGMConfig, StepSize, Units
from lightning_estdgm.method._backward_set import BackwardSet
from lightning_estdgm.method._patterns import FanIn, NofM
from lightning_estdgm.method._schedules import (
    AlternatingDensity,
    ConstantDensity,
    CubicDensity,
    DropTo,
    EstDgm,
    Phase,
    ScheduleConfig,
    StagedDrop,
)
from lightning_estdgm.method._schedules.estdgm import times
from lightning_estdgm.method._scores import WeightAndGradient
from lightning_estdgm.method._update_rule import UpdateRule

__all__ = [
    "PRESETS",
    "ac_dc",
    "est_dgm",
    "gmp",
    "granet",
    "mest",
    "n_of_m",
    "preset",
    "rigl",
    "set_",
    "snfs",
    "srigl",
    "static",
    "top_kast",
]


def preset(name: str, density: float, **overrides: Any) -> DGMConfig:
    """Return the settings of a published method by its name.

    Args:
        name: name of the method, a key of `PRESETS`.
        density: active share of the masked weights at the end of the run, in (0, 1].
        overrides: keyword arguments of the method's function in this module, such as ``update_every``, and fields of
            `DGMConfig`, which replace those of the method. A part such as ``step_size`` may be given whole, or as a
            mapping of the fields to change; a name with a dot, such as ``"units.size"``, is one field of a part.

    Raises:
        ValueError: if there is no such method, or a setting is out of range.
        TypeError: if an override belongs neither to the method nor to `DGMConfig`.

    Example:
        >>> preset("rigl", density=0.1, step_size={"exponent": 1.0}).update_rule.grow
        'gradient'

    """
    if name not in PRESETS:
        raise ValueError(f"expected a method out of {sorted(PRESETS)}, got {name!r}")
    overrides = _by_part(overrides)
    known = set(inspect.signature(PRESETS[name]).parameters) - {"density"}
    settings = {field.name for field in fields(DGMConfig)}
    if unknown := sorted(overrides.keys() - known - settings):
        way = f": {places}" if (places := new_places(unknown)) else ""
        raise TypeError(f"{name!r} takes {sorted(known)} and the fields of DGMConfig, got {unknown}{way}")
    config = PRESETS[name](density, **{key: value for key, value in overrides.items() if key in known})
    result = config.merged(**{key: value for key, value in overrides.items() if key not in known})
    if config.trains_inactive_weights and not result.trains_inactive_weights:
        raise ValueError(
            f"{name!r} has inactive weights go on learning, and inactive={result.inactive!r} has not: leave one out"
        )
    return result


def _by_part(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides with each field of a part, such as ``units.size`` of a command line, in the part's mapping."""
    parts = {name: value for name, value in overrides.items() if "." not in name}
    for name in overrides.keys() - parts.keys():
        part, _, field = name.partition(".")
        whole = parts.get(part, {})
        if not isinstance(whole, Mapping):
            raise TypeError(f"{name!r} needs {part} as a mapping of fields, or left out; got {whole!r}")
        parts[part] = {**whole, field: overrides[name]}
    return parts


def est_dgm(
    density: float,
    *,
    phases: Literal["cycle", "low-density", "sparse-to-denser"] = "cycle",
    update_every: int | None = None,
    observe_steps: int | None = None,
) -> DGMConfig:
    """Return EST-DGM's settings, this package's own method: `DGMConfig`'s defaults at a density of 0.10.

    Args:
        density: active share of the masked weights at the end of the run, in (0, 1].
        phases: densities of the phases. ``"cycle"``: consolidation goes from 3 to 2 times the final density, refinement
            from 1.5 times; exploration from 0.70 to 0.60, but never below the start of consolidation.
            ``"low-density"``: `EstDgm.low_density` and a drop fraction of 0.1, for blocks, where joules count more than
            steps. ``"sparse-to-denser"``: `EstDgm.sparse_to_denser`, with units grown at random, just dropped ones
            included, for single weights, where FLOPs count more than steps.
        update_every: number of steps between mask updates; see `EstDgm`.
        observe_steps: number of observed steps before an update; see `EstDgm`.

    Raises:
        ValueError: for other phases, or a number out of range.

    """
    if phases == "low-density":
        schedule = EstDgm.low_density(density, update_every=update_every, observe_steps=observe_steps)
        return DGMConfig(schedule, update_rule=UpdateRule(drop_fraction=0.1))
    if phases == "sparse-to-denser":
        schedule = EstDgm.sparse_to_denser(density, update_every=update_every, observe_steps=observe_steps)
        return DGMConfig(schedule, update_rule=UpdateRule(grow="random", regrow=True))
    if phases != "cycle":
        raise ValueError(f"phases must be 'cycle', 'low-density' or 'sparse-to-denser', got {phases!r}")
    consolidation = times(3, density)
    schedule = EstDgm(
        Phase(max(0.70, consolidation), max(0.60, consolidation), 0.15),
        Phase(consolidation, times(2, density), 0.35),
        Phase(times(1.5, density), density, 0.50),
        update_every=update_every,
        observe_steps=observe_steps,
    )
    return DGMConfig(schedule)


def static(density: float) -> DGMConfig:
    """Return the settings of a random mask by ERK that never changes."""
    return _published("static", ConstantDensity(density, stop=0.0), grow="random")


def set_(density: float, *, update_every: int | None = None, zeta: float = 0.3) -> DGMConfig:
    """Return SET's settings: Mocanu et al., Nature Communications 9 (2018), arXiv 1707.04780.

    At every update each layer (ERK) drops the share `zeta` of its smallest weights and grows as many at random.
    Deviations: the smallest by magnitude are dropped, where the paper drops that share of the positive and of the
    negative ones; updates come by steps and not at the ends of epochs; a weight dropped and drawn again at once keeps
    its value.
    """
    schedule = ConstantDensity(density, update_every, stop=1.0)
    return _published("SET", schedule, grow="random", regrow=True, drop_fraction=StagedDrop((zeta,)))


def snfs(density: float, *, update_every: int | None = None, prune_rate: float = 0.5) -> DGMConfig:
    r"""Return the settings of sparse networks from scratch: Dettmers & Zettlemoyer, arXiv 1907.04840.

    Each layer drops its smallest weights, a share that is annealed by a cosine over the run. As many are grown: their
    number in each layer is proportional to the mean momentum magnitude of its active weights, and they are those of
    largest momentum. Layers start with one density. Deviations: the optimizer keeps no momentum of inactive weights
    here, so momentum is the mean gradient of the 19 steps before the update (fewer if updates are closer), the plain
    average whose gradients are as old on average as those of an exponential one with :math:`\beta = 0.9`; Adam's
    division by the second moment is left out; weights that a layer has no room for go to the others by momentum and not
    evenly.
    """
    window = 19 if update_every is None else min(19, update_every)
    return _published(
        "SNFS",
        ConstantDensity(density, update_every, window, stop=1.0),
        distribution="uniform",
        grow="momentum",
        regrow=True,
        redistribute="growth",
        drop_fraction=prune_rate,
    )


def rigl(density: float, *, update_every: int | None = None, alpha: float = 0.3, stop: float = 0.75) -> DGMConfig:
    """Return RigL's settings: Evci et al., arXiv 1911.11134.

    Each layer (ERK) drops its smallest weights, a share that goes from `alpha` by a cosine to 0 at `stop` of the run,
    where updates end, and grows those of largest gradient. Weights just dropped may be grown again, with their value.
    """
    schedule = ConstantDensity(density, update_every, observe_steps=1, stop=stop)
    return _published("RigL", schedule, grow="gradient", regrow=True, drop_fraction=alpha)


def gmp(density: float, *, update_every: int | None = None, begin: float = 0.0, end: float = 0.75) -> DGMConfig:
    """Return the settings of gradual magnitude pruning: Zhu & Gupta, arXiv 1710.01878.

    All layers start dense and are pruned by magnitude to the same density, along a cubic between `begin` and `end` of
    the run (the paper leaves both open). Pruned weights do not come back.
    """
    schedule = CubicDensity(density, begin=begin, end=end, update_every=update_every)
    return _published("GMP", schedule, distribution="uniform", grow="random", drop_fraction=0.0)


def ac_dc(density: float, *, warmup: float = 0.10, period: float = 0.05) -> DGMConfig:
    """Return the settings of AC/DC: Peste et al., NeurIPS 2021, arXiv 2106.12379.

    Dense and sparse phases take turns, dense first and sparse last; a sparse phase keeps the largest weights of all
    layers together. Weights that come back start at 0. Deviation: batch-norm statistics are not computed anew.
    """
    schedule = AlternatingDensity(density, warmup, period)
    return _published("AC/DC", schedule, grow="random", redistribute="global", drop_fraction=0.0)


def mest(
    density: float, *, update_every: int | None = None, gradient_weight: float = 1.0, soft: bool = False
) -> DGMConfig:
    r"""Return the settings of MEST: Yuan et al., NeurIPS 2021, arXiv 2110.14032.

    Updates drop the weights of smallest :math:`|w| + \lambda |g|` and grow random ones; all layers have one density.
    Elastic mutation: 0.2 of a layer is exchanged until 56 % of the run, 0.1 until 75 %, then nothing. With `soft` (the
    paper's EM&S) the density is 1.5 and 1.25 times the final one in these stretches, and updates drop to the final
    density before they grow, so that new weights are trained before they are scored. The shares are those of the
    authors' scripts for 160 epochs at a density of 0.10; :math:`\lambda = 1` is this package's choice. With `soft`,
    phases have EST-DGM's names.
    """
    if not soft:
        schedule: ScheduleConfig = ConstantDensity(density, update_every, observe_steps=1)
        drop: Callable[[float, float], float] = StagedDrop((0.2, 0.1), borders=(0.75,))
    else:
        high, middle = min(1.0, 1.5 * density), min(1.0, 1.25 * density)
        stages = Phase(high, high, 0.5625), Phase(middle, middle, 0.1875), Phase(density, density, 0.25)
        schedule = EstDgm(*stages, update_every=update_every, observe_steps=1, freeze=0.99)
        drop = DropTo(density)
    return _published(
        "MEST",
        schedule,
        distribution="uniform",
        keep=WeightAndGradient(gradient_weight),
        grow="random",
        regrow=True,
        drop_fraction=drop,
    )


def granet(
    density: float, *, update_every: int | None = None, start: float = 0.5, end: float = 0.6875, alpha: float = 0.5
) -> DGMConfig:
    """Return GraNet's settings: Liu et al., NeurIPS 2021, arXiv 2106.10404.

    Training starts from a random ERK mask of density `start`. Updates keep the largest weights of all layers together,
    along a cubic that ends at `end` of the run; each layer then drops its smallest weights (a share from `alpha` by a
    cosine to 0 at the end of the run) and grows as many by gradient. `end` is the authors' 110 of 160 epochs.
    """
    schedule = CubicDensity(density, max(start, density), 0.0, end, 1.0, update_every, observe_steps=1)
    return _published("GraNet", schedule, grow="gradient", regrow=True, redistribute="global", drop_fraction=alpha)


def srigl(
    density: float,
    *,
    update_every: int | None = None,
    alpha: float = 0.3,
    stop: float = 0.75,
    ablate: float = 0.3,
) -> DGMConfig:
    """Return SRigL's settings: Lasby et al., ICLR 2024, arXiv 2305.02299.

    RigL with constant fan-in: an output stays only if the weights that its layer keeps by magnitude or would grow by
    gradient make up `ablate` of its fan-in; otherwise its weights go to the other outputs. It may come back at a later
    update, as in the authors' code. Fan-ins are whole numbers, so a layer keeps to its budget only nearly.
    """
    config = rigl(density, update_every=update_every, alpha=alpha, stop=stop)
    return replace(config, method="SRigL", update_rule=replace(config.update_rule, pattern=FanIn(ablate)))


def top_kast(
    density: float, *, update_every: int | None = None, backward_density: float | None = None, penalty: float = 1e-4
) -> DGMConfig:
    r"""Return Top-KAST's settings: Jayakumar et al., NeurIPS 2020, arXiv 2106.03517.

    The forward uses each layer's largest weights, A; gradients go to its largest `backward_density`, B. Weights in B
    but not in A learn outside the forward, and those outside B rest. The exploration loss is `penalty` times half the
    sum of squares of A, and 1 / `density` times that on the rest of B. Deviations: both sets are chosen anew at mask
    updates, in every step only with ``update_every=1``; while a weight rests, an optimizer's momentum of it decays
    unused. By default half of the weights outside A are in B, 0.55 of all at a density of 0.10: this package's choice.
    """
    backward = density + (1.0 - density) / 2 if backward_density is None else backward_density
    if backward < density:
        raise ValueError(f"backward_density must be at least density, got {backward} and {density}")
    return _published(
        "Top-KAST",
        ConstantDensity(density, update_every, stop=1.0),
        distribution="uniform",
        grow="magnitude",
        inactive=BackwardSet(backward, penalty, penalty / density),
    )


def n_of_m(
    density: float, *, m: int = 4, update_every: int | None = None, stop: float = 1.0, decay: float = 2e-4
) -> DGMConfig:
    """Return the settings of N:M sparsity by SR-STE: Zhou et al., ICLR 2021, arXiv 2102.04010.

    The forward uses the largest ``density * m`` of each `m` neighbours along the inputs: 2:4 at a density of 0.5. All
    weights get the gradient of the sparse network, and those outside the forward a decay. Deviation: the choice is made
    anew at mask updates, in every step only with ``update_every=1``.

    Raises:
        ValueError: if ``density * m`` is no whole number; at the start of a run, if a layer's inputs are no multiple of
            `m`.

    """
    n = round(density * m)
    if not 1 <= n <= m or not math.isclose(density * m, n, rel_tol=1e-9):
        raise ValueError(f"N:{m} needs a density that is a whole number of {m}ths, got {density}")
    return _published(
        f"{n}:{m}",
        ConstantDensity(density, update_every, stop=stop),
        distribution="uniform",
        grow="magnitude",
        regrow=True,
        pattern=NofM(m),
        inactive=BackwardSet(1.0, 0.0, decay),
    )


def _published(
    method: str,
    schedule: ScheduleConfig,
    *,
    distribution: str = "erk",
    inactive: Literal["zero"] | BackwardSet = "zero",
    **rule: Any,
) -> DGMConfig:
    return DGMConfig(
        schedule,
        Units(1, distribution),
        UpdateRule(**{"keep": "magnitude", **rule}),
        StepSize(exponent=0.0, scale_initial_weights=False),
        inactive=inactive,
        method=method,
    )


PRESETS: dict[str, Callable[..., DGMConfig]] = {
    "ac/dc": ac_dc,
    "est-dgm": est_dgm,
    "gmp": gmp,
    "granet": granet,
    "mest": mest,
    "n:m": n_of_m,
    "rigl": rigl,
    "set": set_,
    "snfs": snfs,
    "srigl": srigl,
    "static": static,
    "top-kast": top_kast,
}
"""Functions of the methods by name."""
