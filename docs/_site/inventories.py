"""Inventories of other projects' documentation, where they can be had: a build without the network goes without."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from pathlib import Path


def reachable(
    sites: Mapping[str, str], cache: Path, timeout_s: float = 5.0
) -> dict[str, tuple[str, tuple[str | None, ...]]]:
    """Return what `intersphinx_mapping` takes, of those sites only whose inventory is in the cache or answers now.

    Args:
        sites: base address by name.
        cache: folder for the inventories, so that each is asked for once.
        timeout_s: how long to wait for an answer.

    """
    found: dict[str, tuple[str, tuple[str | None, ...]]] = {}
    for name, address in sites.items():
        file = cache / f"{name}.inv"
        if not file.exists():
            try:
                with urllib.request.urlopen(f"{address}/objects.inv", timeout=timeout_s) as answer:
                    content = answer.read()
            except OSError:
                continue
            if not content.startswith(b"# Sphinx inventory"):
                continue
            cache.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        found[name] = (address, (str(file),))
    return found
