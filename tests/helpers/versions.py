"""The test suite with the oldest versions that pyproject.toml admits, and with the newest: ``make versions``.

Each set of versions goes into an environment of its own, so nothing installed changes. Printed are the versions and how
the tests ended, for docs/guides/compatibility.md. It takes the network, some 6 GB a set where torch comes with CUDA,
and as long as the suite does, and is no part of it. To run a part, or on another Python:

    PYTHONPATH=.:tests python -m helpers.versions oldest --python 3.10 tests/engine -n 2
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_ROOT = Path(__file__).parents[2]
_NAME = "lightning-estdgm"
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
"""What `uv` calls the oldest versions of what pyproject.toml names, and the newest."""

LIBRARIES = ("torch", "lightning", "torchmetrics", "numpy", "transformers", "torch-geometric", "jsonargparse", "triton")
_TORCH_BRINGS = ("triton",)  # the version that it was built with
_OF_OTHERS = (  # what libraries say of each other, and torch of itself
    "default::DeprecationWarning",
    "default::PendingDeprecationWarning",
    "default::FutureWarning",
    "default:Guards may run slower:RuntimeWarning",  # on Python 3.13.0
    "default:The .grad attribute:UserWarning",  # in opcheck of torch 2.15
)


def tools_of(extra: str) -> list[str]:
    """Return what an extra asks for, with the extras of this package that it names, but for what torch brings."""
    asked = [Requirement(text) for text in metadata.requires(_NAME) or ()]
    own = [
        r for r in asked if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]
    named = [tool for r in own if r.name == _NAME for inner in sorted(r.extras) for tool in tools_of(inner)]
    return named + [f"{r.name}{r.specifier}" for r in own if r.name not in (_NAME, *_TORCH_BRINGS)]


class Environment:
    """An environment with one set of versions.

    Args:
        folder: folder that is made.
        resolution: key of `RESOLUTIONS`.
        python: interpreter, or its version.

    Attributes:
        python: its interpreter.

    """

    def __init__(self, folder: Path, resolution: str, python: str) -> None:
        self.python = folder / "bin" / "python"
        tools = folder.with_name("uv")
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", tools, "uv"], check=True)
        self._uv = tools / "bin" / "uv"
        subprocess.run([self._uv, "venv", "-q", "--clear", "--python", python, folder], check=True)
        self._install("--resolution", RESOLUTIONS[resolution], "-r", "pyproject.toml", "--extra", "recipes")
        kept = folder.with_suffix(".txt")  # the tools must not move the versions that are tried
        kept.write_text("".join(self._named(self._pip("freeze").splitlines(keepends=True))))
        self._install("-c", str(kept), *tools_of("dev"))
        self._install("--no-deps", "-e", ".")

    def _named(self, frozen: list[str]) -> list[str]:
        """Return the lines of what pyproject.toml names itself; what those bring may move with the tools."""
        asked = [Requirement(text) for text in metadata.requires(_NAME) or ()]
        names = {canonicalize_name(r.name) for r in asked if not r.marker or r.marker.evaluate({"extra": "recipes"})}
        return [line for line in frozen if canonicalize_name(line.partition("==")[0]) in names]

    def _pip(self, command: str, *arguments: str) -> str:
        call = [self._uv, "pip", command, "-q", "--python", self.python, *arguments]
        return subprocess.run(call, cwd=_ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout

    def _install(self, *arguments: str) -> None:
        self._pip("install", *arguments)

    def versions(self) -> dict[str, str]:
        """Return the versions of `LIBRARIES` that are installed, and of Python."""
        pairs = (line.partition("==")[::2] for line in self._pip("freeze").splitlines())
        found = {name: version for name, version in pairs if name in LIBRARIES}
        code = "import platform; print(platform.python_version())"
        python = subprocess.run([self.python, "-c", code], check=True, text=True, stdout=subprocess.PIPE)
        return {"python": python.stdout.strip(), **{name: found.get(name, "none") for name in LIBRARIES}}

    def test(self, arguments: list[str]) -> str:
        """Run the tests and return pytest's last line; what failed goes to stderr."""
        lenient = shlex.join(word for name in _OF_OTHERS for word in ("-W", name))
        environment = {**os.environ, "PYTEST_ADDOPTS": lenient}  # for what tests start, too
        call = [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(call, cwd=_ROOT, env=environment, text=True, stdout=subprocess.PIPE)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
        lines = [line for line in done.stdout.splitlines() if " in " in line and ("passed" in line or "failed" in line)]
        return lines[-1].strip("= ") if lines else f"ended with {done.returncode}"


def main() -> None:
    """Print a table of the sets that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=[*RESOLUTIONS, "both"], default="both")
    parser.add_argument("--python", default=sys.executable, help="interpreter, or its version; default: this one")
    given, arguments = parser.parse_known_args()
    for name in RESOLUTIONS if given.which == "both" else (given.which,):
        with tempfile.TemporaryDirectory() as folder:
            environment = Environment(Path(folder, name), name, given.python)
            columns = {"": name, **environment.versions(), "tests": environment.test(arguments)}
        print(
            "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ["---"] * len(columns), columns.values())),
            flush=True,
        )


if __name__ == "__main__":
    main()
