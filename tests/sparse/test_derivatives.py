"""Derivatives of any order of the sparse products: autograd, torch.func, forward mode, compilation, checkpointing."""

import functools
import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from helpers import sparse_conv, sparse_linear
from helpers.sparse_linear import MODES, widest
from lightning_estdgm.sparse._conv import masked_conv2d
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._linear import masked_linear

POINTS_APART = ConvGeometry((1, 1), (2, 2))
KINDS = ["linear", "linear, transposed", "3x3", "1x1", "1x1, stride 2", "3x2, stride 2x1"]
GEOMETRIES = {
    "3x3": sparse_conv.THREE,
    "1x1": sparse_conv.POINTS,
    "1x1, stride 2": POINTS_APART,
    "3x2, stride 2x1": ConvGeometry((3, 2), (2, 1), (1, 1)),
}
quiet = pytest.mark.filterwarnings(
    "ignore:There is a performance drop",
    "ignore:`torch.jit:DeprecationWarning",  # torch's own, on its first dual number
)


class Layer:
    """A layer of one kind: its operands, by the sparse operator, and by torch with what acts of the weight."""

    def __init__(self, kind, block_size, dtype=torch.float64, by_tap=False):
        self.kind, self.geometry = kind, GEOMETRIES.get(kind)
        if self.geometry:
            taps = math.prod(self.geometry.kernel_size) if by_tap else 1
            self.topology = sparse_conv.make_topology(2, 3, block_size, taps=taps)
            operands = sparse_conv.make_operands(self.topology, 2, 4, 3, self.geometry, torch.bfloat16, taps=taps)
        else:
            self.topology = sparse_linear.make_topology(2, 3, block_size, "density 0.3")
            operands = sparse_linear.make_operands(self.topology, 3, torch.bfloat16)
        x, weight, bias, _ = operands
        weight = weight.t().contiguous() if self.is_transposed else weight
        self.leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]

    @property
    def is_transposed(self):
        return self.kind == "linear, transposed"

    @property
    def mask(self):
        return self.topology.mask_over(self.leaves[1].shape) if self.geometry else self.topology.weight_mask()

    def sparse(self, x, weight, bias, **kwargs):
        if self.geometry:
            return masked_conv2d(x, weight, bias, self.topology, self.geometry, **kwargs)
        return masked_linear(x, weight.t() if self.is_transposed else weight, bias, self.topology, **kwargs)

    def dense(self, x, weight, bias, dense_grad=False, frozen=False):
        weight = weight.t() if self.is_transposed else weight
        weight = weight.where(self.mask, weight.detach() if frozen else torch.zeros_like(weight))
        if self.geometry:
            return F.conv2d(x, weight, bias, self.geometry.stride, self.geometry.padding)
        return F.linear(x, weight, bias)


def _up_to_third(call, leaves):
    """Gradients, gradients of a function of them, and gradients of a function of those."""
    found = [torch.autograd.grad(call(*leaves).pow(3).mean(), leaves, create_graph=True)]
    for create_graph in (True, False):
        loss = sum(g.square().mean() for g in found[-1])
        found.append(torch.autograd.grad(loss, leaves, create_graph=create_graph))
    return [g.detach() for order in found for g in order]


def _assert_near(got, expected):
    for number, (mine, right) in enumerate(zip(got, expected, strict=True)):
        size = right.norm().item()
        assert size > 0, number
        tolerance = 1e-12 if mine.dtype == torch.float64 else 1e-4
        assert (mine.double() - right).norm() <= tolerance * size, number


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_finite_differences(kind):
    layer = Layer(kind, 2)
    call = functools.partial(layer.sparse, backend="reference")
    assert gradcheck(call, layer.leaves)
    assert gradgradcheck(call, layer.leaves)


@pytest.mark.parametrize("kind", ["3x3", "3x2, stride 2x1"])
def test_derivatives_of_single_taps_are_those_of_finite_differences(kind):
    layer = Layer(kind, 1, by_tap=True)
    call = functools.partial(layer.sparse, backend="reference")
    assert gradcheck(call, layer.leaves)
    assert gradgradcheck(call, layer.leaves)


