"""Compiling and loading the operators of this folder: once a machine, kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lightning_estdgm._environment import cache_folder

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {  # of each function that is compiled for every dtype
    "linear": [_P, _N, _N, _P, _N, _N, _P, *[_P] * 4, *[_N] * 3, _I, _P, _P, _N, _P, _I],
    "grad_weight": [_P, _N, _P, _N, _N, _P, _P, *[_N] * 3, _I, _P, _P, _I],
    "units_linear": [_P, _N, _N, _P, _N, _N, _P, *[_P] * 4, *[_N] * 4, _I, _P, _P, _P, _N, _P, _I],
    "units_grad_weight": [_P, _N, _P, _N, _N, *[_P] * 4, *[_N] * 4, _I, _P, _P, _I],
    "units_conv": [_P, *[_N] * 4, _P, _N, _N, _P, *[_N] * 3, _P, *[_P] * 4, *[_N] * 4, _P, _P, *[_N] * 5, _P, _I],
    "units_conv_grad_weight": [_P, _N, _N, _P, *[_N] * 4, _P, *[_N] * 3, *[_P] * 4, *[_N] * 5, _P, _N, _N, _I],
    "conv": [_P, *[_N] * 4, _P, _N, _N, _P, *[_N] * 3, _P, _P, _P, _N, _N, _P, *[_N] * 5, _P, _I],
    "conv_grad_weight": [_P, _N, _N, _P, *[_N] * 4, _P, *[_N] * 3, _P, _P, *[_N] * 3, _P, _N, _I],
}


class CannotBuild(Exception):
    """There can be no compiled operator here; the message says why."""


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout
    except subprocess.CalledProcessError as e:
        raise CannotBuild(f"{command[0]} failed: {e.stderr.strip()[-500:] or e}") from None
    except (OSError, subprocess.TimeoutExpired) as e:
        raise CannotBuild(f"{command[0]} failed: {e}") from None


def _compiler() -> str:
    named = os.environ.get("CXX")
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise CannotBuild(f"no C++ compiler was found ({f'CXX={named}' if named else 'c++, g++, clang++'})")
    return compiler


def built(name: str, folders: Sequence[Path], flags: Sequence[str] = (), key: str = "") -> Path:
    """Return a compiled library, from the cache if this source was built there for this CPU by this compiler.

    Args:
        name: start of its file's name.
        folders: where its source is: the ``.cpp`` files of the first, the headers of all.
        flags: what the compiler is told beside this module's flags.
        key: what decides the code beside source, compiler and CPU.

    Raises:
        CannotBuild: if it cannot be compiled; the message says why.

    """
    compiler = _compiler()
    # What the compiler knows about this CPU decides the code: one cache may serve several machines.
    target = _run([compiler, *_FLAGS, "-x", "c++", "-E", "-dM", os.devnull])
    sources = sorted(folders[0].glob("*.cpp"))
    headers = [path for folder in folders for path in sorted(folder.glob("*.h"))]
    text = [path.read_text() for path in (*sources, *headers)]
    digest = hashlib.sha256("\0".join([*text, compiler, target, key]).encode()).hexdigest()[:16]
    path = cache_folder() / f"{name}-{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # several ranks may build at once
            made = Path(folder) / path.name
            _run([compiler, *_FLAGS, *map(str, sources), "-o", str(made), *flags])
            made.replace(path)
    return path


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """Return the compiled operator, or the reason why there is none."""
    try:
        loaded = ctypes.CDLL(str(built("native", (_FOLDER,))))
    except (CannotBuild, OSError) as e:
        return str(e)
    loaded.estdgm_units_plan.argtypes, loaded.estdgm_units_plan.restype = [_P, _P, _N, _N, _N], _P
    conv_plan = loaded.estdgm_units_conv_plan
    conv_plan.argtypes, conv_plan.restype = [_P, _P, *[_N] * 3, _P, _N, _N, _P], _P
    loaded.estdgm_kept_new.argtypes, loaded.estdgm_kept_new.restype = [], _P
    loaded.estdgm_kept_free.argtypes, loaded.estdgm_kept_free.restype = [_P], None
    loaded.estdgm_packings.argtypes, loaded.estdgm_packings.restype = [], _N
    weight_sum = loaded.estdgm_weight_sum
    weight_sum.argtypes, weight_sum.restype = [_P, *[_N] * 3, _P, _N, _N, _P, _P, *[_N] * 3, _I], ctypes.c_uint64
    loaded.estdgm_zero_outside.argtypes, loaded.estdgm_zero_outside.restype = [_P, *[_N] * 5, _P, _N, _N, _I], None
    for move in (loaded.estdgm_gather, loaded.estdgm_scatter):
        move.argtypes, move.restype = [_P, _P, _P, _N, _P, _P, _N, _I], None
    loaded.estdgm_units_free.argtypes, loaded.estdgm_units_free.restype = [_P], None
    for dtype in DTYPES.values() if loaded.estdgm_has_bfloat16() else ("float32",):
        for name, arguments in _ARGUMENTS.items():
            getattr(loaded, f"estdgm_{name}_{dtype}").argtypes = arguments
    return loaded


def library_in_use() -> ctypes.CDLL | None:
    """Return the compiled operator if a layer's product has loaded it; never build it."""
    found = library() if library.cache_info().currsize else None
    return None if isinstance(found, str) else found


def function(name: str, dtype: torch.dtype) -> Callable[..., int]:
    """Return the compiled function for a dtype; `library` must have been loaded."""
    loaded = library()
    assert not isinstance(loaded, str)
    found: Callable[..., int] = getattr(loaded, f"estdgm_{name}_{DTYPES[dtype]}")
    return found


def check(failed: int) -> None:
    """Raise MemoryError where a compiled function reports a failure."""
    if failed:
        raise MemoryError("the native backend found no memory for its buffers")
