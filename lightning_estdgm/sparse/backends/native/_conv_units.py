"""Convolutions on units finer than a block by the compiled operator: pixels of several images are the vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.native._build import check, function
from lightning_estdgm.sparse.backends.native._kept import KeptWeight
from lightning_estdgm.sparse.backends.native._plans import Plans, Tap, index_lists, tap_array

SCATTERED = 4
"""Inputs of a unit of one output from which no plan is needed."""


def correlate_units(
    plans: Plans,
    image: Tensor,
    weight: Tensor,
    taps: Sequence[Tap],
    step: tuple[int, int],
    bias: Tensor | None,
    topology: BlockTopology,
    depth: int,
    which: Sequence[int],
    out: Tensor,
    kept: KeptWeight | None = None,
) -> None:
    """Fill ``out [N, out, H', W']``, channels adjacent, with what the taps see of ``image``; weight strides count.

    Args:
        plans: Orders of single weights, to look up or add to.
        image: ``[N, in, H, W]`` in channels-last memory.
        weight: ``(out, in, ...)`` as it acts here: swapped in the gradient of the input.
        taps: Taps that are used.
        step: Pixels of the image from one output pixel to the next.
        bias: ``[out]`` or None.
        topology: Units of the weight as it acts here; of single taps, as it is stored.
        depth: Columns of the topology for each input of the stored weight: 1, or all taps of the kernel.
        which: For units of single taps and the gradient of the input, indices of the taps in the kernel.
        out: What is filled.
        kept: The weight in the order of use, to fill or to read.

    """
    n, channels, height, width = image.shape
    rows, columns = topology.sides
    plan = plans.conv(topology, taps, depth, which) if rows == 1 and columns < SCATTERED else None
    check(
        function("units_conv", image.dtype)(
            image.data_ptr(),
            n,
            height,
            width,
            channels,
            weight.data_ptr(),
            *weight.stride()[:2],
            tap_array(taps),
            len(taps),
            *step,
            None if bias is None else bias.data_ptr(),
            *index_lists(topology),
            out.shape[1] // rows,
            channels // columns,
            rows,
            columns,
            None if plan is None else plan.address,
            out.data_ptr(),
            *out.shape[2:],
            out.stride(0),
            *out.stride()[2:],
            None if kept is None else kept.address,
            torch.get_num_threads(),
        )
    )


def units_grad_weight(
    dy: Tensor,
    x: Tensor,
    taps: Sequence[Tap],
    step: tuple[int, int],
    topology: BlockTopology,
    depth: int,
    grad: Tensor,
) -> None:
    """Fill ``grad (out, in, kh, kw)``, dense in memory of any order; `depth` as in `correlate_units`."""
    n, features, height, width = x.shape
    rows, columns = topology.sides
    check(
        function("units_conv_grad_weight", x.dtype)(
            dy.data_ptr(),
            *dy.shape[2:],
            x.data_ptr(),
            n,
            height,
            width,
            features,
            tap_array(taps),
            len(taps),
            *step,
            *index_lists(topology),
            topology.block_rows,
            features // columns,
            rows,
            columns,
            columns * len(taps) // depth,
            grad.data_ptr(),
            *grad.stride()[:2],
            torch.get_num_threads(),
        )
    )
