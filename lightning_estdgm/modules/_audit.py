"""`ForwardAudit`: what forwards really do with the weights of the layers, seen in the first steps of a run.

Class names, registration order and `requires_grad` do not tell whether a layer's forward is called, whether it uses
its weight as it is stored, and which layer is the output head. It changes nothing. Gradients and optimizer steps are
watched by `engine._admission`, which decides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.modules._forward_watch import is_traced, replaced_forward, watch_forward
from lightning_estdgm.modules._kinds import CONVOLUTIONS, foreign_method
from lightning_estdgm.modules._own_hook import OwnHook
from lightning_estdgm.modules._weight_watch import Changes, ProductCount, takes_gradients, tensors_of, unwrapped

_FORWARDS = {
    cls.forward
    for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    + (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}  # torch's own, which use a weight as it is stored

_REPLACED = "another tensor in its place, as by functional_call"
_PUT_IN = "values that are put in for the forward, and taken back before the step"


@dataclass(eq=False)
class ForwardRecord:
    """What was seen of one layer's forwards.

    Attributes:
        called: whether its forward was called.
        changed_by: function that the weight went through before a product, or another reason why the forward is not
            that of the stored weight; empty if it is.
        is_multiplied: whether a forward was seen to multiply by it.
        feeds: whether its output goes into another layer that trains; False too where autograd recorded nothing.
        feeds_frozen: whether its output goes into a layer that takes no gradient.
        recorded: whether autograd recorded a call of it outside a backward: what it feeds is known then, and is not
            where reentrant checkpoints alone compute its forward again in the backward.
        order: index of its last call among those of all layers.
        used_by_itself: whether the forward of the module above got its weight in any step.
        used_by_parent: number of positions that the forward of the module above applies the weight to, this step.

    """

    called: bool = False
    changed_by: str = ""
    is_multiplied: bool = False
    feeds: bool = False
    feeds_frozen: bool = False
    recorded: bool = False
    order: int = -1
    used_by_itself: bool = False
    used_by_parent: int = 0


class ForwardAudit:
    """Watches on the forwards of all layers that record how they use their weights, and which feeds which.

    Args:
        model: the model.
        candidates: its linear and convolution layers.

    Attributes:
        records: record of each layer, by its name.
        saw_graph: whether autograd recorded the output of any layer.

    """

    def __init__(self, model: nn.Module, candidates: Sequence[Candidate]) -> None:
        self.records = {candidate.name: ForwardRecord() for candidate in candidates}
        self.saw_graph = False
        weights = {id(candidate.weight) for candidate in candidates}
        self._gathered = any(_gathers(module) for module in model.modules())
        self._candidates = {candidate.name: candidate for candidate in candidates}
        self._sums = self._sums_now()
        self._found: dict[str, Tensor | None] = {}  # in this step's forwards; None: what it was before the step
        self._feeds_others = False
        self._calls = 0
        self._producers: dict[Any, list[ForwardRecord]] = {}  # by node of autograd's graph
        self._visited: dict[bool, set[Any]] = {True: set(), False: set()}  # from trained layers, and frozen ones
        self._open: list[ProductCount | None] = []  # of the forwards under way, innermost last
        self._own: list[int] = []  # ids of the weights of the layers whose forwards are under way
        self._handles: list[Any] = []
        for module, group in _by_parent(model, candidates):
            self._watch_parent(module, group)
        for module, group in _by_called_module(model, candidates):
            self._watch(module, group)
        for module in model.modules() if candidates else ():
            if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                continue
            if any(p.dim() > 1 and id(p) not in weights for p in module.parameters(recurse=False)):
                self._watch_other(module)

    @property
    def has_end(self) -> bool:
        """Whether the network ends somewhere: in a layer that feeds no other, or in something that is no layer here."""
        return self._feeds_others or any(record.called and not record.feeds for record in self.records.values())

    def used_by_themselves(self) -> dict[str, int]:
        """Return the positions that weights were applied to in this step without their forwards, by layer."""
        return {name: r.used_by_parent for name, r in self.records.items() if r.used_by_parent and not r.called}

    def note_begun_step(self, names: Iterable[str]) -> None:
        """Note layers whose weights, about to be moved by an optimizer, have other values in their forward alone.

        Args:
            names: names of the layers.

        """
        for name in names:
            found, record, weight = self._found.get(name), self.records[name], self._candidates[name].weight.detach()
            if found is None or _sum(weight) != self._sums[name]:
                continue
            if not ((found == 0) | (found == weight)).all():  # a product with a mask of 0 and 1 keeps zeros
                record.changed_by = record.changed_by or _PUT_IN

    def end_step(self) -> None:
        """Forget the graph and the counts of this step."""
        self._forget()
        self._sums = self._sums_now()

    def _forget(self) -> None:
        self._producers.clear()
        self._found.clear()
        for visited in self._visited.values():
            visited.clear()
        for record in self.records.values():
            record.used_by_parent = 0

    def close(self) -> None:
        """Remove the watches. May be called twice."""
        self._forget()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _sums_now(self) -> dict[str, float]:
        """Return the sums of the weights, which tell whether a forward finds the values of before the step."""
        return {name: _sum(c.weight) for name, c in self._candidates.items() if c.masked and not self._gathered}

    def _look(self, candidate: Candidate) -> None:
        """Note what a recorded forward finds in a weight, until one finds the values of before the step."""
        name = candidate.name
        is_known = self._found.get(name, candidate) is None
        if is_known or name not in self._sums or not _is_recorded() or is_traced():
            return
        if _sum(candidate.weight) == self._sums[name]:
            self._found[name] = None
        elif name not in self._found:
            self._found[name] = candidate.weight.detach().clone()

    def _watch_parent(self, module: nn.Module, group: Sequence[Candidate]) -> None:
        def before(module: nn.Module, args: Any) -> None:
            if torch.compiler.is_compiling():
                self._open.append(None)
                return
            seen = {id(record) for mode in self._open if mode is not None for record in mode.records}
            own = [c for c in group if id(self.records[c.name]) not in seen]  # others are counted by a module around
            weights = [(_current(c), self.records[c.name], c.shape[0]) for c in own]
            self._enter(ProductCount(weights, self._own, self._feed_other))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._leave()

        self._handles.append(module.register_forward_pre_hook(OwnHook(before)))
        self._handles.append(module.register_forward_hook(OwnHook(after), prepend=True, always_call=True))

    def _watch_other(self, module: nn.Module) -> None:
        """Watch a module with weights that is no layer known here, such as an LSTM, for what it is fed with."""

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if torch.compiler.is_compiling():
                return
            if any(map(takes_gradients, module.parameters(recurse=False))):
                self._feed_other(tensors_of((args, kwargs)))
            else:
                self._follow(_nodes(tensors_of((args, kwargs))), (), trains=False)

        self._handles.append(module.register_forward_hook(OwnHook(after), with_kwargs=True, prepend=True))

    def _feed_other(self, tensors: Sequence[Tensor]) -> None:
        """Note the layers that feed something with weights that is no layer's forward known here."""
        nodes = _nodes(tensors)
        self._feeds_others |= bool(nodes)
        self._follow(nodes, ())

    def _enter(self, mode: ProductCount) -> None:
        mode.__enter__()
        self._open.append(mode)

    def _leave(self) -> None:
        if self._open and (mode := self._open.pop()) is not None:
            mode.__exit__(None, None, None)

    def _watch(self, module: nn.Module, group: Sequence[Candidate]) -> None:
        records = [self.records[candidate.name] for candidate in group]

        def watch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            weights = [_current(candidate) for candidate in group]
            for candidate, weight, record in zip(group, weights, records, strict=True):
                if not self._gathered and candidate.masked and not _is_stored(weight, candidate.weight):
                    record.changed_by = record.changed_by or _REPLACED
                self._look(candidate)
            is_torchs = replaced_forward(module) is None and type(module).forward in _FORWARDS
            is_torchs = is_torchs and not (isinstance(module, CONVOLUTIONS) and foreign_method(module))
            before = len(self._own)
            self._own += map(id, weights)
            try:
                with nullcontext() if is_torchs else Changes(list(zip(weights, records, strict=True))):
                    output = forward(*args, **kwargs)
            finally:
                del self._own[before:]
            for record in records:
                record.called = True
                record.is_multiplied |= is_torchs
                record.recorded |= _is_recorded()
                record.order = self._calls
            self._calls += 1
            given = tensors_of((args, kwargs, weights))  # a weight too may be the output of another layer
            # What goes into a frozen loss network only is an output all the same.
            self._follow(_nodes(given), records, trains=any(map(takes_gradients, weights)))
            nodes = _nodes(tensors_of(output))
            self.saw_graph |= bool(nodes)
            for node in nodes:
                self._producers.setdefault(node, []).extend(records)
            return output

        self._handles.append(watch_forward(module, watch))

    def _follow(self, nodes: list[Any], own: Sequence[ForwardRecord], *, trains: bool = True) -> None:
        """Walk back from a layer's inputs, and note the other layers whose outputs are found; a node is met once.

        Args:
            nodes: nodes of the inputs in autograd's graph; used up.
            own: records of the layer itself.
            trains: whether the layer takes gradients.

        """
        visited = self._visited[trains]
        while nodes:
            node = nodes.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            for record in self._producers.get(node, ()):
                if record not in own:
                    record.feeds |= trains
                    record.feeds_frozen |= not trains
            nodes.extend(parent for parent, _ in node.next_functions)