@pytest.mark.parametrize("kind", ["3x3", "3x2, stride 2x1"])
@pytest.mark.parametrize("unit", ["1 tap", 1, (2, 1), (4, 1), (8, 1), (16, 1), 4, 8], ids=str)
def test_three_orders_of_fine_units_of_convolutions(unit, kind):
    size, by_tap = (1, True) if unit == "1 tap" else (unit, False)
    layer, right = Layer(kind, size, torch.float32, by_tap), Layer(kind, size, by_tap=by_tap)
    got = _up_to_third(functools.partial(layer.sparse, backend="native"), layer.leaves)
    _assert_near(got, _up_to_third(right.dense, right.leaves))
    assert not any(gradient[~layer.mask.expand_as(gradient)].any() for gradient in got[1::3])


@quiet
@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_forward_mode_is_that_of_finite_differences(kind):
    layer = Layer(kind, 2)
    call = functools.partial(layer.sparse, backend="reference")
    assert gradcheck(call, layer.leaves, check_forward_ad=True)
    assert gradgradcheck(call, layer.leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize("mode", ["plain", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", sparse_linear.ON_CPU)
def test_three_orders_equal_those_of_a_dense_layer_with_masks(backend, kind, mode):
    geometry = GEOMETRIES.get(kind)
    if geometry and sparse_conv.refusal(backend, geometry=geometry):
        pytest.skip(f"{backend} has no such convolution")
    layer, right = Layer(kind, 16, widest(backend)), Layer(kind, 16)
    got = _up_to_third(functools.partial(layer.sparse, backend=backend, **MODES[mode]), layer.leaves)
    _assert_near(got, _up_to_third(functools.partial(right.dense, **MODES[mode]), right.leaves))
    for gradient in got[1::3]:  # of the weight
        off = ~(layer.mask.t() if layer.is_transposed else layer.mask).expand_as(gradient)
        assert not gradient[off].any()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_observed_gradients_are_whole_in_every_order(kind, frozen):
    layer = Layer(kind, 2)
    weight = layer.leaves[1]
    with torch.no_grad():  # as in training, where inactive weights are zero unless frozen
        weight.copy_(weight if frozen else weight.mul(layer.mask.t() if layer.is_transposed else layer.mask))
    call = functools.partial(layer.sparse, backend="reference", dense_grad=True, frozen=frozen)
    got = _up_to_third(call, layer.leaves)
    layer.topology.update_(torch.ones_like(layer.topology.mask()))
    _assert_near(got, _up_to_third(layer.dense, layer.leaves))


def test_inactive_weights_reach_no_derivative_even_as_nan():
    layer = Layer("linear", 16, torch.float32)
    clean = _up_to_third(functools.partial(layer.sparse, backend="cpu"), layer.leaves)
    with torch.no_grad():
        layer.leaves[1].masked_fill_(~layer.mask, float("nan"))
    got = _up_to_third(functools.partial(layer.sparse, backend="cpu"), layer.leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_an_ordinary_backward_saves_nothing_for_a_second_one(kind):
    layer = Layer(kind, 16, torch.float32)
    y = layer.sparse(*layer.leaves, backend="cpu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gradients = torch.autograd.grad(y.sum(), layer.leaves)
    assert not saved
    assert not any(g.requires_grad for g in gradients)


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_only_what_a_wanted_gradient_needs_is_saved(kind):
    layer = Layer(kind, 16, torch.float32)
    x, weight, bias = layer.leaves
    for leaves, wanted in (((x.detach(), weight, bias), 1), ((x, weight.detach(), bias), 0)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            layer.sparse(*leaves, backend="cpu")
        assert not any(t.shape == leaves[wanted].shape for t in saved)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_derivatives_through_recomputed_activations(kind, use_reentrant):
    layer = Layer(kind, 16, torch.float32)

    def call(*leaves):
        return layer.sparse(*leaves, backend="cpu")

    expected = _up_to_third(call, layer.leaves)
    if use_reentrant:  # torch refuses autograd.grad there, of any layer
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            _up_to_third(lambda *leaves: checkpoint(call, *leaves, use_reentrant=True), layer.leaves)
        return
    got = _up_to_third(lambda *leaves: checkpoint(call, *leaves, use_reentrant=False), layer.leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_second_backward_under_autocast_keeps_the_forward_dtype():
    layer = Layer("linear", 16, torch.float32)
    x, weight, bias = layer.leaves
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.sparse(x, weight, bias, backend="cpu")
        (dx,) = torch.autograd.grad(y.float().square().mean(), x, create_graph=True)
        penalty = dx.square().mean()
        dw, db = torch.autograd.grad(penalty, (weight, bias))
    assert y.dtype == torch.bfloat16
    right = layer.dense(x, weight, bias)
    (dx,) = torch.autograd.grad(right.square().mean(), x, create_graph=True)
    for mine, exact in zip((dw, db), torch.autograd.grad(dx.square().mean(), (weight, bias)), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - exact).norm() <= 2**-5 * exact.norm()


# ------------------------------------------------------------------ torch.func


def _functional(x, weight, bias, call):
    """What torch.func makes of a layer: gradients, those of each sample, Jacobians, Hessians, tangents, ensembles."""

    def loss(weight, x, bias):
        return call(x, weight, bias).pow(3).mean()

    def slope(weight, x, bias):
        return torch.func.grad(loss, 1)(weight, x, bias).square().sum()

    def of_bias(bias):
        return loss(weight, x, bias)

    def of_one(x):
        return loss(weight, x[None], bias)

    return {
        "grad": torch.func.grad(loss, (0, 1, 2))(weight, x, bias),
        "of each sample": torch.func.vmap(torch.func.grad(loss), (None, 0, None))(weight, x[:, None], bias),
        "vjp": torch.func.vjp(call, x, weight, bias)[1](call(x, weight, bias)),
        "ensemble": torch.func.vmap(call, (None, 0, None))(x, torch.stack([weight, -weight]), bias),
        "gradient of a gradient": torch.func.grad(slope, (0, 2))(weight, x, bias),
        "of each sample's": torch.func.vmap(torch.func.grad(slope), (None, 0, None))(weight, x[:, None], bias),
        "jvp": torch.func.jvp(call, (x, weight, bias), (x + 1, weight.flip(0), bias)),
        "jacfwd": torch.func.jacfwd(lambda bias: call(x[:1], weight, bias))(bias),
        "hessian": torch.func.hessian(of_bias)(bias),
        "hessian, twice reverse": torch.func.jacrev(torch.func.jacrev(of_bias))(bias),
        "hessian of each sample": torch.func.vmap(torch.func.hessian(of_one))(x[:2]),
    }


@quiet
@pytest.mark.parametrize("kind", ["linear", "3x3", "1x1, stride 2"])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_every_transform_equals_that_of_a_dense_layer(backend, kind):
    if backend not in sparse_linear.ON_CPU:
        pytest.skip("it cannot run here")
    layer = Layer(kind, {"reference": 2, "native": 16}[backend], widest(backend))
    x, weight, bias = (t.detach() for t in layer.leaves)
    got = _functional(x, weight, bias, functools.partial(layer.sparse, backend=backend))
    expected = _functional(x.double(), weight.double(), bias.double(), layer.dense)
    for name, right in expected.items():
        _assert_near(pytree.tree_leaves(got[name]), pytree.tree_leaves(right))


@quiet
def test_dual_numbers_without_torch_func():
    layer = Layer("linear", 16, torch.float32)
    x, weight, bias = (t.detach() for t in layer.leaves)
    with forward_ad.dual_level():
        y = layer.sparse(x, forward_ad.make_dual(weight, weight.flip(0)), bias, backend="cpu")
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, layer.dense(x, weight.flip(0), torch.zeros_like(bias)), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ torch.compile


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_compiled_without_aot_autograd_it_has_every_order(kind):
    layer = Layer(kind, 16, torch.float32)
    compiled = torch.compile(functools.partial(layer.sparse, backend="cpu"), backend="eager", fullgraph=True)
    got = _up_to_third(compiled, layer.leaves)
    expected = _up_to_third(functools.partial(layer.sparse, backend="cpu"), layer.leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("fresh_compiler")
def test_under_aot_autograd_torch_itself_refuses_a_second_order():
    layer = Layer("linear", 16, torch.float32)
    for call in (functools.partial(layer.sparse, backend="cpu"), lambda x, weight, bias: F.linear(x, weight, bias)):
        compiled = torch.compile(call, backend="aot_eager")
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            _up_to_third(compiled, layer.leaves)
