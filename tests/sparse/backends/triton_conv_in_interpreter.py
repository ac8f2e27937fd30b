"""Triton convolutions in the interpreter. test_triton_interpreted.py runs this, with TRITON_INTERPRET set."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.triton import _conv as conv
from lightning_estdgm.sparse.backends.triton import _launch as launch
from lightning_estdgm.sparse.backends.triton import _split_k as split_k
from lightning_estdgm.sparse.backends.triton._backend import TritonBackend
from lightning_estdgm.sparse.backends.triton._conv_grad_weight import conv_grad_weight
from lightning_estdgm.sparse.backends.triton._requirements import BLOCK_SIZES
from lightning_estdgm.sparse.backends.triton._tiles import Tiles, candidates

TOLERANCES = {  # one rounding to the dtype, and before it the float32 sum
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.float16: {"rtol": 2**-11, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-4},
}
THREE = ConvGeometry((3, 3), (1, 1), (1, 1))
TWO = ConvGeometry((2, 1), (1, 2), (0, 1))
SMALL = Tiles(128, 64, 4, 2)


def _topology(rows=3, cols=3, block_size=16, density=0.7, seed=0):
    """Random, but for one empty block row and one empty block column."""
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    mask[rows // 2] = False
    mask[:, cols // 2] = False
    return BlockTopology.from_mask(mask, block_size)


def _operands(topology, geometry, image, dtype=torch.float32, seed=1):
    """x, weight (NaN where inactive), bias, dy; image: (number, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    number, height, width = image
    out, channels = topology.shape
    shapes = (
        (number, channels, height, width),
        (out, channels, *geometry.kernel_size),
        (out,),
        (number, out, *geometry.output_size(height, width)),
    )
    x, weight, bias, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    weight = weight.masked_fill(~topology.weight_mask()[:, :, None, None], float("nan"))
    return *(t.contiguous(memory_format=torch.channels_last) for t in (x, weight)), bias, _last(dy)


def _last(image):
    return image.contiguous(memory_format=torch.channels_last)


def _expected(x, weight, bias, dy, topology, geometry):
    """y, dx, dw of the library on a weight with zeros, in float64."""
    active = topology.weight_mask()[:, :, None, None]
    leaves = [x.double().requires_grad_(), torch.where(active, weight.double(), 0.0).requires_grad_()]
    y = F.conv2d(*leaves, bias.double(), geometry.stride, geometry.padding, geometry.dilation)
    dx, dw = torch.autograd.grad(y, leaves, dy.double())
    return {"y": y.detach(), "dx": dx, "dw": dw * active}


def _products(x, weight, bias, dy, topology, geometry, tiles):
    size = tuple(x.shape[2:])
    return {
        "y": conv.conv(x, weight, bias, topology, geometry, tiles, precision="ieee"),
        "dx": conv.conv_grad_input(dy, weight, size, topology, geometry, tiles, precision="ieee"),
        "dw": conv_grad_weight(dy, x, topology, geometry, tiles, precision="ieee"),
    }


def _assert_right(operands, topology, geometry, tiles):
    got = _products(*operands, topology, geometry, tiles)
    expected = _expected(*operands, topology, geometry)
    dtype = operands[0].dtype
    for name, right in expected.items():
        assert got[name].dtype == dtype
        assert got[name].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(
            got[name].double(), right, **TOLERANCES[dtype], msg=lambda m, at=name: f"{at}, {geometry}, {tiles}: {m}"
        )
    assert not got["dw"][~topology.weight_mask()].any()


@pytest.mark.parametrize(
    ("geometry", "image"),
    [
        (THREE, (2, 8, 9)),  # 144 pixels: a second tile, ragged
        (THREE, (1, 1, 1)),  # only the middle tap ever hits
        (ConvGeometry((3, 3), (2, 2), (1, 1)), (2, 9, 8)),
        (ConvGeometry((1, 1), (2, 2)), (3, 9, 8)),  # most of dX is never written
        (ConvGeometry((3, 3), (1, 1), (2, 2), (2, 2)), (1, 6, 7)),
        (ConvGeometry((4, 2), (3, 2), (0, 4), (2, 3)), (2, 11, 9)),
        (ConvGeometry((2, 2), (3, 3)), (2, 8, 8)),  # strides beyond the kernel, rows that nothing reads
        (ConvGeometry((3, 2), (4, 6), (3, 4), (2, 3)), (1, 13, 15)),  # strides and dilations with common factors
        (ConvGeometry((1, 3), (1, 1), (0, 5)), (1, 3, 4)),  # output pixels that see no input
        (ConvGeometry((1, 15), (1, 1), (0, 7)), (1, 2, 9)),  # as many taps as there may be
        (ConvGeometry((5, 5), (5, 5), (2, 2)), (1, 3, 4)),  # an image smaller than the stride
    ],
    ids=str,
)
def test_every_geometry(geometry, image):
    topology = _topology()
    _assert_right(_operands(topology, geometry, image), topology, geometry, SMALL)


def _all_tiles(block_size, itemsize):
    cases = itertools.product((False, True), (False, True), (2**15, 2**18))
    found = [
        candidates(block_size, itemsize, amd=amd, exact_float32=exact, shared_bytes=shared)
        for amd, exact, shared in cases
    ]
    return {(tiles.rows, tiles.depth): tiles for tiles in itertools.chain(*found)}.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_tile(block_size, dtype):
    topology = _topology(2, 3, block_size, density=1.0)
    operands = _operands(topology, TWO, (3, 6, 15), dtype)
    for tiles in _all_tiles(block_size, dtype.itemsize):
        _assert_right(operands, topology, TWO, tiles)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_any_density(density, monkeypatch):
    monkeypatch.setattr(launch, "SWIZZLE", 2)  # of five tiles two share a sweep, then two, then one
    topology = _topology(2, 7, density=density)
    _assert_right(_operands(topology, TWO, (4, 12, 24)), topology, TWO, SMALL)


@pytest.mark.parametrize("layout", ["default", "by output channels", "gaps"])
def test_a_weight_of_any_strides_and_images_in_default_memory(layout):
    topology = _topology()
    x, weight, bias, dy = _operands(topology, TWO, (2, 5, 6))
    if layout == "default":
        weight = weight.contiguous()
    elif layout == "by output channels":
        weight = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    else:
        weight = torch.zeros(96, 144, 4, 3)[::2, ::3, ::2, 1:2].copy_(weight)
    bias = torch.stack((bias, bias), 1)[:, 0]
    _assert_right((x.contiguous(), weight, bias, dy.contiguous()), topology, TWO, SMALL)


@pytest.mark.parametrize("block_size", [16, 64])
def test_channels_that_no_active_block_reads_reach_nothing(block_size):
    mask = torch.tensor([[False, True, False], [False, False, True], [False, True, True]])
    topology = BlockTopology.from_mask(mask, block_size)
    x, weight, bias, dy = _operands(topology, TWO, (1, 5, 6))
    x[:, :block_size] = float("nan")  # block column 0 is never active
    got = _products(x, weight, bias, dy, topology, TWO, SMALL)
    assert got["y"].isfinite().all()
    assert got["dw"].isfinite().all()
    assert got["dw"].any()


def test_a_mask_changed_in_place_is_followed():
    topology, other = _topology(seed=0), _topology(seed=5)
    assert not torch.equal(topology.mask(), other.mask())
    topology.update_(other.mask())
    _assert_right(_operands(other, TWO, (1, 5, 6)), topology, TWO, SMALL)


def test_results_are_bitwise_repeatable_and_never_read_a_count_on_the_host(monkeypatch):
    topology = _topology()
    operands = _operands(topology, TWO, (1, 7, 8))
    monkeypatch.setattr(split_k, "MIN_STEPS", 1)
    monkeypatch.setattr(BlockTopology, "nnz", property(lambda self: pytest.fail("waits for the device")))
    first, second = (_products(*operands, topology, TWO, Tiles(128, 16, 4, 2)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("block_size", "multiprocessors"), [(16, 1), (128, 12)])
@pytest.mark.parametrize("image", [(2, 9, 7), (40, 2, 3)], ids=["a step is less than an image", "and more"])
def test_split_sums_equal_the_reference(block_size, multiprocessors, image, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(split_k, "MIN_STEPS", 1)
    topology = _topology(2, 3, block_size, density=1.0)
    operands = _operands(topology, TWO, image)
    tiles = Tiles(128, 32, 4, 2)
    x, _, _, dy = operands
    assert split_k.deal(dy[:, 0].numel(), topology, tiles, x.device, 2).partial.shape[0] > 0
    dw = conv_grad_weight(dy, x, topology, TWO, tiles, precision="ieee")
    expected = _expected(*operands, topology, TWO)["dw"]
    torch.testing.assert_close(dw.double(), expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        (7, 3, 1, 1, 1),
        (8, 3, 2, 1, 1),
        (9, 1, 2, 0, 1),
        (20, 5, 4, 3, 2),
        (20, 4, 6, 4, 3),
        (3, 5, 5, 2, 1),
        (9, 3, 3, 0, 3),
    ],
)
def test_phases_pair_every_input_row_with_the_taps_that_meet_it(size, kernel, stride, padding, dilation):
    expected = {
        (stride * at - padding + dilation * tap, tap, at)
        for at in range(-50, 50)
        for tap in range(kernel)
        if 0 <= stride * at - padding + dilation * tap < size
    }
    got = [
        (row, tap, i + phase.first + j * phase.hop)
        for phase in conv.phases(size, kernel, stride, padding, dilation)
        for i, row in enumerate(range(phase.start, size, stride))
        for j, tap in enumerate(range(kernel)[phase.taps])
    ]
    assert len(got) == len(set(got))
    assert set(got) == expected


def test_more_pixels_than_an_index_counts_are_refused():
    x = torch.empty(2**15, 16, 256, 256, device="meta", memory_format=torch.channels_last)
    topology = BlockTopology.from_mask(torch.ones(1, 1, dtype=torch.bool), 16)
    weight = torch.empty(16, 16, 1, 1, device="meta")
    with pytest.raises(ValueError, match=r"needs fewer than 2\*\*31 pixels in a batch, got 2147483648"):
        conv.conv(x, weight, None, topology, ConvGeometry((1, 1)), SMALL, precision="ieee")
    with pytest.raises(ValueError, match="got 2147483648"):
        conv_grad_weight(x, x, topology, ConvGeometry((1, 1)), SMALL, precision="ieee")


# ----------------------------------------------------------------------------------------------------------- backend


def _by_backend(backend, x, weight, bias, dy, topology, geometry):
    return {
        "y": backend.conv(x, weight, bias, topology, geometry),
        "dx": backend.conv_grad_input(dy, weight, tuple(x.shape[2:]), topology, geometry),
        "dw": backend.conv_grad_weight(dy, x, topology, geometry),
    }


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("number", [0, 2])
def test_the_backend(dtype, number):
    topology, backend = _topology(), TritonBackend()
    assert backend.conv_unsupported(torch.device("cpu"), dtype, topology, TWO) is None
    operands = _operands(topology, TWO, (number, 5, 6), dtype)
    got = _by_backend(backend, *operands, topology, TWO)
    for name, right in _expected(*operands, topology, TWO).items():
        assert got[name].dtype == dtype
        torch.testing.assert_close(got[name].double(), right, **TOLERANCES[dtype])


def test_kernels_too_large_are_refused():
    device, topology = torch.device("cpu"), _topology()
    ask = TritonBackend().conv_unsupported
    assert ask(device, torch.float32, topology, ConvGeometry((1, 15))) is None
    assert ask(device, torch.float32, topology, ConvGeometry((1, 16))) == (
        "needs kernels of at most 15 taps a side, got (1, 16)"
    )
    assert ask(device, torch.float64, topology, ConvGeometry((1, 15))) == (
        "needs float16, bfloat16 or float32, got torch.float64"
    )


def test_each_product_and_geometry_is_timed_by_itself():
    timed = []

    def seconds(run):
        run()
        timed.append(1)
        return 1.0 / len(timed)

    topology, backend = _topology(), TritonBackend(seconds)

    def timed_by(geometry, image):
        del timed[:]
        _by_backend(backend, *_operands(topology, geometry, image, torch.float16), topology, geometry)
        return len(timed)

    candidates_each = 2
    assert timed_by(TWO, (1, 7, 7)) == 3 * candidates_each
    assert timed_by(TWO, (1, 6, 7)) == 0  # as many pixels to the next power of two
    assert timed_by(ConvGeometry((2, 1)), (1, 7, 7)) == 3 * candidates_each
    topology.update_(~topology.mask())  # another bucket of density
    assert timed_by(TWO, (1, 7, 7)) == 3 * candidates_each
