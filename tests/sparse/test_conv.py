"""masked_conv2d: every discovered backend against a dense convolution, gradients, compilation, what it refuses."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_estdgm.sparse.backends import protocol
from lightning_estdgm.sparse.backends.protocol import backends, get_backend
from lightning_estdgm.sparse.backends.reference import expand_mask
from lightning_estdgm.sparse.conv import ConvBackend, ConvGeometry, conv_refusal, masked_conv2d
from lightning_estdgm.sparse.topology import BlockTopology

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAST, FIRST = torch.channels_last, torch.contiguous_format
# Error of a whole tensor over its norm: one rounding to the dtype, and sums of up to 1000 products in float32 or wider.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
THREE = ConvGeometry((3, 3), padding=(1, 1))
POINTS = ConvGeometry((1, 1))
# batch, height, width, block rows, block columns, block size
SMALL = (2, 5, 6, 2, 3, 16)
CASES = [
    (SMALL, THREE),
    ((2, 9, 8, 3, 2, 32), ConvGeometry((3, 3), (2, 2), (1, 1))),
    ((2, 14, 14, 2, 2, 64), THREE),
    ((3, 4, 5, 2, 3, 16), POINTS),
    ((1, 7, 6, 2, 2, 32), ConvGeometry((1, 1), (2, 2))),
    ((1, 5, 4, 1, 2, 16), ConvGeometry((1, 1), (2, 1), (1, 2))),  # one tap, and yet no linear layer
    ((1, 11, 12, 2, 2, 16), ConvGeometry((3, 2), (2, 1), (4, 0), (2, 3))),
    ((1, 9, 9, 2, 1, 16), ConvGeometry((2, 3), (3, 4), (0, 2))),  # pixels that no tap reaches
    ((0, 5, 6, 2, 3, 16), THREE),
    ((1, 3, 3, 1, 1, 128), ConvGeometry((3, 3))),
]
MODES = {
    "plain": {},
    "dense_grad": {"dense_grad": True},
    "frozen": {"frozen": True},
    "frozen, dense_grad": {"frozen": True, "dense_grad": True},
}


def _refusal(backend, device="cpu", dtype=torch.float32, block_size=16, geometry=THREE):
    return conv_refusal(backend, torch.device(device), dtype, _topology(1, 1, block_size, device), geometry)


def _topology(rows=2, cols=3, block_size=16, device="cpu", empty=False) -> BlockTopology:
    """About half of the blocks, with a block row and a block column without any where `empty`."""
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(rows + cols)) < 0.6
    mask[0, 0] = True
    if empty:
        mask[0], mask[:, cols - 1] = False, False
    return BlockTopology.from_mask(mask.to(device), block_size)


def _operands(topology, batch, height, width, geometry, dtype, seed=0):
    """x, weight, bias, dy: values that the dtype holds exactly, in float64."""
    generator = torch.Generator().manual_seed(seed)
    out, features = topology.shape
    shapes = (
        (batch, features, height, width),
        (out, features, *geometry.kernel_size),
        (out,),
        (batch, out, *geometry.output_size(height, width)),
    )
    return [torch.randn(*s, generator=generator).to(dtype).double().to(topology.device) for s in shapes]


def _mask(topology):
    return expand_mask(topology)[:, :, None, None]


def _expected(x, weight, bias, dy, topology, geometry, dense_grad=False, frozen=False):
    """y, dx, dw, dbias of torch's own convolution with a masked weight."""
    used = weight if frozen else weight * _mask(topology)
    leaves = [t.detach().requires_grad_() for t in (x, used, bias)]
    y = F.conv2d(*leaves, geometry.stride, geometry.padding, geometry.dilation)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    return [y.detach(), dx, dw if dense_grad else dw * _mask(topology), db]


