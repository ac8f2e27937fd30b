"""Blocked products on the CPU by a small compiled operator.

``native.cpp`` is built by the machine's C++ compiler on first use and kept in the user's cache. Where there is no
compiler, the `cpu` backend does without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lightning_estdgm.topology import BlockTopology

__all__ = ["BACKEND", "NativeBackend"]

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_BLOCK = 16  # the widest vector register; blocks are whole vectors


class _CannotBuild(Exception):
    """Why there is no compiled operator here."""


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lightning_estdgm"


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    except subprocess.CalledProcessError as e:
        raise _CannotBuild(f"{command[0]} failed: {e.stderr.strip()[-500:] or e}") from None
    except (OSError, subprocess.TimeoutExpired) as e:
        raise _CannotBuild(f"{command[0]} failed: {e}") from None


def _build() -> Path:
    """Return the compiled library, from the cache if this source was built there for this CPU by this compiler."""
    named = os.environ.get("CXX")
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise _CannotBuild(f"no C++ compiler was found ({f'CXX={named}' if named else 'c++, g++, clang++'})")
    # What the compiler knows about this CPU decides the code: one cache may serve several machines.
    target = _run([compiler, *_FLAGS, "-x", "c++", "-E", "-dM", os.devnull])
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), compiler, target]).encode()).hexdigest()[:16]
    library = _cache_folder() / f"native-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # several ranks may build at once
            built = Path(folder) / library.name
            _run([compiler, *_FLAGS, str(_SOURCE), "-o", str(built)])
            built.replace(library)
    return library


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """Return the compiled operator, or why there is none."""
    try:
        library = ctypes.CDLL(str(_build()))
    except (_CannotBuild, OSError) as e:
        return str(e)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for dtype in _DTYPES.values() if library.estdgm_has_bfloat16() else ("float32",):
        linear = getattr(library, f"estdgm_linear_{dtype}")
        linear.argtypes = [pointer, size, size, pointer, size, size, *[pointer] * 3, *[size] * 3, pointer, size]
        linear.argtypes += [ctypes.c_int]
        grad_weight = getattr(library, f"estdgm_grad_weight_{dtype}")
        grad_weight.argtypes = [pointer, size, pointer, size, size, *[pointer] * 2, *[size] * 3, pointer, ctypes.c_int]
    return library


def _function(name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    library = _library()
    assert not isinstance(library, str)
    function: ctypes._NamedFuncPointer = getattr(library, f"estdgm_{name}_{_DTYPES[dtype]}")
    return function


def _rows(matrix: Tensor) -> Tensor:
    """Return the matrix with adjacent columns in memory: as it is, or a copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("the native backend found no memory for its buffers")


class NativeBackend:
    """One register-blocked loop over the active blocks, in parallel over tokens or blocks.

    Only active blocks of the weight are read: forward and input gradient copy them once a call into the order in which
    they are used. Sums are in float32. Results do not depend on the number of threads.
    """

    name = "native"

    def unsupported(self, device: torch.device, dtype: torch.dtype, topology: BlockTopology) -> str | None:
        """Reason why a case cannot be run, or None. The first call compiles (a few seconds, once a machine)."""
        if device.type != "cpu":
            return f"runs on CPU tensors only, got device {device}"
        if dtype not in _DTYPES:
            return f"needs float32 or bfloat16, got {dtype}"
        if topology.block_size % _BLOCK:
            return f"needs blocks of a multiple of {_BLOCK}, got block size {topology.block_size}"
        library = _library()
        if isinstance(library, str):
            return f"could not be compiled: {library}"
        if dtype is torch.bfloat16 and not library.estdgm_has_bfloat16():
            return "needs a CPU with AVX512_BF16 for bfloat16"
        return None

    def linear(self, x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        """``Y[:, r] = sum over active c of X[:, c] W[r, c]^T + bias[r]``: ``[T, in] -> [T, out]``."""
        y = x2d.new_empty(x2d.shape[0], topology.shape[0])
        if y.numel() == 0:
            return y
        x2d = _rows(x2d)
        bias = None if bias is None else bias.contiguous()
        failed = _function("linear", x2d.dtype)(
            x2d.data_ptr(),
            x2d.stride(0),
            x2d.shape[0],
            weight.data_ptr(),
            *weight.stride(),
            None if bias is None else bias.data_ptr(),
            topology.row_ptr.data_ptr(),
            topology.col_idx.data_ptr(),
            topology.block_rows,
            topology.shape[1],
            topology.block_size,
            y.data_ptr(),
            y.stride(0),
            torch.get_num_threads(),
        )
        _check(failed)
        return y

    def grad_input(self, dy2d: Tensor, weight: Tensor, topology: BlockTopology) -> Tensor:
        """``dX[:, c] = sum over active r of dY[:, r] W[r, c]``: ``[T, out] -> [T, in]``."""
        return self.linear(dy2d, weight.t(), None, topology.transpose())

    def grad_weight(self, dy2d: Tensor, x2d: Tensor, topology: BlockTopology) -> Tensor:
        """``dW[r, c] = dY[:, r]^T X[:, c]`` where active, else 0: ``[T, out], [T, in] -> [out, in]``."""
        if x2d.shape[0] == 0:
            return x2d.new_zeros(topology.shape)
        dw = x2d.new_empty(topology.shape)
        dy2d, x2d = _rows(dy2d), _rows(x2d)
        failed = _function("grad_weight", x2d.dtype)(
            dy2d.data_ptr(),
            dy2d.stride(0),
            x2d.data_ptr(),
            x2d.stride(0),
            x2d.shape[0],
            topology.row_ptr.data_ptr(),
            topology.col_idx.data_ptr(),
            topology.block_rows,
            topology.shape[1],
            topology.block_size,
            dw.data_ptr(),
            torch.get_num_threads(),
        )
        _check(failed)
        return dw


BACKEND = NativeBackend()
