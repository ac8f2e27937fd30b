"""`energy.json`: the file that tells `estdgm report` and other programs what a run was and what it used."""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE_NAME = "energy.json"
FORMAT, VERSION = "lightning_estdgm.energy", 1

RUNNING, FINISHED, EXCEPTION = "running", "finished", "exception"
"""Status of the run when the file was written."""


def run_file_content(
    *, status: str, run: Mapping[str, Any], method: Mapping[str, Any] | None, energy: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of the file.

    Args:
        status: "running", "finished" or "exception".
        run: Description of the run: model, batch size, precision, devices, versions, fits.
        method: Summary of the training method; None for an ordinary run.
        energy: Result of `EnergyMonitor.summary`.
    """
    return {"version": VERSION, "format": FORMAT, "status": status, "run": run, "method": method, "energy": energy}


def is_run_file(path: Path) -> bool:
    """Return whether a path has the name of a run's file: ``energy.json``, ``energy-1.json``, ...

    Example:
        >>> [is_run_file(Path(name)) for name in ("energy.json", "energy-12.json", "energy-old.json")]
        [True, True, False]
    """
    return re.fullmatch(r"energy(-\d+)?\.json", path.name) is not None


def write_run_file(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write `energy.json` in one move: readers see the old file or the new one, whole.

    The file of another run stays as it is: this run's is then ``energy-1.json``, or the next free number. A file that
    is there is replaced if this run continues the one that wrote it.

    Args:
        folder: Folder of the run; made where it is missing.
        content: Content, as `run_file_content` gives it.

    Returns:
        The path of the file.

    Raises:
        OSError: The folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{FILE_NAME}.", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp keeps it from everybody else
        paths = (folder / (f"energy-{number}.json" if number else FILE_NAME) for number in itertools.count())
        return next(path for path in paths if _take(path, temporary, content))
    finally:
        with suppress(FileNotFoundError):  # moved
            os.unlink(temporary)


def _take(path: Path, temporary: str, content: Mapping[str, Any]) -> bool:
    """Put the file at `path`, and return True, unless another run's is there."""
    if not path.exists():
        try:
            os.link(temporary, path)  # unlike a move, it fails where another run has just come first
            return True
        except FileExistsError:
            pass
        except OSError:  # no links on this file system
            os.replace(temporary, path)
            return True
    if not _continues(content, path):
        return False
    os.replace(temporary, path)
    return True


def _continues(content: Mapping[str, Any], path: Path) -> bool:
    """Return whether a run continues the one whose file this is, or repeats an attempt of its own that failed."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        theirs, ours = ({fit["id"]: fit["steps"] for fit in each["run"]["fits"]} for each in (before, content))
        first, last = next(iter(theirs)), next(reversed(theirs))
    except (OSError, ValueError, LookupError, TypeError, StopIteration):  # of an older version, or no run's file
        return False
    if before.get("status") == FINISHED:  # a run that branched off before its end does not hold its joules
        return ours.get(last, -1) >= theirs[last]
    return first in ours