def _nodes(tensors: Sequence[Tensor]) -> list[Any]:
    """Return the nodes of autograd's graph that tensors come from."""
    return [x.grad_fn for x in tensors if x.grad_fn is not None]


def _by_called_module(model: nn.Module, candidates: Sequence[Candidate]) -> Iterator[tuple[nn.Module, list[Candidate]]]:
    """Yield each module whose forward is called, and its layers: MultiheadAttention computes its out_proj by itself."""
    attention = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    groups: dict[int, tuple[nn.Module, list[Candidate]]] = {}
    for candidate in candidates:
        module = attention.get(id(candidate.module), candidate.module)
        groups.setdefault(id(module), (module, []))[1].append(candidate)
    yield from groups.values()


def _by_parent(model: nn.Module, candidates: Sequence[Candidate]) -> Iterator[tuple[nn.Module, list[Candidate]]]:
    """Yield each module that holds layers, itself or in a list, and these."""
    layers: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        layers.setdefault(id(candidate.module), []).append(candidate)
    for module in model.modules():
        group = [candidate for child in _children(module) for candidate in layers.get(id(child), ())]
        if group and not isinstance(module, nn.MultiheadAttention):
            yield module, group


def _children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield child
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or type(child) is nn.Sequential:
            yield from _children(child)


