"""Figures of a run's energy: the summary in plain types, the metrics for loggers, the announcement. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning_estdgm.energy._device_assignment import ActiveSource, UnavailableSource
from lightning_estdgm.energy._footprint import Footprint
from lightning_estdgm.energy._reading import KINDS, DeviceId, DeviceInfo
from lightning_estdgm.energy._totals import Totals

TRAIN, VAL = "train", "val"


def joules_and_sources(
    totals: Totals,
    active: Iterable[ActiveSource],
    unavailable: Iterable[UnavailableSource],
    failing: Collection[DeviceId] = (),
) -> dict[str, Any]:
    """Return joules, sources and coverage in plain types; a figure that nobody read is None, never 0.

    Args:
        totals: Sums over restarts and processes.
        active: Sources in use now; earlier ones are in `totals`.
        unavailable: Sources that are not used.
        failing: Devices whose last reading failed.
    """
    active = list(active)
    methods: set[str] = {cell.method for cell in totals.energy_uj} | {source.method for source in active}
    return {
        "total_joules": totals.joules(),
        "measured_joules": totals.joules(estimated=False),
        "estimated_joules": totals.joules(estimated=True),
        "by_domain": {kind: totals.joules(kind=kind) for kind in KINDS},
        "seconds": totals.seconds,
        "coverage_ratio": totals.coverage_ratio,
        "gaps": totals.gaps,
        "segments": totals.segments,
        "sources": _sources(totals, active),
        "failing": [
            {"host": d.host, "kind": d.kind, "uid": d.uid, "name": info.name}
            for source in active
            for d, info in source.devices.items()
            if d in failing
        ],
        "absent": [{"name": a.name, "status": a.status.value, "reason": a.reason} for a in unavailable],
        "method": "none" if not methods else methods.pop() if len(methods) == 1 else "mixed",
    }


def summary(
    totals: Totals,
    active: Iterable[ActiveSource],
    unavailable: Iterable[UnavailableSource],
    *,
    failing: Collection[DeviceId] = (),
    idle_w: Mapping[DeviceId, float] | None = None,
    footprint: Footprint | None = None,
) -> dict[str, Any]:
    """Return `joules_and_sources` of a run, and its energy by phase, by step and by sample.

    Args:
        totals: Sums over restarts and processes.
        active: Sources in use now; earlier ones are in `totals`.
        unavailable: Sources that are not used.
        failing: Devices whose last reading failed.
        idle_w: Idle baseline in watts by device; None without one.
        footprint: Factors for CO2 and cost; None leaves both out.
    """
    joules, train_j = totals.joules(), totals.joules(stage=TRAIN)
    counts = {"step": totals.steps, **totals.counts}
    content: dict[str, Any] = {
        **joules_and_sources(totals, active, unavailable, failing),
        "by_phase": {label: totals.joules(label=label) for label in totals.labels()},
        "train_by_phase": {label: totals.joules(label=label, stage=TRAIN) for label in totals.labels()},
        "seconds_by_phase": {
            label: sum(ns for (name, _), ns in totals.window_ns.items() if name == label) / 1e9
            for label in totals.labels()
        },
        "train_joules": train_j,
        "val_joules": totals.joules(stage=VAL),
        "steps": totals.steps,
        "samples": totals.counts.get("sample"),
        "counts": dict(totals.counts),
        **{
            f"joules_per_{unit}": train_j / count if train_j is not None and count else None
            for unit, count in counts.items()
        },
        "idle": None,
        "footprint": None,
    }
    if idle_w is not None:
        content["idle"] = {
            "watts": sum(idle_w.values()) if idle_w else None,
            "devices": [{"host": d.host, "kind": d.kind, "uid": d.uid, "watts": w} for d, w in idle_w.items()],
            "joules": totals.idle_uj / 1e6 if totals.net_joules is not None else None,
            "net_joules": totals.net_joules,
        }
    if footprint is not None:
        content["footprint"] = {
            **asdict(footprint),
            "grams_co2": footprint.grams_co2(joules),
            "cost": footprint.cost(joules),
        }
    return content


def metrics(
    totals: Totals,
    active: Sequence[ActiveSource],
    watts: Mapping[DeviceId, float],
    gpus: Mapping[DeviceId, str],
    footprint: Footprint | None = None,
) -> dict[str, float]:
    """Return the logged metrics by name.

    A figure that nobody read is left out; the name of one with an estimated part ends in "_estimated".

    Args:
        totals: Sums over restarts and processes.
        active: Sources of all processes.
        watts: Mean watts by device since the last log.
        gpus: Name of each GPU, "node/local".
        footprint: Factors for CO2 and cost; None leaves both out.
    """
    found: dict[str, float] = {"energy/seconds": totals.seconds}
    guessed = {device.kind for source in active if source.method == "estimated" for device in source.devices}

    def suffix(kind: str | None = None, **which: str) -> str:
        # Also before an estimate's first joule is there: a curve must not change its name.
        coming = kind in guessed if kind else bool(guessed)
        return "_estimated" if coming or totals.joules(estimated=True, kind=kind, **which) is not None else ""

    def put(name: str, per: int | None = 1, **which: str) -> None:
        joules = totals.joules(**which)  # type: ignore[arg-type]
        if joules is not None and per:
            found[name + suffix(**which)] = joules / per

    put("energy/total_joules")
    for kind in KINDS:
        put(f"energy/{kind}_joules", kind=kind)
    for stage in (TRAIN, VAL):
        put(f"energy/{stage}_joules", stage=stage)
    for label in totals.labels():
        put(f"energy/phase/{label}_joules", label=label)
    for unit, count in {"step": totals.steps, **totals.counts}.items():
        put(f"energy/joules_per_{unit}", per=count, stage=TRAIN)
    if totals.net_joules is not None:
        found[f"energy/net_joules{suffix()}"] = totals.net_joules

    methods = {device: source.method for source in active for device in source.devices}
    for name, kinds in (*((kind, {kind}) for kind in KINDS), ("total", set(KINDS))):
        devices = [d for d in methods if d.kind in kinds]
        if devices and all(d in watts for d in devices):  # a sum with a device missing would look like a saving
            estimated = any(methods[d] == "estimated" for d in devices)
            found[f"power/{name}_watts" + "_estimated" * estimated] = sum(watts[d] for d in devices)
    for device, place in gpus.items():
        if device in watts:
            found[f"power/gpu/{place}_watts" + "_estimated" * (methods[device] == "estimated")] = watts[device]
    if totals.expected_ns:
        found["energy/coverage_ratio"] = totals.coverage_ratio
        found["energy/gaps"] = totals.gaps
    if footprint is not None:
        derived = {"co2_grams": footprint.grams_co2(totals.joules()), "cost": footprint.cost(totals.joules())}
        found.update({f"footprint/{name}{suffix()}": v for name, v in derived.items() if v is not None})
    return found


def announcement(
    active: Sequence[ActiveSource], unavailable: Iterable[UnavailableSource], idle_w: Mapping[DeviceId, float]
) -> str:
    """Return a text of which device is measured by which source, and why other sources are not used."""
    if active:
        lines = ["Energy of this run:"]
    else:
        lines = ["Energy of this run: no joules, seconds only, because no source could be used:"]
    for source in active:
        word = source.method if source.method != "estimated" else "ESTIMATED, not measured"
        for device, info in source.devices.items():
            idle = f", idle {idle_w[device]:.1f} W" if device in idle_w else ""
            lines.append(f"  {device.kind}: {source.name} ({word}): {info.name} [{device.host} {device.uid}]{idle}")
    lines += [f"  not used: {a.name} ({a.status.value}): {a.reason}" for a in unavailable]
    return "\n".join(lines)


def _sources(totals: Totals, active: Iterable[ActiveSource]) -> list[dict[str, Any]]:
    """Return all sources that were read, those of earlier fits included, with joules and mean watts by device."""
    used: dict[tuple[str, str], dict[DeviceId, DeviceInfo | None]] = {}
    drivers: dict[tuple[str, str], str] = {}
    for cell in totals.energy_uj:
        used.setdefault((cell.source, cell.method), {}).setdefault(cell.device, None)
    for source in active:
        used.setdefault((source.name, source.method), {}).update(source.devices)
        drivers[source.name, source.method] = source.driver
    energy_uj: dict[tuple[str, str, DeviceId], int] = {}
    for cell, uj in totals.energy_uj.items():
        key = (cell.source, cell.method, cell.device)
        energy_uj[key] = energy_uj.get(key, 0) + uj
    device_uj = totals.device_uj()
    times_known = sum(totals.device_ns.values()) == totals.covered_ns  # not after a restart from release 0.1

    def device(name: str, method: str, d: DeviceId, info: DeviceInfo | None) -> dict[str, Any]:
        uj, ns = energy_uj.get((name, method, d)), totals.device_ns.get(d)
        return {
            "host": d.host,
            "kind": d.kind,
            "uid": d.uid,
            "name": info.name if info else "",
            "shared": info.shared if info else None,
            "joules": None if uj is None else uj / 1e6,
            "watts": device_uj[d] * 1000 / ns if d in device_uj and ns and times_known else None,
        }

    return [
        {
            "name": name,
            "method": method,
            "driver": drivers.get((name, method), ""),
            "devices": [device(name, method, d, info) for d, info in devices.items()],
        }
        for (name, method), devices in used.items()
    ]
