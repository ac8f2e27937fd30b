"""Candidates: layers of a model whose weight could be masked, and whether it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_estdgm.distributed._shard import Shard
from lightning_estdgm.distributed.adapters._protocol import shard_of
from lightning_estdgm.distributed.adapters.whole import Whole
from lightning_estdgm.method._masks import keep_active_
from lightning_estdgm.modules._expert_adapter import ExpertAdapter
from lightning_estdgm.modules._expert_kinds import expert_kinds
from lightning_estdgm.modules._expert_layout import stack_shard, whole_shape, why_no_stack
from lightning_estdgm.modules._kinds import LAYER_KINDS, LayerKind, is_computed, own_class
from lightning_estdgm.modules._sparse_forward import SparseForward

Selector = str | Callable[[str, nn.Module], bool]
"""A glob over module names such as ``"encoder.*"``, or a predicate of a module's name and the module."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")  # the last: Fabric's
# Not query_key_value: Bloom and GPT-NeoX interleave the three by head.
_FUSED_NAMES = ("qkv", "kv", "c_attn", "in_proj", "to_qkv", "to_kv", "Wqkv", "qkv_proj")
_FROZEN, _NOT_HELD = "its weight takes no gradient", "no optimizer holds its weight"
_HEAD_NAMES = ("head", "lm_head", "classifier", "output_head", "output_layer")

