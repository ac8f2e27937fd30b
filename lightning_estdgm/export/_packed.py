"""Models whose masked layers hold their active weights only, in memory and in files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_estdgm._words import first_names
from lightning_estdgm.export._copies import clean_zeros_, copied
from lightning_estdgm.export._packed_layers import PackedConv2d, PackedLinear
from lightning_estdgm.export._sparse_layers import has_hooks, other_sparse_weights
from lightning_estdgm.modules._kinds import LAYER_KINDS, LayerKind, conv_geometry
from lightning_estdgm.modules._packed_forward import PackedForward, unpack_free_
from lightning_estdgm.modules._sparse_forward import SparseForward
from lightning_estdgm.plugins._whole_file import write_whole
from lightning_estdgm.sparse._packed_weight import PackedWeight, pack_weight

_FORMAT = "lightning_estdgm packed model"
_VERSION = 2  # of 1, the columns of convolutions were inputs, the taps of each side by side
_PAYS = 0.9  # of the dense bytes: what a layer may take to be packed


class _Found(NamedTuple):
    """A layer whose weight could be packed: as a matrix, where it is in memory, or the reason why not.

    Columns of a convolution's matrix are its taps, the inputs of each side by side.
    """

    name: str
    module: Any
    matrix: Tensor
    stored: tuple[Any, ...]
    why_not: str


def packed(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy of a model for inference, with layers that hold their active weights only.

    What is zero decides, as training leaves it: no masks are asked for. A linear layer or convolution with zeros enough
    becomes a `PackedLinear` or `PackedConv2d` under its name, by the coarsest unit that its zeros come in; the others
    stay as they are, with whole weights. The copy is on the CPU, in evaluation mode, and takes no gradients; the model
    is left alone.

    Args:
        model: trained model, or one with the state of a checkpoint.
        dtype: of the stored values: float32, bfloat16, or int8 with one scale an output. Sums are in float32.

    Raises:
        RuntimeError: if the operator cannot be built here, such as without a C++ compiler.
        ValueError: for another dtype, or weights on the meta device.

    Warns:
        UserWarning: if no layer has zeros enough, or layers that have them cannot be packed; they are named.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> _ = torch.nn.init.sparse_(layer.weight, sparsity=0.9)
        >>> packed(layer)(torch.ones(2, 64)).shape
        torch.Size([2, 64])
    """
    replaced: dict[int, nn.Module] = {}
    refused = [f"{name} (of {kind}, density {share:.2f})" for name, kind, share in other_sparse_weights(model)]
    weights: dict[Any, PackedWeight] = {}  # of layers that share one, packed once
    for found in _layers(model):
        if found.matrix.is_meta:
            raise ValueError(f"{found.name or 'the weight'} is on the meta device: load the model's weights first")
        share = float(torch.count_nonzero(found.matrix)) / max(1, found.matrix.numel())
        if share > _PAYS:
            continue
        if found.why_not:
            refused.append(f"{found.name} ({found.why_not}, density {share:.2f})")
            continue
        if found.stored not in weights:
            weights[found.stored] = pack_weight(found.matrix, dtype=dtype)
        weight = weights[found.stored]
        if weight.nbytes < _PAYS * found.matrix.nbytes:
            replaced[id(found.module)] = _packed_layer(found, weight)
    if refused:
        warnings.warn(
            f"these layers have zeros but cannot be packed, and stay dense: {', '.join(refused)}", stacklevel=2
        )
    if not replaced:
        warnings.warn(
            f"no layer was packed: none {'of the others ' if refused else ''}has zeros enough; expected a model that "
            "was trained with masks",
            stacklevel=2,
        )
    return _for_inference(copied(model, replaced))


