"""masked_conv2d: memory formats, autograd, autocast, compilation, what it refuses."""

from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.sparse_conv import (
    FIRST,
    LAST,
    ON_CPU,
    POINTS,
    THREE,
    assert_close,
    by_torch,
    make_operands,
    make_topology,
    refusal,
    run,
)
from helpers.sparse_linear import MODES
from lightning_estdgm.sparse._conv import masked_conv2d
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends import _protocol as protocol
from lightning_estdgm.sparse.backends._protocol import ConvBackend, backends, get_backend


@pytest.mark.parametrize(("x_memory", "weight_memory"), list(product((FIRST, LAST), (FIRST, LAST))), ids=str)
@pytest.mark.parametrize("geometry", [THREE, POINTS, ConvGeometry((1, 1), (2, 2))], ids=["3x3", "1x1", "1x1, stride 2"])
def test_the_memory_of_the_output_is_that_of_torch(geometry, x_memory, weight_memory):
    topology = make_topology()
    x, weight, bias, _ = make_operands(topology, 2, 6, 5, geometry, torch.float32)
    x, weight = x.float().contiguous(memory_format=x_memory), weight.float().contiguous(memory_format=weight_memory)
    y = masked_conv2d(x, weight, bias.float(), topology, geometry, backend="reference")
    assert y.stride() == F.conv2d(x, weight, bias.float(), geometry.stride, geometry.padding).stride()


