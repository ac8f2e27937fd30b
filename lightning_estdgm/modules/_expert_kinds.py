"""Experts that one parameter stacks, ``(experts, rows, columns)``: recognised by a module's attributes, or by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lightning_estdgm.modules._kinds import LayerKind, own_class

_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "num_routed_experts")
_CHOSEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "experts_per_token")
_HUGGING_FACE_MARKS = ("is_transposed", "is_concatenated", "has_gate")  # set by use_experts_implementation
_HUGGING_FACE_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def expert_kinds(name: str, module: nn.Module, named: Sequence[str] = ()) -> Iterator[LayerKind]:
    """Yield a kind for each parameter of a module that stacks the matrices of its experts.

    Such are the weights of transformers' experts; parameters of three dimensions in any module with a number of experts
    (`num_experts` and the like) that is the size of the first one; and parameters that match `named`. Biases, of shape
    ``(experts, n)`` or ``(experts, 1, n)``, are none. Parametrized weights are left alone.

    Args:
        name: Name of the module in the model.
        module: The module.
        named: Globs over names of parameters.

    """
    for own, parameter in module.named_parameters(recurse=False):
        count = next((n for n in map(vars(module).get, _COUNTS) if type(n) is int and n > 0), 0)
        path = f"{name}.{own}" if name else own
        is_stack = parameter.dim() == 3 and min(parameter.shape[1:]) > 1
        if _is_hugging_face(module) and own in _HUGGING_FACE_WEIGHTS and count:
            # FSDP1 leaves a flat stretch of the parameter, which is no less the experts' weight.
            if parameter.dim() == 1 or (is_stack and len(parameter) == count):
                yield _hugging_face(module, own, count)
        elif is_stack and (len(parameter) == count or any(fnmatchcase(path, glob) for glob in named)):
            yield _kind(own, len(parameter), parts=len(parameter), inputs_last=False)


def _is_hugging_face(module: nn.Module) -> bool:
    return all(mark in vars(module) for mark in _HUGGING_FACE_MARKS)


def _hugging_face(module: Any, own: str, experts: int) -> LayerKind:
    rows_are_outputs = not module.is_transposed
    # Gate and up lie one after the other; where they take turns, or lie along the columns, they are one matrix.
    halves = 2 if own == "gate_up_proj" and rows_are_outputs and module.is_concatenated else 1
    return _kind(own, experts, parts=halves * experts, inputs_last=rows_are_outputs, why_dense=_why_dense)


def _why_dense(module: nn.Module) -> str:
    # A class of someone's own may have a forward of its own.
    own = own_class(module)
    return "" if own.__module__.partition(".")[0] == "transformers" else f"no sparse operator for {own.__name__}"


def _found_by_its_parameter(module: nn.Module) -> bool:
    return True


def _no_operator(module: nn.Module) -> str:
    return "no sparse operator for stacked experts"


def _kind(
    own: str,
    experts: int,
    *,
    parts: int,
    inputs_last: bool,
    why_dense: Callable[[nn.Module], str] = _no_operator,
) -> LayerKind:
    return LayerKind(
        "experts",
        _found_by_its_parameter,
        _routed_tokens,
        why_dense,
        weight_name=own,
        experts=experts,
        parts=parts,
        inputs_last=inputs_last,
    )


def _routed_tokens(module: Any, args: tuple[Any, ...], output: Any) -> int:
    """Return the number of pairs of a token and an expert that it was sent to.

    By the indices of the chosen experts if the module is given any (a tensor of integers); otherwise by its output and
    the number of experts that it says it chooses for a token, or 1.
    """
    for given in args:
        if (
            isinstance(given, Tensor)
            and not (given.is_floating_point() or given.is_complex())
            and given.element_size() > 1
        ):
            return given.numel()
    out = output[0] if isinstance(output, tuple) else output
    chosen = next((n for n in (getattr(module, a, None) for a in _CHOSEN) if type(n) is int and n > 0), 1)
    return out.numel() // out.shape[-1] * chosen
