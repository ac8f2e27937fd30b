"""Copies of models for export: plain layers on the CPU, in evaluation mode, without gradients or negative zeros."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_estdgm.modules._packed_forward import unpack_free_

_WITH_SUMS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def copied(model: nn.Module, replaced: Mapping[int, nn.Module] = MappingProxyType({})) -> nn.Module:
    """Return a copy of a model for inference, of plain layers; the model is left alone.

    Args:
        model: the model.
        replaced: modules to put in the place of others, by the others' ids; the weights of these are not copied.

    """
    made = without_trainer(model, replaced).cpu()
    unpack_free_(made)
    return clean_zeros_(made).eval().requires_grad_(False)


def without_trainer(model: nn.Module, replaced: Mapping[int, nn.Module] = MappingProxyType({})) -> nn.Module:
    """Return a deepcopy of a model, with modules in the place of others as `copied` has them.

    Tensors with a graph that modules keep, such as an attention map or the weight of ``torch.nn.utils.weight_norm``,
    are copied without it: torch copies none with.
    """
    computed = [leaf for module in model.modules() for leaf in pytree.tree_leaves(vars(module)) if _has_graph(leaf)]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in computed} | dict(replaced)
    trainer, holder = getattr(model, "_trainer", None), model
    if trainer is not None:  # a LightningModule's Trainer holds loaders and loggers, which no copy needs
        holder._trainer = None  # type: ignore[assignment]
    try:
        made: nn.Module = copy.deepcopy(model, memo)
    finally:
        if trainer is not None:
            holder._trainer = trainer
    return made


def _has_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def clean_zeros_(model: nn.Module) -> nn.Module:
    """Turn every ``-0.0`` of parameters and buffers into ``+0.0``; products with a mask leave them. Returns `model`."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype in _WITH_SUMS and tensor.layout is torch.strided and not _overlaps(tensor):
                tensor += 0.0
    return model


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements lie at one place, as in what ``expand`` returns."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
