"""Classes that a swapped layer takes on: a forward on active blocks over the layer's own class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_estdgm.modules._kinds import CONVOLUTIONS, as_images, conv_geometry, is_computed
from lightning_estdgm.sparse._conv import masked_conv2d
from lightning_estdgm.sparse._linear import masked_linear
from lightning_estdgm.sparse._topology import BlockTopology

STATE_PREFIX = "_estdgm_"
"""Start of the names of a swapped layer's attributes: all that come with the swap, and go with its end."""


class SparseForward:
    """Mixin of the swapped classes: a forward on active blocks only. All state lives on the instance.

    The topology is one object for as long as the layer is swapped, written in place as masks change. It follows the
    module through ``to``, but is no buffer: in no state dict, and out of reach of DDP's broadcast of buffers, which
    would hide masks that differ from rank to rank. A deepcopy or a pickle is the plain layer.
    """

    _estdgm_dense_class: type[nn.Module]
    _estdgm_topology: BlockTopology
    _estdgm_backend: str
    _estdgm_transposed: bool
    _estdgm_observing: bool
    _estdgm_frozen: bool

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._move_topologies(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _move_topologies(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._estdgm_topology = self._estdgm_topology.apply(fn)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy is the plain layer: nobody would tell it of later masks, and inactive weights are zero anyway (or, if
        # frozen, take part in the forward). So it is right for ever.
        if "parametrizations" in self.__dict__["_modules"]:
            return super().__reduce_ex__(protocol)  # torch's refusal: its class cannot be pickled
        state = {name: value for name, value in self.__dict__.items() if not name.startswith(STATE_PREFIX)}
        return object.__new__, (self._estdgm_dense_class,), state


class _SparseLinear(SparseForward):
    """A linear layer on active blocks."""

    def forward(self, input: Tensor) -> Tensor:  # as torch names it: it may be passed by name
        as_given = input.layout is not torch.strided or input.is_nested or is_computed(self, "weight")
        if self._estdgm_backend == "dense" or as_given:
            return super().forward(input)  # type: ignore[misc]
        return masked_linear(
            input,
            self.weight.t() if self._estdgm_transposed else self.weight,  # type: ignore[attr-defined]
            self.bias,  # type: ignore[attr-defined]
            self._estdgm_topology,
            backend=self._estdgm_backend,
            dense_grad=self._estdgm_observing,
            frozen=self._estdgm_frozen,
        )


class _SparseLinearOfX(_SparseLinear):
    """The same for classes of other libraries, which name their input ``x``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class _SparseConv(SparseForward):
    """A convolution on active blocks; one over a length is computed as of height 1."""

    def forward(self, input: Tensor) -> Tensor:
        spatial = self.weight.dim() - 2  # type: ignore[attr-defined]
        is_padded_by_zeros = self.padding_mode == "zeros"  # type: ignore[attr-defined]  # else set in mid-run
        geometry = conv_geometry(self) if is_padded_by_zeros else None  # type: ignore[arg-type]
        as_given = input.layout is not torch.strided or input.dim() not in (spatial + 1, spatial + 2)
        if self._estdgm_backend == "dense" or geometry is None or as_given or is_computed(self, "weight"):
            return super().forward(input)  # type: ignore[misc]
        y = masked_conv2d(
            as_images(self, input),
            self.weight if spatial == 2 else self.weight.unsqueeze(2),  # type: ignore[attr-defined]
            self.bias,  # type: ignore[attr-defined]
            self._estdgm_topology,
            geometry,
            backend=self._estdgm_backend,
            dense_grad=self._estdgm_observing,
            frozen=self._estdgm_frozen,
        )
        y = y if spatial == 2 else y.squeeze(2)
        return y if input.dim() == spatial + 2 else y.squeeze(0)


_SWAPPED: dict[type, type] = {}


def swapped_class(cls: type[nn.Module], mixin: type[SparseForward] | None = None) -> type[nn.Module]:
    """Return the class that puts a `SparseForward` over `cls`; always the same one, so that type guards hold.

    Args:
        cls: Class of a layer.
        mixin: What is put over it; ``None``: that of a linear layer or a convolution.

    """
    if cls not in _SWAPPED:
        if mixin is None:
            linear = _SparseLinear if issubclass(cls, nn.Linear) else _SparseLinearOfX
            mixin = _SparseConv if issubclass(cls, CONVOLUTIONS) else linear
        _SWAPPED[cls] = type(f"Masked{cls.__name__}", (mixin, cls), {"_estdgm_dense_class": cls})
    return _SWAPPED[cls]


def dense_class(cls: type) -> type:
    """Return the class that `swapped_class` was given, also where torch has put its own on top since.

    ``fully_shard`` and ``register_parametrization`` do, each as a class made for the one module.
    """
    if "_estdgm_dense_class" in vars(cls):
        return cls._estdgm_dense_class  # type: ignore[attr-defined]
    (swapped,) = (base for base in cls.__bases__ if issubclass(base, SparseForward))
    dense = dense_class(swapped)
    bases = tuple(dense if base is swapped else base for base in cls.__bases__)
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__", "__doc__")}
    return type(cls.__name__.replace(swapped.__name__, dense.__name__), bases, own)