def _run(x, weight, bias, dy, topology, geometry, **kwargs):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = masked_conv2d(*leaves, topology, geometry, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _assert_close(got, expected, dtype, where=""):
    for name, mine, right in zip(("y", "dx", "dw", "dbias"), got, expected, strict=True):
        assert mine.shape == right.shape, (name, where)
        error, size = (mine.double() - right).norm().item(), right.norm().item()
        assert error <= TOLERANCES[dtype] * size, f"{name} is off by {error / size:.1e} of its norm: {where}"


ON_CPU = [name for name in sorted(backends()) if _refusal(name) is None]


# ------------------------------------------------------------------------------------------------ conformance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", sorted(backends()))
def test_conformance(backend, device, dtype, mode):
    cases = [c for c in CASES if _refusal(backend, device, dtype, c[0][-1], c[1]) is None]
    if not cases:
        pytest.skip(f"{backend} {_refusal(backend, device, dtype)}")
    for case, empty in product(cases, (False, True)):
        (batch, height, width, *blocks), geometry = case
        topology = _topology(*blocks, device, empty)
        x, weight, bias, dy = _operands(topology, batch, height, width, geometry, dtype)
        expected = _expected(x, weight, bias, dy, topology, geometry, **MODES[mode])
        if "frozen" not in MODES[mode]:
            weight = weight.masked_fill(~_mask(topology), float("nan"))  # ignored, whatever it holds
        memory = LAST if empty else FIRST
        operands = [t.to(dtype, memory_format=memory) for t in (x, weight)] + [t.to(dtype) for t in (bias, dy)]
        got = _run(*operands, topology, geometry, backend=backend, **MODES[mode])
        assert all(t.dtype == dtype for t in got)
        _assert_close(got, expected, dtype, (case, empty))
        assert got[0].is_contiguous(memory_format=memory)
        assert got[2].is_contiguous(memory_format=memory)
        if "dense_grad" not in MODES[mode]:
            assert not got[2][~_mask(topology).expand_as(got[2])].any()


def _sizes(least, most):
    return st.tuples(st.integers(least, most), st.integers(least, most))


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=25)
@given(
    size=_sizes(1, 9),
    geometry=st.builds(
        ConvGeometry, kernel_size=_sizes(1, 4), stride=_sizes(1, 3), padding=_sizes(0, 4), dilation=_sizes(1, 3)
    ),
    batch=st.integers(1, 3),
)
def test_any_geometry(backend, size, geometry, batch):
    topology = _topology(2, 2)
    if min(geometry.output_size(*size)) < 1:
        with pytest.raises(ValueError, match="too small"):
            masked_conv2d(
                torch.ones(1, 32, *size),
                torch.ones(32, 32, *geometry.kernel_size),
                None,
                topology,
                geometry,
                backend=backend,
            )
        return
    operands = _operands(topology, batch, *size, geometry, torch.float32)
    got = _run(*(t.float() for t in operands), topology, geometry, backend=backend)
    _assert_close(got, _expected(*operands, topology, geometry), torch.float32)


def test_single_weights_are_the_oracles():
    topology = _topology(5, 3, 1)
    operands = _operands(topology, 2, 5, 5, THREE, torch.float64)
    got = _run(*operands, topology, THREE, backend="reference")
    _assert_close(got, _expected(*operands, topology, THREE), torch.float64)


