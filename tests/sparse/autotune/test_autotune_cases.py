"""Cases of the never-slower choice, and how they are timed for real."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.autotune_cases import POINTWISE, conv_case, linear_case
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse.autotune._cases import layer_key, layer_of, measured_case, refusals
from lightning_estdgm.sparse.autotune._timing import measure_case


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"out_features": 60}, "out_features must be a positive multiple of block size 16, got 60"),
        ({"in_features": 0}, "in_features must be a positive multiple of block size 16, got 0"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.01}, r"density must be in \(0, 1\], got 1.01"),
        ({"density": float("nan")}, r"density must be in \(0, 1\], got nan"),
    ],
)
def test_a_case_that_cannot_be_raises(change, message):
    with pytest.raises(ValueError, match=message):
        linear_case(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"in_channels": 40}, "in_channels must be a positive multiple of block size 16, got 40"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"geometry": ConvGeometry((11, 1))}, "an input of 9 x 6 is too small for ConvGeometry"),
    ],
)
def test_a_convolution_that_cannot_be_raises(change, message):
    with pytest.raises(ValueError, match=message):
        conv_case(**change)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "estdgm":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "ambient",
    [
        torch.enable_grad,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["enable_grad", "no_grad", "inference_mode", "autocast", "device"],
)
@pytest.mark.parametrize("change", [{}, {"frozen": True}, {"transposed": True}], ids=str)
def test_measuring_runs_forward_and_backward_in_the_dtype_asked_and_leaves_no_trace(ambient, change):
    state, threads, mode = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    with ambient(), _Operators() as operators:
        times = measure_case(linear_case(**change), ["dense", "cpu"], rounds=2).seconds
    assert set(times) == {"dense", "cpu"}
    assert all(0 < seconds < math.inf for seconds in times.values())
    names = [func.name().removeprefix("estdgm::") for func, _ in operators.calls]
    assert sorted(set(names)) == ["masked_linear", "masked_linear_grad_input", "masked_linear_grad_weight"]
    assert names.count("masked_linear") >= 2 + 2  # two to warm up, two or more that count
    for func, args in operators.calls:
        assert args[0].dtype == torch.float32
        if func.name() == "estdgm::masked_linear":
            assert args[-1] is bool(change.get("frozen"))
            assert args[1].shape == (64, 96)
            assert (args[1].stride(0) == 1) == bool(change.get("transposed"))
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, mode)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_convolution_is_measured_as_it_lies_in_memory(frozen, channels_last):
    case = conv_case(frozen=frozen, channels_last=channels_last)
    with _Operators() as operators:
        times = measure_case(case, ["dense", "reference"], rounds=1).seconds
    assert set(times) == {"dense", "reference"}
    names = [func.name() for func, _ in operators.calls]
    assert sorted(set(names)) == [f"estdgm::masked_conv2d{part}" for part in ("", "_grad_input", "_grad_weight")]
    for func, args in operators.calls:
        if func.name() == "estdgm::masked_conv2d":
            assert args[0].shape == (2, 48, 9, 6)
            assert args[1].shape == (32, 48, 3, 1)
            assert args[1].is_contiguous(memory_format=torch.channels_last) == channels_last
            assert args[-1] is frozen
    problem = case.problem()
    for name in ("dense", "reference"):
        y = problem.forward(name)
        assert y.shape == problem.dy.shape
        assert y.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_refusals_of_a_convolution_know_its_geometry():
    assert refusals(conv_case(geometry=POINTWISE))["cpu"] is None
    assert "needs blocks of at least 8" in refusals(conv_case(block_size=4, geometry=POINTWISE))["cpu"]


@pytest.mark.parametrize("density", [1e-6, 0.25, 1.0])
def test_the_measured_mask_has_the_density_asked_and_is_always_the_same(density):
    case = linear_case(density=density)
    topology = case.topology()
    assert topology.shape == (64, 96)
    assert topology.nnz == max(1, round(density * 24))
    assert torch.equal(topology.mask(), case.topology().mask())


# ------------------------------------------------------------------ which case is timed for a layer


@pytest.mark.parametrize(
    ("case", "timed"),
    [
        (linear_case(tokens=117, density=0.11), linear_case(tokens=128, density=0.125)),
        (linear_case(tokens=150, density=0.125), linear_case(tokens=128, density=0.125)),
        (linear_case(tokens=1, density=1.0, frozen=True), linear_case(tokens=1, density=1.0, frozen=True)),
        (conv_case(batch=6, density=0.5), conv_case(batch=8, density=0.5)),
    ],
)
def test_a_layer_is_timed_at_the_density_and_count_of_its_bucket(case, timed):
    assert measured_case(case) == timed
    assert measured_case(timed) == timed


def test_flops_count_three_products():
    assert linear_case(tokens=10).flops == 3 * 2 * 10 * 64 * 96
    assert conv_case().flops == 3 * 2 * (2 * 5 * 6) * (32 * 48 * 3)


def test_units_of_two_sides_are_layers_of_their_own():
    """Whatever the side of a unit is given as, its key is the same before and after a state was saved."""
    column, row, square = (linear_case(block_size=unit) for unit in ((4, 1), (1, 4), 4))
    keys = {layer_key(layer_of(case)) for case in (column, row, square)}
    assert len(keys) == 3
    assert layer_key({**layer_of(column), "block_size": (4, 1)}) in keys
    with pytest.raises(ValueError, match=r"in_features must be a positive multiple of block size 7, got 96"):
        linear_case(block_size=(1, 7))
    with pytest.raises(ValueError, match=r"block_size must be at least 1, got \(4, 0\)"):
        linear_case(block_size=(4, 0))


def test_single_weights_of_a_convolution_have_a_flag_for_each_tap():
    case = conv_case(block_size=1, density=0.25)
    taps = case.geometry.kernel_size[0] * case.geometry.kernel_size[1]
    assert taps > 1
    assert case.topology().shape == (case.out_channels, case.in_channels * taps)
    weight = case.problem().leaves[1]
    assert torch.count_nonzero(weight) == case.topology().nnz
    assert refusals(case)["native"] is None
