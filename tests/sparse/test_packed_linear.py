"""Linear layers of packed values on every backend against dense products in float64."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from helpers.sparse_linear import BACKENDS, DEVICES, MASKS, TOLERANCES, make_operands, make_topology, refusal
from lightning_estdgm.sparse import BlockTopology
from lightning_estdgm.sparse._packed_linear import expand, gather, packed_linear
from lightning_estdgm.sparse.backends._protocol import PackedBackend, get_backend

# tokens, block rows, block columns, block size
SHAPES = [
    (1, 1, 1, 32),
    (0, 2, 3, 8),
    (7, 3, 5, 16),
    (33, 2, 16, 8),
    (50, 4, 2, 64),
    (19, 2, 3, 48),
    (40, 50, 30, 1),
    (3, 7, 130, 1),
    (9, 5, 7, (4, 1)),
    (70, 21, 9, (2, 1)),
    (21, 9, 22, (1, 2)),
    (11, 9, 6, (1, 4)),
    (18, 3, 5, (1, 8)),
    (130, 3, 7, (1, 16)),
    (3, 10, 6, 4),
    (140, 23, 17, 4),
    (33, 4, 19, (8, 1)),
    (130, 3, 37, (16, 1)),
    (6, 3, 5, (2, 3)),
]


def _values(topology, weight):
    return gather(weight, topology)


def _products(x, values, bias, dy, topology, backend, order=None):
    """y, dx, dvalues, dbias."""
    leaves = [t.detach().requires_grad_() for t in (x, values, bias)]
    y = packed_linear(leaves[0], leaves[1], topology, leaves[2], backend, order)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _expected(x, values, bias, dy, topology):
    """The same by the dense library from a weight that is written block by block."""
    leaves = [t.detach().double().requires_grad_() for t in (x, values, bias)]
    (rows, columns), mask = topology.sides, topology.mask()
    at, lines = 0, []
    for r in range(topology.block_rows):
        line = []
        for c in range(topology.block_cols):
            active = bool(mask[r, c])
            line.append(leaves[1][at] if active else torch.zeros(rows, columns, dtype=torch.float64, device=x.device))
            at += active
        lines.append(torch.cat(line, 1))
    y = F.linear(leaves[0], torch.cat(lines), leaves[2])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double(), materialize_grads=True)]


def _agree(backend, device, dtype, shapes):
    for (tokens, rows, cols, block_size), mask in product(shapes, MASKS):
        topology = make_topology(rows, cols, block_size, mask, device)
        x, weight, bias, dy = make_operands(topology, tokens, dtype)
        operands = x, _values(topology, weight), bias, dy
        got = _products(*(t.to(dtype) for t in operands), topology, backend)
        for name, mine, right in zip(("y", "dx", "dvalues", "dbias"), got, _expected(*operands, topology), strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(
                mine.double(),
                right,
                **TOLERANCES[dtype],
                msg=lambda m, at=(name, tokens, rows, cols, block_size, mask): f"{at}: {m}",
            )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_unit_in_the_compiled_loops(dtype, threads):
    shapes = [shape for shape in SHAPES if refusal("native", "cpu", dtype, shape[-1]) is None]
    if not shapes:
        pytest.skip(f"native {refusal('native', 'cpu', dtype)}")
    assert isinstance(get_backend("native"), PackedBackend)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _agree("native", "cpu", dtype, shapes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [*BACKENDS, "dense", None])
def test_every_backend_takes_packed_values(backend, device, dtype):
    named = [] if backend in ("dense", None) else [backend]
    shapes = [
        shape for shape in SHAPES[:12:2] if all(refusal(name, device, dtype, shape[-1]) is None for name in named)
    ]
    if not shapes:
        pytest.skip(f"{backend} {refusal(backend, device, dtype)}")
    _agree(backend, device, dtype, shapes)


@pytest.mark.parametrize("block_size", [1, (4, 1), (1, 8), 4, 16, 64])
def test_numbers_do_not_depend_on_threads(block_size):
    topology = make_topology(12, 9, block_size, "density 0.3")
    x, weight, bias, dy = (t.float() for t in make_operands(topology, 37, torch.float32))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(_products(x, _values(topology, weight), bias, dy, topology, None))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("block_size", [1, (4, 1), (1, 4), 4, 16])
def test_packed_values_give_the_numbers_of_a_whole_weight(block_size):
    topology = make_topology(12, 9, block_size, "density 0.3")
    x, weight, _, dy = (t.float() for t in make_operands(topology, 37, torch.float32))
    native, values = get_backend("native"), _values(topology, weight)
    assert torch.equal(native.packed_linear(x, values, None, None, topology), native.linear(x, weight, None, topology))
    assert torch.equal(native.packed_grad_input(dy, values, None, topology), native.grad_input(dy, weight, topology))
    dw = native.grad_weight(dy, x, topology)
    assert torch.equal(native.packed_grad_values(dy, x, None, topology, topology.nnz), gather(dw, topology))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["native", "dense"])
@pytest.mark.parametrize("block_size", [1, (4, 1), (1, 4), (1, 8), 4, 8, 16, 64])
def test_units_in_another_order_give_the_same_numbers(block_size, backend, dtype):
    topology = make_topology(12, 9, block_size, "density 0.3")
    if backend == "native" and refusal("native", "cpu", dtype, block_size):
        pytest.skip(refusal("native", "cpu", dtype, block_size))
    x, weight, bias, dy = (t.to(dtype) for t in make_operands(topology, 37, dtype))
    order = torch.randperm(topology.nnz, generator=torch.Generator().manual_seed(3)).int()
    values, ordered = gather(weight, topology), gather(weight, topology, order)
    assert not torch.equal(values, ordered)
    assert torch.equal(expand(ordered, topology, order), expand(values, topology))
    y, dx, dvalues, dbias = _products(x, values, bias, dy, topology, backend)
    found = _products(x, ordered, bias, dy, topology, backend, order)
    for mine, right in zip(found, (y, dx, gather(expand(dvalues, topology), topology, order), dbias), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("compact", [False, True])
def test_a_mask_that_changes_is_followed(compact):
    topology = BlockTopology.from_mask(torch.zeros(20, 30, dtype=torch.bool), 1, compact=compact)
    for mask in ("density 0.3", "every other block", "empty", "full"):
        topology.update_(MASKS[mask](20, 30))
        x, weight, bias, dy = make_operands(topology, 9, torch.float32)
        operands = x, _values(topology, weight), bias, dy
        got = _products(*(t.float() for t in operands), topology, "native")
        torch.testing.assert_close([t.double() for t in got], _expected(*operands, topology), rtol=1e-5, atol=3e-5)


# ---- expand and gather


@pytest.mark.parametrize("block_size", [1, 4, (4, 1), (2, 3)])
@pytest.mark.parametrize("mask", MASKS)
def test_expand_is_the_inverse_of_gather(mask, block_size):
    topology = make_topology(5, 7, block_size, mask)
    weight = torch.randn(topology.shape)
    values = gather(weight, topology)
    assert values.shape == (topology.nnz, *topology.sides)
    assert torch.equal(expand(values, topology), weight * topology.weight_mask())
    assert torch.equal(gather(expand(values, topology), topology), values)
    filled = torch.where(topology.weight_mask(), weight, 0.1)
    assert torch.equal(expand(values, topology, fill=0.1), filled)
    assert torch.equal(gather(weight.t().contiguous().t(), topology), values)


def test_values_are_in_the_order_of_the_row_major_lists():
    topology = BlockTopology.from_mask(torch.tensor([[False, True], [True, True]]), 2)
    weight = torch.arange(16.0).view(4, 4)
    assert gather(weight, topology).tolist() == [
        [[2, 3], [6, 7]],
        [[8, 9], [12, 13]],
        [[10, 11], [14, 15]],
    ]


def test_expand_and_gather_are_differentiable():
    topology = make_topology(3, 4, 2, "density 0.3")
    values = torch.randn(topology.nnz, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(topology.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: expand(v, topology), values)
    assert torch.autograd.gradcheck(lambda w: gather(w, topology), weight)


# ---- derivatives and transforms


def _float64_case(block_size=4):
    topology = make_topology(2, 3, block_size, "every other block")
    x, weight, bias, _ = make_operands(topology, 3, torch.float64)
    return topology, [t.requires_grad_() for t in (x, _values(topology, weight).detach(), bias)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["dense", "reference", None])
@pytest.mark.parametrize("block_size", [1, 4, (4, 1)])
@pytest.mark.parametrize("ordered", [False, True])
def test_gradcheck(ordered, block_size, backend):
    topology, leaves = _float64_case(block_size)
    order = torch.arange(topology.nnz, dtype=torch.int32).flip(0) if ordered else None

    def layer(x, values, bias):
        return packed_linear(x, values, topology, bias, backend, order)

    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)
    assert torch.autograd.gradcheck(layer, leaves, check_forward_ad=True, check_backward_ad=False)


def test_a_gradient_penalty_in_the_compiled_loops():
    topology = make_topology(6, 5, 4, "density 0.3")
    x, weight, bias, _ = (t.float() for t in make_operands(topology, 9, torch.float32))
    values = _values(topology, weight)

    def penalty(forward):
        leaves = [t.detach().requires_grad_() for t in (x, values)]
        (dx,) = torch.autograd.grad(forward(*leaves).square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves)

    torch.testing.assert_close(
        penalty(lambda x, v: packed_linear(x, v, topology, bias, "native")),
        penalty(lambda x, v: F.linear(x, expand(v, topology), bias)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_dimensions(lead):
    topology = make_topology()
    values = torch.randn(topology.nnz, 16, 16, requires_grad=True)
    x = torch.randn(*lead, topology.shape[1], requires_grad=True)
    y, expected = packed_linear(x, values, topology), F.linear(x, expand(values, topology))
    assert y.shape == (*lead, topology.shape[0])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(out.square().sum(), (x, values)) for out in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "dense"])
def test_operands_of_odd_strides(backend):
    topology = make_topology(4, 5, 8)
    x, weight, bias, dy = make_operands(topology, 6, torch.float32)
    values = _values(topology, weight)
    expected = _expected(x, values, bias, dy, topology)
    x, values, bias, dy = (t.float() for t in (x, values, bias, dy))
    odd_values = values.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    wide = torch.zeros(12, 2 * x.shape[1])
    wide[::2, ::2] = x
    for odd_x in (x.t().contiguous().t(), wide[::2, ::2]):
        got = _products(odd_x, odd_values, bias, dy, topology, backend)
        torch.testing.assert_close([t.double() for t in got], expected, rtol=1e-5, atol=3e-5)


# ---- compile and autocast


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("backend", ["native", "dense"])
def test_compiled_with_a_number_of_units_that_changes(backend, compact):
    torch.compiler.reset()
    topology = BlockTopology.from_mask(torch.zeros(8, 6, dtype=torch.bool), 4, compact=compact)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def layer(x, values, bias):
        return packed_linear(x, values, topology, bias, backend)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    counted = torch.compile(layer, backend=count, fullgraph=True)
    for number in range(2, 7):
        mask = torch.zeros(48, dtype=torch.bool)
        mask[: 5 * number] = True
        topology.update_(mask.view(8, 6))
        x, weight, bias, dy = (t.float() for t in make_operands(topology, 5, torch.float32))
        values = _values(topology, weight)
        counted(x, values, bias)
        results = []
        for call in (compiled, layer):
            leaves = [t.detach().requires_grad_() for t in (x, values, bias)]
            results.append(torch.autograd.grad(call(*leaves), leaves, dy))
        torch.testing.assert_close(*results)
    assert len(graphs) == 2  # one of the first number, one of any


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("op", ["packed_values_linear", "_grad_input", "_grad_values"])
def test_operators_pass_torchs_own_checks(op, ordered):
    topology = make_topology(2, 3, 4)
    x, weight, bias, dy = (t.float() for t in make_operands(topology, 5, torch.float32))
    values = _values(topology, weight).requires_grad_()
    order = torch.arange(topology.nnz, dtype=torch.int32).flip(0) if ordered else None
    lists = (order, topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx, [4, 4], "native")
    space = torch.ops.estdgm
    if op == "packed_values_linear":
        call = space.packed_values_linear, (x.requires_grad_(), values, bias, *lists)
    elif op == "_grad_input":
        call = space.packed_values_linear_grad_input, (dy.requires_grad_(), values, *lists)
    else:
        call = space.packed_values_linear_grad_values, (dy, x.requires_grad_(), *lists, topology.nnz)
    torch.library.opcheck(*call)


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters():
    topology = make_topology(2, 3, 16)
    x, weight, bias, _ = (t.float() for t in make_operands(topology, 5, torch.bfloat16))
    leaves = [t.detach().requires_grad_() for t in (x, _values(topology, weight), bias)]
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_linear(leaves[0], leaves[1], topology, leaves[2])
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 3
    right = F.linear(x.double(), expand(leaves[1].detach().double(), topology), bias.double())
    torch.testing.assert_close(y.detach().double(), right, rtol=2**-8, atol=3e-5)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topology": None}, TypeError, "topology must be a BlockTopology, got NoneType"),
        ({"values": torch.ones(3, 16)}, ValueError, r"values must be of shape \[units, 16, 16\], got \[3, 16\]"),
        ({"values": torch.ones(3, 8, 8)}, ValueError, r"values must be of shape \[units, 16, 16\], got \[3, 8, 8\]"),
        ({"values": torch.ones(2, 16, 16)}, ValueError, "values are of 2 units, but 3 are active"),
        ({"inputs": torch.ones(5, 32)}, ValueError, "48 features"),
        ({"bias": torch.ones(48)}, ValueError, "bias must have shape"),
        ({"inputs": torch.ones(5, 48).double()}, TypeError, "one dtype"),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
        ({"order": torch.arange(3)}, ValueError, r"order must be int32 of shape \[3\], got torch.int64"),
        ({"order": torch.arange(2).int()}, ValueError, r"order must be int32 of shape \[3\], got torch.int32 \[2\]"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, message):
    arguments = {"inputs": torch.ones(5, 48), "values": torch.ones(3, 16, 16), "topology": make_topology(), **change}
    with pytest.raises(error, match=message):
        packed_linear(**arguments)


def test_a_backend_that_cannot_run_the_case_is_refused():
    topology = make_topology(2, 3, 5)
    with pytest.raises(ValueError, match="backend 'native' cannot run this layer"):
        packed_linear(torch.ones(1, 15), torch.ones(topology.nnz, 5, 5), topology, backend="native")


def test_expand_and_gather_refuse_what_does_not_fit():
    topology = make_topology()
    with pytest.raises(ValueError, match="values are of 2 units, but 3 are active"):
        expand(torch.ones(2, 16, 16), topology)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 4\), but the topology is for \(32, 48\)"):
        gather(torch.ones(3, 4), topology)
