"""`scripts/set_up.py`: what a stage of setting up says, and when it is over."""

import importlib.util
import os
import subprocess
import sys
import zipfile
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


def test_uv_is_told_what_pip_is_told(set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pip")  # environments that uv makes have none
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nconstraint = /a.txt\nfind-links =\n  /wheels\n  /more\n"
        "[install]\nindex-url = https://b/simple\n[download]\nconstraint = /not-this.txt\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    told = set_up.uv("uv").environment
    assert told["UV_FIND_LINKS"] == "/wheels,/more"
    assert told["UV_CONSTRAINT"] == "/a.txt"
    assert told["UV_DEFAULT_INDEX"] == "https://b/simple"
    monkeypatch.setenv("PIP_CONSTRAINT", "/c.txt")
    assert set_up.uv("uv").environment["UV_CONSTRAINT"] == "/c.txt", "the environment comes before files"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mine/simple")
    assert "UV_DEFAULT_INDEX" not in set_up.uv("uv").environment, "what uv is told itself stands"


@pytest.mark.timeout(120)
def test_pip_brings_uv_where_it_can(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no uv there
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert set_up.find_uv() is None
    assert "No matching distribution found for uv" in capfd.readouterr().err
    info = "uv-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "uv-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("its_uv.py", "def main():\n    print('it runs')\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: uv\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\nuv = its_uv:main\n")
        wheel.writestr(f"{info}/RECORD", "")
    program = set_up.find_uv()
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "it runs\n"
    assert "uv, which installs faster, by pip" in capfd.readouterr().out
    assert set_up.find_uv() == program, "it is there now"
