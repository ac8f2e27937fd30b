"""A comparison as one HTML page, as Markdown, as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_estdgm.tools.report.compare import Comparison
from lightning_estdgm.tools.report.document import document
from lightning_estdgm.tools.report.figures import COLOURS, draw

__all__ = ["FORMATS", "as_dict", "html", "markdown", "write", "write_json"]

SCHEMA = 1
LONG_WORD = 24


def html(comparison: Comparison) -> str:
    """One self-contained page: no script, no request, readable on paper and on a phone."""
    return _render("report.html.j2", comparison, escape=True, plots=draw(comparison), colours=COLOURS)


def markdown(comparison: Comparison) -> str:
    """The same sentences and tables, without the plots."""
    return _render("report.md.j2", comparison, escape=False)


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Everything in plain types: joules in J, in a key that ends in _estimated where they are not measured."""
    doc = document(comparison)
    arms = [{**asdict(arm), "runs": [_named(asdict(run), run.kind) for run in arm.runs]} for arm in comparison.arms]
    kinds = {arm.name: arm.kind for arm in comparison.arms}
    return {
        "format": "lightning_estdgm.tools.report",
        "made_by": _made_by(),
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


def write(comparison: Comparison, path: str | Path) -> None:
    """Write the report in the format that the file's suffix names: .html, .md or .json.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: got the suffix {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FORMATS[path.suffix](comparison), encoding="utf-8")


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write strict JSON (what is no finite number becomes null); each run on one line, as its logs are long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_json_text(content), encoding="utf-8")


def _json_text(content: Mapping[str, Any]) -> str:
    entries = []
    for key, value in _plain({"schema": SCHEMA, **content}).items():
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
    """Keys of figures made from joules say so where these are not measured."""
    if isinstance(value, Mapping):
        estimated = kind in ("estimated", "partly estimated")
        return {
            key + "_estimated" * (estimated and key in ("joules", "share")): _named(item, kind)
            for key, item in value.items()
        }
    return value


FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    ".html": html,
    ".md": markdown,
    ".json": lambda comparison: _json_text(as_dict(comparison)),
}
"""By suffix, what writes it."""


def _render(template: str, comparison: Comparison, escape: bool, **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("lightning_estdgm.tools.report", "."), autoescape=escape, undefined=StrictUndefined
    )
    environment.filters |= {"cell": _cell, "keep": _keep}
    return environment.get_template(template).render(doc=document(comparison), made_by=_made_by(), **more)


def _cell(text: str) -> str:
    """Text that Markdown takes as it is: no line break, no new cell, no tag."""
    for character in "\\`*|[]<>":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _keep(text: str) -> Markup:
    """For HTML: a number stays on one line with its unit and its deviation, and a very long word may be broken."""
    joined = re.sub(r"(?<=±) | (?=(?:[±≤≥×%JsWh]|[kMG]J|less|more)(?:[ ,.;)]|$))", "\N{NO-BREAK SPACE}", text)
    words = re.split(r"(\s)", joined)
    return Markup("").join(
        Markup("<wbr>").join(re.findall(".{1,12}", word)) if len(word) > LONG_WORD else word for word in words
    )


def _made_by() -> str:
    try:
        return f"Made by lightning_estdgm {version('lightning-estdgm')}."
    except PackageNotFoundError:  # a source tree that was never installed
        return "Made by lightning_estdgm."
