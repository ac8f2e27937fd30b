"""``estdgm doctor``: energy sources of this machine, or what is in their way.

Also the backends that compute layers here, and the timings that the never-slower choice rests on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_estdgm.energy._probe import Probe, probe
from lightning_estdgm.energy._reading import KINDS, torch_ids
from lightning_estdgm.energy.sources._protocol import resolve
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.autotune._choice import choice_of
from lightning_estdgm.sparse.autotune._timing_cache import (
    ENVIRONMENT,
    device_name,
    files_of,
    folder,
    machine,
    read_file,
)
from lightning_estdgm.sparse.backends._protocol import backends
from lightning_estdgm.tools.bench._environment import environment


def diagnose(seconds: float = 1.0, remeasure: bool = False) -> dict[str, Any]:
    """Return all that `estdgm doctor` tells, in plain types; "measurable" is the answer.

    Args:
        seconds: time for which the sensors are read.
        remeasure: whether to drop the timings of layers on this machine's devices first.

    """
    dropped = _drop_choices() if remeasure else []
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
        "absent": [{"name": a.name, "status": a.status.value, "reason": a.reason} for a in seen.unavailable],
        "torch_devices": _torch_devices(),
        "backends": _backends(),
        "choices": {"folder": None if folder() is None else str(folder()), "dropped": dropped, "files": _choices()},
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


def _device_types() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _backends() -> list[dict[str, Any]]:
    """Return for each backend of the sparse operators whether it could run a layer of one block here, or why not."""
    topology = BlockTopology.from_mask(torch.ones(64, 64, dtype=torch.bool), 32)
    return [
        {"name": name, "device": kind, "unsupported": backend.unsupported(torch.device(kind), torch.float32, topology)}
        for name, backend in backends().items()
        for kind in _device_types()
    ]


def _models() -> list[torch.device]:
    """Return one device of each model that this machine has."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in gpus)]
    return list({device_name(device): device for device in devices}.values())


def _choices() -> list[dict[str, Any]]:
    """Return the timings on devices of these models, of all threads and versions, and the choices that they give."""
    found: list[dict[str, Any]] = []
    for device in _models():
        here = {**machine(device), "threads": None}
        for path in files_of(device):
            try:
                there, rows = read_file(path)
            except (OSError, ValueError) as error:
                found.append({"path": str(path), "error": str(error)})
                continue
            found.append(
                {
                    "path": str(path),
                    "machine": there,
                    "of_these_versions": {**there, "threads": None} == here,
                    "choices": [
                        {
                            **asdict(row),
                            "seconds": row.seconds,
                            "busy": row.timing.busy,
                            **asdict(choice_of(row.timing, row.when)),
                        }
                        for row in sorted(
                            rows, key=lambda row: (row.layer["device"], layer_words(row.layer), row.density)
                        )
                    ],
                }
            )
    return found


def _drop_choices() -> list[str]:
    dropped = [path for device in _models() for path in files_of(device)]
    for path in dropped:
        path.unlink(missing_ok=True)
    return list(map(str, dropped))


def layer_words(layer: Mapping[str, Any]) -> str:
    """Return a layer and its input in words, weight first, from the description by `_cases.layer_of`."""
    if "tokens" in layer:
        words = f"{layer['out_features']} x {layer['in_features']}, {layer['tokens']} tokens"
        if "experts" in layer:
            words = f"{layer['experts']} experts of {words} in all, {layer['dense']} if dense"
        return words + ", stored (in, out)" * layer["transposed"] + ", frozen" * layer["frozen"]
    kernel, stride, padding, dilation = (
        "x".join(map(str, layer[name])) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    words = f"{layer['out_channels']} x {layer['in_channels']} x {kernel}"
    words += f" stride {stride}" * (stride != "1x1") + f" padding {padding}" * (padding != "0x0")
    words += f" dilation {dilation}" * (dilation != "1x1")
    words += f", {layer['batch']} images of {layer['height']}x{layer['width']}"
    return words + ", channels last" * layer["channels_last"] + ", frozen" * layer["frozen"]


def show(result: Mapping[str, Any]) -> RenderableType:
    """Return the answer of `diagnose` for a terminal."""
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
    return Group(*parts, *_show_choices(result["choices"]))


def _show_choices(choices: Mapping[str, Any]) -> list[RenderableType]:
    """Return a table for each file that these versions use, a line for each that is damaged, one for all others."""
    if choices["folder"] is None:
        return [Text(f"Measured layers are not kept: {ENVIRONMENT}=off.")]
    parts: list[RenderableType] = [Text(f"Dropped: {path}") for path in choices["dropped"]]
    others: list[int] = []  # layers in each file of other versions
    for file in choices["files"]:
        if "error" in file:
            parts.append(Text(f"Not used, and written anew by the next run: {file['error']}"))
            continue
        there = file["machine"]
        threads = "" if there.get("threads") is None else f", {there['threads']} thread(s)"
        where = f"{there.get('device')}{threads}, torch {there.get('torch')}"
        if not file["of_these_versions"]:
            others.append(len(file["choices"]))
            continue
        table = Table(
            title=escape(f"Measured layers: {where}"), title_justify="left", caption=escape(file["path"]),
            caption_justify="left",
        )  # fmt: skip
        for column in ("layer and input", "dtype", "block", "density", "chosen", "dense, ms", "sparse, ms", "when"):
            table.add_column(column, overflow="fold", justify="right" if "ms" in column else "left")
        for row in file["choices"]:
            layer, times = row["layer"], (f"{1e3 * row[name]:.3g}" for name in ("dense_s", "sparse_s"))
            block, density = str(layer["block_size"]), f"{row['density']:.3f}"
            when = row["when"] + ", busy" * row["busy"]
            table.add_row(
                escape(layer_words(layer)), layer["dtype"], block, density, escape(row["backend"]), *times, when
            )
        parts.append(table)
    if others:
        parts.append(
            Text(f"Not used: {sum(others)} layers of other versions, {len(others)} files in {choices['folder']}")
        )
    if not choices["files"]:
        parts.append(Text(f"No layers measured yet on this machine; they would be kept in {choices['folder']}."))
    return parts


def _device(device: Mapping[str, Any]) -> str:
    notes = ["shared"] * device["shared"] + [f"holds {kind} too" for kind in device["covers"]]
    return device["name"] + (f" [{', '.join(notes)}]" if notes else "")


def _ids(device: Mapping[str, Any]) -> str:
    pci = [device["pci"]] if device["pci"] not in (None, device["uid"]) else []
    return "\n".join([device["uid"], *pci, *device["ids"]])
