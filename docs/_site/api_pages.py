"""A page for each public name, made from its docstring; docs/api/README.md says which there are."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

PLACE = Path("api/README.md")
TITLE = re.compile(r"^## `([\w.]+)`$", flags=re.MULTILINE)
ROW = re.compile(r"^\| `(\w+)` \|", flags=re.MULTILINE)


def listed(text: str) -> list[tuple[str, str]]:
    """Return (package, name) of each row under the headings that name packages."""
    parts = TITLE.split(text)[1:]
    return [
        (package, name) for package, rows in zip(parts[::2], parts[1::2], strict=True) for name in ROW.findall(rows)
    ]


def _directive(value: object) -> str:
    """Return the directive of autodoc for a public name's value."""
    if inspect.isclass(value):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if inspect.isroutine(value) else "autodata"


def _page(package: str, name: str, is_second: bool) -> str:
    """Return the page of one name; one that another package has already is described again, but not indexed."""
    lines = [name, "=" * len(name), "", f".. {_directive(getattr(import_module(package), name))}:: {package}.{name}"]
    return "\n".join([*lines, *(["   :no-index:"] if is_second else []), ""])


def pages(text: str) -> dict[str, str]:
    """Return the pages in reStructuredText by file name, for the names that the text lists."""
    seen: set[int] = set()
    found = {}
    for package, name in listed(text):
        key = id(getattr(import_module(package), name))
        found[f"{package}.{name}.rst"] = _page(package, name, is_second=key in seen)
        seen.add(key)
    return found


def with_links(text: str) -> str:
    """Return the text with each listed name led to its page."""
    parts = TITLE.split(text)
    for i in range(1, len(parts), 2):
        package = parts[i]
        parts[i] = f"## `{package}`"
        parts[i + 1] = ROW.sub(rf"| [`\1`]({package}.\1.rst) |", parts[i + 1])
    toctree = "\n".join(f"{package}.{name}" for package, name in listed(text))
    return "".join(parts) + f"\n```{{toctree}}\n:hidden:\n\n{toctree}\n```\n"
