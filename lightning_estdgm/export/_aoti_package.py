"""Packages of AOTInductor with packed layers: what is recorded of the CPU they are built for, and loading them."""

from __future__ import annotations

import json
import platform
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_estdgm._environment import instruction_sets
from lightning_estdgm.sparse.backends.native._operator import operator_library

_MACHINE, _SETS = "ESTDGM_MACHINE", "ESTDGM_CPU"


def cpu_metadata() -> dict[str, str]:
    """Return what a package says of the CPU it is built on: its kind and its vector instruction sets."""
    return {_MACHINE: platform.machine(), _SETS: " ".join(instruction_sets())}


def load_aoti(path: str | Path) -> Callable[..., Any]:
    """Load an AOTInductor package that `export_model` has written, with the operator of packed layers.

    Args:
        path: the ``.pt2`` file. Code in it is run: load files of your own only.

    Returns:
        The network as a function of its inputs.

    Raises:
        RuntimeError: if it was built for instructions that this CPU lacks, or the operator cannot be built here.
        ValueError: if it is no AOTInductor package.

    """
    recorded = _metadata(Path(path))
    machine, needed = recorded.get(_MACHINE, platform.machine()), set(recorded.get(_SETS, "").split())
    here = instruction_sets()
    if machine != platform.machine():
        raise RuntimeError(
            f"{path} was built for {machine}, and this CPU is {platform.machine()}: export the model anew on a machine "
            "of this kind"
        )
    if here and (lacking := sorted(needed - set(here))):
        raise RuntimeError(
            f"{path} was built on a CPU with {', '.join(lacking)}, which this one lacks: export the model anew on this "
            "machine or one of its kind, or as --to packed, whose files run on every CPU"
        )
    operator_library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Package(torch._inductor.aoti_load_package(str(path)))


class _Package:
    """A loaded package as a function.

    PyTorch's own parses the package's description of inputs and outputs, which are JSON, at each call: a third of the
    time of a small network. Where inputs are tensors by position and the output is one tensor, nothing is parsed.
    """

    def __init__(self, whole: Any) -> None:
        self._whole = whole
        inputs, output = map(pytree.treespec_loads, whole.loader.get_call_spec())
        positional, named = inputs.children_specs
        is_plain = all(spec.is_leaf() for spec in positional.children_specs) and not named.children_specs
        self._plain_inputs = len(positional.children_specs) if is_plain and output.is_leaf() else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == self._plain_inputs and not kwargs and all(isinstance(arg, Tensor) for arg in args):
            loader = self._whole.loader
            return getattr(loader, "boxed_run", loader.run)(list(args))[0]  # torch 2.6 has no boxed_run
        return self._whole(*args, **kwargs)

    def get_metadata(self) -> Mapping[str, str]:
        """Return what the package says of itself."""
        found: Mapping[str, str] = self._whole.get_metadata()
        return found


def _metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a package; nothing of it is run."""
    try:
        with zipfile.ZipFile(path) as package:
            names = [name for name in package.namelist() if name.endswith("_metadata.json")]
            return {key: value for name in names for key, value in json.loads(package.read(name)).items()}
    except (zipfile.BadZipFile, ValueError) as e:
        raise ValueError(f"{path} is no AOTInductor package: {e}") from e
