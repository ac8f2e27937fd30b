"""The graph of a model by torch.export, with the dimensions of its inputs that may vary."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from lightning_estdgm._environment import dynamo_settings
from lightning_estdgm.export.targets._protocol import ExportError, ExportInput

_LIMITS = {"recompile_limit": 1 << 16, "accumulated_recompile_limit": 1 << 16}
"""Torch 2.6 refuses the ninth model of a process by these, as all ``nn.Sequential`` are one function to dynamo."""


def exported_program(given: ExportInput) -> tuple[ExportedProgram, str]:
    """Trace the model and say which dimensions of its inputs may vary.

    A dimension of size 1 would be taken for one that is always 1, so a batch of one is traced as a batch of two.

    Raises:
        ExportError: if torch.export cannot trace the model.

    """
    args, kwargs = given.args, dict(given.kwargs)
    if given.dynamic != "none":
        args, kwargs = doubled((args, kwargs)) if _is_one((args, kwargs)) else (args, kwargs)
    named = inspect.signature(given.model.forward).bind(*args, **kwargs).arguments
    shapes = pytree.tree_map(lambda value: _dimensions(value, given.dynamic), named)
    from torch._dynamo import config  # which takes a second to import

    try:
        with warnings.catch_warnings(), torch.no_grad(), config.patch(dynamo_settings(config, **_LIMITS)):
            warnings.simplefilter("ignore")
            program = torch.export.export(given.model, args, kwargs, dynamic_shapes=shapes)
    except Exception as e:
        raise ExportError(f"torch.export cannot trace the model: {type(e).__name__}: {_first_lines(str(e))}") from e
    return program, _varying(program)


def doubled(inputs: Any) -> Any:
    """Return inputs with twice the batch: each tensor twice, one after the other."""
    return pytree.tree_map_only(Tensor, lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor, inputs)


def _is_one(inputs: Any) -> bool:
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()}
    return sizes == {1}


def _dimensions(value: Any, dynamic: str) -> Any:
    if not isinstance(value, Tensor) or dynamic == "none":
        return None
    varying = range(value.dim()) if dynamic == "shape" else range(min(1, value.dim()))
    return dict.fromkeys(varying, Dim.AUTO)


def _varying(program: ExportedProgram) -> str:
    found = []
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in inputs and isinstance(value := node.meta.get("val"), Tensor):
            sizes = [text if (text := str(size)).isdecimal() else "any" for size in value.shape]
            found.append(f"{node.name} [{', '.join(sizes)}]")
    return "inputs: " + ", ".join(found)


def _first_lines(text: str, count: int = 6) -> str:
    return "\n".join(text.strip().splitlines()[:count])
