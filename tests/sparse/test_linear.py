"""masked_linear: autograd, transforms, autocast, compilation, and what it refuses."""

import functools
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.sparse_linear import MODES, ON_CPU, make_arguments, make_operands, make_topology, run, widest
from lightning_estdgm.sparse._linear import masked_linear
from lightning_estdgm.sparse._topology import BlockTopology


class OperatorCalls(TorchDispatchMode):
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
    topology = make_topology()
    x, weight, bias, _ = make_operands(topology, 4, torch.float32)
    for tensor, want in zip((x, weight, bias), wanted, strict=True):
        tensor.requires_grad_(want)
    with OperatorCalls() as calls:
        y = masked_linear(x, weight, bias, topology, backend="cpu")
        if any(wanted):
            y.sum().backward()
    assert ("masked_linear_grad_input" in calls.names) == wanted[0]
    assert ("masked_linear_grad_weight" in calls.names) == wanted[1]
    assert [t.grad is not None for t in (x, weight, bias)] == list(wanted)
    assert y.requires_grad == any(wanted)


def test_a_parameter_behind_a_transposed_view_gets_its_gradient_as_it_is_stored():
    topology = make_topology()
    x, weight, bias, dy = make_operands(topology, 4, torch.float64)
    stored = weight.t().contiguous().requires_grad_()
    masked_linear(x, stored.t(), bias, topology, backend="cpu").backward(dy)
    assert stored.grad.stride() == stored.stride()
    torch.testing.assert_close(stored.grad.t(), run(x, weight, bias, dy, topology, backend="reference")[2])


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
    topology = make_topology()
    dtype = widest(backend)
    x, weight, bias, _ = (t.to(dtype) for t in make_operands(topology, 4, torch.float32))
    x = torch.stack([x, x + 1, -x])
    on = topology.weight_mask()
    expected = _functional(x, weight, bias, lambda x, weight, bias: F.linear(x, weight * on, bias))
    got = _functional(x, weight, bias, functools.partial(masked_linear, topology=topology, backend=backend))
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(got, expected, **tolerance)


def test_a_mask_changed_between_forward_and_backward_raises():
    topology = make_topology()
    x, weight, _, dy = make_operands(topology, 4, torch.float64)
    y = masked_linear(x, weight.requires_grad_(), None, topology, backend="cpu")
    topology.update_(~topology.mask())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    topology = make_topology()
    x, weight, bias, _ = (t.requires_grad_() for t in make_operands(topology, 4, torch.float64))
    with context():
        y = masked_linear(x, weight, bias, topology, backend="cpu")
    assert not y.requires_grad
    torch.testing.assert_close(y, masked_linear(x, weight, bias, topology, backend="reference").detach())


@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast_casts_as_a_dense_linear_does(backend):
    topology = make_topology(2, 3, 16, "full")
    x, weight, bias, dy = (t.float() for t in make_operands(topology, 5, torch.float32))
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
    topology = make_topology()
    x, weight, bias, _ = make_operands(topology, 5, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_linear(x, weight, bias, topology, backend="cpu").dtype == torch.float64


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_backward_called_under_autocast_keeps_the_forward_dtype(backend, mode):
    topology = make_topology()
    x, weight, bias, dy = (t.float() for t in make_operands(topology, 5, torch.float32))
    expected = run(x, weight, bias, dy, topology, backend=backend, **MODES[mode])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = masked_linear(*leaves, topology, backend=backend, **MODES[mode])
    with torch.autocast("cpu", torch.bfloat16):
        got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()  # it counts recompilations of one function over all tests


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_whole_and_follows_a_new_mask_without_recompiling(backend, mode):
    topology = make_topology(3, 4, 16)
    x, weight, bias, dy = (t.float() for t in make_operands(topology, 5, torch.float32))
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
        torch.testing.assert_close(got, run(x, weight, bias, dy, topology, backend=backend, **MODES[mode]))
        seen.append(got)
        topology.update_(~topology.mask())
    assert counter.frame_count == 1
    changed = any(not torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert changed == (mode != "frozen, dense_grad")  # there nothing is masked


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_under_autocast(backend):
    topology = make_topology()
    x, weight, bias, _ = (t.float() for t in make_operands(topology, 5, torch.float32))
    compiled = torch.compile(
        lambda x: masked_linear(x, weight, bias, topology, backend=backend), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = compiled(x), masked_linear(x, weight, bias, topology, backend=backend)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_operators_are_registered_properly(transposed):
    topology = make_topology(2, 3, 8)
    x, weight, bias, dy = (t.float() for t in make_operands(topology, 4, torch.float32))
    weight = weight.t().contiguous().t() if transposed else weight
    flat = (topology.row_ptr, topology.col_idx, topology.col_ptr, topology.row_idx, [8, 8], "cpu")
    for with_bias, dense_grad, frozen in [(True, False, False), (False, True, False), (True, False, True)]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        args = (*leaves, bias.clone().requires_grad_() if with_bias else None, *flat, dense_grad, frozen)
        torch.library.opcheck(torch.ops.estdgm.masked_linear.default, args)
    for dense in (False, True):
        a, b, c = (t.clone().requires_grad_() for t in (dy, weight, x))
        torch.library.opcheck(torch.ops.estdgm.masked_linear_grad_input.default, (a, b, *flat, not dense, dense))
        torch.library.opcheck(torch.ops.estdgm.masked_linear_grad_weight.default, (a, c, *flat, dense))


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
    args, kwargs = make_arguments(**change)
    with pytest.raises(error, match=message):
        masked_linear(*args, **kwargs)


def test_a_topology_elsewhere_raises():
    args, kwargs = make_arguments()
    there = BlockTopology(16, 2, 3, *(torch.zeros(n, dtype=torch.int32, device="meta") for n in (3, 6, 4, 6)))
    with pytest.raises(ValueError, match="x and topology must be on one device, got cpu and meta"):
        masked_linear(*args[:3], there, **kwargs)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_backend_that_does_not_support_the_case_raises(frozen):
    small = make_topology(2, 3, 4)
    x, weight, bias, _ = (t.float() for t in make_operands(small, 5, torch.float32))
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run .* blocks of at least 8 .* got block size 4"):
        masked_linear(x, weight, bias, small, backend="cpu", frozen=frozen)
    args, kwargs = make_arguments()
    with pytest.raises(ValueError, match=r"needs float32, float64, bfloat16 or float16, got torch\.int64"):
        masked_linear(*(t.long() for t in args[:3]), args[3], **kwargs)
    there = BlockTopology(16, 2, 3, *(torch.zeros(n, dtype=torch.int32, device="meta") for n in (3, 6, 4, 6)))
    with pytest.raises(ValueError, match=r"CPU tensors only, got device meta"):
        masked_linear(*(t.to("meta") for t in args[:3]), there, **kwargs)
