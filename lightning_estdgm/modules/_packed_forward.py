"""Layers that store the active units of their weight only: the class that such a layer takes on.

The layer keeps its module object and its name, and its parameter keeps its object and its name, too: under ``weight``
stands a parameter of shape ``[units, rows, columns]``. Read as an attribute, ``layer.weight`` is the whole weight.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_estdgm.modules._forward_watch import replaced_forward
from lightning_estdgm.modules._gradient_probe import probe, with_probe
from lightning_estdgm.modules._kinds import CONVOLUTIONS, LayerKind, foreign_method, own_class
from lightning_estdgm.modules._later_whole import LaterWhole, plain
from lightning_estdgm.modules._packing import Packing, topology_of
from lightning_estdgm.modules._sparse_forward import STATE_PREFIX
from lightning_estdgm.sparse._packed_linear import packed_linear

OF_THE_RUN = ("_estdgm_observer", "_estdgm_probe", "_estdgm_hooks", "_estdgm_loaded_states")
"""Attributes of a packed layer that no copy of it has."""

_WEIGHT = "weight"
_READ_AGAIN = frozenset({"__get__", "detach"})  # what gives another view of the weight, such as ``weight.data``


class WholeWeight(Tensor):
    """The whole weight of a packed layer, to be read: what writes to it or to a view raises, as it would be lost.

    Copies of it are plain tensors, and so is what a file gets.
    """

    _allowed: frozenset[str] = frozenset()  # names of functions that are no writes

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function on plain tensors; refuse those that write in place or to ``out``."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if torch.compiler.is_compiling():  # cannot follow what comes here
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        writes = name in ("__setitem__", "__set__", "__delete__") or (name.endswith("_") and not name.endswith("__"))
        written = [*(_several(args[0]) if writes and name not in cls._allowed else ()), *_several(kwargs.get("out"))]
        if any(isinstance(one, WholeWeight) for one in written):
            raise RuntimeError(f"{name} would write to a copy: {_SAY}")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if name in _READ_AGAIN and isinstance(result, Tensor) and result.dim() > 1:
                return result.as_subclass(cls)
            whole = args[0] if args and isinstance(args[0], WholeWeight) else None
            if whole is None:
                return result
            if type(result) in (list, tuple):
                return type(result)(_as_view(one, whole) for one in result)
            return _as_view(result, whole)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.detach().as_subclass(Tensor), memo)


class _WeightView(WholeWeight):
    """A view of a whole weight, which may become a parameter of its own."""

    _allowed = frozenset({"requires_grad_", "share_memory_"})


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _as_view(result: Any, whole: WholeWeight) -> Any:
    """Return what a function of a whole weight has returned: if it is a view of that, as one that cannot be written."""
    if not isinstance(result, Tensor) or result.dim() == 0 or not result._is_view():
        return result
    base = whole._base if whole._is_view() else whole
    return result.as_subclass(_WeightView) if result._base is base else result


_SAY = (
    "the layer stores its active units only (storage='packed'). Load a whole weight by "
    "`module.load_state_dict({'weight': ...}, strict=False)`, or write to the packed values, "
    "`dict(module.named_parameters())['weight']`; an average of state dicts is kept in clones of their tensors. "
    "Register a parametrization, such as weight_norm, before the fit: its layer is left dense"
)


class GradientObserver(Protocol):
    """What observes the whole gradients of a packed layer."""

    def begin(self, accumulated: Tensor | None) -> None:
        """Note that a backward is about to add to the parameter's gradient, which is `accumulated` so far."""
        ...

    def end(self) -> None:
        """Note that a backward has added to the parameter's gradient."""
        ...

    def __call__(self, gradient: Tensor) -> None:
        """Take the gradient of all uses in one backward, ``(out, in, ...)``."""
        ...


