"""``mnn``: a file for MNN, whose products skip zeros of any pattern; phones run it too."""

from __future__ import annotations

import os
import pickle
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_estdgm.export import _mnn_process
from lightning_estdgm.export.targets._protocol import ExportError, ExportInput, ExportTarget
from lightning_estdgm.export.targets.onnx import write_onnx

_OPTIONS: Mapping[str, Sequence[str]] = {
    "fp32": ("--detectSparseSpeedUp",),
    "int8": ("--weightQuantBits", "8", "--weightQuantAsymmetric", "0"),  # asymmetric makes every zero a nonzero
}
_CONVERT_S, _ANSWER_S = 1800.0, 300.0
_CALLS = 7


class MNN(ExportTarget):
    """A file of MNN by way of ONNX: sparse in fp32, or with symmetric 8-bit weights, which MNN computes dense."""

    name = "mnn"
    suffix = ".mnn"
    values: Sequence[str] = tuple(_OPTIONS)
    requires: Sequence[str] = ("MNN", "_tools", "onnx", "onnxscript")
    extra = "mnn"

    def write(self, given: ExportInput, path: Path) -> list[str]:
        """Write the file, and with fp32 a dense one beside, if that is faster on the example input."""
        onnx = path.with_suffix(".onnx")
        try:
            varying = write_onnx(given, onnx)
            _convert(onnx, path, _OPTIONS[given.values])
            if given.values == "int8":
                return [varying, "8-bit symmetric weights, computed dense: MNN's sparse products are fp32 only"]
            return [varying, self._dense_beside(onnx, path, given)]
        finally:
            for file in path.parent.glob(f"{onnx.name}*"):
                file.unlink()

    def load(self, path: Path, given: ExportInput) -> Callable[..., Any]:
        """Return MNN's module, in a process of its own, with as many threads as PyTorch has."""
        return _Runner(path)

    def _dense_beside(self, onnx: Path, path: Path, given: ExportInput) -> str:
        dense = path.with_name(f"{path.stem}.dense{self.suffix}")
        _convert(onnx, dense, ())
        sparse_s, dense_s = (_seconds(_Runner(file), given) for file in (path, dense))
        if dense_s < sparse_s:
            return (
                f"MNN's sparse products lose at few tokens: {dense.name} is dense, {sparse_s / dense_s:.2f} times as "
                "fast on the example input; serve that where such calls matter"
            )
        dense.unlink()
        return f"sparse, {dense_s / sparse_s:.2f} times as fast as MNN's own dense on the example input"


class _Runner:
    """A file of MNN as a function of tensors: a process computes it, which ends with this object."""

    def __init__(self, path: Path) -> None:
        call = [sys.executable, _mnn_process.__file__, "run", str(path), str(torch.get_num_threads())]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=_environment()
        )
        weakref.finalize(self, _end, self._process, self._said)

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the outputs as a list.

        Raises:
            ExportError: if the process ends or does not answer; its last lines.

        """
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            pickle.dump([tensor.numpy() for tensor in tensors], self._process.stdin)
            self._process.stdin.flush()
            with selectors.DefaultSelector() as waiting:
                waiting.register(self._process.stdout, selectors.EVENT_READ)
                if not waiting.select(_ANSWER_S):
                    raise ExportError(f"MNN did not answer within {_ANSWER_S:.0f} s\n{self._last_lines()}")
            return [torch.from_numpy(array) for array in pickle.load(self._process.stdout)]
        except (EOFError, OSError, pickle.UnpicklingError) as e:
            status = self._process.wait()
            raise ExportError(f"MNN cannot run what it converted (exit status {status})\n{self._last_lines()}") from e

    def _last_lines(self) -> str:
        self._said.seek(0)
        return _last_lines(self._said.read().decode(errors="replace"))


def _end(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    process.kill()
    process.communicate()
    said.close()


def _environment(home: str | None = None) -> dict[str, str]:
    """Return variables for MNN's process: no programs to call, and this process's modules."""
    found = {"PATH": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return found if home is None else found | {"HOME": home}


def _convert(onnx: Path, path: Path, options: Sequence[str]) -> None:
    """Run MNN's converter where it can neither install packages nor leave files.

    Raises:
        ExportError: with its last lines, if it fails or writes nothing.

    """
    files = ["--modelFile", str(onnx.absolute()), "--MNNModel", str(path.absolute())]  # its folder is another
    call = ["-f", "ONNX", *files, "--bizCode", "estdgm", *options]
    with tempfile.TemporaryDirectory() as home:
        try:
            done = subprocess.run(
                [sys.executable, _mnn_process.__file__, "convert", *call],
                cwd=home, env=_environment(home), text=True, errors="replace", timeout=_CONVERT_S, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as e:
            raise ExportError(f"MNN's converter did not end within {_CONVERT_S:.0f} s") from e
    if done.returncode or not path.exists() or not path.stat().st_size:
        raise ExportError(f"MNN's converter failed (exit status {done.returncode}):\n{_last_lines(done.stdout)}")


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-12:])


def _seconds(run: Callable[..., Any], given: ExportInput) -> float:
    taken = []
    for _ in range(_CALLS + 1):
        start = time.perf_counter()
        run(*given.args, **given.kwargs)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


TARGET = MNN()
