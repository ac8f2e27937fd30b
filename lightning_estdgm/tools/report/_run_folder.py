"""Reading the folder of a run: the summary that EnergyMonitor wrote, and the curves logged beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_estdgm.energy._run_file import FILE_NAME, FORMAT, VERSION, is_run_file
from lightning_estdgm.tools.report._curve import Curve
from lightning_estdgm.tools.report._finished_run import FinishedRun

_NEEDED: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "run": {"model": (dict,)},
    "energy": {
        "method": (str,),
        "total_joules": (int, float, type(None)),
        "measured_joules": (int, float, type(None)),
        "estimated_joules": (int, float, type(None)),
        "by_phase": (dict,),
        "seconds_by_phase": (dict,),
        "seconds": (int, float),
        "sources": (list,),
        "coverage_ratio": (int, float),
        "gaps": (int,),
    },
}
_ENTRIES: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "sources": {"name": (str,), "method": (str,), "devices": (list,)},
    "absent": {"name": (str,), "reason": (str,)},
    "failing": {"host": (str,), "kind": (str,), "uid": (str,)},
}
_DEVICE: Mapping[str, tuple[type, ...]] = {
    "host": (str,),
    "kind": (str,),
    "uid": (str,),
    "name": (str,),
    "joules": (int, float, type(None)),
}


class RunError(ValueError):
    """A folder that does not hold one readable run."""


def find_summary(folder: Path) -> Path:
    """The one energy.json in a folder or below it; of several in one folder, the file that the user named.

    Raises:
        RunError: There is no such folder, no summary in it, or several.
    """
    if folder.is_file() and is_run_file(folder):
        return folder
    if not folder.is_dir():
        raise RunError(
            f"{folder}: expected the folder of a run, got {'a file' if folder.exists() else 'nothing there'}"
        )
    found = _summaries_below(folder)
    if not found:
        raise RunError(
            f"{folder}: no {FILE_NAME} in it or below. EnergyMonitor writes it at the end of fit and at each "
            "checkpoint, into the folder of the first logger, else into default_root_dir"
        )
    if len(found) > 1:
        parents = [path.parent for path in found]
        places = [str(path if parents.count(path.parent) > 1 else path.parent) for path in found]
        raise RunError(f"{folder}: got {len(found)} runs, expected one; name one of {', '.join(places)}")
    return found[0]


def _summaries_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("energy*.json") if is_run_file(path))


def read_run(folder: str | Path, label: str | None = None) -> FinishedRun:
    """Read a run: its energy.json and the curves beside it.

    Of several runs in one folder no curves are read, as nothing tells whose they are.

    Raises:
        RunError: The folder does not hold one run, or its summary is broken or of a newer version than this one reads,
            or its curves are no CSV.
    """
    folder = Path(folder)
    path = find_summary(folder)
    alone = sum(map(is_run_file, path.parent.glob("energy*.json"))) == 1
    return FinishedRun(folder, _read_summary(path), _read_curves(path.parent) if alone else {}, label)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise RunError(f"{path}: not readable as JSON ({e}); was it cut off?") from e
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise RunError(f"{path}: expected the format {FORMAT!r}, got {got!r}")
    version = content.get("version")
    if not isinstance(version, int) or version < 1:
        raise RunError(f"{path}: expected version {VERSION}, got {version!r}")
    if version > VERSION:
        raise RunError(
            f"{path}: got version {version}, this lightning_estdgm reads version {VERSION}; "
            "make the report with the newer one that wrote it"
        )
    for part, keys in _NEEDED.items():
        if not isinstance(content.get(part), dict):
            raise RunError(f"{path}: {part!r} is missing")
        _check(path, part, content[part], keys)
    energy = content["energy"]
    for part, keys in _ENTRIES.items():
        if part in energy:
            _check_each(path, f"energy.{part}", energy[part], keys)
    for i, source in enumerate(energy["sources"]):
        _check_each(path, f"energy.sources.{i}.devices", source["devices"], _DEVICE)
    return content


def _check_each(path: Path, place: str, entries: Any, keys: Mapping[str, tuple[type, ...]]) -> None:
    """Check a list of objects, as `_check` does each."""
    if not isinstance(entries, list):
        raise RunError(f"{path}: {place}: got {entries!r}, expected list")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise RunError(f"{path}: {place}.{i}: got {entry!r}, expected dict")
        _check(path, f"{place}.{i}", entry, keys)


def _check(path: Path, place: str, content: Mapping[str, Any], keys: Mapping[str, tuple[type, ...]]) -> None:
    """Check that an object of a summary has these keys, with values of these types.

    Raises:
        RunError: It does not; the message names the file, the place in it and what was expected.
    """
    for key, types in keys.items():
        value = content.get(key, path)  # the path is of no type that is expected
        if not isinstance(value, types):
            got = "nothing" if value is path else repr(value)
            raise RunError(f"{path}: {place}.{key}: got {got}, expected {' or '.join(t.__name__ for t in types)}")


def _read_curves(folder: Path) -> dict[str, Curve]:
    """From TensorBoard's event files and CSVLogger's metrics.csv; where both have a tag, TensorBoard's."""
    return _read_csv(folder / "metrics.csv") | _read_events(folder)


def _read_csv(path: Path) -> dict[str, Curve]:
    if not path.is_file():
        return {}
    points: dict[str, list[tuple[int, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if None in row or None in row.values():  # a line that a crash cut off, or that another runs on from
                    continue
                for tag, text in row.items():
                    with suppress(LookupError, OverflowError, ValueError):  # empty cells, and rows without a step
                        point = int(float(row["step"])), float(text)
                        points.setdefault(tag, []).append(point)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise RunError(f"{path}: not readable as CSV ({e})") from e
    return {tag: Curve.of(series) for tag, series in points.items() if tag != "step"}


def _read_events(folder: Path) -> dict[str, Curve]:
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()  # 0: all of them
    return {
        tag: Curve.of((point.step, point.value) for point in events.Scalars(tag)) for tag in events.Tags()["scalars"]
    }
