"""Linear layers: the three products by each backend, and the whole layer forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.sparse.autotune._cases import Case, refusals
from lightning_estdgm.sparse.backends._protocol import get_backend
from lightning_estdgm.tools.bench.kernels._cases import attempt, timed_product
from lightning_estdgm.tools.bench.kernels._kernels_config import KernelsConfig
from lightning_estdgm.tools.bench.kernels._peers import PEERS, Weights, measure_peer
from lightning_estdgm.tools.bench.kernels._rows import row


def linear_rows(config: KernelsConfig, say: Callable[[str], None] = lambda text: None) -> Iterator[dict[str, Any]]:
    """Yield a row for each case and each backend or peer that can run it; `say` is told once which cannot, and why."""
    told: set[str] = set()

    def refuse(name: str, reason: str) -> None:
        if (text := f"{name} left out: {reason}") not in told:
            told.add(text)
            say(text)

    for dtype in config.dtypes:
        for tokens, out_features, in_features in config.shapes:
            done: set[tuple[Any, ...]] = set()  # of peers that know no blocks
            for block_size in config.block_sizes:
                for density in config.densities:
                    case = Case(
                        tokens,
                        out_features,
                        in_features,
                        block_size,
                        density,
                        getattr(torch, dtype),
                        torch.device(config.device),
                    )
                    yield from _case_rows(case, config, refuse)
                    if config.peers:
                        yield from _peer_rows(case, config.rounds, done, refuse)


def _case_rows(case: Case, config: KernelsConfig, refuse: Callable[[str, str], None]) -> Iterator[dict[str, Any]]:
    names = []
    for name, reason in refusals(case).items():
        if reason is None:
            names.append(name)
        else:
            refuse(f"backend {name}", f"it {reason}")
    shape = {"tokens": case.tokens, "out_features": case.out_features, "in_features": case.in_features}
    for name in names:
        products = partial(linear_products, case, name, config.rounds)
        yield attempt("linear", shape, case, name, products, config.rounds)


def linear_products(case: Case, name: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Time Y, dX and dW by a backend's own methods against ``F.linear``, ``dY @ W`` and ``dY^T @ X``.

    Without bias and autograd. Every result is compared with the dense product of the masked weight.

    Returns:
        Rows by product, as `product_row` makes them.
    """
    topology, backend = case.topology(), get_backend(name)
    mask = topology.weight_mask()
    x, weight, dy = _operands(case)
    weight = torch.where(mask, weight, torch.zeros_like(weight))
    calls: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "Y": (lambda: F.linear(x, weight), lambda: backend.linear(x, weight, None, topology)),
        "dX": (lambda: dy @ weight, lambda: backend.grad_input(dy, weight, topology)),
        "dW": (lambda: dy.t() @ x, lambda: backend.grad_weight(dy, x, topology)),
    }
    flops = 2.0 * case.tokens * case.out_features * case.in_features
    with torch.no_grad(), torch.autocast(case.device.type, enabled=False):
        return {
            product: timed_product(dense, sparse, mask if product == "dW" else None, flops, case, rounds)
            for product, (dense, sparse) in calls.items()
        }


def _peer_rows(
    case: Case, rounds: int, done: set[tuple[Any, ...]], refuse: Callable[[str, str], None]
) -> Iterator[dict[str, Any]]:
    x, weight, dy = _operands(case)
    weights = Weights(weight, case.topology())
    for peer in PEERS:
        key = (
            peer.name,
            *([case.block_size] if peer.has_blocks else []),
            *([case.density] if peer.any_density else []),
        )
        if key in done:
            continue
        done.add(key)
        found = measure_peer(peer, x, weights, dy, rounds)
        if isinstance(found, str):
            refuse(peer.name, found)
            continue
        block_size = case.block_size if peer.has_blocks else None
        shape = {"tokens": case.tokens, "out_features": case.out_features, "in_features": case.in_features}
        seconds, products, notes = found.seconds, found.products, found.notes
        yield row("linear", shape, case.dtype, block_size, found.density, peer.name, seconds, products, notes)


def _operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return X, W (not masked) and dY, random, always the same ones."""
    generator = torch.Generator(case.device).manual_seed(0)
    shapes = (case.tokens, case.in_features), (case.out_features, case.in_features), (case.tokens, case.out_features)
    x, weight, dy = (torch.randn(*s, generator=generator, device=case.device).to(case.dtype) for s in shapes)
    return x, weight, dy
