"""A comparison as one HTML page, as Markdown, as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_estdgm.tools.report._comparison import Comparison
from lightning_estdgm.tools.report._document import document
from lightning_estdgm.tools.report._figures import draw
from lightning_estdgm.tools.report._json_format import as_dict, json_text
from lightning_estdgm.tools.report._svg import PALETTE
from lightning_estdgm.tools.report._words import made_by

if TYPE_CHECKING:
    from markupsafe import Markup


_LONG_WORD = 24


def html(comparison: Comparison) -> str:
    """One self-contained page: no script, no request, readable on paper and on a phone."""
    return _render("report.html.j2", comparison, escape=True, plots=draw(comparison), colours=PALETTE)


def markdown(comparison: Comparison) -> str:
    """The same sentences and tables, without the plots."""
    return _render("report.md.j2", comparison, escape=False)


def write(comparison: Comparison, path: str | Path) -> None:
    """Write the report in the format that the file's suffix names: .html, .md or .json.

    Raises:
        ValueError: The file has another suffix.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: got the suffix {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FORMATS[path.suffix](comparison), encoding="utf-8")


FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    ".html": html,
    ".md": markdown,
    ".json": lambda comparison: json_text(as_dict(comparison)),
}
"""Maker of the text of a report by the suffix of its file."""


def _render(template: str, comparison: Comparison, escape: bool, **more: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lightning_estdgm.tools.report", "."), autoescape=escape, undefined=StrictUndefined
    )
    environment.filters |= {"cell": _cell, "keep": _keep}
    return environment.get_template(template).render(doc=document(comparison), made_by=made_by(), **more)


def _cell(text: str) -> str:
    """Text for Markdown, which it takes as it is: no line break, no new cell, no tag."""
    for character in "\\`*|[]<>":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _keep(text: str) -> Markup:
    """Text for HTML: a number stays on one line with its unit and its deviation, and a very long word may be broken."""
    from markupsafe import Markup

    joined = re.sub(r"(?<=±) | (?=(?:[±≤≥×%JsWh]|[kMG]J|less|more)(?:[ ,.;)]|$))", "\N{NO-BREAK SPACE}", text)
    words = re.split(r"(\s)", joined)
    return Markup("").join(
        Markup("<wbr>").join(re.findall(".{1,12}", word)) if len(word) > _LONG_WORD else word for word in words
    )