def round_stored_(model: nn.Module, made: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of a model of plain layers where they are packed, to what stored values stand for.

    Args:
        model: a copy of the trained model, of plain layers.
        made: what `packed` has made of it.
        dtype: of the stored values.

    """
    layers = {found.name: found for found in _layers(model)}
    for name, layer in made.named_modules(remove_duplicate=False):
        if isinstance(layer, (PackedLinear, PackedConv2d)):
            found = layers[name]
            weight = found.module.weight if isinstance(layer, PackedConv2d) else found.matrix  # outputs come first
            weight.data.copy_(_rounded(weight.flatten(1), dtype).view(weight.shape))


def _rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype is not torch.int8:
        return matrix.to(dtype).to(matrix.dtype)
    scale = matrix.abs().amax(1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny) / 127
    return (matrix / scale).round() * scale


def save_packed(model: nn.Module, path: str | Path) -> None:
    """Write a packed model: its values and lists, and what else is in its state dict; no code.

    Args:
        model: what `packed` has returned.
        path: the file; `load_packed` reads it.

    Raises:
        ValueError: if the model has no packed layer.

    """
    layers = {
        name: {"sides": module.sides, "shape": [module.out_features, module.in_features]}
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (PackedLinear, PackedConv2d))
    }
    if not layers:
        raise ValueError(f"expected a model that export.packed has returned, got a {type(model).__name__} without any")
    content = {"format": _FORMAT, "version": _VERSION, "layers": layers, "state_dict": model.state_dict()}
    write_whole(path, lambda file: torch.save(content, file))


def load_packed(path: str | Path, model: nn.Module) -> nn.Module:
    """Read a packed model.

    Args:
        path: what `save_packed` has written.
        model: the model's architecture with any weights, such as of the class that was trained, made under
            ``torch.device("meta")``; its layers are replaced in place.

    Returns:
        The model, packed, in evaluation mode.

    Raises:
        ValueError: if the file holds no packed model, or one of another architecture.

    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not (isinstance(content, Mapping) and content.get("format") == _FORMAT):
        raise ValueError(f"{path} holds no packed model: expected a file that export.save_packed has written")
    if content["version"] != _VERSION:
        raise ValueError(
            f"expected a packed model of version {_VERSION}, got {content['version']} in {path}; export the model anew"
        )
    unpack_free_(model)  # what the file has dense may have been packed in training
    state, made = content["state_dict"], {}
    layers = {found.name: found for found in _layers(model)}
    for name, layer in content["layers"].items():
        found = layers.get(name)
        if found is None or list(found.matrix.shape) != layer["shape"]:
            got = "none" if found is None else f"one of shape {list(found.matrix.shape)}"
            raise ValueError(f"{path}: expected a layer {name!r} of shape {layer['shape']} in the model, got {got}")
        prefix = f"{name}." if name else ""
        tensors = {key: state.get(f"{prefix}{key}") for key in ("values", "ptr", "idx", "outputs", "ends", "scale")}
        weight = PackedWeight(tuple(layer["shape"]), tuple(layer["sides"]), **tensors)
        made[name] = _packed_layer(found, weight, state.get(f"{prefix}bias"))
    for name, module in made.items():
        if not name:
            model = module
        else:
            model.set_submodule(name, module)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise ValueError(f"{path} is of another model: {e}") from None
    if left := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise ValueError(
            f"{path} does not hold {first_names(left)}, which the model has on the meta device, as buffers with "
            "persistent=False: make the model without the meta device"
        )
    return _for_inference(model)


def _layers(model: nn.Module) -> Iterator[_Found]:
    for name, module in model.named_modules(remove_duplicate=False):
        plain: Any = copy.copy(module) if isinstance(module, PackedForward) else module  # whole for this turn
        kind = next((kind for kind in LAYER_KINDS if kind.matches(plain)), None)
        if kind is not None and isinstance(getattr(plain, kind.weight_name, None), Tensor):
            yield _found(name, module, plain, kind)


def _found(name: str, module: Any, plain: Any, kind: LayerKind) -> _Found:
    weight = getattr(plain, kind.weight_name).detach()
    matrix = weight.t() if kind.transposed else weight.movedim(1, -1).flatten(1)
    held = module.packed_weight if isinstance(module, PackedForward) else weight  # not by memory that is used again
    stored = held.data_ptr(), weight.shape, weight.stride(), kind.transposed
    why = "" if isinstance(plain, SparseForward) else kind.why_no_operator(plain)
    if weight.is_complex():
        why = "complex weights"
    if not why and weight.dim() == 3:
        why = "1-D convolution"
    if not why and has_hooks(module):
        why = "it has forward hooks"
    return _Found(name, module, matrix, stored, why)


def _packed_layer(found: _Found, weight: PackedWeight, bias: Tensor | None = None) -> nn.Module:
    bias = found.module.bias if bias is None else bias
    if isinstance(found.module, nn.Conv2d):
        geometry = conv_geometry(found.module)
        assert geometry is not None  # else it has a reason to stay dense
        return PackedConv2d(weight, bias, geometry)
    return PackedLinear(weight, bias)


def _for_inference(model: nn.Module) -> nn.Module:
    """Return the model, ready for inference."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # else its fast path reads the weights of its layers
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which asks for that path with a mask of padding
    return clean_zeros_(model).eval().requires_grad_(False)
