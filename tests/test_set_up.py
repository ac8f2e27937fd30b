"""`scripts/set_up.py`: what a stage of setting up says, and when it is over."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "set_up.py"


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("set_up", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "set_up", module)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def run(set_up: ModuleType, code: str) -> bool:
    """Run a line of Python as a stage."""
    ended: bool = set_up.run("[1 of 1] a stage", set_up.pip(), [sys.executable, "-c", code])
    return ended


@pytest.mark.timeout(60)
def test_a_stage_is_over_when_its_command_is(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(set_up, "EVERY_S", 3600.0)
    assert run(set_up, "print('Collecting a')")
    assert capsys.readouterr().out.splitlines() == ["[1 of 1] a stage ...", "    done in 0 s"]


def test_a_stage_that_takes_long_says_how_far_it_is(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(set_up, "EVERY_S", 0.2)
    assert run(set_up, "import time; print('  Downloading a-1.whl (2 MB)', flush=True); time.sleep(1)")
    assert "s: downloading a-1.whl (2 MB)" in capsys.readouterr().out


def test_a_stage_that_fails_shows_what_its_command_said(set_up: ModuleType, capsys) -> None:
    assert not run(set_up, "import sys; print('no such package'); sys.exit(1)")
    said = capsys.readouterr()
    assert "no such package" in said.err
    assert "done" not in said.out
