"""Start of the package and of its commands: each in a process of its own, which imports only what it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_estdgm
from helpers import run_files
from lightning_estdgm import energy, export, method, recipes
from lightning_estdgm._lazy import attach

HEAVY = {"torch", "lightning", "torchmetrics", "scipy", "transformers", "matplotlib"}
_TELL = """
import json, os, sys
from pathlib import Path
status = 0
try:
    {program}
except SystemExit as end:
    status = end.code or 0
Path(os.environ["TOLD"]).write_text(json.dumps([status, sorted(sys.modules)]))
"""


def run(program: str, folder: Path, *arguments: str) -> tuple[Any, set[str]]:
    """Run a line of Python with arguments; return its exit status and the modules that it has imported in the end."""
    told = folder / "modules.json"
    environment = {**os.environ, "TOLD": str(told), "XDG_CACHE_HOME": str(folder / "cache")}
    call = [sys.executable, "-c", _TELL.format(program=program), *arguments]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    status, modules = json.loads(told.read_text(encoding="utf-8"))
    return status, set(modules)


def command(folder: Path, *arguments: str) -> tuple[Any, set[str]]:
    return run("from lightning_estdgm.cli import main; main()", folder, *arguments)


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    status, modules = run("import lightning_estdgm; dir(lightning_estdgm); lightning_estdgm.__version__", tmp_path)
    assert status == 0
    assert "lightning_estdgm" in modules
    assert not HEAVY & modules


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("demo", "train", "study", "plan", "bench", "report", "export")),
    ],
    ids=" ".join,
)
def test_help_and_version_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    status, modules = command(tmp_path, *arguments)
    assert status == 0
    assert "lightning_estdgm.cli" in modules
    assert not HEAVY & modules


def test_report_loads_no_torch(tmp_path: Path) -> None:
    dense = run_files.write_run(tmp_path / "dense", run_files.falling(2.0))
    sparse = run_files.write_run(tmp_path / "sparse", run_files.falling(1.0), method=run_files.DGM)
    status, modules = command(tmp_path, "report", str(dense), str(sparse), "-o", str(tmp_path / "report.html"))
    assert status == 0
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert not {"torch", "lightning", "torchmetrics", "scipy", "transformers"} & modules


def test_densify_loads_no_lightning(tmp_path: Path) -> None:
    lightning_estdgm.SparseCheckpointIO().save_checkpoint({"x": 1}, tmp_path / "last.ckpt")
    status, modules = command(tmp_path, "densify", str(tmp_path / "last.ckpt"))
    assert status == 0
    assert (tmp_path / "last.dense.ckpt").exists()
    assert HEAVY & modules == {"torch"}


def test_plan_loads_no_lightning(tmp_path: Path) -> None:
    status, modules = command(tmp_path, "plan", "--params", "125e6", "--json", str(tmp_path / "plan.json"))
    assert status == 0
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == "lightning_estdgm.plan"
    assert "torch" in modules
    assert not {"lightning", "torchmetrics", "scipy", "transformers"} & modules


def test_doctor_loads_no_lightning(tmp_path: Path) -> None:
    status, modules = command(tmp_path, "doctor", "--json")
    assert status in (0, 1)  # 1: energy cannot be measured here
    assert HEAVY & modules == {"torch"}


@pytest.mark.parametrize(
    "package", [lightning_estdgm, energy, export, method, recipes], ids=lambda package: package.__name__
)
def test_every_public_name_is_there(package: Any) -> None:
    """As `dir` lists it, and as type checkers see it."""
    assert package.__all__
    assert set(package.__all__) <= set(dir(package))
    seen_by_checkers = {
        line.split(" as ")[-1]
        for line in Path(package.__file__).read_text(encoding="utf-8").splitlines()
        if line.startswith("    from ")
    }
    assert set(package.__all__) == seen_by_checkers
    for name in package.__all__:
        value = getattr(package, name)
        assert value.__name__ == name
        assert vars(package)[name] is value


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_estdgm' has no attribute 'Dgm'"):
        lightning_estdgm.Dgm  # noqa: B018
    get, names, public = attach("lightning_estdgm", {"sqrt": "math"})
    assert public == ["sqrt"]
    assert "sqrt" in names()
    with pytest.raises(AttributeError, match="no attribute 'cbrt'"):
        get("cbrt")
