"""The compiled convolutions: their loops at real sizes, for each kind of processor that they are built for."""

import math

import pytest
import torch
from test_native import target  # noqa: F401

from lightning_estdgm.method._masks import sides
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends import native
from lightning_estdgm.sparse.backends._protocol import get_backend

DTYPES = [torch.float32, torch.bfloat16]
SAME = ConvGeometry((3, 3), padding=(1, 1))


UNITS = ["1 tap", 1, (2, 1), (4, 1), (8, 1), (16, 1), (1, 2), (1, 4), (1, 8), (1, 16), 4, 8]


def _case(batch, height, width, rows, cols, block_size, geometry, dtype, density=0.4):
    by_tap = block_size == "1 tap"
    block_size = 1 if by_tap else block_size
    (r, c), taps = sides(block_size), math.prod(geometry.kernel_size) if by_tap else 1
    generator = torch.Generator().manual_seed(height + r + c)

    def normal(*shape):
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    mask = torch.rand(rows, cols * taps, generator=generator) < density
    mask[0], mask[:, :taps] = False, False  # a block row and a column without anything
    mask[-1] = True
    out, features = rows * r, cols * c
    size = geometry.output_size(height, width)
    operands = (batch, features, height, width), (out, features, *geometry.kernel_size), (out,), (batch, out, *size)
    return BlockTopology.from_mask(mask, block_size), *(normal(*shape) for shape in operands)


def _products(backend, topology, geometry, x, weight, bias, dy):
    return (
        backend.conv(x, weight, bias, topology, geometry),
        backend.conv(x, weight, None, topology, geometry),
        backend.conv_grad_input(dy, weight, tuple(x.shape[2:]), topology, geometry),
        backend.conv_grad_weight(dy, x, topology, geometry),
    )


