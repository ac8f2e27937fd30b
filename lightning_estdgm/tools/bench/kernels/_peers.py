"""What else PyTorch has: its sparse layouts BSR, CSR and 2:4, and oneDNN's dense product beside that of `F.linear`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.tools.bench.kernels._rows import is_wrong, product_row, relative_error
from lightning_estdgm.tools.bench.kernels._timing import take_turns

_SUM = ("whole", "the sum of the three products")


@dataclass(frozen=True)
class Weights:
    """Dense weight ``(out, in)`` and its active blocks."""

    dense: Tensor
    topology: BlockTopology

    def masked(self) -> Tensor:
        """Return the weight with zeros in inactive blocks."""
        return torch.where(self.topology.weight_mask(), self.dense, torch.zeros_like(self.dense))


@dataclass(frozen=True)
class Peer:
    """Other way to compute the layer.

    Attributes:
        name: name of the peer.
        measure: function of X, the weights, dY and the number of turns that times the peer; it raises where the peer
            does not exist here.
        has_blocks: whether it stores blocks; else it is measured at one block size only.
        any_density: whether it can have any density; else it is measured once for a shape.

    """

    name: str
    measure: Callable[[Tensor, Weights, Tensor, int], PeerTimes]
    has_blocks: bool = False
    any_density: bool = True


@dataclass(frozen=True)
class PeerTimes:
    """Times of a peer, as the arguments of `_rows.row`."""

    density: float
    seconds: tuple[float, float] | None
    products: Mapping[str, Any]
    notes: Mapping[str, str] = field(default_factory=dict)


# ---- sparse layouts: each is a function that returns the sparse weight, and its values as a dense matrix


def torch_bsr(weights: Weights) -> tuple[Tensor, Tensor]:
    """Block compressed rows; on a GPU ``F.linear`` runs them by PyTorch's Triton kernels, on a CPU by MKL."""
    masked = weights.masked()
    return masked.to_sparse_bsr(weights.topology.sides), masked


def torch_csr(weights: Weights) -> tuple[Tensor, Tensor]:
    """Compressed rows of single weights: cuSPARSE or MKL."""
    masked = weights.masked()
    return masked.to_sparse_csr(), masked


def torch_two_four(weights: Weights) -> tuple[Tensor, Tensor]:
    """Two of every four weights of a row, the larger ones: NVIDIA's sparse matrix units, at density 0.5 only."""
    dense = weights.dense
    groups = dense.view(dense.shape[0], -1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.abs().topk(2, -1).indices, True)
    pruned = torch.where(keep, groups, torch.zeros_like(groups)).view_as(dense)
    return torch.sparse.to_sparse_semi_structured(pruned), pruned


def _layout(
    make: Callable[[Weights], tuple[Tensor, Tensor]], x: Tensor, weights: Weights, dy: Tensor, rounds: int
) -> PeerTimes:
    sparse, dense = make(weights)
    error = relative_error(F.linear(x, sparse), F.linear(x, dense))
    return _times(x, sparse, dense, dy, error, rounds)


def _times(x: Tensor, sparse: Tensor, dense: Tensor, dy: Tensor, error: float, rounds: int) -> PeerTimes:
    density = float(torch.count_nonzero(dense)) / dense.numel()
    flops = 2.0 * x.shape[0] * dense.numel()
    wrong = is_wrong(error, x.dtype)
    products: dict[str, Any] = {}
    notes: dict[str, str] = {}

    def add(product: str, dense_call: Callable[[], object], sparse_call: Callable[[], object], bad: bool) -> None:
        seconds = take_turns({"dense": dense_call, "sparse": sparse_call}, x.device, rounds)
        products[product] = product_row(seconds["dense"], seconds["sparse"], flops, density, error, bad)

    add("Y", lambda: F.linear(x, dense), lambda: F.linear(x, sparse), wrong)
    for product, expected in (("dX", lambda: dy @ dense), ("dW", lambda: dy.t() @ x)):
        try:
            x_leaf = x.detach().clone().requires_grad_(product == "dX")
            w_leaf = sparse.detach().requires_grad_(product == "dW")
            y = F.linear(x_leaf, w_leaf)
            leaf = x_leaf if product == "dX" else w_leaf

            def backward(y: Tensor = y, leaf: Tensor = leaf) -> Tensor:
                return torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

            gradient = backward()
        except Exception as e:
            notes[product] = f"not offered: {_first_line(e)}"
            continue
        if product == "dX" and is_wrong(relative_error(gradient, expected()), x.dtype):
            notes[product] = "wrong result"
            continue
        if product == "dW" and gradient.layout == torch.strided:
            notes[product] = "computed dense, for inactive weights too"
        add(product, expected, backward, False)
    whole = None
    if {"dX", "dW"} <= products.keys():
        whole = _whole(products)
        notes.update((_SUM,))
    return PeerTimes(density, whole, products, notes)


def _whole(products: Mapping[str, Any]) -> tuple[float, float]:
    return sum(row["dense_s"] for row in products.values()), sum(row["sparse_s"] for row in products.values())


# ---- dense


def _onednn_dense(x: Tensor, weights: Weights, dy: Tensor, rounds: int) -> PeerTimes:
    """Time oneDNN's dense product: the same FLOPs as `F.linear`, for which PyTorch calls MKL in float32.

    On AMD's processors MKL 2024.2 goes no faster than AVX2 allows: there this is what a dense layer could reach.
    """
    w = weights.dense
    products: dict[str, Any] = {}
    for product, a, b in (("Y", x, w), ("dX", dy, w.t()), ("dW", dy.t(), x.t())):
        expected = a @ b.t()
        error = relative_error(_onednn(a, b), expected)
        calls = {"dense": partial(torch.matmul, a, b.t()), "peer": partial(_onednn, a, b)}
        seconds = take_turns(calls, x.device, rounds)
        flops, wrong = 2.0 * expected.numel() * a.shape[1], is_wrong(error, x.dtype)
        products[product] = product_row(seconds["dense"], seconds["peer"], flops, 1.0, error, wrong)
    return PeerTimes(1.0, _whole(products), products, dict((_SUM,)))


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.t()`` by oneDNN; a private operator of PyTorch's, which its compiler calls."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


# ---- all


PEERS = (
    Peer("torch BSR", partial(_layout, torch_bsr), has_blocks=True),
    Peer("torch CSR", partial(_layout, torch_csr)),
    Peer("torch 2:4", partial(_layout, torch_two_four), any_density=False),
    Peer("oneDNN dense", _onednn_dense, any_density=False),
)


def measure_peer(peer: Peer, x: Tensor, weights: Weights, dy: Tensor, rounds: int) -> PeerTimes | str:
    """Time what the peer has of Y, dX and dW against dense, or return in a phrase why it has not even Y.

    Gradients come from autograd, where a layout defines them; ``notes`` says of each that is missing why.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*(beta state|prototype)", category=UserWarning)
        try:
            return peer.measure(x, weights, dy, rounds)
        except Exception as e:  # another project's code may fail in any way; then it is left out, and why is told
            return _first_line(e)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
