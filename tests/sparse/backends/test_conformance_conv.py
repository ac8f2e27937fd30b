"""Convolutions of every discovered backend against dense convolutions of torch."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sparse_conv import (
    FIRST,
    LAST,
    ON_CPU,
    POINTS,
    THREE,
    TOLERANCES,
    assert_close,
    by_torch,
    kernel_mask,
    make_operands,
    make_topology,
    refusal,
    run,
)
from helpers.sparse_linear import DEVICES, MODES
from lightning_estdgm.sparse._conv import masked_conv2d
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse.backends._protocol import backends

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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", sorted(backends()))
def test_conformance(backend, device, dtype, mode):
    cases = [c for c in CASES if refusal(backend, device, dtype, c[0][-1], c[1]) is None]
    if not cases:
        pytest.skip(f"{backend} {refusal(backend, device, dtype)}")
    for case, empty in product(cases, (False, True)):
        (batch, height, width, *blocks), geometry = case
        topology = make_topology(*blocks, device, empty)
        x, weight, bias, dy = make_operands(topology, batch, height, width, geometry, dtype)
        expected = by_torch(x, weight, bias, dy, topology, geometry, **MODES[mode])
        if "frozen" not in MODES[mode]:
            weight = weight.masked_fill(~kernel_mask(topology), float("nan"))  # ignored, whatever it holds
        memory = LAST if empty else FIRST
        operands = [t.to(dtype, memory_format=memory) for t in (x, weight)] + [t.to(dtype) for t in (bias, dy)]
        got = run(*operands, topology, geometry, backend=backend, **MODES[mode])
        assert all(t.dtype == dtype for t in got)
        assert_close(got, expected, dtype, (case, empty))
        assert got[0].is_contiguous(memory_format=memory)
        assert got[2].is_contiguous(memory_format=memory)
        if "dense_grad" not in MODES[mode]:
            assert not got[2][~kernel_mask(topology).expand_as(got[2])].any()


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
    topology = make_topology(2, 2)
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
    operands = make_operands(topology, batch, *size, geometry, torch.float32)
    got = run(*(t.float() for t in operands), topology, geometry, backend=backend)
    assert_close(got, by_torch(*operands, topology, geometry), torch.float32)


def test_single_weights_are_the_oracles():
    topology = make_topology(5, 3, 1)
    operands = make_operands(topology, 2, 5, 5, THREE, torch.float64)
    got = run(*operands, topology, THREE, backend="reference")
    assert_close(got, by_torch(*operands, topology, THREE), torch.float64)


@pytest.mark.parametrize("geometry", [THREE, POINTS], ids=["3x3", "1x1"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_operands_of_odd_strides(backend, geometry):
    topology = make_topology()
    operands = x, weight, bias, dy = make_operands(topology, 2, 6, 5, geometry, torch.float32)
    expected = by_torch(*operands, topology, geometry)
    x, weight, bias, dy = (t.float() for t in operands)
    wide = torch.zeros(2, x.shape[1], 12, 7).contiguous(memory_format=LAST)
    wide[:, :, ::2, 1:6] = x
    swapped = weight.transpose(0, 1).contiguous().transpose(0, 1)
    spread = bias.repeat_interleave(2)[::2]
    got = run(wide[:, :, ::2, 1:6], swapped, spread, dy.flip(3).flip(3), topology, geometry, backend=backend)
    assert_close(got, expected, torch.float32)
    ones = torch.ones(()).expand_as(dy)  # what sum().backward() sends
    expected = by_torch(*operands[:3], ones.double(), topology, geometry)
    assert_close(run(x, weight, bias, ones, topology, geometry, backend=backend), expected, torch.float32)
