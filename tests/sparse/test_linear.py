"""masked_linear: every discovered backend against the oracle, gradients, compilation, and what it refuses."""

import functools
import importlib
import sys
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_estdgm.sparse.backends import protocol
from lightning_estdgm.sparse.backends.protocol import Backend, backends, get_backend
from lightning_estdgm.sparse.backends.reference import expand_mask
from lightning_estdgm.sparse.linear import masked_linear
from lightning_estdgm.sparse.topology import BlockTopology

BACKENDS = sorted(backends())
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# One rounding of the result to the dtype (half a unit in the last place), and before it the accumulation of up to
# 256 products of order one, in float32 (2**-24 * 256 * E|ab| = 1e-5 where no error cancels another's) or float64.
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 3e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 3e-5},
    torch.float16: {"rtol": 2**-11, "atol": 3e-5},
}
# tokens, block rows, block columns, block size
SHAPES = [(7, 3, 5, 16), (33, 2, 16, 8), (1, 1, 1, 32), (0, 2, 3, 8), (50, 4, 2, 64)]
MASKS = {
    "empty row and column": lambda r, c: (
        (_random(r, c, 0.5).index_fill_(0, torch.tensor(0), False)).index_fill_(1, torch.tensor(c - 1), False).bool()
    ),
    "density 0.3": lambda r, c: _random(r, c, 0.3),
    "every other block": lambda r, c: (torch.arange(r)[:, None] + torch.arange(c)) % 2 == 0,
    "full": lambda r, c: torch.ones(r, c, dtype=torch.bool),
    "empty": lambda r, c: torch.zeros(r, c, dtype=torch.bool),
}
MODES = {
    "plain": {},
    "dense_grad": {"dense_grad": True},
    "frozen": {"frozen": True},
    "frozen, dense_grad": {"frozen": True, "dense_grad": True},
}


def _random(rows: int, cols: int, density: float) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(3)) < density


def _topology(rows=2, cols=3, block_size=16, mask="every other block", device="cpu") -> BlockTopology:
    return BlockTopology.from_mask(MASKS[mask](rows, cols).to(device), block_size)


def _operands(topology, tokens, dtype, seed=0):
    """x, weight, bias, dy: values that the dtype holds exactly, in float64."""
    generator = torch.Generator().manual_seed(seed)
    out, features = topology.shape
    shapes = ((tokens, features), (out, features), (out,), (tokens, out))
    return [torch.randn(*s, generator=generator).to(dtype).double().to(topology.device) for s in shapes]


