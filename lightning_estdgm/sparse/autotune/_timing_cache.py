"""Timings of layers, kept on disk: what was timed once on a machine is not timed again by its next run.

One JSON file for each device model, number of threads and set of versions, in the user's cache folder. The
environment variable ``ESTDGM_CHOICES`` names another folder, or says ``off``. What is kept are the turns; the choice
is made from them anew. ``estdgm doctor`` shows them, and ``estdgm doctor --remeasure`` drops them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lightning_estdgm import sparse
from lightning_estdgm._environment import cache_folder, package_version, processor_name
from lightning_estdgm.sparse.autotune._cases import DENSE, Case, ConvCase, is_layer, layer_key, layer_of
from lightning_estdgm.sparse.autotune._timing import Timing
from lightning_estdgm.sparse.backends._protocol import backends

try:
    import fcntl
except ImportError:  # not on Windows
    _fcntl: ModuleType | None = None
else:
    _fcntl = fcntl


ENVIRONMENT = "ESTDGM_CHOICES"

_FORMAT = 2
_PATIENCE_S = 10.0  # for another process that writes; then on without a lock


@dataclass(frozen=True)
class LayerTiming:
    """Timing of one layer at one density, by each backend.

    Attributes:
        layer: Plain form of the layer, as `_cases.layer_of` returns it.
        density: Active share of its blocks.
        timing: Turns of forward and backward, for ``"dense"`` and each backend that was tried.
        when: Date and time in UTC, as ISO 8601.

    """

    layer: dict[str, Any]
    density: float
    timing: Timing
    when: str

    @property
    def seconds(self) -> dict[str, float]:
        """Time of forward and backward, by name."""
        return self.timing.seconds


def folder() -> Path | None:
    """Return the folder of the files (it need not exist yet); ``None`` if timings are not to be kept."""
    named = os.environ.get(ENVIRONMENT)
    if named is not None and named.lower() in ("off", "0", "false", "no"):
        return None
    return Path(named).expanduser() if named else cache_folder()


# ---- which machine


def device_name(device: torch.device) -> str:
    """Return the model of a device."""
    if device.type == "cpu":
        return processor_name()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def machine(device: torch.device) -> dict[str, Any]:
    """Return all that decides an operator's time here, other than its operands, in plain types."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "cores": _cores() if device.type == "cpu" else None,
        "instructions": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "torch": str(torch.__version__),
        "libraries": _libraries(device),
        "precision": _precision(device),
        "triton": package_version("triton"),
        "lightning-estdgm": package_version("lightning-estdgm"),
        "operators": _digest(Path(sparse.__file__)),
        "backends": {name: _build(backend, device) for name, backend in backends().items()},
    }


def _cores() -> int | None:
    """Return the number of cores that this process may use: threads share them where there are fewer."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _libraries(device: torch.device) -> dict[str, Any]:
    """Return the libraries that compute dense layers, and whether they may be used."""
    if device.type == "cpu":
        return {"onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled}
    cudnn = torch.backends.cudnn
    return {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": cudnn.version() if cudnn.enabled else None,
        "cudnn_benchmark": cudnn.benchmark,
    }


def _precision(device: torch.device) -> dict[str, Any]:
    """Return the settings by which the same dtype is computed faster or slower."""
    found = {
        "float32": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return found if device.type == "cpu" else found | {"cudnn_tf32": torch.backends.cudnn.allow_tf32}


def _build(backend: object, device: torch.device) -> str | None:
    """Return a hash of a backend from elsewhere and the build of a compiled one; ``None`` for any other backend."""
    parts = []
    if not type(backend).__module__.startswith(f"{sparse.__name__}."):
        with contextlib.suppress(TypeError, OSError):
            parts.append(_digest(Path(inspect.getfile(type(backend)))))
    build = getattr(backend, "build", None)
    if build is not None and (built := build(device)):
        parts.append(str(built))
    return " ".join(parts) or None


@functools.lru_cache
def _digest(module: Path) -> str:
    """Return a hash of a module's source, or of all files of a package."""
    paths = [module]
    if module.name == "__init__.py":
        paths = sorted(p for p in module.parent.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:12]


