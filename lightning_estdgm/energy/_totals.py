"""Sums of energy and time by device, phase and stage: they add up over restarts and over processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lightning_estdgm.energy._reading import DeviceId, Method

_Key = TypeVar("_Key")

_VERSION = 2
_READABLE = (1, 2)  # version 1 knew no steps, counts, idle baseline, nor times by device


@dataclass(frozen=True, order=True)
class Cell:
    """Key of one sum: who measured the energy, by what method, of which device, in which phase and stage.

    Attributes:
        source: Name of the source.
        method: Method of the source.
        device: Device whose energy was read.
        label: Phase of the run, or label of the window.
        stage: "train" or "val"; empty outside a Trainer.
    """

    source: str
    method: Method
    device: DeviceId
    label: str
    stage: str


@dataclass
class Totals:
    """Energy, time and counts of a run, which add up over restarts and over processes.

    Attributes:
        energy_uj: Microjoules by cell.
        window_ns: Wall time by (label, stage).
        covered_ns: Device time between two readings whose difference is known.
        expected_ns: Wall time times the number of devices.
        gaps: Number of stretches without readings of a device, plus counter resets.
        segments: Number of uninterrupted sequences of readings, over all devices.
        device_ns: Covered time by device.
        idle_uj: Idle energy of the covered time in microjoules, as far as a baseline was measured.
        idle_ns: Covered device time with a baseline.
        steps: Number of optimizer steps.
        counts: Further counts by unit ("sample", "token"); None where unknown.
    """

    energy_uj: dict[Cell, int] = field(default_factory=dict)
    window_ns: dict[tuple[str, str], int] = field(default_factory=dict)
    covered_ns: int = 0
    expected_ns: int = 0
    gaps: int = 0
    segments: int = 0
    device_ns: dict[DeviceId, int] = field(default_factory=dict)
    idle_uj: int = 0
    idle_ns: int = 0
    steps: int = 0
    counts: dict[str, int | None] = field(default_factory=dict)

    def add(self, other: Totals, *, beside: bool = False) -> Totals:
        """Return the sum; with `beside` the other ran at the same time: its wall time and steps are left out."""
        return Totals(
            energy_uj=_sum(self.energy_uj, other.energy_uj),
            window_ns=dict(self.window_ns) if beside else _sum(self.window_ns, other.window_ns),
            covered_ns=self.covered_ns + other.covered_ns,
            expected_ns=self.expected_ns + other.expected_ns,
            gaps=self.gaps + other.gaps,
            segments=self.segments + other.segments,
            device_ns=_sum(self.device_ns, other.device_ns),
            idle_uj=self.idle_uj + other.idle_uj,
            idle_ns=self.idle_ns + other.idle_ns,
            steps=self.steps + (0 if beside else other.steps),
            counts={
                unit: _known_sum(self._count(unit), other._count(unit))
                for unit in dict.fromkeys([*self.counts, *other.counts])
            },
        )

    def _count(self, unit: str) -> int | None:
        """Return the count of a unit; where nobody counted it None, but 0 before the first step."""
        return self.counts.get(unit, None if self.steps else 0)

    def joules(
        self,
        *,
        kind: str | None = None,
        label: str | None = None,
        stage: str | None = None,
        estimated: bool | None = None,
    ) -> float | None:
        """Return the joules of the matching cells; None where nothing was ever read, which is not 0 J.

        Args:
            kind: Kind of device; None for all.
            label: Phase or window; None for all.
            stage: "train" or "val"; None for all.
            estimated: True for estimates, False for measurements, None for both.
        """
        cells = [
            uj
            for cell, uj in self.energy_uj.items()
            if kind in (None, cell.device.kind)
            and label in (None, cell.label)
            and stage in (None, cell.stage)
            and estimated in (None, cell.method == "estimated")
        ]
        return sum(cells) / 1e6 if cells else None

    @property
    def net_joules(self) -> float | None:
        """Joules above the idle baseline, which may be negative; None unless every reading has a baseline."""
        if not self.idle_ns or self.idle_ns != self.covered_ns:
            return None
        return (sum(self.energy_uj.values()) - self.idle_uj) / 1e6

    def device_uj(self) -> dict[DeviceId, int]:
        """Return the microjoules by device."""
        sums: dict[DeviceId, int] = {}
        for cell, uj in self.energy_uj.items():
            sums[cell.device] = sums.get(cell.device, 0) + uj
        return sums

    @property
    def seconds(self) -> float:
        """Wall time of all windows."""
        return sum(self.window_ns.values()) / 1e9

    @property
    def coverage_ratio(self) -> float:
        """Share of the device time that readings cover, in [0, 1]; 0 without devices."""
        return min(1.0, self.covered_ns / self.expected_ns) if self.expected_ns else 0.0

    def labels(self) -> list[str]:
        """Return the labels in the order in which they were first entered."""
        return list(dict.fromkeys(label for label, _ in self.window_ns))

    def state_dict(self) -> dict[str, Any]:
        """Return the sums in plain types, which load with `torch.load(weights_only=True)`."""
        return {
            "version": _VERSION,
            "energy_uj": [
                [c.source, c.method, c.device.host, c.device.kind, c.device.uid, c.label, c.stage, uj]
                for c, uj in self.energy_uj.items()
            ],
            "window_ns": [[label, stage, ns] for (label, stage), ns in self.window_ns.items()],
            "covered_ns": self.covered_ns,
            "expected_ns": self.expected_ns,
            "gaps": self.gaps,
            "segments": self.segments,
            "device_ns": [[d.host, d.kind, d.uid, ns] for d, ns in self.device_ns.items()],
            "idle_uj": self.idle_uj,
            "idle_ns": self.idle_ns,
            "steps": self.steps,
            "counts": dict(self.counts),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Totals:
        """Rebuild the sums from a `state_dict` of this release or an older one.

        Raises:
            ValueError: The state has an unknown version.
        """
        if state.get("version") not in _READABLE:
            known = " or ".join(map(str, _READABLE))
            raise ValueError(
                f"energy totals of version {known} expected, got {state.get('version')!r}: they were written by "
                "another lightning_estdgm, which reads them"
            )
        energy = {
            Cell(source, method, DeviceId(host, kind, uid), label, stage): int(uj)
            for source, method, host, kind, uid, label, stage, uj in state["energy_uj"]
        }
        windows = {(label, stage): int(ns) for label, stage, ns in state["window_ns"]}
        return cls(
            energy,
            windows,
            covered_ns=int(state["covered_ns"]),
            expected_ns=int(state["expected_ns"]),
            gaps=int(state["gaps"]),
            segments=int(state["segments"]),
            device_ns={DeviceId(host, kind, uid): int(ns) for host, kind, uid, ns in state.get("device_ns", ())},
            idle_uj=int(state.get("idle_uj", 0)),
            idle_ns=int(state.get("idle_ns", 0)),
            steps=int(state.get("steps", 0)),
            counts=dict(state.get("counts", {})),
        )


def _sum(a: Mapping[_Key, int], b: Mapping[_Key, int]) -> dict[_Key, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in dict.fromkeys([*a, *b])}


def _known_sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b