def _run(x, weight, bias, dy, topology, **kwargs):
    """y, dx, dw, dbias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = masked_linear(*leaves, topology, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _refusal(backend, device="cpu", dtype=torch.float32, block_size=16):
    topology = _topology(block_size=block_size, device=device)
    return get_backend(backend).unsupported(torch.device(device), dtype, topology)


ON_CPU = [name for name in BACKENDS if _refusal(name) is None]


def _widest(backend):
    """The widest dtype that the backend takes on the CPU."""
    return next(dtype for dtype in (torch.float64, torch.float32) if _refusal(backend, dtype=dtype) is None)


# ------------------------------------------------------------------------------------------------ conformance


@pytest.mark.parametrize(("rows", "cols", "block_size"), [(2, 3, 4), (5, 3, 1), (1, 1, 8)])
@pytest.mark.parametrize("mask", MASKS)
def test_the_oracle_is_dense_autograd_on_a_masked_weight(rows, cols, block_size, mask):
    topology = _topology(rows, cols, block_size, mask)
    x, weight, bias, dy = _operands(topology, 6, torch.float32)
    keep = torch.kron(topology.mask().double(), torch.ones(block_size, block_size).double())
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = F.linear(x, weight * keep, bias)
    expected = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    got = _run(x, weight, bias, dy, topology, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_conformance(backend, device, dtype, mode, transposed):
    refusals = {b: _refusal(backend, device, dtype, b) for _, _, _, b in SHAPES}
    shapes = [shape for shape in SHAPES if refusals[shape[-1]] is None]
    if not shapes:
        pytest.skip(f"{backend} {next(iter(refusals.values()))}")
    for (tokens, rows, cols, block_size), mask in product(shapes, MASKS):
        topology = _topology(rows, cols, block_size, mask, device)
        x, weight, bias, dy = _operands(topology, tokens, dtype)
        expected = _run(x, weight, bias, dy, topology, backend="reference", **MODES[mode])
        if "frozen" not in MODES[mode]:
            weight = weight.masked_fill(~expand_mask(topology), float("nan"))  # ignored, whatever it holds
        if transposed:
            weight = weight.t().contiguous().t()
        got = _run(*(t.to(dtype) for t in (x, weight, bias, dy)), topology, backend=backend, **MODES[mode])
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
            assert not dw[~expand_mask(topology)].any()
        assert dw.t().is_contiguous() if transposed else dw.is_contiguous()


@pytest.mark.parametrize("backend", ON_CPU)
def test_conformance_without_bias(backend):
    topology = _topology(3, 5, 16, "empty row and column")
    x, weight, _, dy = _operands(topology, 9, torch.float32)
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = masked_linear(*leaves, None, topology, backend=name)
        results.append([y.detach().double(), *(g.double() for g in torch.autograd.grad(y, leaves, dy.to(dtype)))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3), (2, 0, 3), (1, 2, 1, 2)], ids=str)
def test_any_leading_dimensions(backend, lead):
    topology = _topology()
    dtype = _widest(backend)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    _, weight, bias, _ = (t.to(dtype) for t in _operands(topology, 1, torch.float32))
    x = torch.randn(*lead, topology.shape[1], dtype=dtype, requires_grad=True)
    y = masked_linear(x, weight.requires_grad_(), bias, topology, backend=backend)
    expected = F.linear(x, weight * expand_mask(topology), bias)
    assert y.shape == (*lead, topology.shape[0])
    torch.testing.assert_close(y, expected, **tolerance)
    grads = [torch.autograd.grad(out.square().sum(), (x, weight)) for out in (y, expected)]
    torch.testing.assert_close(*grads, **tolerance)


@pytest.mark.parametrize("backend", ON_CPU)
def test_operands_of_odd_strides(backend):
    topology = _topology()
    x, weight, bias, dy = (t.to(_widest(backend)) for t in _operands(topology, 6, torch.float32))
    expected = _run(x, weight, bias, dy, topology, backend="reference")
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=3e-5)
    wide = torch.zeros(12, 2 * x.shape[1], dtype=x.dtype)
    wide[::2, ::2] = x
    for odd_x in (x.t().contiguous().t(), wide[::2, ::2]):
        close(_run(odd_x, weight, bias, dy, topology, backend=backend), expected)
    odd_weight = torch.zeros(2 * weight.shape[0], 3 * weight.shape[1], dtype=weight.dtype)[::2, ::3]
    odd_weight.copy_(weight)
    close(_run(x, odd_weight, bias, dy, topology, backend=backend), expected)
    ones = torch.ones((), dtype=x.dtype).expand_as(dy)  # what sum().backward() sends
    close(
        _run(x, weight, bias, ones, topology, backend=backend),
        _run(x, weight, bias, ones.contiguous(), topology, backend="reference"),
    )


@pytest.mark.parametrize("backend", [name for name in ON_CPU if _widest(name) == torch.float64])
def test_gradcheck(backend):
    topology = _topology(2, 2, 8, "every other block")
    leaves = [t.requires_grad_() for t in _operands(topology, 3, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *a: masked_linear(*a, topology, backend=backend), leaves)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_cpu_backend_reads_and_writes_in_place(transposed):
    topology = _topology(3, 5, 16)
    x, weight, _, dy = (t.float() for t in _operands(topology, 9, torch.float32))
    if transposed:
        weight = weight.t().contiguous().t()
    backend = get_backend("cpu")
    with torch.profiler.profile() as profile:
        backend.linear(x, weight, None, topology)
        backend.grad_input(dy, weight, topology)
        backend.grad_weight(dy, x, topology)
    names = {event.name for event in profile.events()}
    assert "aten::mm" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::cat"}


# --------------------------------------------------------------------------------------------------- autograd


class _Calls(TorchDispatchMode):
    """Names of the project's operators, as they run, with the dtype of their first operand."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "estdgm":
            self.seen.append((func.name().removeprefix("estdgm::"), args[0].dtype))
        return func(*args, **(kwargs or {}))

    @property
    def names(self):
        return {name for name, _ in self.seen}


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients_are_computed(wanted):
    topology = _topology()
    x, weight, bias, _ = _operands(topology, 4, torch.float32)
    for tensor, want in zip((x, weight, bias), wanted, strict=True):
        tensor.requires_grad_(want)
    with _Calls() as calls:
        y = masked_linear(x, weight, bias, topology, backend="cpu")
        if any(wanted):
            y.sum().backward()
    assert ("masked_linear_grad_input" in calls.names) == wanted[0]
    assert ("masked_linear_grad_weight" in calls.names) == wanted[1]
    assert [t.grad is not None for t in (x, weight, bias)] == list(wanted)
    assert y.requires_grad == any(wanted)


