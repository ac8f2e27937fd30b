"""``onnx``: a dense ONNX file by torch.export, for onnxruntime, OpenVINO and others."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_estdgm.export._program import exported_program
from lightning_estdgm.export.targets._protocol import ExportError, ExportInput, ExportTarget

OPSET = 18
_VARIADIC = ("Max", "Min", "Sum", "Mean")


class ONNX(ExportTarget):
    """An ONNX file with the zeros in full: it runs everywhere, and nothing gains from its zeros."""

    name = "onnx"
    suffix = ".onnx"
    requires: Sequence[str] = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"

    def write(self, given: ExportInput, path: Path) -> list[str]:
        """Write the model; weights go beside it where they exceed what one file of ONNX holds."""
        varying = write_onnx(given, path)
        return [
            f"opset {OPSET}, {varying}",
            "zeros are stored in full: no ONNX runtime gains from them (onnxruntime and OpenVINO run at dense speed), "
            "but the file zips to about the density; 8-bit weights, by the runtime's own tools, might be faster",
        ]

    def load(self, path: Path, given: ExportInput) -> Callable[..., Any]:
        """Return a session of onnxruntime, with as many threads as PyTorch has."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]

        def run(*args: Any, **kwargs: Any) -> list[Tensor]:
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, feeds)]

        return run


def write_onnx(given: ExportInput, path: Path) -> str:
    """Write an ONNX file and say which dimensions of the inputs may vary.

    Raises:
        ExportError: if there is no ONNX operator for a part of the model.

    """
    program, varying = exported_program(given)
    said = io.StringIO()
    try:
        with _quietly(said):
            written = cast(Any, torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False))
            for node in written.model.graph.all_nodes():
                node.metadata_props.clear()  # stack traces with the paths of this machine
                if node.op_type in _VARIADIC and len(node.inputs) == 1:
                    node.op_type = "Identity"  # what it is; MNN's converter crashes on the other
            written.save(path, external_data=_exceeds_one_file(given))
    except Exception as e:
        lines = str(e).strip().splitlines() or said.getvalue().strip().splitlines()
        way_out = "" if given.dynamic == "none" else '\nFixed sizes, dynamic="none", may help.'
        raise ExportError("torch.onnx.export failed:\n" + "\n".join(lines[-12:]) + way_out) from e
    return varying


def _exceeds_one_file(given: ExportInput) -> bool:
    """Whether weights exceed the 2 GB of a protocol buffer, with room for the graph."""
    return sum(t.numel() * t.itemsize for t in given.model.state_dict().values()) > 1.9e9


@contextlib.contextmanager
def _quietly(said: io.StringIO) -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


TARGET = ONNX()
