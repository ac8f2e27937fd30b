"""Linear layers: the three products by each backend, and the whole layer forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.bench.kernels.config import KernelsConfig
from lightning_estdgm.bench.kernels.peers import PEERS, Weights, measure_peer
from lightning_estdgm.bench.kernels.rows import is_wrong, product_row, relative_error, row
from lightning_estdgm.bench.kernels.timing import take_turns
from lightning_estdgm.ops import get_backend
from lightning_estdgm.ops.cases import DENSE, Case, measure_case, refusals
from lightning_estdgm.ops.reference import expand_mask

__all__ = ["linear_products", "linear_rows"]


def linear_rows(config: KernelsConfig, say: Callable[[str], None] = lambda text: None) -> Iterator[dict[str, Any]]:
    """Yield a row for each case and each backend or peer that can run it; `say` is told what cannot, and why, once."""
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
    if not names:
        return
    products = linear_products(case, names, config.rounds)
    seconds = measure_case(case, [DENSE, *names], rounds=config.rounds)
    for name in names:
        times = seconds[DENSE], seconds[name]
        yield row(
            "linear",
            _shape(case),
            case.dtype,
            case.block_size,
            case.topology().density,
            name,
            times,
            products[name],
        )


def linear_products(case: Case, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Time Y, dX and dW by the backends' own methods against ``F.linear``, ``dY @ W`` and ``dY^T @ X``.

    Without bias and autograd. Every result is compared with the dense product of the masked weight.

    Returns:
        by backend and product, what `product_row` holds.
    """
    topology = case.topology()
    x, weight, dy = _operands(case)
    weight = torch.where(expand_mask(topology), weight, torch.zeros((), dtype=case.dtype, device=case.device))
    dense: dict[str, Callable[[], Tensor]] = {
        "Y": lambda: F.linear(x, weight),
        "dX": lambda: dy @ weight,
        "dW": lambda: dy.t() @ x,
    }
    flops = 2.0 * case.tokens * case.out_features * case.in_features
    result: dict[str, dict[str, Any]] = {name: {} for name in names}
    with torch.no_grad(), torch.autocast(case.device.type, enabled=False):
        for product, dense_call in dense.items():
            calls: dict[str, Callable[[], object]] = {DENSE: dense_call}
            for name in names:
                calls[name] = _product(name, product, x, weight, dy, case)
            expected = dense_call()
            if product == "dW":
                expected = torch.where(expand_mask(topology), expected, torch.zeros_like(expected))
            errors = {name: relative_error(calls[name](), expected) for name in names}  # type: ignore[arg-type]
            seconds = take_turns(calls, case.device, rounds)
            for name in names:
                wrong = is_wrong(errors[name], case.dtype)
                result[name][product] = product_row(
                    seconds[DENSE], seconds[name], flops, topology.density, errors[name], wrong
                )
    return result


def _product(name: str, product: str, x: Tensor, weight: Tensor, dy: Tensor, case: Case) -> Callable[[], Tensor]:
    backend, topology = get_backend(name), case.topology()
    if product == "Y":
        return lambda: backend.linear(x, weight, None, topology)
    if product == "dX":
        return lambda: backend.grad_input(dy, weight, topology)
    return lambda: backend.grad_weight(dy, x, topology)


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
        yield row(
            "linear",
            _shape(case),
            case.dtype,
            block_size,
            found.density,
            peer.name,
            found.seconds,
            found.products,
            found.notes,
        )


def _operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """X, W (not masked) and dY, random, always the same ones."""
    generator = torch.Generator(case.device).manual_seed(0)
    shapes = (case.tokens, case.in_features), (case.out_features, case.in_features), (case.tokens, case.out_features)
    x, weight, dy = (torch.randn(*s, generator=generator, device=case.device).to(case.dtype) for s in shapes)
    return x, weight, dy


def _shape(case: Case) -> dict[str, int]:
    return {"tokens": case.tokens, "out_features": case.out_features, "in_features": case.in_features}
