"""``estdgm doctor``: can energy be measured here, by what, and if not, what is in the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_estdgm.bench.environment import environment
from lightning_estdgm.energy import KINDS, resolve, torch_ids
from lightning_estdgm.energy.probe import Probe, probe
from lightning_estdgm.ops import backends
from lightning_estdgm.topology import BlockTopology

__all__ = ["diagnose", "show"]


def diagnose(seconds: float = 1.0) -> dict[str, Any]:
    """All that `estdgm doctor` tells, in plain types; "measurable" is the answer.

    Args:
        seconds: how long the sensors are read.
    """
    seen = probe(resolve(None), seconds)
    return {
        "measurable": seen.measurable,
        "verdict": _verdict(seen),
        "seconds": seen.seconds,
        "sources": [
            {
                "name": source.name,
                "method": source.method,
                "driver": source.driver,
                "update_period_s": source.update_period_s,
                "devices": [
                    {
                        **asdict(device),
                        **asdict(shown.info),
                        "covers": list(shown.info.covers),
                        "ids": list(shown.info.ids),
                        "watts": shown.watts,
                        "update_period_seen_s": shown.period_s,
                        "status": shown.status.value,
                        "reads": shown.reads,
                        "failed": shown.failed,
                    }
                    for device, shown in devices.items()
                ],
            }
            for source, devices in seen.sources
        ],
        "absent": [{"name": a.name, "status": a.status.value, "reason": a.reason} for a in seen.absent],
        "torch_devices": _torch_devices(),
        "backends": _backends(),
        "environment": environment(),
    }


def _verdict(seen: Probe) -> str:
    measured, estimated = seen.kinds(estimated=False), seen.kinds(estimated=True)
    parts = [f"{kind} by {measured[kind]}" for kind in KINDS if kind in measured]
    guesses = [f"{kind} by {estimated[kind]}" for kind in KINDS if kind in estimated]
    if not parts:
        only = f" It is only estimated: {', '.join(guesses)}." if guesses else ""
        return f"Energy CANNOT be measured here.{only} Below: why each source is absent, and what helps."
    missing = [kind for kind in KINDS if kind not in measured and kind not in estimated]
    text = f"Energy can be measured here: {', '.join(parts)}."
    if guesses:
        text += f" Only estimated: {', '.join(guesses)}."
    return text + (f" Not covered: {', '.join(missing)}." if missing else "")


def _torch_devices() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        uuid, pci = torch_ids(properties)
        found.append({"device": f"cuda:{i}", "name": properties.name, "uuid": uuid, "pci": pci})
    return found


def _backends() -> list[dict[str, Any]]:
    """Whether each backend of the sparse operators could run a layer of one block here, or why not."""
    types = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    topology = BlockTopology.from_mask(torch.ones(64, 64, dtype=torch.bool), 32)
    return [
        {"name": name, "device": kind, "unsupported": backend.unsupported(torch.device(kind), torch.float32, topology)}
        for name, backend in backends().items()
        for kind in types
    ]


def show(result: Mapping[str, Any]) -> RenderableType:
    """The answer of `diagnose` for a terminal."""
    verdict = Text(str(result["verdict"]), style="bold green" if result["measurable"] else "bold red")
    parts: list[RenderableType] = [verdict]
    if result["sources"]:
        table = Table(title=f"Sensors, read for {result['seconds']:g} s", title_justify="left")
        for column in ("source", "method", "kind", "device", "UUID or address", "power", "renewed every", "driver"):
            table.add_column(column, overflow="fold")
        for source in result["sources"]:
            for device in source["devices"]:
                method = "ESTIMATED" if source["method"] == "estimated" else source["method"]
                watts = f"no reading ({device['status']})" if device["watts"] is None else f"{device['watts']:.1f} W"
                seen = device["update_period_seen_s"]
                period = "not seen" if seen is None else f"{1000 * seen:.1f} ms"
                row = (source["name"], method, device["kind"], _device(device), _ids(device), watts, period)
                table.add_row(*map(escape, row), escape(source["driver"]))
        parts.append(table)
    if result["absent"]:
        table = Table(title="Not used", title_justify="left")
        for column in ("source", "status", "why"):
            table.add_column(column, overflow="fold")
        for absent in result["absent"]:
            table.add_row(escape(absent["name"]), absent["status"], escape(absent["reason"]))
        parts.append(table)
    table = Table(title="Sparse operators and versions", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for backend in result["backends"]:
        state = "available" if backend["unsupported"] is None else f"not here: {backend['unsupported']}"
        table.add_row(f"backend {backend['name']} on {backend['device']}", escape(state))
    for device in result["torch_devices"]:
        table.add_row(device["device"], escape(f"{device['name']}, {device['uuid'] or device['pci']}"))
    for name, value in result["environment"].items():
        table.add_row(name, escape(str(value)))
    parts.append(table)
    return Group(*parts)


def _device(device: Mapping[str, Any]) -> str:
    notes = ["shared"] * device["shared"] + [f"holds {kind} too" for kind in device["covers"]]
    return device["name"] + (f" [{', '.join(notes)}]" if notes else "")


def _ids(device: Mapping[str, Any]) -> str:
    pci = [device["pci"]] if device["pci"] not in (None, device["uid"]) else []
    return "\n".join([device["uid"], *pci, *device["ids"]])