def _current(candidate: Candidate) -> Any:
    """Return what the layer holds as its weight in this forward; FSDP1 puts a plain attribute there."""
    module, name = candidate.module, candidate.kind.weight_name
    return vars(module).get(name, module._parameters.get(name))


def _is_stored(tensor: Any, weight: Tensor) -> bool:
    """Whether a tensor is a weight, or shows its storage as it is, as `detach` and transforms of torch.func do."""
    if tensor is weight or not isinstance(tensor, Tensor):
        return tensor is weight
    tensor = unwrapped(tensor)
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return False
    same = tensor.data_ptr() == weight.data_ptr() and tensor.device == weight.device and tensor.dtype == weight.dtype
    return same and tensor.shape == weight.shape and tensor.stride() == weight.stride()


def _is_recorded() -> bool:
    """Whether autograd records what is computed now, outside a backward."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1


def _sum(weight: Tensor) -> float:
    """Return the sum of a plain weight's numbers; 0 for other tensors, such as parts of sharded ones."""
    is_plain = type(weight) in (Tensor, nn.Parameter) and weight.layout is torch.strided and not weight.is_meta
    is_summed = is_plain and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return float(weight.detach().sum(dtype=torch.float64)) if is_summed else 0.0


def _gathers(module: nn.Module) -> bool:
    """Whether a module is one of FSDP's, which put gathered weights in the place of stored ones."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule))
