"""Finished runs as they lie on disk: the summary that EnergyMonitor wrote, and the curves logged beside it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_estdgm.energy.run_file import FILE_NAME, FORMAT, VERSION

__all__ = ["Curve", "Kind", "Run", "RunError", "energy_label", "find_summary", "read_run"]

Kind = Literal["measured", "estimated", "partly estimated", "unknown"]
"""Where joules come from; "unknown" where nothing was read."""

_NEEDED: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "run": {"model": (dict,)},
    "energy": {
        "method": (str,),
        "total_joules": (int, float, type(None)),
        "measured_joules": (int, float, type(None)),
        "estimated_joules": (int, float, type(None)),
        "by_phase": (dict,),
        "seconds_by_phase": (dict,),
        "seconds": (int, float),
        "sources": (list,),
        "coverage_ratio": (int, float),
        "gaps": (int,),
    },
}


class RunError(ValueError):
    """A folder that does not hold one readable run."""


@dataclass(frozen=True)
class Curve:
    """Values logged at steps; steps rise strictly.

    >>> curve = Curve.of([(0, 1.0), (10, 3.0)])
    >>> curve.at(5), curve.at(10), curve.at(11)
    (2.0, 3.0, None)
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, points: Iterable[tuple[int, float]]) -> Curve:
        """From (step, value) in the order they were written; of two at one step the later stands (a resumed run)."""
        last = dict(points)
        steps = sorted(last)
        return cls(np.array(steps, dtype=np.int64), np.array([last[step] for step in steps], dtype=np.float64))

    def at(self, step: float) -> float | None:
        """The value at a step, linear between two points; None outside them."""
        value = float(self.along(np.array([step], dtype=np.float64))[0])
        return None if math.isnan(value) else value

    def along(self, steps: NDArray[Any]) -> NDArray[np.float64]:
        """The values at many steps; nan outside the points."""
        if not len(self.steps):
            return np.full(len(steps), np.nan)
        return np.interp(steps, self.steps, self.values, left=np.nan, right=np.nan)

    def finite(self) -> Curve:
        """Without what is not a number."""
        keep = np.isfinite(self.values)
        return Curve(self.steps[keep], self.values[keep])


_EMPTY = Curve.of([])


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: the folder as it was named.
        summary: the content of its energy.json.
        curves: by tag, what lies in the TensorBoard event files or the metrics.csv beside it.
        label: the arm it was said to belong to, if any.
    """

    path: Path
    summary: Mapping[str, Any]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    label: str | None = None

    @property
    def run(self) -> Mapping[str, Any]:
        """What was run: model, batch, precision, devices, versions."""
        return self.summary["run"]

    @property
    def energy(self) -> Mapping[str, Any]:
        """The EnergyMonitor's account."""
        return self.summary["energy"]

    @property
    def method(self) -> Mapping[str, Any] | None:
        """What the method's callback says of itself; None for an ordinary run."""
        return self.summary.get("method")

    @property
    def kind(self) -> Kind:
        """How far its joules are measured."""
        return kind_of(self.energy)

    @property
    def covers(self) -> frozenset[tuple[str, str]]:
        """Which domains are in the joules, each with "measured" or "estimated"."""
        return frozenset(
            (device["kind"], "estimated" if source["method"] == "estimated" else "measured")
            for source in self.energy["sources"]
            for device in source["devices"]
            if device["joules"] is not None
        )

    @property
    def started(self) -> datetime | None:
        """When it began; None where that is not stated."""
        with suppress(KeyError, TypeError, ValueError):
            return datetime.fromisoformat(str(self.run["started"]).replace("Z", "+00:00"))
        return None

    @cached_property
    def joules(self) -> Curve:
        """Joules so far over steps; in a run without curves the one point that its summary gives."""
        return self._cumulative("energy/total_joules", self.energy["total_joules"])

    @cached_property
    def seconds(self) -> Curve:
        """Seconds so far over steps, as `joules`."""
        return self._cumulative("energy/seconds", self.energy["seconds"])

    @cached_property
    def watts(self) -> Curve:
        """Mean watts since the entry before, over steps."""
        return self._either("power/total_watts")

    @cached_property
    def metrics(self) -> dict[str, Curve]:
        """The curves that are the user's own."""
        own = ("energy/", "power/", "footprint/", "dgm/")
        return {
            tag: curve
            for tag, curve in self.curves.items()
            if not tag.startswith(own) and tag not in ("epoch", "hp_metric")
        }

    def _either(self, tag: str) -> Curve:
        # A figure is logged under the one name or the other, and under both where a sensor went or came.
        named = [self.curves.get(tag, _EMPTY), self.curves.get(f"{tag}_estimated", _EMPTY)]
        return Curve.of(
            (s, v) for c in named for s, v in zip(c.steps.tolist(), c.values.tolist(), strict=True)
        ).finite()

    def _cumulative(self, tag: str, total: float | None) -> Curve:
        curve = self._either(tag)
        if not len(curve.steps) and total is not None and self.run.get("global_step") is not None:
            return Curve.of([(self.run["global_step"], total)])
        return curve


