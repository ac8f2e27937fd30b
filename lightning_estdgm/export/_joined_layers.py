"""Packed layers of one input, such as queries, keys and values, joined into one call of the operator."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from lightning_estdgm.export._program import exported_program
from lightning_estdgm.export.targets._protocol import ExportError, ExportInput

_X, _VALUES, _PTR, _IDX, _SCALE, _BIAS, _SIDES, _IN, _OUT = 0, 1, 2, 3, 6, 7, 8, 9, 10  # arguments of the operator
_HELD = (_VALUES, _PTR, _IDX, _SCALE, _BIAS)


def with_joined_layers(program: ExportedProgram, given: ExportInput) -> ExportedProgram:
    """Return the program with packed layers of one input joined, or as it is where there are none.

    Each output is a part of one product, with the bits that it had. Single weights stay: their order is one of all
    outputs. So does a layer that is called more than once, whose values would be held twice.
    """
    module = program.module()
    assert isinstance(module, GraphModule)
    groups = _groups(module)
    if not groups:
        return program
    for number, group in enumerate(groups):
        _join_(module, group, f"joined_{number}")
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    try:
        return exported_program(dataclasses.replace(given, model=module))[0]
    except ExportError:  # such as for a view that takes no part of a larger tensor
        return program


def _groups(module: GraphModule) -> list[list[Node]]:
    """Return the calls that can be joined."""
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    if any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in nodes):
        return []  # an input might change between two calls
    calls = [node for node in nodes if node.target is torch.ops.estdgm.packed_linear.default]
    calls = [node for node in calls if node.args[_SIDES][0] > 1 and all(arg.op == "get_attr" for arg in _held(node))]
    uses = Counter(_tensor(module, node.args[_VALUES]).data_ptr() for node in calls)
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in calls:
        values = _tensor(module, node.args[_VALUES])
        if uses[values.data_ptr()] == 1:
            there = tuple(node.args[place] is not None for place in (_SCALE, _BIAS))
            groups[node.args[_X], tuple(node.args[_SIDES]), node.args[_IN], values.dtype, there].append(node)
    return [group for group in groups.values() if len(group) > 1]


def _join_(module: GraphModule, group: Sequence[Node], name: str) -> None:
    """Replace the calls by one and parts of its result."""
    columns = {place: [_tensor(module, node.args[place]) for node in group] for place in _HELD if group[0].args[place]}
    counts = [0, *accumulate(int(ptr[-1]) for ptr in columns[_PTR])]
    columns[_PTR] = [ptr[1:] + first for ptr, first in zip(columns[_PTR], counts, strict=False)]
    columns[_PTR].insert(0, torch.zeros(1, dtype=torch.int32))
    ends = list(accumulate(node.args[_OUT] for node in group))
    args = list(group[0].args)
    args[_OUT] = ends[-1]
    with module.graph.inserting_before(group[0]):
        for place, tensors in columns.items():
            module.register_buffer(f"{name}_{place}", torch.cat(tensors))
            args[place] = module.graph.get_attr(f"{name}_{place}")
        whole = module.graph.call_function(torch.ops.estdgm.packed_linear.default, tuple(args))
        for node, first, end in zip(group, [0, *ends], ends, strict=False):
            part = module.graph.call_function(torch.ops.aten.slice.Tensor, (whole, -1, first, end))
            node.replace_all_uses_with(part)
    for node in group:
        module.graph.erase_node(node)


def _held(node: Node) -> list[Node]:
    return [arg for place in _HELD if isinstance(arg := node.args[place], Node)]


def _tensor(module: nn.Module, node: Any) -> Tensor:
    found: Any = module
    for part in node.target.split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found
