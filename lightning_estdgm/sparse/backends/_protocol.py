"""Backends of the sparse operators: the protocols they follow, and their discovery.

A backend is one module of this folder with a module-level ``BACKEND``, or an entry point of the group
``lightning_estdgm.backends`` that loads to one.
"""

from __future__ import annotations

import functools
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_estdgm._registry import offers
from lightning_estdgm.sparse import backends as backends_folder
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology

ENTRY_POINT_GROUP = "lightning_estdgm.backends"

_RESERVED = ("auto", "dense")  # names that mean "no backend" wherever one is chosen


@runtime_checkable
class Backend(Protocol):
    """The three products of a linear layer, on active blocks only.

    Methods are called below autograd, with checked arguments: ``x2d [T, in]``, ``dy2d [T, out]`` and
    ``weight (out, in)`` of one dtype and device, of any strides, ``T >= 0``. They return new row-major
    tensors. What inactive blocks of ``weight`` hold must not reach a result, not even if it is NaN.
    """

    name: str

    def unsupported(self, device: torch.device, dtype: torch.dtype, topology: BlockTopology) -> str | None:
        """Reason why a case cannot be run, or None. May read sizes of the topology, never its tensors."""
        ...

    def linear(self, x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        """``Y = X (W * M)^T + bias``, shape ``[T, out]``."""
        ...

    def grad_input(self, dy2d: Tensor, weight: Tensor, topology: BlockTopology) -> Tensor:
        """``dX = dY (W * M)``, shape ``[T, in]``."""
        ...

    def grad_weight(self, dy2d: Tensor, x2d: Tensor, topology: BlockTopology) -> Tensor:
        """``dW = (dY^T X) * M``, shape ``(out, in)``, dense storage, exactly 0 in inactive blocks."""
        ...


@runtime_checkable
class ConvBackend(Backend, Protocol):
    """A backend that has the three products of a convolution as well.

    Called below autograd, with checked arguments: ``x [N, in, H, W]`` and ``dy [N, out, H', W']`` in channels-last
    memory, ``weight (out, in, kh, kw)`` of any strides, all of one dtype and device, ``N >= 0``. They return new
    tensors; activations in channels-last memory. What inactive blocks of ``weight`` hold must not reach a result.
    """

    def conv_unsupported(
        self, device: torch.device, dtype: torch.dtype, topology: BlockTopology, geometry: ConvGeometry
    ) -> str | None:
        """Reason why a case cannot be run, or None. May read sizes of the topology, never its tensors."""
        ...

    def conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """``Y = conv2d(X, W * M) + bias``, shape ``[N, out, H', W']``."""
        ...

    def conv_grad_input(
        self, dy: Tensor, weight: Tensor, size: tuple[int, int], topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """Gradient of the input, shape ``[N, in, *size]``."""
        ...

    def conv_grad_weight(self, dy: Tensor, x: Tensor, topology: BlockTopology, geometry: ConvGeometry) -> Tensor:
        """Gradient of the weight, shape ``(out, in, kh, kw)``, exactly 0 in inactive blocks."""
        ...


@runtime_checkable
class PointwiseBackend(Backend, Protocol):
    """A backend that is given the weight of a pointwise convolution itself, such as one that keeps what it made of it.

    Others are given a matrix, a new view of the weight at each call.
    """

    def pointwise(self, pixels: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        """``Y = X (W * M)^T + bias`` with ``W (out, in, 1, 1)``: ``[T, in] -> [T, out]``."""
        ...


@runtime_checkable
class PackedBackend(Backend, Protocol):
    """A backend that has the three products of a linear layer of packed values as well.

    ``values [units, rows, columns]`` are the active units alone, of any strides. ``order [units]`` says where each unit
    of the topology's row-major lists is among them, int32; None: they are in the order of these lists. Called below
    autograd, as the products of whole weights are.
    """

    def packed_linear(
        self, x2d: Tensor, values: Tensor, bias: Tensor | None, order: Tensor | None, topology: BlockTopology
    ) -> Tensor:
        """``Y = X W^T + bias``, shape ``[T, out]``."""
        ...

    def packed_grad_input(self, dy2d: Tensor, values: Tensor, order: Tensor | None, topology: BlockTopology) -> Tensor:
        """``dX = dY W``, shape ``[T, in]``."""
        ...

    def packed_grad_values(
        self, dy2d: Tensor, x2d: Tensor, order: Tensor | None, topology: BlockTopology, units: int
    ) -> Tensor:
        """Active units of ``dY^T X``, shape ``[units, rows, columns]``; `units` are active."""
        ...


# ---- discovery


@functools.lru_cache(maxsize=1)
def _discover() -> dict[str, Backend]:
    found: dict[str, Backend] = {}
    for offer in offers(backends_folder, "BACKEND", ENTRY_POINT_GROUP):
        backend = offer.load()
        if not isinstance(backend, Backend):
            raise TypeError(f"{offer.origin} must be a Backend (name, unsupported, linear, grad_input, grad_weight)")
        if backend.name in found or backend.name in _RESERVED:
            raise ValueError(f"{offer.origin}: the backend name {backend.name!r} is already taken")
        found[backend.name] = backend
    return dict(sorted(found.items()))


def backends() -> dict[str, Backend]:
    """Return every installed backend by name: those of this package and those of entry points.

    Raises:
        TypeError: A module or entry point offers something that is no backend.
        ValueError: Two backends have one name.

    Example:
        >>> sorted(backends())
        ['cpu', 'native', 'reference', 'triton']
    """
    return dict(_discover())


def get_backend(name: str) -> Backend:
    """Return the backend of that name.

    Raises:
        ValueError: There is none; the message lists the known ones.
    """
    found = _discover()
    if name not in found:
        raise ValueError(f"unknown backend {name!r}, expected one of: {', '.join(found)}")
    return found[name]


def supporting(name: str, device: torch.device, dtype: torch.dtype, topology: BlockTopology) -> Backend:
    """Return the backend of that name, or raise ValueError where it is unknown or cannot run the case."""
    backend = get_backend(name)
    reason = backend.unsupported(device, dtype, topology)
    if reason is not None:
        raise ValueError(f'backend {name!r} cannot run this layer: it {reason}; backend="reference" runs any')
    return backend


def conv_refusal(
    backend_name: str, device: torch.device, dtype: torch.dtype, topology: BlockTopology, geometry: ConvGeometry
) -> str | None:
    """Return the reason why a backend cannot run a convolution, or None.

    For a pointwise one, a backend of linear layers is enough.

    Raises:
        ValueError: There is no backend of that name.
    """
    backend = get_backend(backend_name)
    if geometry.pointwise:
        return backend.unsupported(device, dtype, topology)
    if not isinstance(backend, ConvBackend):
        return f"has no convolutions of {geometry.kernel_size} taps and padding {geometry.padding}"
    return backend.conv_unsupported(device, dtype, topology, geometry)


def supporting_conv(
    name: str, device: torch.device, dtype: torch.dtype, topology: BlockTopology, geometry: ConvGeometry
) -> Backend:
    """Return the backend of that name, or raise ValueError where it is unknown or cannot run the convolution."""
    reason = conv_refusal(name, device, dtype, topology, geometry)
    if reason is not None:
        raise ValueError(f'backend {name!r} cannot run this convolution: it {reason}; backend="reference" runs any')
    return get_backend(name)
