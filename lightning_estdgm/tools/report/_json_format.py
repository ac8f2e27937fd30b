"""A comparison as JSON, and strict JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_estdgm.tools.report._comparison import Comparison
from lightning_estdgm.tools.report._document import document
from lightning_estdgm.tools.report._words import made_by

_SCHEMA = 1


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """A comparison in plain types: joules in J, in a key that ends in _estimated where they are not measured."""
    doc = document(comparison)
    arms = [{**asdict(arm), "runs": [_named(asdict(run), run.kind) for run in arm.runs]} for arm in comparison.arms]
    kinds = {arm.name: arm.kind for arm in comparison.arms}
    return {
        "format": "lightning_estdgm.report",
        "made_by": made_by(),
        "headlines": [asdict(headline) for headline in doc.headlines],
        "warnings": list(comparison.warnings),
        "baseline": comparison.baseline,
        "target": asdict(comparison.target) if comparison.target else None,
        "no_target": comparison.no_target or None,
        "budget_steps": comparison.budget_steps,
        "contrasts": [_named(asdict(contrast), kinds[contrast.arm]) for contrast in comparison.contrasts],
        "arms": arms,
        "settings": comparison.settings,
        "differing": sorted(comparison.differing),
        "notes": list(doc.notes),
        "runs": [
            {"folder": str(run.path), "arm": arm, **run.summary}
            for arm, runs in comparison.members.items()
            for run in runs
        ],
    }


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write strict JSON: numbers that are not finite become null; each run is on one line, as its logs are long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(content), encoding="utf-8")


def json_text(content: Mapping[str, Any]) -> str:
    """Strict JSON of plain types, each entry of "runs" on one line."""
    entries = []
    for key, value in _plain({"schema": _SCHEMA, **content}).items():
        if key == "runs":
            text = "[\n  " + ",\n  ".join(json.dumps(run, allow_nan=False) for run in value) + "\n ]"
        else:
            text = json.dumps(value, indent=1, allow_nan=False).replace("\n", "\n ")
        entries.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _plain(value: Any) -> Any:
    """Plain types for strict JSON; floats to seven significant digits, which is below their noise."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _named(value: Any, kind: str) -> Any:
    """Add to the keys of numbers made from joules that these are not measured, where they are not."""
    if isinstance(value, Mapping):
        estimated = kind in ("estimated", "partly estimated")
        return {
            key + "_estimated" * (estimated and key in ("joules", "share")): _named(item, kind)
            for key, item in value.items()
        }
    return value
