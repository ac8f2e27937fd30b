"""Links of the documentation lead somewhere, and the files and names that it mentions exist."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_estdgm"

PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
OF_TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""The changelog names what was there before."""

ENTRY_POINT_GROUPS = {
    "lightning_estdgm.backends",
    "lightning_estdgm.energy_sources",
    "lightning_estdgm.export_targets",
    "lightning_estdgm.strategies",
}
FORMATS = {"lightning_estdgm.energy"}
"""Names that are no modules, or not only."""

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def text_of(page: Path) -> str:
    """Text of a page; of a notebook that of its Markdown cells."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def prose_of(page: Path) -> str:
    """Text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def named(page: Path) -> list[str]:
    """What a page has in inline code."""
    return CODE.findall(prose_of(page))


def is_in_package(path: str) -> bool:
    """Whether a file or folder of the package ends in that path."""
    return any(PACKAGE.rglob(path))


def short(page: Path) -> str:
    """Path of a page, for the name of a test."""
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{short(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{short(page)} links to {link}, which has no such heading"


@pytest.mark.parametrize("page", OF_TODAY, ids=short)
def test_named_files_exist(page: Path) -> None:
    for text in named(page):
        for path in re.findall(r"(?<![\w./])(?:lightning_estdgm|tests|docs|notebooks)/[\w./*-]*", text):
            assert list(ROOT.glob(path.rstrip("/"))), f"{short(page)} names {path}"
        if re.fullmatch(r"[\w/]+\.py|[\w/]+/", text):
            assert (ROOT / text).exists() or is_in_package(text.rstrip("/")), f"{short(page)} names {text}"


@pytest.mark.parametrize("page", OF_TODAY, ids=short)
def test_named_modules_exist(page: Path) -> None:
    for name in re.findall(r"(?<![\w.])lightning_estdgm(?:\.\w+)+", "\n".join(named(page))):
        if name in ENTRY_POINT_GROUPS | FORMATS:
            continue
        module, _, attribute = name.rpartition(".")
        try:
            assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name)
        except ModuleNotFoundError:
            pytest.fail(f"{short(page)} names {name}")


def test_modules_named_in_the_internals_exist() -> None:
    names = {text for text in named(ROOT / "docs" / "internals" / "README.md") if re.fullmatch(r"_[a-z][a-z_]*", text)}
    assert len(names) > 50
    assert [name for name in sorted(names) if not is_in_package(f"{name}.py")] == []


def test_pages_named_in_the_source_exist() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *PACKAGE.rglob("*.yaml")]
    for file in files:
        for path in re.findall(r"(?<!/)docs/[\w/.-]+\.md", file.read_text()):
            assert (ROOT / path).exists(), f"{short(file)} names {path}"
