"""A run as its files tell it: its summary and its curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning_estdgm.energy._run_file import RUNNING
from lightning_estdgm.tools.report._curve import Curve

Kind = Literal["measured", "estimated", "partly estimated", "unknown"]
"""Origin of joules; "unknown" where nothing was read."""

_EMPTY = Curve.of([])


@dataclass(frozen=True)
class FinishedRun:
    """One run that has ended, or was killed, as read from its folder.

    Attributes:
        path: Folder, or file in it, as the user named it.
        summary: Content of its energy.json.
        curves: Logged values by tag, from the TensorBoard event files or the metrics.csv beside the summary.
        label: Name of the arm that the user gave it; None for none.
    """

    path: Path
    summary: Mapping[str, Any]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    label: str | None = None

    @property
    def run(self) -> Mapping[str, Any]:
        """Description of the run: model, batch, precision, devices, versions."""
        return self.summary["run"]

    @property
    def energy(self) -> Mapping[str, Any]:
        """The EnergyMonitor's account."""
        return self.summary["energy"]

    @property
    def method(self) -> Mapping[str, Any] | None:
        """Description of the sparse method by its callback; None for an ordinary run."""
        return self.summary.get("method")

    @property
    def kind(self) -> Kind:
        """Origin of its joules."""
        return kind_of(self.energy)

    @property
    def covers(self) -> frozenset[tuple[str, str]]:
        """Domains that the joules include, each with "measured" or "estimated"."""
        return frozenset(
            (device["kind"], "estimated" if source["method"] == "estimated" else "measured")
            for source in self.energy["sources"]
            for device in source["devices"]
            if device["joules"] is not None
        )

    @property
    def counted_devices(self) -> frozenset[tuple[str, str, str]]:
        """Devices whose joules in it are those of all that used them, each as host, kind and id: no estimate is."""
        return frozenset(
            (str(device.get("host")), str(device["kind"]), str(device.get("uid")))
            for source in self.energy["sources"]
            for device in source["devices"]
            if device["joules"] is not None and source["method"] != "estimated"
        )

    @property
    def started(self) -> datetime | None:
        """Time at which it began; None where that is not stated."""
        with suppress(KeyError, TypeError, ValueError):
            return _time(self.run["started"])
        return None

    @property
    def fits(self) -> dict[str, tuple[datetime, datetime]]:
        """Begin and end of its fits by their ids; empty where they are not stated, as in older files."""
        found = {}
        with suppress(KeyError, TypeError, ValueError):
            for fit in self.run["fits"]:
                found[str(fit["id"])] = (_time(fit["started"]), _time(fit["ended"]))
        return found

    @property
    def unfinished(self) -> bool:
        """Whether its file was last written while it ran."""
        return self.summary.get("status") == RUNNING

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
        """Curves that the user's own code logged."""
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


def _time(text: str) -> datetime:
    """Return a time of ISO 8601; one without a zone is UTC."""
    time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def kind_of(energy: Mapping[str, Any]) -> Kind:
    """Origin of the joules of an EnergyMonitor's summary.

    >>> kind_of({"total_joules": 3.0, "measured_joules": 2.0, "estimated_joules": 1.0})
    'partly estimated'
    """
    if energy.get("total_joules") is None:
        return "unknown"
    if energy.get("estimated_joules") is None:
        return "measured"
    return "estimated" if energy.get("measured_joules") is None else "partly estimated"


def energy_label(energy: Mapping[str, Any]) -> str:
    """Origin of the joules of an EnergyMonitor's summary in words, with the sources; an estimate says so first."""
    sources = energy.get("sources", ())
    kind = kind_of(energy)
    if kind == "unknown":
        return "no energy source on this machine"
    methods = sorted({source["method"] for source in sources})
    word = {"estimated": "ESTIMATED", "partly estimated": "PARTLY ESTIMATED"}.get(kind, " and ".join(methods))
    return ", ".join([word, *dict.fromkeys(str(source["name"]) for source in sources)])


def common_metrics(runs: Sequence[FinishedRun]) -> list[str]:
    """Names of the user's metrics that all runs have, with at least one finite value in any of them."""
    tags = set(runs[0].metrics).intersection(*(run.metrics for run in runs))
    return sorted(
        tag for tag in tags if any(math.isfinite(value) for run in runs for value in run.metrics[tag].values.tolist())
    )