def test_gradcheck():
    topology = make_topology(2, 2, 2)
    geometry = ConvGeometry((3, 2), (2, 1), (1, 1))
    leaves = [t.requires_grad_() for t in make_operands(topology, 2, 4, 3, geometry, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *a: masked_conv2d(*a, topology, geometry, backend="reference"), leaves)


class _Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().removeprefix("estdgm::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("geometry", [THREE, POINTS], ids=["3x3", "1x1"])
def test_only_wanted_gradients_are_computed(geometry, wanted):
    topology = make_topology()
    leaves = [
        t.requires_grad_(want)
        for t, want in zip(make_operands(topology, 2, 4, 4, geometry, torch.float32), wanted, strict=False)
    ]
    with _Calls() as calls:
        y = masked_conv2d(*leaves, topology, geometry, backend="reference")
        if any(wanted):
            y.sum().backward()
    assert ("masked_conv2d_grad_input" in calls.names) == wanted[0]
    assert ("masked_conv2d_grad_weight" in calls.names) == wanted[1]
    assert [t.grad is not None for t in leaves] == list(wanted)
    assert y.requires_grad == any(wanted)


@pytest.mark.parametrize("backend", ON_CPU)
def test_without_bias(backend):
    topology = make_topology()
    x, weight, bias, dy = make_operands(topology, 2, 5, 5, THREE, torch.float32)
    right = by_torch(x, weight, torch.zeros_like(bias), dy, topology, THREE)[:3]
    x, weight = x.float().requires_grad_(), weight.float().requires_grad_()
    y = masked_conv2d(x, weight, None, topology, THREE, backend=backend)
    got = [y.detach(), *torch.autograd.grad(y, (x, weight), dy.float())]
    assert_close([*got, bias], [*right, bias], torch.float32)


def test_a_pointwise_convolution_in_channels_last_memory_copies_nothing():
    topology = make_topology()
    x, weight, _, dy = (t.float() for t in make_operands(topology, 2, 5, 5, POINTS, torch.float32))
    x, dy = x.contiguous(memory_format=LAST).requires_grad_(), dy.contiguous(memory_format=LAST)
    with torch.profiler.profile() as profile:
        y = masked_conv2d(x, weight.requires_grad_(), None, topology, POINTS, backend="cpu")
        torch.autograd.grad(y, (x, weight), dy)
    names = {event.name for event in profile.events()}
    assert "aten::mm" in names
    assert not names & {"aten::copy_", "aten::clone"}


def test_a_mask_changed_between_forward_and_backward_raises():
    topology = make_topology()
    x, weight, _, dy = make_operands(topology, 2, 4, 4, THREE, torch.float64)
    y = masked_conv2d(x, weight.requires_grad_(), None, topology, THREE, backend="reference")
    topology.update_(~topology.mask())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_casts_as_a_dense_convolution_does(backend):
    topology = make_topology()
    topology.update_(torch.ones_like(topology.mask()))
    x, weight, bias, dy = (t.float() for t in make_operands(topology, 2, 5, 5, THREE, torch.float32))
    results = []
    for call in (
        lambda *a: masked_conv2d(*a, topology, THREE, backend=backend),
        lambda *a: F.conv2d(*a, padding=1),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*leaves)
        assert y.dtype == torch.bfloat16
        y.backward(dy.bfloat16())
        assert all(t.grad.dtype == torch.float32 for t in leaves)
        results.append([y.detach().float(), *(t.grad for t in leaves)])
    for mine, right in zip(*results, strict=True):
        assert (mine - right).norm() <= 2**-7 * right.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("geometry", [THREE, POINTS], ids=["3x3", "1x1"])
def test_backward_called_under_autocast_keeps_the_forward_dtype(backend, mode, geometry):
    topology = make_topology()
    x, weight, bias, dy = (t.float() for t in make_operands(topology, 2, 5, 5, geometry, torch.float32))
    expected = run(x, weight, bias, dy, topology, geometry, backend=backend, **MODES[mode])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = masked_conv2d(*leaves, topology, geometry, backend=backend, **MODES[mode])
    with torch.autocast("cpu", torch.bfloat16):
        got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()  # it counts recompilations of one function over all tests


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("geometry", [THREE, POINTS], ids=["3x3", "1x1"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_whole_and_follows_a_new_mask_without_recompiling(backend, geometry):
    topology = make_topology()
    x, weight, bias, dy = (t.float() for t in make_operands(topology, 2, 5, 4, geometry, torch.float32))
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()  # the other backends' graphs of this function count towards its limit

    def forward(x, weight, bias):
        # As a layer does that keeps the lists in buffers: the topology is put together in the graph.
        again = BlockTopology(16, 2, 3, topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx)
        return masked_conv2d(x, weight, bias, again, geometry, backend=backend)

    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    seen = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = compiled(*leaves)
        got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        torch.testing.assert_close(got, run(x, weight, bias, dy, topology, geometry, backend=backend))
        seen.append(got)
        topology.update_(~topology.mask())
    assert counter.frame_count == 1
    assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_for_any_batch_size():
    topology = make_topology()
    _, weight, bias, _ = (t.float() for t in make_operands(topology, 1, 4, 4, THREE, torch.float32))
    counter = CompileCounterWithBackend("aot_eager")

    def call(x):
        return masked_conv2d(x, weight, bias, topology, THREE, backend="reference")

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for batch in (2, 3, 4, 5):  # the second one makes torch try a graph for any number
        x = torch.randn(batch, 48, 4, 4)
        torch.testing.assert_close(compiled(x), call(x))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("geometry", "memory"),
    [(ConvGeometry((3, 3), (2, 1), (1, 1)), LAST), (ConvGeometry((1, 1), (2, 2)), FIRST)],
    ids=["3x3", "1x1, stride 2"],
)
def test_operators_are_registered_properly(geometry, memory):
    topology = make_topology(2, 3, 8)
    operands = (t.float() for t in make_operands(topology, 2, 6, 5, geometry, torch.float32))
    x, weight, bias, dy = (t.contiguous(memory_format=LAST) if t.dim() == 4 else t for t in operands)
    weight = weight.contiguous(memory_format=memory)
    flat = (topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx, [8, 8], "reference")
    flat = (*flat, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
    for with_bias, dense_grad, frozen in [(True, False, False), (False, True, False), (True, False, True)]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        args = (*leaves, bias.clone().requires_grad_() if with_bias else None, *flat, dense_grad, frozen)
        torch.library.opcheck(torch.ops.estdgm.masked_conv2d.default, args)
    for dense in (False, True):
        a, b, c = (t.clone().requires_grad_() for t in (dy, weight, x))
        args = (a, b, *flat, (6, 5), not dense, dense)
        torch.library.opcheck(torch.ops.estdgm.masked_conv2d_grad_input.default, args)
        torch.library.opcheck(torch.ops.estdgm.masked_conv2d_grad_weight.default, (a, c, *flat, memory == LAST, dense))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topology": torch.ones(2, 3)}, TypeError, "topology must be a BlockTopology, got Tensor"),
        ({"geometry": (3, 3)}, TypeError, "geometry must be a ConvGeometry, got tuple"),
        ({"weight": torch.ones(48, 32, 3, 3)}, ValueError, r"weight has shape \(48, 32, 3, 3\), .* \(32, 48, 3, 3\)"),
        ({"geometry": POINTS}, ValueError, r"weight has shape \(32, 48, 3, 3\), .* for \(32, 48, 1, 1\)"),
        ({"x": torch.ones(2, 47, 5, 5)}, ValueError, r"x must have shape \[N, 48, H, W\], got \(2, 47, 5, 5\)"),
        ({"x": torch.ones(48, 5, 5)}, ValueError, r"x must have shape \[N, 48, H, W\], got \(48, 5, 5\)"),
        ({"x": torch.ones(2, 48, 0, 5)}, ValueError, r"\(2, 48, 0, 5\) is too small for ConvGeometry"),
        ({"x": torch.ones(2, 48, 5, 2), "geometry": ConvGeometry((3, 3))}, ValueError, "is too small for ConvGeometry"),
        ({"bias": torch.ones(48)}, ValueError, r"bias must have shape \(32,\), got \(48,\)"),
        ({"x": torch.ones(2, 48, 5, 5).double()}, TypeError, r"x and weight .* torch\.float64 and torch\.float32"),
        ({"bias": torch.ones(32, device="meta")}, ValueError, "x and bias .* cpu and meta"),
        ({"backend": "tritn"}, ValueError, "unknown backend 'tritn', expected one of: .*cpu.*reference"),
    ],
)
def test_bad_arguments_raise(change, error, message):
    topology = make_topology()
    x, weight, bias, _ = (t.float() for t in make_operands(topology, 2, 5, 5, THREE, torch.float32))
    given = {"x": x, "weight": weight, "bias": bias, "topology": topology, "geometry": THREE, "backend": "reference"}
    with pytest.raises(error, match=message):
        masked_conv2d(**{**given, **change})


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("backend", "block_size"), [("native", 3), ("cpu", 4)])
def test_a_backend_that_does_not_support_the_case_raises(backend, block_size, frozen):
    topology = make_topology(2, 3, block_size)
    x, weight, bias, _ = (t.float() for t in make_operands(topology, 2, 5, 5, THREE, torch.float32))
    assert refusal(backend, block_size=block_size) is not None
    with pytest.raises(ValueError, match=rf'{backend}.* needs (blocks|units) of .*; backend="reference" runs any'):
        masked_conv2d(x, weight, bias, topology, THREE, backend=backend, frozen=frozen)


def test_a_backend_of_linear_layers_runs_pointwise_convolutions_alone(monkeypatch):
    class Linear:
        name = "linear only"
        unsupported = staticmethod(get_backend("reference").unsupported)
        linear = staticmethod(get_backend("reference").linear)
        grad_input = staticmethod(get_backend("reference").grad_input)
        grad_weight = staticmethod(get_backend("reference").grad_weight)

    monkeypatch.setitem(protocol._discover(), "linear only", Linear())
    assert "taps" in refusal("linear only")
    assert "taps" in refusal("linear only", geometry=ConvGeometry((1, 1), padding=(1, 1)))
    topology = make_topology()
    for geometry in (POINTS, ConvGeometry((1, 1), (2, 3))):
        operands = make_operands(topology, 2, 5, 5, geometry, torch.float64)
        got = run(*operands, topology, geometry, backend="linear only")
        assert_close(got, by_torch(*operands, topology, geometry), torch.float64)


def test_backends_with_convolutions():
    assert {name for name, backend in backends().items() if isinstance(backend, ConvBackend)} >= {
        "cpu",
        "native",
        "reference",
    }
