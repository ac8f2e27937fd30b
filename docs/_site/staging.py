"""The site's sources, put together: docs/, the notebooks, the changelog, a page for each public name and linked file.

docs/ itself stays as it is in the repository, where its links lead to files of the repository. In the copy they lead to
pages of the site.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import api_pages

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?!\w+:)[^)\s#]+)(#[\w-]+)?\)")
"""A link to a file: text, path, anchor."""

TEXTS = {".md", ".ipynb"}

FRONT = {"index.md", "README.md"}
"""Names of a folder's front page."""

_AT_THE_ROOT = {"CHANGELOG.md": "changelog.md", "README.md": "readme.md"}


def _sources(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each file of the repository that is part of the site, and its place there."""
    for path in sorted((root / "docs").rglob("*")):
        if path.is_file() and "_site" not in path.parts and path.name != "conf.py":
            yield path, path.relative_to(root / "docs")
    for path in sorted((root / "notebooks").iterdir()):
        if path.suffix in TEXTS:
            yield path, path.relative_to(root)
    for source, place in _AT_THE_ROOT.items():
        yield root / source, Path(place)


def _place(target: Path, root: Path) -> Path | None:
    """Return where a file of the repository is on the site; None for one that gets a page of its source."""
    if target.is_relative_to(root / "docs"):
        return target.relative_to(root / "docs")
    if target.parent == root and target.name in _AT_THE_ROOT:
        return Path(_AT_THE_ROOT[target.name])
    return target.relative_to(root) if target.parent == root / "notebooks" else None


def _with_links_of_the_site(text: str, source: Path, place: Path, root: Path, listings: set[Path]) -> str:
    """Return a page's text with its links led to pages of the site; add the files that need a page to `listings`."""

    def mended(match: re.Match[str]) -> str:
        label, path, anchor = match[1], match[2], match[3] or ""
        target = (source.parent / path).resolve()
        if not target.is_file():
            return match[0]
        there = _place(target, root)
        if there is None:
            listings.add(target)
            there = Path("source") / f"{target.relative_to(root)}.md"
        link = os.path.relpath(there, place.parent)
        if there.suffix == ".html":  # a page of its own, not one of Sphinx
            return f'<a href="{link}">{label}</a>'
        return f"[{label}]({link}{anchor})"

    return LINK.sub(mended, text)


def _with_contents(text: str, place: Path, places: Iterable[Path]) -> str:
    """Return the front page of a folder with a hidden table of its pages, in the order of its links to them."""
    below = [other for other in places if other.suffix in TEXTS and other != place and place.parent in other.parents]
    fronts = {other.parent for other in below if other.name in FRONT}
    pages = [other for other in below if other.name in FRONT or other.parent not in fronts]
    if not pages:
        return text
    links = [os.path.normpath(place.parent / path) for _, path, _ in LINK.findall(text)]
    order = {link: i for i, link in reversed(list(enumerate(links)))}
    pages.sort(key=lambda other: (order.get(str(other), len(links)), str(other)))
    entries = "\n".join(str(other.relative_to(place.parent).with_suffix("")) for other in pages)
    return f"{text.rstrip()}\n\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


def _listing(path: Path, root: Path) -> str:
    """Return the page that shows a source file."""
    name = path.relative_to(root)
    head = f"---\norphan: true\nnosearch: true\n---\n\n# `{name}`\n\n"
    fence = "`" * 8
    return f"{head}{fence}{path.suffix[1:] or 'text'}\n{path.read_text()}{fence}\n"


def _write(path: Path, content: bytes, kept: set[Path]) -> None:
    """Write a file unless it is there as it should be, so that Sphinx reads again only what has changed."""
    kept.add(path)
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def stage(root: Path, folder: Path) -> None:
    """Put the sources of the site into a folder, and remove what is no part of them any more."""
    root = root.resolve()
    kept: set[Path] = set()
    listings: set[Path] = set()
    sources = list(_sources(root))
    places = [place for _, place in sources]
    for source, place in sources:
        content = source.read_bytes()
        if source.suffix in TEXTS:
            text = _with_links_of_the_site(content.decode(), source, place, root, listings)
            if place == api_pages.PLACE:
                for name, page in api_pages.pages(text).items():
                    _write(folder / place.parent / name, page.encode(), kept)
                text = api_pages.with_links(text)
            elif place.name in FRONT and place.parent != Path():
                text = _with_contents(text, place, places)
            if source.suffix == ".md" and not text.startswith("# "):  # tables that are part of another page
                text = f"# {place.parent.name}: {place.stem}\n\n{text}"
            content = text.encode()
        # Pages that are no sources of Sphinx are copied beside its own.
        _write(folder / ("_extra" if source.suffix == ".html" else "") / place, content, kept)
    for path in listings:
        _write(folder / "source" / f"{path.relative_to(root)}.md", _listing(path, root).encode(), kept)
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