def kind_of(energy: Mapping[str, Any]) -> Kind:
    """Of an EnergyMonitor's summary: are its joules measured?

    >>> kind_of({"total_joules": 3.0, "measured_joules": 2.0, "estimated_joules": 1.0})
    'partly estimated'
    """
    if energy.get("total_joules") is None:
        return "unknown"
    if energy.get("estimated_joules") is None:
        return "measured"
    return "estimated" if energy.get("measured_joules") is None else "partly estimated"


def energy_label(energy: Mapping[str, Any]) -> str:
    """Where the joules of an EnergyMonitor's summary come from, in words; an estimate says so first."""
    sources = energy.get("sources", ())
    kind = kind_of(energy)
    if kind == "unknown":
        return "no energy source on this machine"
    methods = sorted({source["method"] for source in sources})
    word = {"estimated": "ESTIMATED", "partly estimated": "PARTLY ESTIMATED"}.get(kind, " and ".join(methods))
    return ", ".join([word, *dict.fromkeys(str(source["name"]) for source in sources)])


def find_summary(folder: Path) -> Path:
    """The one energy.json inside a folder.

    Raises:
        RunError: there is no such folder, none in it, or several.
    """
    if not folder.is_dir():
        raise RunError(
            f"{folder}: expected the folder of a run, got {'a file' if folder.exists() else 'nothing there'}"
        )
    found = sorted(folder.rglob(FILE_NAME))
    if not found:
        raise RunError(
            f"{folder}: no {FILE_NAME} in it or below. EnergyMonitor writes it at the end of fit, into the folder of "
            "the first logger, else into default_root_dir"
        )
    if len(found) > 1:
        folders = ", ".join(str(path.parent) for path in found)
        raise RunError(f"{folder}: got {len(found)} runs, expected one; name one of {folders}")
    return found[0]


def read_run(folder: str | Path, label: str | None = None) -> Run:
    """Read a finished run: its energy.json and the curves beside it.

    Raises:
        RunError: not one run, or its summary is broken, or of a newer version than this one reads.
    """
    folder = Path(folder)
    path = find_summary(folder)
    return Run(folder, _read_summary(path), _read_curves(path.parent), label)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise RunError(f"{path}: not readable as JSON ({e}); was it cut off?") from e
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise RunError(f"{path}: expected the format {FORMAT!r}, got {got!r}")
    version = content.get("version")
    if not isinstance(version, int) or version < 1:
        raise RunError(f"{path}: expected version {VERSION}, got {version!r}")
    if version > VERSION:
        raise RunError(
            f"{path}: got version {version}, this lightning_estdgm reads version {VERSION}; "
            "make the report with the newer one that wrote it"
        )
    for part, keys in _NEEDED.items():
        if not isinstance(content.get(part), dict):
            raise RunError(f"{path}: {part!r} is missing")
        for key, types in keys.items():
            value = content[part].get(key, path)  # the path is of no type that is expected
            if not isinstance(value, types):
                got = "nothing" if value is path else repr(value)
                raise RunError(f"{path}: {part}.{key}: got {got}, expected {' or '.join(t.__name__ for t in types)}")
    return content


def _read_curves(folder: Path) -> dict[str, Curve]:
    """From TensorBoard's event files and CSVLogger's metrics.csv; where both have a tag, TensorBoard's."""
    return _read_csv(folder / "metrics.csv") | _read_events(folder)


def _read_csv(path: Path) -> dict[str, Curve]:
    if not path.is_file():
        return {}
    points: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for tag, text in row.items():
                with suppress(TypeError, ValueError):  # empty cells, and the line that a crash cut off
                    points.setdefault(tag, []).append((int(float(row["step"])), float(text)))
    return {tag: Curve.of(series) for tag, series in points.items() if tag != "step"}


def _read_events(folder: Path) -> dict[str, Curve]:
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()  # 0: all of them
    return {
        tag: Curve.of((point.step, point.value) for point in events.Scalars(tag)) for tag in events.Tags()["scalars"]
    }


def common_metrics(runs: Sequence[Run]) -> list[str]:
    """The user's metrics that all runs have, with at least one finite value somewhere."""
    tags = set(runs[0].metrics).intersection(*(run.metrics for run in runs))
    return sorted(
        tag for tag in tags if any(math.isfinite(value) for run in runs for value in run.metrics[tag].values.tolist())
    )
