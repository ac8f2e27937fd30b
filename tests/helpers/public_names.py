"""Public names, as the packages offer them."""

import importlib

PUBLIC = {
    "lightning_estdgm",
    "lightning_estdgm.distributed",
    "lightning_estdgm.energy",
    "lightning_estdgm.export",
    "lightning_estdgm.method",
    "lightning_estdgm.presets",
    "lightning_estdgm.recipes",
    "lightning_estdgm.sparse",
    "lightning_estdgm.tools.report",
}
"""Packages and modules whose names are public."""

NAMES = [(package, name) for package in sorted(PUBLIC) for name in importlib.import_module(package).__all__]
"""Package and name of each."""