def test_a_parameter_behind_a_transposed_view_gets_its_gradient_as_it_is_stored():
    topology = _topology()
    x, weight, bias, dy = _operands(topology, 4, torch.float64)
    stored = weight.t().contiguous().requires_grad_()
    masked_linear(x, stored.t(), bias, topology, backend="cpu").backward(dy)
    assert stored.grad.stride() == stored.stride()
    torch.testing.assert_close(stored.grad.t(), _run(x, weight, bias, dy, topology, backend="reference")[2])


def test_second_derivatives_raise():
    topology = _topology()
    x, weight, _, _ = (t.requires_grad_() for t in _operands(topology, 4, torch.float64))
    y = masked_linear(x, weight, None, topology, backend="cpu")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on its first dual number
@pytest.mark.parametrize("operand", range(3), ids=["x", "weight", "bias"])
def test_forward_mode_raises(operand):
    topology = _topology()
    leaves = _operands(topology, 4, torch.float64)[:3]

    def call(value):
        return masked_linear(*leaves[:operand], value, *leaves[operand + 1 :], topology, backend="cpu")

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (leaves[operand],), (leaves[operand],))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(leaves[operand], leaves[operand])
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call(dual)


def _functional(x, weight, bias, call):
    """What torch.func makes of a layer: gradients, those of each sample, a Jacobian, a product, two models at once."""

    def loss(weight, x, bias):
        return call(x, weight, bias).square().sum()

    return {
        "grad": torch.func.grad(loss, (0, 1, 2))(weight, x[0], bias),
        "of each sample": torch.func.vmap(torch.func.grad(loss), (None, 0, None))(weight, x, bias),
        "jacrev": torch.func.jacrev(lambda bias: call(x[0, :1], weight, bias))(bias),
        "vjp": torch.func.vjp(call, x[0], weight, bias)[1](torch.ones(x.shape[1], len(weight), dtype=x.dtype)),
        "ensemble": torch.func.vmap(call, (None, 0, None))(x, torch.stack([weight, -weight]), bias),
        "transposed": torch.func.grad(lambda stored: loss(stored.t(), x, bias))(weight.t().contiguous()),
    }


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("backend", ON_CPU)
def test_functional_gradients(backend):
    topology = _topology()
    dtype = _widest(backend)
    x, weight, bias, _ = (t.to(dtype) for t in _operands(topology, 4, torch.float32))
    x = torch.stack([x, x + 1, -x])
    on = topology.mask().repeat_interleave(16, 0).repeat_interleave(16, 1)
    expected = _functional(x, weight, bias, lambda x, weight, bias: F.linear(x, weight * on, bias))
    got = _functional(x, weight, bias, functools.partial(masked_linear, topology=topology, backend=backend))
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(got, expected, **tolerance)


def test_functional_gradients_of_gradients_raise():
    topology = _topology()
    x, weight, _, _ = _operands(topology, 4, torch.float64)

    def gradient(weight):
        call = functools.partial(masked_linear, bias=None, topology=topology, backend="cpu")
        return torch.func.grad(lambda x: call(x, weight).square().sum())(x).sum()

    with pytest.raises(NotImplementedError, match="masked_linear has no gradients of gradients"):
        torch.func.grad(gradient)(weight)


def test_a_mask_changed_between_forward_and_backward_raises():
    topology = _topology()
    x, weight, _, dy = _operands(topology, 4, torch.float64)
    y = masked_linear(x, weight.requires_grad_(), None, topology, backend="cpu")
    topology.update_(~topology.mask())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    topology = _topology()
    x, weight, bias, _ = (t.requires_grad_() for t in _operands(topology, 4, torch.float64))
    with context():
        y = masked_linear(x, weight, bias, topology, backend="cpu")
    assert not y.requires_grad
    torch.testing.assert_close(y, masked_linear(x, weight, bias, topology, backend="reference").detach())


