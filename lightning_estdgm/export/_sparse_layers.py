"""Layers of a model that are linear and hold zeros enough for a sparse form, and the reasons why others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lightning_estdgm.method._masks import active_units
from lightning_estdgm.modules._kinds import CONVOLUTIONS, LAYER_KINDS, LayerKind
from lightning_estdgm.modules._own_hook import OwnHook

DENSE_ABOVE = 0.5
"""Share of active weights above which a layer counts as dense."""


@dataclass(frozen=True)
class SparseLayer:
    """One linear layer under one of its names.

    Attributes:
        name: name in the model.
        module: the layer.
        weight: its weight as ``(out, in)``.
        bias: its bias, or None.
        density: share of its weights that are not zero.

    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    density: float


def sparse_linear_layers(model: nn.Module) -> tuple[list[SparseLayer], list[str]]:
    """Return the linear layers with at most half of their weights active, and why other sparse layers stay dense.

    A layer with several names is returned under each.
    """
    found: list[SparseLayer] = []
    kept: dict[str, list[str]] = {}
    inside_encoder = _inside_encoder_layers(model)
    for name, module in model.named_modules(remove_duplicate=False):
        kind = next((kind for kind in LAYER_KINDS if kind.matches(module)), None)
        if kind is None or (density := _density(module, kind)) > DENSE_ABOVE:
            continue
        if reason := _why_dense(name, module, kind, inside_encoder):
            kept.setdefault(reason, []).append(f"{name} ({type(module).__name__})")
            continue
        weight = cast(Tensor, module.weight).detach()
        oriented = weight.t() if kind.transposed else weight
        bias = cast("Tensor | None", getattr(module, "bias", None))
        found.append(SparseLayer(name, module, oriented, None if bias is None else bias.detach(), density))
    for name, owner, _ in other_sparse_weights(model):
        kept.setdefault("as this form holds linear layers only", []).append(f"{name} (of {owner})")
    return found, [f"stays dense, {reason}: {', '.join(names)}" for reason, names in kept.items()]


def other_sparse_weights(model: nn.Module) -> list[tuple[str, str, float]]:
    """Return name, class of its module and density of weights that are sparse and belong to no kind of layer."""
    weights = [
        (f"{name}.{key}" if name else key, type(module).__name__, weight.detach())
        for name, module in model.named_modules()
        if not any(kind.matches(module) for kind in LAYER_KINDS)
        for key, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1 and weight.numel() and not weight.is_meta
    ]
    found = [(name, kind, active_units(weight != 0) / weight.numel()) for name, kind, weight in weights]
    return [row for row in found if row[2] <= DENSE_ABOVE]


def has_hooks(module: nn.Module) -> bool:
    """Whether forward hooks of a user's would be lost with a layer; this package's own do nothing in copies."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not isinstance(hook, OwnHook) for hook in hooks)


def replace_layers(model: nn.Module, layers: list[SparseLayer], make: Callable[[SparseLayer], nn.Module]) -> None:
    """Put a new module in the place of each layer; one with several names gets one new module."""
    made: dict[int, nn.Module] = {}
    for layer in layers:
        if id(layer.module) not in made:
            made[id(layer.module)] = make(layer)
        model.set_submodule(layer.name, made[id(layer.module)])


def _density(module: Any, kind: LayerKind) -> float:
    weight = getattr(module, kind.weight_name, None)
    if not isinstance(weight, Tensor) or not weight.numel():
        return 1.0
    return active_units(weight.detach() != 0) / weight.numel()


def _why_dense(name: str, module: nn.Module, kind: LayerKind, inside_encoder: set[int]) -> str:
    if isinstance(module, CONVOLUTIONS) or "convolution" in kind.name:
        return "as this form holds linear layers only"
    if why := kind.why_no_operator(module):
        return why
    if id(module) in inside_encoder:
        return "nn.TransformerEncoderLayer reads the weights of its layers itself"
    if has_hooks(module) or hasattr(module, "parametrizations"):
        return "it has hooks or parametrizations"
    return "" if name else "the model itself is this layer: put it into an nn.Sequential"


def _inside_encoder_layers(model: nn.Module) -> set[int]:
    layers = (m for m in model.modules() if isinstance(m, (nn.TransformerEncoderLayer, nn.MultiheadAttention)))
    return {id(inner) for layer in layers for inner in layer.modules()}
