"""Builds the site: ``python docs/_site/build.py [FOLDER]``, by default into build/site; any warning is an error.

It needs the extra `docs`, and no network. ``NOTEBOOKS=force`` runs the notebooks, so that their pages have outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.cmd.build import build_main
from staging import stage

ROOT = Path(__file__).parents[2]


def build(folder: Path) -> int:
    """Build the site into a folder, with its sources and Sphinx's cache beside it; return the exit status."""
    sources, cache = folder.with_name(f"{folder.name}-sources"), folder.with_name(f"{folder.name}-cache")
    stage(ROOT, sources)
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--doctree-dir", str(cache)]
    options += ["--conf-dir", str(Path(__file__).parent), "--define", f"html_extra_path={sources / '_extra'}"]
    return build_main([*options, str(sources), str(folder)])


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site")
    status = build(target)
    print(f"{target / 'index.html'}" if status == 0 else "the site has warnings, see above")
    sys.exit(status)