# --------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_casts_as_a_dense_linear_does(backend):
    topology = _topology(2, 3, 16, "full")
    x, weight, bias, dy = (t.float() for t in _operands(topology, 5, torch.float32))
    results = []
    for call in (lambda *a: masked_linear(*a, topology, backend=backend), F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*leaves)
        assert y.dtype == torch.bfloat16
        y.backward(dy.bfloat16())
        assert all(t.grad.dtype == torch.float32 for t in leaves)
        results.append([y.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(*results, rtol=2**-7, atol=1e-2)


def test_autocast_leaves_float64_alone():
    topology = _topology()
    x, weight, bias, _ = _operands(topology, 5, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_linear(x, weight, bias, topology, backend="cpu").dtype == torch.float64


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_backward_called_under_autocast_keeps_the_forward_dtype(backend, mode):
    topology = _topology()
    x, weight, bias, dy = (t.float() for t in _operands(topology, 5, torch.float32))
    expected = _run(x, weight, bias, dy, topology, backend=backend, **MODES[mode])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = masked_linear(*leaves, topology, backend=backend, **MODES[mode])
    with torch.autocast("cpu", torch.bfloat16):
        got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ------------------------------------------------------------------------------------------------ compilation


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()  # it counts recompilations of one function over all tests


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_whole_and_follows_a_new_mask_without_recompiling(backend, mode):
    topology = _topology(3, 4, 16)
    x, weight, bias, dy = (t.float() for t in _operands(topology, 5, torch.float32))
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()  # the other backends' graphs of this function count towards its limit

    def forward(x, weight, bias):
        # As a layer does that keeps the lists in buffers: the topology is put together in the graph.
        again = BlockTopology(16, 3, 4, topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx)
        return masked_linear(x, weight, bias, again, backend=backend, **MODES[mode])

    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    seen = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = compiled(*leaves)
        got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        torch.testing.assert_close(got, _run(x, weight, bias, dy, topology, backend=backend, **MODES[mode]))
        seen.append(got)
        topology.update_(~topology.mask())
    assert counter.frame_count == 1
    changed = any(not torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert changed == (mode != "frozen, dense_grad")  # there nothing is masked


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_under_autocast(backend):
    topology = _topology()
    x, weight, bias, _ = (t.float() for t in _operands(topology, 5, torch.float32))
    compiled = torch.compile(
        lambda x: masked_linear(x, weight, bias, topology, backend=backend), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = compiled(x), masked_linear(x, weight, bias, topology, backend=backend)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_operators_are_registered_properly(transposed):
    topology = _topology(2, 3, 8)
    x, weight, bias, dy = (t.float() for t in _operands(topology, 4, torch.float32))
    weight = weight.t().contiguous().t() if transposed else weight
    flat = (topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx, 8, "cpu")
    for with_bias, dense_grad, frozen in [(True, False, False), (False, True, False), (True, False, True)]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        args = (*leaves, bias.clone().requires_grad_() if with_bias else None, *flat, dense_grad, frozen)
        torch.library.opcheck(torch.ops.estdgm.masked_linear.default, args)
    for dense in (False, True):
        torch.library.opcheck(torch.ops.estdgm.masked_linear_grad_input.default, (dy, weight, *flat, dense))
        torch.library.opcheck(torch.ops.estdgm.masked_linear_grad_weight.default, (dy, x, *flat, dense))


# ------------------------------------------------------------------------------------------------ bad arguments


def _arguments(**change):
    topology = _topology()  # (32, 48)
    x, weight, bias, _ = (t.float() for t in _operands(topology, 5, torch.float32))
    arguments = {"x": x, "weight": weight, "bias": bias, "topology": topology, "backend": "cpu", **change}
    return [arguments.pop(name) for name in ("x", "weight", "bias", "topology")], arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topology": torch.ones(2, 3)}, TypeError, "topology must be a BlockTopology, got Tensor"),
        ({"weight": torch.ones(48, 32)}, ValueError, r"weight has shape \(48, 32\), .* for \(32, 48\)"),
        ({"x": torch.ones(5, 47)}, ValueError, r"x must have 48 features .* got shape \(5, 47\)"),
        ({"x": torch.ones(())}, ValueError, r"x must have 48 features .* got shape \(\)"),
        ({"bias": torch.ones(48)}, ValueError, r"bias must have shape \(32,\), got \(48,\)"),
        ({"x": torch.ones(5, 48).double()}, TypeError, r"x and weight .* torch\.float64 and torch\.float32"),
        ({"bias": torch.ones(32).bfloat16()}, TypeError, r"x and bias .* torch\.float32 and torch\.bfloat16"),
        ({"weight": torch.ones(32, 48, device="meta")}, ValueError, "x and weight .* cpu and meta"),
        ({"bias": torch.ones(32, device="meta")}, ValueError, "x and bias .* cpu and meta"),
        ({"backend": "dense"}, ValueError, "unknown backend 'dense', expected one of: .*cpu.*reference"),
        ({"backend": "tritn"}, ValueError, "unknown backend 'tritn', expected one of: .*cpu.*reference"),
    ],
)
def test_bad_arguments_raise(change, error, message):
    args, kwargs = _arguments(**change)
    with pytest.raises(error, match=message):
        masked_linear(*args, **kwargs)


def test_a_topology_elsewhere_raises():
    args, kwargs = _arguments()
    there = BlockTopology(16, 2, 3, *(torch.zeros(n, dtype=torch.int32, device="meta") for n in (3, 6, 4, 6)))
    with pytest.raises(ValueError, match="x and topology must be on one device, got cpu and meta"):
        masked_linear(*args[:3], there, **kwargs)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_backend_that_does_not_support_the_case_raises(frozen):
    small = _topology(2, 3, 4)
    x, weight, bias, _ = (t.float() for t in _operands(small, 5, torch.float32))
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run .* blocks of at least 8 .* got block size 4"):
        masked_linear(x, weight, bias, small, backend="cpu", frozen=frozen)
    args, kwargs = _arguments()
    with pytest.raises(ValueError, match=r"needs float32, float64, bfloat16 or float16, got torch\.int64"):
        masked_linear(*(t.long() for t in args[:3]), args[3], **kwargs)
    there = BlockTopology(16, 2, 3, *(torch.zeros(n, dtype=torch.int32, device="meta") for n in (3, 6, 4, 6)))
    with pytest.raises(ValueError, match=r"CPU tensors only, got device meta"):
        masked_linear(*(t.to("meta") for t in args[:3]), there, **kwargs)


# --------------------------------------------------------------------------------------------------- discovery


def test_discovered_backends_are_backends():
    found = backends()
    assert {"cpu", "reference"} <= set(found)
    for name, backend in found.items():
        assert isinstance(backend, Backend)
        assert backend.name == name
        assert get_backend(name) is backend


def test_the_list_of_backends_is_a_copy():
    backends().clear()
    assert backends()


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Installs a distribution with one entry point, whose module holds the given source."""

    def install(source: str):
        (tmp_path / "estdgm_plugin.py").write_text(source)
        info = tmp_path / "estdgm_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: estdgm-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{protocol.ENTRY_POINT_GROUP}]\nmine = estdgm_plugin:BACKEND\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        protocol._discover.cache_clear()

    yield install
    sys.modules.pop("estdgm_plugin", None)
    protocol._discover.cache_clear()


_PLUGIN = """
from lightning_estdgm.sparse.backends.reference import ReferenceBackend
class Mine(ReferenceBackend):
    name = {name!r}
BACKEND = Mine()
"""


def test_a_backend_may_come_from_an_entry_point(plugin):
    plugin(_PLUGIN.format(name="mine"))
    assert "mine" in backends()
    args, kwargs = _arguments(backend="mine")
    torch.testing.assert_close(masked_linear(*args, **kwargs), masked_linear(*args, backend="reference"))


@pytest.mark.parametrize("name", ["cpu", "dense", "auto"])
def test_a_taken_name_raises(plugin, name):
    plugin(_PLUGIN.format(name=name))
    with pytest.raises(ValueError, match=rf"entry point 'mine' .* backend name '{name}' is already taken"):
        backends()


def test_an_entry_point_that_is_no_backend_raises(plugin):
    plugin("BACKEND = object()")
    with pytest.raises(TypeError, match=r"entry point 'mine' .* must be a Backend"):
        backends()