def _assert_right(geometry, topology, *operands):
    dtype = operands[0].dtype
    refusal = native.BACKEND.conv_unsupported(torch.device("cpu"), dtype, topology, geometry)
    if refusal is not None:
        assert dtype is torch.bfloat16, refusal
        pytest.skip("this build has no bfloat16")
    right = _products(get_backend("reference"), topology, geometry, *(t.double() for t in operands))
    for got, want in zip(_products(native.BACKEND, topology, geometry, *operands), right, strict=True):
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=torch.channels_last)
        error = (got.double() - want).norm() / want.norm()
        assert error < (3e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
def test_every_loop_of_every_target(target, block_size, dtype):  # noqa: F811
    # 2 x 11 x 13 pixels: an odd number in a row for pairs, and some left over in each loop.
    _assert_right(SAME, *_case(2, 11, 13, 2, 3, block_size, SAME, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "blocks", "geometry"),
    [
        (3, 30, (2, 8, 32), SAME),  # several windows an image
        (40, 5, (2, 2, 64), SAME),  # several images a window
        (2, 6, (3, 24, 64), SAME),  # windows of one row of the output
        (2, 33, (2, 3, 16), ConvGeometry((7, 7), (2, 2), (3, 3))),
        (2, 17, (3, 2, 32), ConvGeometry((3, 2), (3, 2), (2, 5), (4, 3))),
    ],
)
def test_windows(batch, size, blocks, geometry, dtype):
    _assert_right(geometry, *_case(batch, size, size + 1, *blocks, geometry, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "size"), [(1, 6), (6, 20)], ids=["one window", "several"])
def test_results_do_not_depend_on_the_number_of_threads(batch, size, dtype):
    topology, *operands = _case(batch, size, size, 6, 5, 32, SAME, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(_products(native.BACKEND, topology, SAME, *operands))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- units finer than a block


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_every_loop_of_fine_units_of_every_target(target, unit, dtype):  # noqa: F811
    # 11 x 13 pixels of 3 images: bands, strips of pixels and tiles that do not divide. 21 x 19 and 5 x 40 units:
    # channels left over of a vector, and several stretches of single weights.
    _assert_right(SAME, *_case(3, 11, 13, 21, 19, unit, SAME, dtype))
    _assert_right(SAME, *_case(17, 4, 5, 5, 40, unit, SAME, dtype))


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize(
    ("batch", "height", "width", "geometry"),
    [
        (1, 1, 1, SAME),
        (1, 7, 7, SAME),  # fewer pixels than lanes in some builds
        (33, 3, 2, SAME),  # a last group of one image
        (2, 40, 35, SAME),  # several tiles a band
        (2, 33, 34, ConvGeometry((7, 7), (2, 2), (3, 3))),
        (3, 17, 18, ConvGeometry((3, 2), (3, 2), (2, 5), (4, 3))),  # all kinds of positions between strides
        (2, 9, 9, ConvGeometry((2, 3), (3, 4), (0, 2))),  # pixels that no tap reaches
        (2, 5, 4, ConvGeometry((1, 1), (2, 1), (1, 2))),
        (2, 1, 50, ConvGeometry((1, 5), (1, 3), (0, 2), (1, 2))),  # of one dimension
        (2, 70, 75, ConvGeometry((3, 3), (1, 1), (30, 30), (30, 30))),  # taps far apart
    ],
)
def test_fine_units_of_any_geometry(batch, height, width, geometry, unit):
    _assert_right(geometry, *_case(batch, height, width, 3, 5, unit, geometry, torch.float32))


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("mask", [False, True], ids=["nothing active", "all active"])
def test_fine_units_of_the_first_and_the_last_density(unit, mask):
    topology, *operands = _case(2, 6, 7, 4, 6, unit, SAME, torch.float32)
    topology.update_(torch.full_like(topology.mask(), mask))
    reference = get_backend("reference")
    for got, want in zip(
        _products(native.BACKEND, topology, SAME, *operands),
        _products(reference, topology, SAME, *operands),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("batch", [2, 40])
def test_fine_units_do_not_depend_on_the_number_of_threads(batch, unit, dtype):
    geometry = ConvGeometry((3, 3), (2, 1), (1, 1))
    topology, *operands = _case(batch, 10, 11, 9, 12, unit, geometry, dtype)
    _assert_right(geometry, topology, *operands)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5, 65):
            torch.set_num_threads(n)
            results.append(_products(native.BACKEND, topology, geometry, *operands))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("geometry", [SAME, ConvGeometry((3, 3), (2, 2), (1, 1))], ids=["stride 1", "stride 2"])
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_what_inactive_weights_hold_reaches_nothing(unit, geometry):
    topology, x, weight, bias, dy = _case(3, 6, 7, 9, 11, unit, geometry, torch.float32)
    inactive = ~topology.mask_over(weight.shape).expand_as(weight)
    for got, want in zip(
        _products(native.BACKEND, topology, geometry, x, weight.masked_fill(inactive, torch.nan), bias, dy),
        _products(native.BACKEND, topology, geometry, x, weight.masked_fill(inactive, 0.0), bias, dy),
        strict=True,
    ):
        assert torch.equal(got, want)
    assert not native.BACKEND.conv_grad_weight(dy, x, topology, geometry)[inactive].any()


@pytest.mark.parametrize("unit", ["1 tap", 1, (2, 1)], ids=str)
def test_an_infinite_input_reaches_only_the_outputs_that_use_it(unit):
    # Outputs are taken in fours of equal length: what fills up the shorter ones must be no input.
    topology, x, weight, _, _ = _case(2, 5, 5, 16, 40, unit, SAME, torch.float32, density=0.1)
    x[1, 5, 2, 2] = torch.inf
    used = topology.mask_over(weight.shape).expand_as(weight)[:, 5].flip(1, 2)  # of the 3 x 3 outputs around that pixel
    assert used.any()
    assert not used.all()
    finite = native.BACKEND.conv(x, weight, None, topology, SAME).isfinite()
    assert torch.equal(finite[1, :, 1:4, 1:4], ~used)
    finite[1, :, 1:4, 1:4] = True
    assert finite.all()


@pytest.mark.parametrize("unit", ["1 tap", (4, 1), 8], ids=str)
def test_weights_of_any_strides(unit):
    topology, x, weight, bias, dy = _case(2, 6, 7, 4, 5, unit, SAME, torch.float32)
    _assert_right(SAME, topology, x, weight.contiguous(), bias, dy)
    _assert_right(SAME, topology, x, weight.transpose(0, 1).contiguous().transpose(0, 1), bias, dy)
    spread = weight.repeat_interleave(2, 1)[:, ::2]
    _assert_right(SAME, topology, x, spread, bias.repeat_interleave(2)[::2], dy)


@pytest.mark.parametrize("unit", ["1 tap", (2, 1)], ids=str)
def test_single_weights_follow_a_mask_that_changes_in_place(unit):
    geometry = ConvGeometry((3, 3), (2, 2), (1, 1))
    for case in (SAME, geometry):  # one topology may serve several
        topology, *operands = _case(2, 9, 9, 12, 10, unit, case, torch.float32)
        _assert_right(case, topology, *operands)
        topology.update_(topology.mask().logical_not())
        _assert_right(case, topology, *operands)


def test_masks_made_in_inference_mode_are_ordered_at_each_call():
    with torch.inference_mode():
        _assert_right(SAME, *_case(2, 6, 6, 9, 10, "1 tap", SAME, torch.float32))


def test_taps_too_far_apart_for_fine_units_are_refused_by_name():
    far, cpu = ConvGeometry((2, 2), padding=(200, 200), dilation=(200, 200)), torch.device("cpu")
    topologies = {unit: _case(1, 8, 8, 2, 2, unit, far, torch.float32)[0] for unit in (16, 4)}
    assert native.BACKEND.conv_unsupported(cpu, torch.float32, topologies[16], far) is None
    reason = native.BACKEND.conv_unsupported(cpu, torch.float32, topologies[4], far)
    assert reason == "needs taps within 20000 pixels for units finer than 16, got 40401"