@pytest.mark.parametrize("geometry", [THREE, POINTS], ids=["3x3", "1x1"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_operands_of_odd_strides(backend, geometry):
    topology = _topology()
    operands = x, weight, bias, dy = _operands(topology, 2, 6, 5, geometry, torch.float32)
    expected = _expected(*operands, topology, geometry)
    x, weight, bias, dy = (t.float() for t in operands)
    wide = torch.zeros(2, x.shape[1], 12, 7).contiguous(memory_format=LAST)
    wide[:, :, ::2, 1:6] = x
    swapped = weight.transpose(0, 1).contiguous().transpose(0, 1)
    spread = bias.repeat_interleave(2)[::2]
    got = _run(wide[:, :, ::2, 1:6], swapped, spread, dy.flip(3).flip(3), topology, geometry, backend=backend)
    _assert_close(got, expected, torch.float32)
    ones = torch.ones(()).expand_as(dy)  # what sum().backward() sends
    expected = _expected(*operands[:3], ones.double(), topology, geometry)
    _assert_close(_run(x, weight, bias, ones, topology, geometry, backend=backend), expected, torch.float32)


@pytest.mark.parametrize(("x_memory", "weight_memory"), list(product((FIRST, LAST), (FIRST, LAST))), ids=str)
@pytest.mark.parametrize("geometry", [THREE, POINTS, ConvGeometry((1, 1), (2, 2))], ids=["3x3", "1x1", "1x1, stride 2"])
def test_the_memory_of_the_output_is_that_of_torch(geometry, x_memory, weight_memory):
    topology = _topology()
    x, weight, bias, _ = _operands(topology, 2, 6, 5, geometry, torch.float32)
    x, weight = x.float().contiguous(memory_format=x_memory), weight.float().contiguous(memory_format=weight_memory)
    y = masked_conv2d(x, weight, bias.float(), topology, geometry, backend="reference")
    assert y.stride() == F.conv2d(x, weight, bias.float(), geometry.stride, geometry.padding).stride()


def test_gradcheck():
    topology = _topology(2, 2, 2)
    geometry = ConvGeometry((3, 2), (2, 1), (1, 1))
    leaves = [t.requires_grad_() for t in _operands(topology, 2, 4, 3, geometry, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *a: masked_conv2d(*a, topology, geometry, backend="reference"), leaves)


# --------------------------------------------------------------------------------------------------- autograd


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
    topology = _topology()
    leaves = [
        t.requires_grad_(want)
        for t, want in zip(_operands(topology, 2, 4, 4, geometry, torch.float32), wanted, strict=False)
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
    topology = _topology()
    x, weight, bias, dy = _operands(topology, 2, 5, 5, THREE, torch.float32)
    right = _expected(x, weight, torch.zeros_like(bias), dy, topology, THREE)[:3]
    x, weight = x.float().requires_grad_(), weight.float().requires_grad_()
    y = masked_conv2d(x, weight, None, topology, THREE, backend=backend)
    got = [y.detach(), *torch.autograd.grad(y, (x, weight), dy.float())]
    _assert_close([*got, bias], [*right, bias], torch.float32)


def test_a_pointwise_convolution_in_channels_last_memory_copies_nothing():
    topology = _topology()
    x, weight, _, dy = (t.float() for t in _operands(topology, 2, 5, 5, POINTS, torch.float32))
    x, dy = x.contiguous(memory_format=LAST).requires_grad_(), dy.contiguous(memory_format=LAST)
    with torch.profiler.profile() as profile:
        y = masked_conv2d(x, weight.requires_grad_(), None, topology, POINTS, backend="cpu")
        torch.autograd.grad(y, (x, weight), dy)
    names = {event.name for event in profile.events()}
    assert "aten::mm" in names
    assert not names & {"aten::copy_", "aten::clone"}


def test_second_derivatives_raise():
    topology = _topology()
    x, weight, _, _ = (t.requires_grad_() for t in _operands(topology, 2, 4, 4, THREE, torch.float64))
    y = masked_conv2d(x, weight, None, topology, THREE, backend="reference")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on its first dual number
def test_forward_mode_raises():
    topology = _topology()
    x, weight, bias, _ = _operands(topology, 2, 4, 4, THREE, torch.float64)
    with pytest.raises(NotImplementedError, match="masked_conv2d has no forward-mode derivative"):
        torch.func.jvp(lambda w: masked_conv2d(x, w, bias, topology, THREE, backend="reference"), (weight,), (weight,))


def test_a_mask_changed_between_forward_and_backward_raises():
    topology = _topology()
    x, weight, _, dy = _operands(topology, 2, 4, 4, THREE, torch.float64)
    y = masked_conv2d(x, weight.requires_grad_(), None, topology, THREE, backend="reference")
    topology.update_(~topology.mask())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


# --------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_casts_as_a_dense_convolution_does(backend):
    topology = _topology()
    topology.update_(torch.ones_like(topology.mask()))
    x, weight, bias, dy = (t.float() for t in _operands(topology, 2, 5, 5, THREE, torch.float32))
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
    topology = _topology()
    x, weight, bias, dy = (t.float() for t in _operands(topology, 2, 5, 5, geometry, torch.float32))
    expected = _run(x, weight, bias, dy, topology, geometry, backend=backend, **MODES[mode])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = masked_conv2d(*leaves, topology, geometry, backend=backend, **MODES[mode])
    with torch.autocast("cpu", torch.bfloat16):
        got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ------------------------------------------------------------------------------------------------ compilation


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()  # it counts recompilations of one function over all tests


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("geometry", [THREE, POINTS], ids=["3x3", "1x1"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_whole_and_follows_a_new_mask_without_recompiling(backend, geometry):
    topology = _topology()
    x, weight, bias, dy = (t.float() for t in _operands(topology, 2, 5, 4, geometry, torch.float32))
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
        torch.testing.assert_close(got, _run(x, weight, bias, dy, topology, geometry, backend=backend))
        seen.append(got)
        topology.update_(~topology.mask())
    assert counter.frame_count == 1
    assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_for_any_batch_size():
    topology = _topology()
    _, weight, bias, _ = (t.float() for t in _operands(topology, 1, 4, 4, THREE, torch.float32))
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
    topology = _topology(2, 3, 8)
    operands = (t.float() for t in _operands(topology, 2, 6, 5, geometry, torch.float32))
    x, weight, bias, dy = (t.contiguous(memory_format=LAST) if t.dim() == 4 else t for t in operands)
    weight = weight.contiguous(memory_format=memory)
    flat = (topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx, 8, "reference")
    flat = (*flat, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
    for with_bias, dense_grad, frozen in [(True, False, False), (False, True, False), (True, False, True)]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        args = (*leaves, bias.clone().requires_grad_() if with_bias else None, *flat, dense_grad, frozen)
        torch.library.opcheck(torch.ops.estdgm.masked_conv2d.default, args)
    for dense in (False, True):
        torch.library.opcheck(torch.ops.estdgm.masked_conv2d_grad_input.default, (dy, weight, *flat, (6, 5), dense))
        torch.library.opcheck(torch.ops.estdgm.masked_conv2d_grad_weight.default, (dy, x, *flat, memory == LAST, dense))


# ------------------------------------------------------------------------------------------------ bad arguments


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
    topology = _topology()
    x, weight, bias, _ = (t.float() for t in _operands(topology, 2, 5, 5, THREE, torch.float32))
    given = {"x": x, "weight": weight, "bias": bias, "topology": topology, "geometry": THREE, "backend": "reference"}
    with pytest.raises(error, match=message):
        masked_conv2d(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": (0, 3)}, r"kernel_size must be two numbers of at least 1, got \(0, 3\)"),
        ({"stride": (1, 0)}, r"stride must be two numbers of at least 1, got \(1, 0\)"),
        ({"padding": (-1, 0)}, r"padding must be two numbers of at least 0, got \(-1, 0\)"),
        ({"stride": 2}, "stride must be two numbers of at least 1, got 2"),
        ({"dilation": (1,)}, r"dilation must be two numbers of at least 1, got \(1,\)"),
    ],
)
def test_a_bad_geometry_raises(change, message):
    with pytest.raises(ValueError, match=message):
        ConvGeometry(**{"kernel_size": (3, 3), **change})


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("backend", "block_size"), [("native", 8), ("cpu", 4)])
def test_a_backend_that_does_not_support_the_case_raises(backend, block_size, frozen):
    topology = _topology(2, 3, block_size)
    x, weight, bias, _ = (t.float() for t in _operands(topology, 2, 5, 5, THREE, torch.float32))
    assert _refusal(backend, block_size=block_size) is not None
    with pytest.raises(ValueError, match=rf"backend '{backend}' cannot run this convolution: it needs blocks of"):
        masked_conv2d(x, weight, bias, topology, THREE, backend=backend, frozen=frozen)


def test_a_backend_of_linear_layers_runs_pointwise_convolutions_alone(monkeypatch):
    class Linear:
        name = "linear only"
        unsupported = staticmethod(get_backend("reference").unsupported)
        linear = staticmethod(get_backend("reference").linear)
        grad_input = staticmethod(get_backend("reference").grad_input)
        grad_weight = staticmethod(get_backend("reference").grad_weight)

    monkeypatch.setitem(protocol._discover(), "linear only", Linear())
    assert "taps" in _refusal("linear only")
    assert "taps" in _refusal("linear only", geometry=ConvGeometry((1, 1), padding=(1, 1)))
    topology = _topology()
    for geometry in (POINTS, ConvGeometry((1, 1), (2, 3))):
        operands = _operands(topology, 2, 5, 5, geometry, torch.float64)
        got = _run(*operands, topology, geometry, backend="linear only")
        _assert_close(got, _expected(*operands, topology, geometry), torch.float64)


def test_backends_with_convolutions():
    assert {name for name, backend in backends().items() if isinstance(backend, ConvBackend)} >= {
        "cpu",
        "native",
        "reference",
    }
