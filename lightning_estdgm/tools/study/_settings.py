"""Settings that the plans of the study share."""

from __future__ import annotations

from typing import Any

SCALED: dict[str, Any] = {"step_exponent": 1.0, "scale_init": True}
"""The density-aware step size and initialisation, given to rivals as well: the mask rule alone is to differ."""


BEST_RATES: dict[str, dict[str, float]] = {
    "gpt": {"dense": 4e-3, "est-dgm": 4e-3, "static": 8e-3, "set": 4e-3, "rigl": 4e-3},
    "digits": {"dense": 1e-2, "est-dgm": 1e-3, "static": 3e-3, "set": 3e-3, "rigl": 1e-2},
    "clutter": {"dense": 3e-3, "est-dgm": 1e-2, "static": 1e-2, "set": 1e-2, "rigl": 1e-2},
    "graph": {"dense": 1e-3, "est-dgm": 1e-3, "static": 1e-3, "set": 1e-3, "rigl": 3e-4},
    "tabular": {"dense": 1e-3, "est-dgm": 3e-3, "static": 1e-2, "set": 1e-3, "rigl": 1e-2},
    "wide": {"dense": 5e-4, "est-dgm": 5e-4},
}
"""task -> method -> the learning rate that the plan ``rates`` found best; other methods take EST-DGM's."""


def phases(exploration: list[float], consolidation: list[float], refinement: list[float]) -> dict[str, Any]:
    """Settings of a schedule from start, end and length of each phase."""
    return {
        "schedule.exploration": exploration,
        "schedule.consolidation": consolidation,
        "schedule.refinement": refinement,
    }


SCHEDULES: dict[str, dict[str, Any]] = {
    "low-peak": phases([0.3, 0.25, 0.05], [0.25, 0.15, 0.25], [0.12, 0.1, 0.7]),
    "longer-exploration": phases([0.7, 0.6, 0.25], [0.3, 0.2, 0.5], [0.15, 0.1, 0.25]),
    "shorter-exploration": phases([0.7, 0.6, 0.05], [0.3, 0.2, 0.35], [0.15, 0.1, 0.6]),
    "sparser-exploration": phases([0.4, 0.35, 0.15], [0.3, 0.2, 0.35], [0.15, 0.1, 0.5]),
    "denser-exploration": phases([1.0, 0.7, 0.15], [0.3, 0.2, 0.35], [0.15, 0.1, 0.5]),
}
"""Schedules of EST-DGM other than the default, whose mean density is 0.25, by the name that tables give them.

``"low-peak"`` has a mean density of 0.14, between the default and `LOW_DENSITY`.
"""

LOW_DENSITY: dict[str, Any] = {"schedule": "low-density"}
"""EST-DGM at a low density throughout, at about the FLOPs of rivals at a constant density; for blocks."""

SPARSE_TO_DENSER: dict[str, Any] = {"schedule": "sparse-to-denser"}
"""EST-DGM from sparse to denser, at less than those FLOPs a step; for single weights."""

SPARSE_TO_DENSER_LENGTH = {"gpt": 1.14, "digits": 1.24, "clutter": 1.24, "graph": 1.22, "tabular": 1.24}
"""task -> steps of `SPARSE_TO_DENSER` at the FLOPs of static masks and SET, as a multiple of theirs."""

LOW_PEAK_LENGTH = {"graph": 0.5, "tabular": 0.57}
"""Tasks of few labels -> steps of the low peak at the FLOPs of static masks and SET, as a multiple of theirs."""

MAGNITUDE: dict[str, Any] = {"keep": "magnitude"}
"""Blocks kept by their weights' norms alone, as single weights are."""

WEIGHT_AND_GRADIENT: dict[str, Any] = {"keep": "weight_and_gradient"}
"""Units kept by the norms of their weights and of their gradients, as blocks are by default."""

FINE_UNITS, BLOCKS = ([4, 1], 4), (16, 64)
"""Mask units other than single weights."""
