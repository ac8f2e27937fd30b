"""Public names: docs/api lists them, packages offer them, and everything else is private by its name."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest

from helpers.public_names import NAMES, PUBLIC

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_estdgm"
PAGE = ROOT / "docs" / "api" / "README.md"

COLLECTING = {"lightning_estdgm.method._schedules"}
"""Private packages that say what their modules offer the rest of the package."""

DISCOVERED = {
    "lightning_estdgm.distributed.adapters": "ADAPTER",
    "lightning_estdgm.energy.sources": "SOURCE",
    "lightning_estdgm.export.targets": "TARGET",
    "lightning_estdgm.sparse.backends": "BACKEND",
}
"""Discovery folders, and the name that each of their modules offers."""

PLAIN = {
    "lightning_estdgm.callbacks.dgm",
    "lightning_estdgm.callbacks.energy",
    "lightning_estdgm.callbacks.requeue",
    "lightning_estdgm.cli",
    "lightning_estdgm.config",
    "lightning_estdgm.plugins.checkpoint_io",
    "lightning_estdgm.recipes.gnn",
    "lightning_estdgm.recipes.gpt",
    "lightning_estdgm.recipes.graph_files",
    "lightning_estdgm.recipes.idx_images",
    "lightning_estdgm.recipes.image_folders",
    "lightning_estdgm.recipes.resnet",
    "lightning_estdgm.recipes.stdlib_text",
    "lightning_estdgm.recipes.text_files",
}
"""Modules of plain names whose public names a public package offers, and the command line."""

AT_MOST_AT_THE_ROOT = 22


def modules() -> dict[str, Path]:
    """Every module and package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_empty(path: Path) -> bool:
    """Whether a module holds nothing but its docstring."""
    return len(ast.parse(path.read_text()).body) <= 1


def listed() -> dict[str, list[str]]:
    """Names on the page, by package."""
    found: dict[str, list[str]] = {}
    for line in PAGE.read_text().splitlines():
        if title := re.fullmatch(r"## `([\w.]+)`", line):
            names = found.setdefault(title[1], [])
        elif row := re.match(r"\| `(\w+)` \|", line):
            names.append(row[1])
    return found


def assigned_docstring(module: ModuleType, name: str) -> str:
    """The string that follows the assignment of a module's name."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, following in itertools.pairwise(body):
        target = statement.target if isinstance(statement, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == name and isinstance(following, ast.Expr):
            return str(ast.literal_eval(following.value))
    return ""


def test_the_page_lists_the_public_names_and_no_others() -> None:
    offered = {package: sorted(importlib.import_module(package).__all__) for package in PUBLIC}
    assert {package: sorted(names) for package, names in listed().items()} == offered


def test_no_other_module_says_that_names_are_public() -> None:
    saying = {name for name, path in modules().items() if "__all__" in path.read_text()} - {"lightning_estdgm._lazy"}
    assert saying == PUBLIC | COLLECTING


@pytest.mark.parametrize("name", [name for name in modules() if name not in PUBLIC | PLAIN])
def test_every_other_module_is_private_by_its_name(name: str) -> None:
    folder = name.rpartition(".")[0]
    if any(part.startswith("_") for part in name.split(".")):
        return
    if folder in DISCOVERED:
        assert hasattr(importlib.import_module(name), DISCOVERED[folder])
        return
    path = modules()[name]
    assert path.name == "__init__.py", f"{name} has no underscore"
    assert is_empty(path), f"{name} has names and no underscore"


def test_the_plain_modules_are_there_and_define_public_names() -> None:
    values = [getattr(importlib.import_module(package), name) for package, name in NAMES]
    defining = {value.__module__ for value in values if hasattr(value, "__module__")}
    assert modules().keys() >= PLAIN
    assert defining >= PLAIN - {"lightning_estdgm.cli"}


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_a_public_name_imports_and_is_documented(package: str, name: str) -> None:
    module = importlib.import_module(package)
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        docstring = value.__doc__ or ""
    else:
        docstring = assigned_docstring(module, name)
    assert docstring.strip()
    assert not docstring.startswith(f"{name}("), "a dataclass makes one up where there is none"


def test_the_root_offers_few_names() -> None:
    assert len(importlib.import_module("lightning_estdgm").__all__) <= AT_MOST_AT_THE_ROOT
