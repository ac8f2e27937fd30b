"""Builds sdist and wheel, installs the wheel into an environment of its own, and uses it there: ``make package``.

Nothing of this folder is on the path of that environment, and no extras are installed: what the package needs, it
has to ask for itself, and the sources of the compiled backend have to be in the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_estdgm"
SOURCE_ENDINGS = {".py", ".cpp", ".h", ".j2", ".yaml", ".typed"}

FIT = """
import importlib.util, sys
from pathlib import Path
import lightning.pytorch as pl
import lightning_estdgm
from lightning_estdgm import DGMCallback, DGMConfig, EnergyMonitor, Units
from lightning_estdgm.recipes import ByteGPT, StdlibText

assert Path(lightning_estdgm.__file__).is_relative_to(sys.prefix), lightning_estdgm.__file__
assert importlib.util.find_spec("pytest") is None, "the development extra is here"
dgm = DGMCallback(DGMConfig(units=Units(size=16), backend=sys.argv[1]))
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = pl.Trainer(max_steps=20, accelerator="cpu", callbacks=[dgm, EnergyMonitor()], limit_val_batches=0, **quiet)
trainer.fit(ByteGPT(width=64, layers=1, heads=2, context=32), StdlibText(context=32, batch_size=4))
assert dgm.controller.steps == 20
assert {layer.backend for layer in dgm.decisions() if layer.masked} == {sys.argv[1]}
assert dgm.density < 0.12, dgm.density
"""


def call(what: str, command: Sequence[str | Path], allowed: Sequence[int] = (0,), **settings: object) -> None:
    """Say what is done, and run a command; print what it said and end if it fails."""
    print(f"{what} ...", flush=True)
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **settings,  # type: ignore[call-overload]
    )
    if done.returncode not in allowed:
        sys.exit(f"{done.stdout}\n{what}: exit status {done.returncode}")


def sources() -> set[str]:
    """Return the package's files, as they have to be in wheel and sdist."""
    files = (path for path in PACKAGE.rglob("*") if path.suffix in SOURCE_ENDINGS and path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files}


def main() -> None:
    """Build, install, use."""
    backend = "native" if shutil.which(os.environ.get("CXX", "c++")) else "cpu"
    if backend == "cpu":
        if os.environ.get("CI"):
            sys.exit("no C++ compiler: the native backend cannot be built from the wheel")
        print("no C++ compiler here: the fit runs on the backend that needs none")
    with tempfile.TemporaryDirectory(prefix="estdgm-package-") as name:
        folder = Path(name)
        call("building sdist, and the wheel from it", [sys.executable, "-m", "build", "--outdir", folder, ROOT])
        (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            shipped = {member.partition("/")[2] for member in archive.getnames()}
        for kind, files in (("sdist", shipped), ("wheel", set(zipfile.ZipFile(wheel).namelist()))):
            if missing := sources() - files:
                sys.exit(f"not in the {kind}: {', '.join(sorted(missing))}")
        venv.create(folder / "venv", with_pip=True)
        bin_, python = folder / "venv" / "bin", folder / "venv" / "bin" / "python"
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
        call(f"installing {sys.argv[1]}", [*pip, sys.argv[1]])
        call(f"installing {wheel.name}, and what it asks for", [*pip, wheel])
        away = {"cwd": folder, "env": {**clean(), "XDG_CACHE_HOME": str(folder / "cache")}}
        call("estdgm --help", [bin_ / "estdgm", "--help"], **away)
        call("estdgm doctor", [bin_ / "estdgm", "doctor"], allowed=(0, 1), **away)  # 1: no counter of energy here
        call(f"20 steps by the {backend} backend", [python, "-c", FIT, backend], **away)
    print("the package builds, installs and trains")


def clean() -> dict[str, str]:
    """Return the environment without what leads Python to this folder."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


if __name__ == "__main__":
    main()
