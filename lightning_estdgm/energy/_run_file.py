"""`energy.json`: the file that tells `estdgm report` and other programs what a run was and what it used."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "energy.json"
FORMAT, VERSION = "lightning_estdgm.energy", 1


def run_file_content(
    *, status: str, run: Mapping[str, Any], method: Mapping[str, Any] | None, energy: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of the file.

    Args:
        status: "finished" or "exception".
        run: Description of the run: model, batch size, precision, devices, versions.
        method: Summary of the training method; None for an ordinary run.
        energy: Result of `EnergyMonitor.summary`.
    """
    return {"version": VERSION, "format": FORMAT, "status": status, "run": run, "method": method, "energy": energy}


def write_run_file(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write `energy.json` in one move: readers see the old file or the new one, whole.

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
        os.replace(temporary, folder / FILE_NAME)
    except BaseException:
        os.unlink(temporary)
        raise
    return folder / FILE_NAME
