"""`energy.json`: the file that tells `estdgm report` and other programs what a run was and what it used."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

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


def write_run_file(folder: str | Path, content: Mapping[str, Any]) -> PurePath:
    """Write `energy.json`; on a local disk in one move: readers see the old file or the new one, whole.

    It is strict JSON: numbers that are not finite, as a method may report, become null.

    The file of another run stays as it is: this run's is then ``energy-1.json``, or the next free number. A file that
    is there is replaced if this run continues the one that wrote it.

    Args:
        folder: Folder of the run, local or any URL that fsspec can write; made where it is missing.
        content: Content, as `run_file_content` gives it.

    Returns:
        The path of the file; a remote one without its protocol.

    Raises:
        OSError: The folder cannot be made or written.
    """
    files, place = url_to_fs(str(folder))
    text = json.dumps(_strict(content), indent=1, allow_nan=False) + "\n"
    files.makedirs(place, exist_ok=True)
    names = (f"energy-{number}.json" if number else FILE_NAME for number in itertools.count())
    if not isinstance(files, LocalFileSystem):
        files.invalidate_cache()  # else a run that came since is not seen
        paths = (f"{place}/{name}" for name in names)
        free = next(p for p in paths if not files.exists(p) or _continues(content, partial(files.cat_file, p)))
        files.pipe_file(free, text.encode())
        return PurePosixPath(free)
    handle, temporary = tempfile.mkstemp(prefix=f".{FILE_NAME}.", dir=place)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp keeps it from everybody else
        return next(path for name in names if _take(path := Path(place, name), temporary, content))
    finally:
        with suppress(FileNotFoundError):  # moved
            os.unlink(temporary)


def _strict(value: Any) -> Any:
    """Return the value with None in place of numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {_strict(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    if not _continues(content, path.read_bytes):
        return False
    os.replace(temporary, path)
    return True


def _continues(content: Mapping[str, Any], read: Callable[[], bytes]) -> bool:
    """Return whether a run continues the one whose file `read` gives, or repeats an attempt of its own that failed."""
    try:
        before = json.loads(read())
        theirs, ours = ({fit["id"]: fit["steps"] for fit in each["run"]["fits"]} for each in (before, content))
        first, last = next(iter(theirs)), next(reversed(theirs))
    except (OSError, ValueError, LookupError, TypeError, StopIteration):  # of an older version, or no run's file
        return False
    if before.get("status") == FINISHED:  # a run that branched off before its end does not hold its joules
        return ours.get(last, -1) >= theirs[last]
    return first in ours
