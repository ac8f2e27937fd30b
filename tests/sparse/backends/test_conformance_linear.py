"""Linear layers of every discovered backend against the oracle, and the oracle against dense autograd."""

import functools
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from helpers.sparse_linear import (
    BACKENDS,
    DEVICES,
    MASKS,
    MODES,
    ON_CPU,
    TOLERANCES,
    make_operands,
    make_topology,
    refusal,
    run,
    widest,
)
from lightning_estdgm.sparse._linear import masked_linear

# tokens, block rows, block columns, block size
SHAPES = [
    (7, 3, 5, 16),
    (33, 2, 16, 8),
    (1, 1, 1, 32),
    (0, 2, 3, 8),
    (50, 4, 2, 64),
    (40, 50, 30, 1),
    (9, 5, 7, (4, 1)),
    (18, 3, 5, (1, 8)),
    (3, 10, 6, 4),
    (33, 4, 19, (8, 1)),
    (130, 3, 37, (16, 1)),
    (21, 2, 50, (32, 1)),
]


@pytest.mark.parametrize(("rows", "cols", "block_size"), [(2, 3, 4), (5, 3, 1), (1, 1, 8), (2, 3, (4, 2))])
@pytest.mark.parametrize("mask", MASKS)
def test_the_oracle_is_dense_autograd_on_a_masked_weight(rows, cols, block_size, mask):
    topology = make_topology(rows, cols, block_size, mask)
    x, weight, bias, dy = make_operands(topology, 6, torch.float32)
    keep = torch.kron(topology.mask().double(), torch.ones(topology.sides).double())
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = F.linear(x, weight * keep, bias)
    expected = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    got = run(x, weight, bias, dy, topology, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_conformance(backend, device, dtype, mode, transposed):
    refusals = {b: refusal(backend, device, dtype, b) for _, _, _, b in SHAPES}
    shapes = [shape for shape in SHAPES if refusals[shape[-1]] is None]
    if not shapes:
        pytest.skip(f"{backend} {next(iter(refusals.values()))}")
    for (tokens, rows, cols, block_size), mask in product(shapes, MASKS):
        topology = make_topology(rows, cols, block_size, mask, device)
        x, weight, bias, dy = make_operands(topology, tokens, dtype)
        expected = run(x, weight, bias, dy, topology, backend="reference", **MODES[mode])
        if "frozen" not in MODES[mode]:
            weight = weight.masked_fill(~topology.weight_mask(), float("nan"))  # ignored, whatever it holds
        if transposed:
            weight = weight.t().contiguous().t()
        got = run(*(t.to(dtype) for t in (x, weight, bias, dy)), topology, backend=backend, **MODES[mode])
        for name, mine, right in zip(("y", "dx", "dw", "dbias"), got, expected, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(
                mine.double(),
                right,
                **TOLERANCES[dtype],
                msg=lambda m, at=(name, tokens, rows, cols, block_size, mask): f"{at}: {m}",
            )
        dw = got[2]
        if "dense_grad" not in MODES[mode]:
            assert not dw[~topology.weight_mask()].any()
        assert dw.t().is_contiguous() if transposed else dw.is_contiguous()


@pytest.mark.parametrize("backend", ON_CPU)
def test_conformance_without_bias(backend):
    topology = make_topology(3, 5, 16, "empty row and column")
    x, weight, _, dy = make_operands(topology, 9, torch.float32)
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = masked_linear(*leaves, None, topology, backend=name)
        results.append([y.detach().double(), *(g.double() for g in torch.autograd.grad(y, leaves, dy.to(dtype)))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 0, 3), (1, 2, 1, 2)], ids=str)
def test_any_leading_dimensions(backend, lead):
    topology = make_topology()
    dtype = widest(backend)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    _, weight, bias, _ = (t.to(dtype) for t in make_operands(topology, 1, torch.float32))
    x = torch.randn(*lead, topology.shape[1], dtype=dtype, requires_grad=True)
    y = masked_linear(x, weight.requires_grad_(), bias, topology, backend=backend)
    expected = F.linear(x, weight * topology.weight_mask(), bias)
    assert y.shape == (*lead, topology.shape[0])
    torch.testing.assert_close(y, expected, **tolerance)
    grads = [torch.autograd.grad(out.square().sum(), (x, weight)) for out in (y, expected)]
    torch.testing.assert_close(*grads, **tolerance)


@pytest.mark.parametrize("backend", ON_CPU)
def test_operands_of_odd_strides(backend):
    topology = make_topology()
    x, weight, bias, dy = (t.to(widest(backend)) for t in make_operands(topology, 6, torch.float32))
    expected = run(x, weight, bias, dy, topology, backend="reference")
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=3e-5)
    wide = torch.zeros(12, 2 * x.shape[1], dtype=x.dtype)
    wide[::2, ::2] = x
    for odd_x in (x.t().contiguous().t(), wide[::2, ::2]):
        close(run(odd_x, weight, bias, dy, topology, backend=backend), expected)
    odd_weight = torch.zeros(2 * weight.shape[0], 3 * weight.shape[1], dtype=weight.dtype)[::2, ::3]
    odd_weight.copy_(weight)
    close(run(x, odd_weight, bias, dy, topology, backend=backend), expected)
    ones = torch.ones((), dtype=x.dtype).expand_as(dy)  # what sum().backward() sends
    close(
        run(x, weight, bias, ones, topology, backend=backend),
        run(x, weight, bias, ones.contiguous(), topology, backend="reference"),
    )


@pytest.mark.parametrize("backend", [name for name in ON_CPU if widest(name) == torch.float64])
def test_gradcheck(backend):
    topology = make_topology(2, 2, 8, "every other block")
    leaves = [t.requires_grad_() for t in make_operands(topology, 3, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *a: masked_linear(*a, topology, backend=backend), leaves)