# ---- files


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _file_name(here: Mapping[str, Any]) -> str:
    key = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]
    return f"choices.{_slug(here['device'])}.{key}.json"


def files_of(device: torch.device) -> list[Path]:
    """Return every file about a device of this model, whatever the threads and versions."""
    where = folder()
    return [] if where is None else sorted(where.glob(f"choices.{_slug(device_name(device))}.*.json"))


def read_file(path: Path) -> tuple[dict[str, Any], list[LayerTiming]]:
    """Return the machine that a file is about, and the timings made there.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read.
        ValueError: It is no file of timings.

    """
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}, got {content['format']!r}")
        found = [LayerTiming(**{**row, "timing": Timing(**row["timing"])}) for row in content["measurements"]]
        if not isinstance(content["machine"], dict) or not all(map(_is_sane, found)):
            raise ValueError("expected a machine, and seconds of layers")
    except (KeyError, TypeError, ValueError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} does not hold measurements: {error}") from error
    return content["machine"], found


def _is_sane(row: LayerTiming) -> bool:
    turns, facts = row.timing.turns, (row.timing.own_share, row.timing.load)
    return (
        is_layer(row.layer)
        and isinstance(turns, dict)
        and DENSE in turns
        and len(turns) > 1
        and 0.0 < row.density <= 1.0
        and isinstance(row.when, str)
        and all(isinstance(name, str) and isinstance(seconds, list) and seconds for name, seconds in turns.items())
        and len(set(map(len, turns.values()))) == 1
        and all(math.isfinite(s) and s > 0 for seconds in turns.values() for s in seconds)
        and all(fact is None or math.isfinite(fact) for fact in facts)
    )


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing beside `path`.

    Where the system or the file system has no locks, go on without: files stay whole, and at worst what another process
    has just added is lost and measured again.
    """
    if _fcntl is None:
        yield
        return
    with open(path.with_suffix(".lock"), "a") as lock:
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end:
            try:
                _fcntl.flock(lock, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
            else:
                break
        yield


def _write(path: Path, content: Mapping[str, Any]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


class TimingCache:
    """Timings of layers on this machine, kept in files. What goes wrong with them warns once and stops no run."""

    def __init__(self) -> None:
        self._rows: dict[Path, dict[tuple[str, float], LayerTiming]] = {}
        self._warned: set[str] = set()

    def path(self, device: torch.device) -> Path | None:
        """Return the file about a device of this machine, ``None`` if none is to be kept; it need not exist yet."""
        where = folder()
        return None if where is None else where / _file_name(machine(device))

    def of(self, case: Case | ConvCase) -> list[LayerTiming]:
        """Return the timings of a case's layer, at any density."""
        path = self.path(case.device)
        if path is None:
            return []
        if path not in self._rows:
            self._rows[path] = self._read(path)
        key = layer_key(layer_of(case))
        return [row for (layer, _), row in self._rows[path].items() if layer == key]

    def add(self, case: Case | ConvCase, found: Timing | Mapping[str, float]) -> None:
        """Keep the timing of a case, beside those that other processes have added."""
        path = self.path(case.device)
        if path is None:
            return
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
        timing = Timing.of(found)
        turns = {name: list(seconds) for name, seconds in timing.turns.items()}
        row = LayerTiming(layer_of(case), case.density, replace(timing, turns=turns), now)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(path):
                rows = self._read(path)
                rows[layer_key(row.layer), row.density] = row
                content = {"format": _FORMAT, "machine": machine(case.device)}
                _write(path, content | {"measurements": [asdict(row) for row in rows.values()]})
        except OSError as error:
            self._warn(f"measured times of layers cannot be kept, so the next run will measure again: {error}")
            rows = {**self._rows.get(path, {}), (layer_key(row.layer), row.density): row}
        self._rows[path] = rows

    def _read(self, path: Path) -> dict[tuple[str, float], LayerTiming]:
        try:
            _, found = read_file(path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"measured times of layers are not used, and measured again: {error}")
            return {}
        return {(layer_key(row.layer), row.density): row for row in found}

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
