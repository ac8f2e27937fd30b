"""Convolutions on active blocks for tests: geometries, operands, and what torch computes of them."""

import torch
from torch.nn import functional as F

from lightning_estdgm.sparse._conv import masked_conv2d
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends._protocol import backends, conv_refusal

LAST, FIRST = torch.channels_last, torch.contiguous_format


# Error of a whole tensor over its norm: one rounding to the dtype, and sums of up to 1000 products in float32 or wider.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


THREE = ConvGeometry((3, 3), padding=(1, 1))


POINTS = ConvGeometry((1, 1))


def refusal(backend, device="cpu", dtype=torch.float32, block_size=16, geometry=THREE):
    return conv_refusal(backend, torch.device(device), dtype, make_topology(1, 1, block_size, device), geometry)


def make_topology(rows=2, cols=3, block_size=16, device="cpu", empty=False, taps=1) -> BlockTopology:
    """About half of the blocks, with a block row and a block column without any where `empty`.

    With `taps`, single weights that have a flag for each of so many taps.
    """
    cols *= taps
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(rows + cols)) < 0.6
    mask[0, 0] = True
    if empty:
        mask[0], mask[:, cols - 1] = False, False
    return BlockTopology.from_mask(mask.to(device), block_size)


def make_operands(topology, batch, height, width, geometry, dtype, seed=0, taps=1):
    """x, weight, bias, dy: values that the dtype holds exactly, in float64."""
    generator = torch.Generator().manual_seed(seed)
    out, features = topology.shape[0], topology.shape[1] // taps
    shapes = (
        (batch, features, height, width),
        (out, features, *geometry.kernel_size),
        (out,),
        (batch, out, *geometry.output_size(height, width)),
    )
    return [torch.randn(*s, generator=generator).to(dtype).double().to(topology.device) for s in shapes]


def kernel_mask(topology, weight=None):
    """Mask of the weights; of those of a `weight` that is given, where single weights have taps."""
    return topology.mask_over(topology.shape + (1, 1) if weight is None else weight.shape)


def by_torch(x, weight, bias, dy, topology, geometry, dense_grad=False, frozen=False):
    """y, dx, dw, dbias of torch's own convolution with a masked weight."""
    mask = kernel_mask(topology, weight)
    used = weight if frozen else weight * mask
    leaves = [t.detach().requires_grad_() for t in (x, used, bias)]
    y = F.conv2d(*leaves, geometry.stride, geometry.padding, geometry.dilation)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    return [y.detach(), dx, dw if dense_grad else dw * mask, db]


def run(x, weight, bias, dy, topology, geometry, **kwargs):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = masked_conv2d(*leaves, topology, geometry, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_close(got, expected, dtype, where=""):
    for name, mine, right in zip(("y", "dx", "dw", "dbias"), got, expected, strict=True):
        assert mine.shape == right.shape, (name, where)
        error, size = (mine.double() - right).norm().item(), right.norm().item()
        assert error <= TOLERANCES[dtype] * size, f"{name} is off by {error / size:.1e} of its norm: {where}"


ON_CPU = [name for name in sorted(backends()) if refusal(name) is None]