class PackedForward:
    """Mixin of the packed classes: the parameter ``weight`` holds active units only. All state lives on the instance.

    A deepcopy is packed as well, with a mask of its own; a pickle is the plain layer with its whole weight.
    """

    _estdgm_dense_class: type[nn.Module]
    _estdgm_packing: Packing
    _estdgm_observer: GradientObserver | None
    _estdgm_probe: Tensor | None  # the whole weight's place in the graph, where its gradient is observed
    _estdgm_hooks: Any  # on the parameter, for as long
    _estdgm_called: bool
    _estdgm_held: bool
    _estdgm_loaded: Tensor | None
    _estdgm_loaded_states: dict[tuple[Any, str], Any]  # of an optimizer, whole, by it and the name
    _parameters: dict[str, Any]

    @property
    def packed_weight(self) -> nn.Parameter:
        """The active units, ``[units, rows, columns]``."""
        parameter: nn.Parameter = self._parameters[_WEIGHT]
        return parameter

    @property
    def weight(self) -> Tensor:
        """The whole weight, made anew at each reading; gradients reach the active units through it."""
        return self._whole_in_graph().as_subclass(WholeWeight)

    def _whole_in_graph(self) -> Tensor:
        whole, probed = self._whole_weight(), self._probe
        return whole if probed is None else whole + probed

    def _whole_weight(self) -> Tensor:
        if self._estdgm_loaded is not None:
            return self._estdgm_loaded.detach().to(self.packed_weight)
        return self._estdgm_packing.unpack(self.packed_weight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == _WEIGHT:
            raise AttributeError(f"layer {self._estdgm_packing.name!r}: the weight cannot be replaced, as {_SAY}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == _WEIGHT:
            raise AttributeError(f"layer {self._estdgm_packing.name!r}: the weight cannot be removed, as {_SAY}")
        super().__delattr__(name)

    def observe(self, observing: bool) -> None:
        """Have each backward that adds to the parameter's gradient show the observer that of the whole weight."""
        observer = self._estdgm_observer
        observing = observing and observer is not None and self.packed_weight.requires_grad
        if observing == (self._estdgm_probe is not None):
            return
        for hook in self._estdgm_hooks or ():
            hook.remove()
        self._estdgm_probe = self._estdgm_hooks = None
        if observing:
            assert observer is not None
            packing, parameter = self._estdgm_packing, self.packed_weight
            see = partial(_see, observer, packing.transposed)
            self._estdgm_probe = probe(parameter, packing.stored_shape, see)
            self._estdgm_hooks = (
                parameter.register_hook(partial(_begin, observer, weakref.ref(parameter))),
                parameter.register_post_accumulate_grad_hook(partial(_end, observer)),
            )

    @property
    def _probe(self) -> Tensor | None:
        """The probe, unless the parameter is frozen now."""
        return self._estdgm_probe if self.packed_weight.requires_grad else None

    # ------------------------------------------------------------------ torch's own ways of a module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        packing = self._estdgm_packing
        order = None if packing.order is None else fn(packing.order)
        self._estdgm_packing = replace(packing, topology=packing.topology.apply(fn), order=order)
        is_observed = self._estdgm_probe is not None
        self.observe(False)
        super()._apply(fn, recurse)  # type: ignore[misc]
        self.observe(is_observed)  # by a probe of the parameter's dtype and device
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if keep_vars:
            destination[prefix + _WEIGHT] = self._whole_weight()
        elif self._estdgm_loaded is not None:
            destination[prefix + _WEIGHT] = self._whole_weight().detach().as_subclass(WholeWeight)
        else:
            saved = self._estdgm_packing.saved(self.packed_weight)
            destination[prefix + _WEIGHT] = saved if isinstance(saved, LaterWhole) else saved.as_subclass(WholeWeight)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, packing = prefix + _WEIGHT, self._estdgm_packing
        given = state_dict.get(key)
        if given is not None:
            own = self.packed_weight.detach()
            if tuple(given.shape) != packing.stored_shape:
                error_msgs.append(
                    f"size mismatch for {key}: got {tuple(given.shape)}, expected the whole weight "
                    f"{packing.stored_shape} of layer {packing.name!r}, which stores its active units only"
                )
                state_dict[key] = own
            elif local_metadata.get("assign_to_params_buffers", False):
                error_msgs.append(f"{key}: assign=True would replace the parameter of a packed layer: leave it out")
                state_dict[key] = own
            else:
                state_dict[key] = self._taken(given.detach())
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _taken(self, given: Tensor) -> Tensor:
        """Return the active units of a loaded weight; one that holds others is kept until its mask is known.

        A layer under no controller takes over the units that are not zero.
        """
        packing = self._estdgm_packing
        whole = plain(given).to(packing.topology.device)
        values = packing.pack(whole)
        is_other = int(torch.count_nonzero(whole)) != int(torch.count_nonzero(values))
        self._estdgm_loaded = given if is_other and self._estdgm_held else None
        if is_other and not self._estdgm_held:
            repack_(self, _units_of(whole, packing))
            values = self._estdgm_packing.pack(whole)
        return values

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(
            {
                name: copy.deepcopy(value, memo) if name not in OF_THE_RUN else None
                for name, value in self.__dict__.items()
            }
        )
        vars(new).update(_estdgm_held=False)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if not name.startswith(STATE_PREFIX)}
        weight = nn.Parameter(self._whole_weight().detach(), self.packed_weight.requires_grad)
        state["_parameters"] = {**self._parameters, _WEIGHT: weight}
        return object.__new__, (self._estdgm_dense_class,), state


class _PackedLinear(PackedForward):
    """A linear layer on its active units."""

    def forward(self, input: Tensor) -> Tensor:  # as torch names it: it may be passed by name
        self._estdgm_called = True
        packing, bias = self._estdgm_packing, self._parameters.get("bias")
        if self._estdgm_loaded is not None:
            return F.linear(input, packing.oriented(self._whole_weight()), bias)
        if input.layout is not torch.strided or input.is_nested:
            return F.linear(input, packing.oriented(self._whole_in_graph()), bias)
        y = packed_linear(input, self.packed_weight, packing.topology, bias, order=packing.order)
        probed = self._probe
        return y if probed is None else with_probe(y, input, packing.oriented(probed))


class _PackedLinearOfX(_PackedLinear):
    """The same for classes of other libraries, which name their input ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class _PackedConv(PackedForward):
    """A convolution that stores its active units; the whole weight of the one layer is made for the product."""

    def forward(self, input: Tensor) -> Tensor:
        self._estdgm_called = True
        y: Tensor = self._conv_forward(input, self._whole_in_graph(), self._parameters.get("bias"))  # type: ignore[attr-defined]
        return y


def _see(observer: GradientObserver, transposed: bool, gradient: Tensor) -> None:
    observer(gradient.t() if transposed else gradient)


def _begin(observer: GradientObserver, parameter: Callable[[], Tensor | None], _: Tensor) -> None:
    held = parameter()
    observer.begin(None if held is None else held.grad)


def _end(observer: GradientObserver, _: Tensor) -> None:
    observer.end()


_PACKED: dict[type, type] = {}


def why_not_packed(module: nn.Module, kind: LayerKind) -> str:
    """Return the reason why a layer's weight cannot be packed; empty if it can."""
    cls = own_class(module)
    if replaced_forward(module) is not None:
        return kind.why_no_operator(module)
    if cls in (nn.Linear, *CONVOLUTIONS) and (name := foreign_method(module)):
        return f"its {name} is not torch's"
    if cls in CONVOLUTIONS:
        return ""
    if kind.experts or kind.weight_name != _WEIGHT or isinstance(module, CONVOLUTIONS):
        return f"no packed {cls.__name__}"
    return kind.why_dense(module) and f"no packed {cls.__name__}"


def pack_(module: Any, packing: Packing) -> None:
    """Make a layer store the active units of its weight only; the parameter stays the same object.

    Args:
        module: layer for which `why_not_packed` is empty.
        packing: its active units.

    """
    values = packing.pack(module._parameters[_WEIGHT].detach())
    cls = type(module)
    if cls not in _PACKED:
        linear = _PackedLinear if issubclass(cls, nn.Linear) else _PackedLinearOfX
        mixin = _PackedConv if issubclass(cls, CONVOLUTIONS) else linear
        _PACKED[cls] = type(f"Packed{cls.__name__}", (mixin, cls), {"_estdgm_dense_class": cls})
    vars(module).update(
        _estdgm_packing=packing,
        _estdgm_observer=None,
        _estdgm_probe=None,
        _estdgm_hooks=None,
        _estdgm_called=False,
        _estdgm_held=True,
        _estdgm_loaded=None,
        _estdgm_loaded_states={},
    )
    module.__class__ = _PACKED[cls]
    resize_(module._parameters[_WEIGHT], values)


def repack_(module: PackedForward, mask: Tensor, order: Tensor | None = None) -> None:
    """Give a packed layer another mask and order of its units; those that stay keep their values, others are 0."""
    packing = module._estdgm_packing
    new = replace(packing, topology=topology_of(mask, packing.block_size, packing.shape), order=order)
    values = new.pack(packing.unpack(module.packed_weight.detach()))
    module._estdgm_packing = new
    resize_(module.packed_weight, values)


def unpack_(module: Any, weight: Tensor | None = None) -> None:
    """Make a packed layer store its whole weight again, in its own class.

    Args:
        module: packed layer; any other is left alone.
        weight: weight as the state dict has it; ``None``: the active units, and 0 elsewhere.

    """
    if not isinstance(module, PackedForward):
        return
    parameter, packing = module.packed_weight, module._estdgm_packing
    whole = module._whole_weight().detach() if weight is None else weight.to(parameter)
    gradient = None if parameter.grad is None else packing.unpack(parameter.grad)
    parameter.grad = None
    module.observe(False)
    module.__class__ = module._estdgm_dense_class  # type: ignore[assignment]
    for name in [name for name in vars(module) if name.startswith(STATE_PREFIX)]:
        delattr(module, name)
    resize_(parameter, whole)
    parameter.grad = gradient


@torch.no_grad()
def unpack_free_(model: nn.Module) -> None:
    """Have layers store whole weights that an earlier run has left packed."""
    for module in model.modules():
        if isinstance(module, PackedForward):
            if module._estdgm_held:
                raise ValueError("the model is under another DGMController already: close that one first")
            unpack_(module)


@torch.no_grad()
def resize_(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor other values, maybe more or fewer; it stays the same object, and in place where it can."""
    if tensor.shape == values.shape:
        tensor.copy_(values)
    else:
        tensor.set_(values.to(tensor.dtype).contiguous())  # type: ignore[call-overload]


def _units_of(stored: Tensor, packing: Packing) -> Tensor:
    """Return the mask of the units of a weight that are not 0."""
    rows, columns = packing.topology.sides
    grid = packing.oriented(stored).reshape(packing.topology.block_rows, rows, packing.topology.block_cols, columns)
    mask = grid.ne(0).any(3).any(1)
    return mask.view(packing.shape) if packing.block_size == 1 else mask