HEAD = "output head"
"""Reason why a layer that seems to be the output head is left dense."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """Layer with a weight that could be masked, and whether it is.

    Attributes:
        name: Name of the module in the model, free of wrappers' parts; of the parameter, where it stacks experts.
        module: The layer.
        kind: Kind of the layer.
        weight: Parameter that optimizers hold, as stored; a sharded module's attribute is another at times.
        shard: Layout of the weight over ranks.
        why_dense: Reason why no sparse operator can replace its forward; empty where one can.
        parts: Number of matrices of one shape that are stacked along the outputs, such as query, key and value; each
            has its own density and budget, or the one with the largest weights would take the units of the others.
        masked: Whether its weight is masked.
        why: Reason for that, in words.
        seems_head: Whether it seems to be the output head, by its place and name; never true of included layers.
        later: What it will be once it trains, for a layer that does not train yet; ``None`` for others.

    """

    name: str
    module: nn.Module
    kind: LayerKind
    weight: Tensor
    shard: Shard
    why_dense: str
    parts: int
    masked: bool
    why: str
    seems_head: bool = False
    later: Candidate | None = None

    @property
    def has_operator(self) -> bool:
        """Whether a sparse operator can replace its forward."""
        return not self.why_dense

    @property
    def is_convolution(self) -> bool:
        """Whether its operator, if it has one, is a convolution."""
        return isinstance(self.module, (nn.Conv1d, nn.Conv2d))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(out, in, ...)`` of the whole weight."""
        return self.shard.shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the whole weight as the model stores it."""
        if self.kind.experts and len(self.shape) == 2:
            return (self.kind.experts, self.shape[0] // self.kind.experts, self.shape[1])
        return self.shape[::-1] if self.kind.transposed else self.shape

    @property
    def module_name(self) -> str:
        """Name of the module that owns the weight."""
        if not self.kind.experts or self.name == self.kind.weight_name:
            return "" if self.kind.experts else self.name
        return self.name.removesuffix(f".{self.kind.weight_name}")

    @cached_property
    def position_weights(self) -> int:
        """Number of weights that one position is multiplied with: of experts, those of one."""
        return math.prod(self.shape) // max(1, self.kind.experts)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape ``(out, in, ...)`` of one part of the weight."""
        out, *rest = self.shape
        return (out // self.parts, *rest)


def clean_name(name: str) -> str:
    """Return a module's name without the parts that torch.compile, FSDP, Fabric and checkpoint wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _maskable(
    model: nn.Module, experts: Sequence[str], adapters: Sequence[ExpertAdapter]
) -> Iterator[tuple[str, nn.Module, LayerKind]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # its forward is no Python that could be watched or replaced
            continue
        kind = next((kind for kind in LAYER_KINDS if kind.matches(module)), None)
        if kind is not None:
            if is_parametrized(module, kind.weight_name) or isinstance(getattr(module, kind.weight_name, None), Tensor):
                yield clean_name(name), module, kind  # else another module makes its weight
            continue
        owner = clean_name(name)
        for stack in expert_kinds(owner, module, partial(whole_shape, model), experts, adapters):
            yield f"{owner}.{stack.weight_name}" if owner else stack.weight_name, module, stack


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, selector) if isinstance(selector, str) else bool(selector(name, module))


def _fused_parts(name: str, shape: tuple[int, ...], kind: LayerKind) -> int:
    """Return how many square matrices a fused attention projection stacks; 1 for any other layer."""
    if kind.experts:
        return kind.parts
    if kind.weight_name != "in_proj_weight" and name.rpartition(".")[2] not in _FUSED_NAMES:
        return 1
    out, inner = shape[:2]
    return out // inner if out in (2 * inner, 3 * inner) else 1


def find_candidates(
    model: nn.Module,
    include: Sequence[Selector] = (),
    exclude: Sequence[Selector] = (),
    held: Container[int] | None = None,
    experts: Sequence[str | ExpertAdapter] = (),
    *,
    mask_heads: bool = False,
    masks_late: bool = False,
) -> tuple[Candidate, ...]:
    """List linear layers, convolutions and stacked experts of `model`, and decide for each whether it is masked.

    All are masked but the output head (the last such layer that trains, if several do, and layers named like one),
    weights that take no gradient, weights that no optimizer holds, and weights shared with another module, such as an
    embedding. `include` overrides the head rule, `exclude` the rest. Norms, biases and embeddings are never listed.

    Args:
        model: Any module.
        include: Selectors of layers to mask although they look like the output head.
        exclude: Selectors of layers to leave dense.
        held: Ids of the parameters that an optimizer holds; others are left dense. ``None``: all are held.
        experts: Globs over names of parameters that stack the experts' matrices, and adapters; see `expert_kinds`.
        mask_heads: Whether layers that only seem to be the output head are masked as well, for an audit to decide.
        masks_late: Whether layers that do not train yet will be masked once they do; then it is no error if there are
            frozen ones and nothing else to mask.

    Raises:
        ValueError: A selector or adapter matches no layer, no layer at all is left to mask, a weight is not
            materialised yet (lazy modules), or the model is masked by another controller.

    """
    if any(isinstance(module, SparseForward) for module in model.modules()):
        raise ValueError("the model is under another DGMController already: close that one first")
    globs = [glob for glob in experts if isinstance(glob, str)]
    found = list(_maskable(model, globs, _adapters(model, experts)))
    stacks = [name for name, _, kind in found if kind.experts]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in stacks):
            raise ValueError(
                f"experts={glob!r} matches no parameter of shape (experts, rows, columns); "
                f"of three dimensions are {_three_dimensional(model)}"
            )
    for label, selectors in (("include", include), ("exclude", exclude)):
        for selector in selectors:
            if not any(_matches(selector, name, module) for name, module, _ in found):
                raise ValueError(
                    f"{label}={selector!r} matches none of the layers that can be masked: {[n for n, _, _ in found]}"
                )
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(_place(parameter), set()).add(id(module))

    def verdict(name: str, module: nn.Module, kind: LayerKind, is_last: bool, trains: bool) -> tuple[bool, str]:
        weight = _stored_weight(module, kind)
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} is lazy and has no weight yet: run one batch through the model first")
        if is_parametrized(module, kind.weight_name) or not isinstance(weight, nn.Parameter):
            return False, "its weight is not a plain parameter"
        if any(_matches(selector, name, module) for selector in exclude):
            return False, "excluded"
        if weight.is_complex():
            return False, "its weight is complex"
        if not trains and not weight.requires_grad:
            return False, _FROZEN
        if not trains and held is not None and id(weight) not in held:
            return False, _NOT_HELD
        if len(owners[_place(weight)]) > 1:
            return False, "its weight is shared with another module"
        if 0 in whole_shape(model, module, kind.weight_name):
            return False, "its weight is empty"
        if kind.experts and (reason := why_no_stack(model, module, kind)):
            return False, reason
        if reason := _why_no_zeros(weight):
            return False, reason
        if any(_matches(selector, name, module) for selector in include):
            return True, "included"
        if kind.experts:
            return True, ""
        if is_last or name.rpartition(".")[2] in _HEAD_NAMES:
            return False, HEAD
        return True, ""

    end = len(found) - 1
    # A frozen copy of the network may be registered after it. Where one layer alone trains, it need not be a head.
    training = [i for i, (_, module, kind) in enumerate(found) if _trains(module, kind, held)]
    last = training[-1] if len(training) > 1 else end

    def candidate_of(index: int, *, trains: bool = False) -> Candidate:
        name, module, kind = found[index]
        masked, why = verdict(name, module, kind, index == (end if trains else last), trains)
        seems_head = why == HEAD
        if seems_head and mask_heads:
            masked, why = True, ""
        weight = _stored_weight(module, kind)
        shard = _shard(model, name, module, kind, asked_for=masked or not isinstance(weight, nn.Parameter))
        why_dense = f"no sparse operator: {shard.why_dense}" if shard.why_dense else kind.why_no_operator(module)
        parts = _fused_parts(name, shard.shape, kind) if masked else 1
        later = candidate_of(index, trains=True) if masks_late and why in (_FROZEN, _NOT_HELD) else None
        return Candidate(name, module, kind, weight, shard, why_dense, parts, masked, why, seems_head, later)

    candidates = [candidate_of(index) for index in range(len(found))]
    if any(c.why == _FROZEN and c.later is not None and c.later.masked for c in candidates):
        return tuple(candidates)
    if not any(candidate.masked and not candidate.seems_head for candidate in candidates):
        reasons = {candidate.name: candidate.why or HEAD for candidate in candidates}
        unmade = held is not None and not held
        thawed_later = not unmade and any(candidate.why in (_FROZEN, _NOT_HELD) for candidate in candidates)
        stacked = _three_dimensional(model)
        raise ValueError(
            "the model has no layer to mask: expected at least one linear or convolution layer besides the output head"
            + ("; there is no optimizer yet: make it in configure_optimizers, not in a later hook" if unmade else "")
            + (
                "; what BackboneFinetuning or the like thaws later is not seen: thaw it before the fit, or begin "
                "another fit once it trains"
                if thawed_later
                else ""
            )
            + (f"; found {reasons} (name one in include=)" if reasons else "")
            + (f"; experts or the like stacked in one parameter are named in experts=: {stacked}" if stacked else "")
        )
    return tuple(candidates)


def _adapters(model: nn.Module, experts: Sequence[str | ExpertAdapter]) -> list[ExpertAdapter]:
    """Return the adapters among `experts`, one for each class, which the model has a module of."""
    adapters = {x.module: x for x in experts if isinstance(x, ExpertAdapter)}
    if len(adapters) < sum(isinstance(x, ExpertAdapter) for x in experts):
        raise ValueError(f"experts= has two adapters for one class, of {[cls.__name__ for cls in adapters]}")
    classes = {own_class(module) for module in model.modules()}
    for cls in adapters:
        if cls not in classes:
            raise ValueError(
                f"experts= has an adapter for {cls.__name__}, and the model has no such module (subclasses do not "
                f"count); parameters of three dimensions are {_three_dimensional(model)}"
            )
    return list(adapters.values())


def _place(parameter: Tensor) -> int:
    """Return what two parameters have in common that are one weight, tied by ``b.data = a.data.t()``, or are the same.

    That is their address; parts of FSDP's flat parameters have their own. What has none here is told by its object.
    """
    is_plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided and parameter.numel() > 0
    return (is_plain and parameter.data_ptr()) or id(parameter)


def _three_dimensional(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {clean_name(n): tuple(p.shape) for n, p in model.named_parameters() if p.dim() == 3}


def _why_no_zeros(weight: Tensor) -> str:
    """Return why a tensor subclass, such as a quantised weight, cannot be masked; empty for what can be.

    Weights that are spread over ranks are left to their adapters: those know their parts.
    """
    if not hasattr(weight, "__tensor_flatten__") or hasattr(weight, "placements"):
        return ""
    try:
        with torch.no_grad():
            copy = weight.detach().clone()
            keep_active_(copy, torch.zeros(copy.shape, dtype=torch.bool, device=copy.device), 1)
            is_zero = not bool(copy.abs().any())
    except Exception:  # whatever a class raises that does not know an operator
        is_zero = False
    return "" if is_zero else f"its weight is of class {type(weight).__name__}, in which units cannot be set to zero"


def _stored_weight(module: nn.Module, kind: LayerKind) -> Any:
    """Return a layer's weight as stored; of a parametrized one the parameter of its shape that it is made from.

    The attribute of a parametrized weight is not read: that computes it, and spectral_norm's power iteration goes on.
    """
    if is_parametrized(module, kind.weight_name):
        return max(module.parametrizations[kind.weight_name].parameters(recurse=False), key=Tensor.numel)  # type: ignore[index,union-attr]
    return getattr(module, kind.weight_name)


def _trains(module: nn.Module, kind: LayerKind, held: Container[int] | None) -> bool:
    """Return whether a layer's weight, or what it is computed from, takes gradients and is held by an optimizer."""
    weight = _stored_weight(module, kind)
    parameters = [weight] if isinstance(weight, nn.Parameter) else module.parameters()
    return any(p.requires_grad and (held is None or id(p) in held) for p in parameters)


def _shard(model: nn.Module, name: str, module: nn.Module, kind: LayerKind, asked_for: bool) -> Shard:
    """Return the layout of a layer's weight over ranks; for one that is not to be masked, its shape is enough."""
    if is_parametrized(module, kind.weight_name):
        return Whole(_stored_weight(module, kind), kind.transposed)
    if kind.experts and asked_for:
        return stack_shard(model, module, kind)
    try:
        return shard_of(model, module, kind.weight_name, kind.transposed)
    except ValueError as error:
        if asked_for:
            raise ValueError(f"layer {name!r}: {error}") from error
        return Whole(_stored_weight(module, kind), kind.transposed)


def thawed_layers(candidates: Sequence[Candidate], held: Container[int]) -> list[str]:
    """Return the names of layers that were left dense because they did not train, and train now.

    Args:
        candidates: what `find_candidates` returned.
        held: ids of the parameters that an optimizer holds now.

    """
    waiting = (candidate for candidate in candidates if candidate.why in (_FROZEN, _NOT_HELD))
    return [c.name for c in waiting if c.weight.requires_grad and id(c.weight) in held]


def replaced_layers(model: nn.Module, candidates: Sequence[Candidate], held: Container[int]) -> list[str]:
    """Return the names of layers that the model no longer has, or whose weight is another parameter or computed now.

    Where weights are sharded, a layer's attribute is another object in its forward, which no optimizer holds.

    Args:
        model: the model that `find_candidates` was called of.
        candidates: candidates of it.
        held: ids of the parameters that an optimizer holds now.

    """
    modules = set(model.modules())

    def is_replaced(candidate: Candidate) -> bool:
        module, name = candidate.module, candidate.kind.weight_name
        now = module._parameters.get(name)
        is_other = isinstance(now, nn.Parameter) and now is not candidate.weight
        is_other = is_other and (id(now) in held or isinstance(candidate.shard, Whole))
        return module not in modules or is_other or is_computed(module, name)

    return [candidate.name for candidate in candidates if is_replaced(candidate)]


def new_layers(model: nn.Module, candidates: Sequence[Candidate], held: Container[int]) -> list[str]:
    """Return the names of linear and convolution layers that train and that the model did not have before.

    Args:
        model: the model that `find_candidates` was called of.
        candidates: all candidates of it.
        held: ids of the parameters that an optimizer holds now.

    """
    known = {candidate.module for candidate in candidates}
    found = ((name, module, kind) for name, module, kind in _maskable(model, (), ()) if module not in known)
    stored = [(name, _stored_weight(module, kind)) for name, module, kind in found]
    return [name for name, weight in stored if weight.requires_grad and id(weight) in held]


def unlisted_weights(model: nn.Module, candidates: Sequence[Candidate]) -> dict[str, int]:
    """Return the trainable weights of two or more dimensions that belong to none of the candidates.

    Such are embeddings, routers, and weights of layers that are not known here.

    Args:
        model: the model.
        candidates: what `find_candidates` returned for it.

    Returns:
        Number of weights by the parameter's name, free of wrappers' parts.

    """
    listed = {id(candidate.weight) for candidate in candidates}
    return {
        clean_name(name): parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dim() > 1 and id(parameter) not in listed
    }
