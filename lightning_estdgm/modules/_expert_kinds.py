"""Experts that one parameter stacks, ``(experts, rows, columns)``: recognised by a module's attributes, or by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lightning_estdgm.modules._expert_adapter import ExpertAdapter
from lightning_estdgm.modules._hugging_face_experts import (
    HUGGING_FACE_WEIGHTS,
    dense_form,
    hugging_face_forward,
    is_hugging_face,
    why_dense,
)
from lightning_estdgm.modules._kinds import LayerKind, own_class, tokens

_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "num_routed_experts")
_CHOSEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "experts_per_token")


def expert_kinds(
    name: str,
    module: nn.Module,
    whole_shape: Callable[[nn.Module, str], tuple[int, ...]],
    named: Sequence[str] = (),
    adapters: Sequence[ExpertAdapter] = (),
) -> Iterator[LayerKind]:
    """Yield a kind for each parameter of a module that stacks the matrices of its experts.

    Such are parameters that an adapter of the module's class names; the weights of transformers' experts; parameters of
    three dimensions in any module with a number of experts (`num_experts` and the like) that is the size of the first
    one; and parameters that match `named`. Biases, of shape ``(experts, n)`` or ``(experts, 1, n)``, are none.
    Parametrized weights are left alone.

    Args:
        name: Name of the module in the model.
        module: The module.
        whole_shape: Function of a module and a parameter's name that returns the shape of the whole parameter.
        named: Globs over names of parameters.
        adapters: Adapters of classes of modules.

    Raises:
        ValueError: A module of an adapter's class has not the parameters that this names.

    """
    adapter = next((adapter for adapter in adapters if adapter.module is own_class(module)), None)
    own_shape = functools.partial(whole_shape, module)
    if adapter is not None:
        adapter.check(name, module, own_shape)
    count = next((n for n in map(vars(module).get, _COUNTS) if type(n) is int and n > 0), 0)
    for own in module._parameters:
        is_adapted = adapter is not None and own in adapter.layouts
        is_named = any(fnmatchcase(f"{name}.{own}" if name else own, glob) for glob in named)
        if module._parameters[own] is None or not (is_adapted or is_named or count):
            continue
        shape = own_shape(own)
        if len(shape) != 3 or min(shape[1:]) < 2:
            continue
        if is_adapted:
            assert adapter is not None
            yield _adapted(adapter, own, shape[0])
        elif is_hugging_face(module) and own in HUGGING_FACE_WEIGHTS and shape[0] == count:
            yield _hugging_face(module, own, count)
        elif is_named or shape[0] == count:
            yield _kind(own, shape[0], inputs_last=False, why_dense=_no_operator)


def _adapted(adapter: ExpertAdapter, own: str, experts: int) -> LayerKind:
    return _kind(
        own,
        experts,
        inputs_last=adapter.layouts[own] == "eoi",
        why_dense=lambda module: "",
        forward=adapter.forward,
        layouts=adapter.layouts,
        is_adapted=True,
    )


def _hugging_face(module: Any, own: str, experts: int) -> LayerKind:
    rows_are_outputs = not module.is_transposed
    # Gate and up lie one after the other; where they take turns, or lie along the columns, they are one matrix.
    halves = 2 if own == "gate_up_proj" and rows_are_outputs and module.is_concatenated else 1
    return _kind(
        own,
        experts,
        parts=halves * experts,
        inputs_last=rows_are_outputs,
        why_dense=why_dense,
        forward=hugging_face_forward,
        layouts=dict.fromkeys(HUGGING_FACE_WEIGHTS, "eoi" if rows_are_outputs else "eio"),
        dense_form=dense_form,
    )


def _found_by_its_parameter(module: nn.Module) -> bool:
    return True


def _no_operator(module: nn.Module) -> str:
    return "no sparse operator for stacked experts: an ExpertAdapter in selection.experts gives one"


def _kind(own: str, experts: int, **settings: Any) -> LayerKind:
    return LayerKind(
        "experts",
        _found_by_its_parameter,
        _routed_tokens,
        weight_name=own,
        experts=experts,
        **{"parts": experts, **settings},
    )


def _routed_tokens(module: Any, inputs: tuple[Any, ...], output: Any) -> int:
    """Return the number of pairs of a token and an expert that it was sent to.

    By the indices of the chosen experts if the module is given any (a tensor of integers); otherwise by its output and
    the number of experts that it says it chooses for a token, or 1.
    """
    for given in inputs:
        if (
            isinstance(given, Tensor)
            and not (given.is_floating_point() or given.is_complex())
            and given.element_size() > 1
        ):
            return given.numel()
    chosen = next((n for n in (getattr(module, a, None) for a in _CHOSEN) if type(n) is int and n > 0), 1)
    return tokens(module, inputs, output) * chosen
