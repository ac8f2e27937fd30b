"""The compiled convolutions: their loops at real sizes, for each kind of processor that they are built for."""

import pytest
import torch
from test_native import target  # noqa: F401

from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends import native
from lightning_estdgm.sparse.backends._protocol import get_backend

DTYPES = [torch.float32, torch.bfloat16]
SAME = ConvGeometry((3, 3), padding=(1, 1))


def _case(batch, height, width, rows, cols, block_size, geometry, dtype):
    generator = torch.Generator().manual_seed(height + block_size)

    def normal(*shape):
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    mask = torch.rand(rows, cols, generator=generator) < 0.4
    mask[0], mask[:, 0] = False, False  # a block row and a column without anything
    mask[-1] = True
    out, features = rows * block_size, cols * block_size
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
