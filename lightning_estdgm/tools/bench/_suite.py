"""``estdgm bench all``: every part in a process of its own, and one page of tables from their files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_estdgm.tools.bench._environment import environment
from lightning_estdgm.tools.bench._goals import goals_columns
from lightning_estdgm.tools.bench._output import machine_name, markdown_table
from lightning_estdgm.tools.bench._serve import serve_columns
from lightning_estdgm.tools.bench.kernels._report import kernels_columns
from lightning_estdgm.tools.bench.train._report import backends_used, energy_words, profile_columns, train_columns

PAGE = "README.md"
_UNITS = (
    *("--shape", "2048x1024x1024", "--density", "0.05", "--density", "0.1", "--density", "0.25"),
    *("--block-size", "1", "--block-size", "4x1", "--block-size", "4", "--block-size", "8", "--block-size", "16"),
    *("--block-size", "64", "--dtype", "float32", "--no-peers"),
)
"""Mask units side by side: the cases that docs/pictures/layer-speed.png is drawn from."""


@dataclass(frozen=True)
class Part:
    """One file of the suite.

    Attributes:
        name: name of the file, without suffix.
        arguments: ``estdgm bench`` command that writes it.

    """

    name: str
    arguments: tuple[str, ...]


_SERVED = [
    Part(f"serve-{network}{suffix}", ("serve", "--network", network, "--threads", "1", "--block-size", side))
    for network in ("mlp", "gpt")
    for suffix, side in (("", "16"), ("-single-weights", "1"))
]


def parts(quick: bool) -> list[Part]:
    """Return the parts that `all` runs, the most wanted first."""
    more = ("--quick",) if quick else ()
    both = ("--only-compiled",) if quick else ("--compile",)
    serve = () if quick else _SERVED
    return [
        Part("kernels-linear", ("kernels", "--kind", "linear", *more)),
        Part("train-gpt", ("train", "--model", "gpt", *both, *more)),
        Part("kernels-units", ("kernels", "--kind", "linear", *_UNITS, *more)),
        Part("kernels-convolution", ("kernels", "--kind", "convolution", *more)),
        Part("train-resnet50", ("train", "--model", "resnet50", *both, *more)),
        *serve,
    ]


def device_folder() -> str:
    """Return a folder name for this machine's device, such as ``nvidia-h100-80gb-hbm3``."""
    machine = environment()
    return re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or machine["cpu"]).lower()).strip("-") or "unknown"


def run_parts(wanted: Sequence[Part], folder: Path, *, again: bool, say: Callable[[str], None]) -> list[str]:
    """Run the parts that are not there yet, and return the names of those that failed; one does not stop the others."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in wanted:
        path = folder / f"{part.name}.json"
        if not again and _is_done(path, part):
            say(f"{part.name}: there already")
            continue
        say(f"{part.name}: estdgm bench {' '.join(part.arguments)}")
        command = [sys.executable, "-m", "lightning_estdgm.cli", "bench", *part.arguments, "--output", str(path)]
        if subprocess.run(command, check=False).returncode:
            failed.append(part.name)
            say(f"{part.name}: FAILED")
    return failed


def write_page(folder: Path) -> Path:
    """Write the page of the files in a folder, and return its path."""
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    path = folder / PAGE
    pictures = {picture.stem for picture in folder.glob("*.png")}
    path.write_text(page(contents, pictures), encoding="utf-8")
    return path


def page(contents: Mapping[str, Mapping[str, Any]], pictures: Container[str]) -> str:
    """Return the page as Markdown: device, date, command, goals, tables and picture of each part, from its JSON.

    Args:
        contents: the JSON of each part by its name.
        pictures: names of the parts that have a picture.

    """
    devices = list(dict.fromkeys(machine_name(content["environment"]) for content in contents.values()))
    lines = [f"# Benchmarks: {'; '.join(devices) or 'nothing measured'}", ""]
    lines += ["Written by `estdgm bench all` from the JSON files beside it. docs/benchmarks/README.md says how.", ""]
    for name, content in contents.items():
        state = "" if content["complete"] else " - CUT OFF, not all was measured"
        lines += [
            f"## {name}{state}",
            "",
            f"`{content['command']}`, {content['date']}",
            "",
        ]
        if name in pictures:
            lines += [f"![{name}]({name}.png)", ""]
        if content["goals"]:
            lines += [markdown_table(*goals_columns(content["goals"])), ""]
        if "rows" in content:
            lines += [markdown_table(*kernels_columns(content["rows"])), "", f"Timing: {content['timing']}.", ""]
            lines += [*(f"- {text}" for text in content["left_out"]), ""]
        if "served" in content:
            lines += _serve_lines(content["served"])
        for result in content.get("results", ()):
            lines += _train_lines(result)
    return "\n".join(lines).rstrip() + "\n"


def _serve_lines(result: Mapping[str, Any]) -> list[str]:
    lines = [markdown_table(*serve_columns(result)), ""]
    if (generation := result["generation"]) is not None and result["config"]["network"] == "gpt":
        lines += [
            f"Text, one token a step: {generation['packed']:.0f} tokens/s packed, {generation['torch']:.0f} dense.",
            "",
        ]
    return [*lines, *(f"- {text}" for text in result["left_out"]), ""]


def _train_lines(result: Mapping[str, Any]) -> list[str]:
    once = ", ".join(f"{name.removesuffix('_s')} {seconds:.1f} s" for name, seconds in result["one_off"].items())
    lines = [f"### {result['name']}, {result['mode']}, {result['settings']['precision']}", ""]
    lines += [markdown_table(*train_columns(result)), ""]
    lines += [
        f"Joules: {energy_words(result)}. Backends at the end: {backends_used(result)}. "
        f"Once only, by first of its kind: {once}.",
        "",
    ]
    if result.get("profile"):
        lines += [markdown_table(*profile_columns(result["profile"])), ""]
    return lines


def _is_done(path: Path, part: Part) -> bool:
    """Whether the file holds the whole of this part, by the same arguments."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return bool(content["complete"]) and f"bench {' '.join(part.arguments)} --output" in content["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
