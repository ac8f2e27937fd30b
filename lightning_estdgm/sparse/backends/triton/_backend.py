"""The backend that launches the Triton kernels: which cut of the work, in which precision."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_estdgm.method._masks import size_words
from lightning_estdgm.sparse._buckets import bucket_of
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.triton._requirements import (
    BLOCK_SIZES,
    DTYPES,
    MAX_TAPS,
    UNIT_LENGTHS,
    device_refusal,
)
from lightning_estdgm.sparse.backends.triton._tiles import Tiles, Tuner, candidates, unit_candidates

Seconds = Callable[[Callable[[], object]], float]


def _of(module: str) -> ModuleType:
    """A module of this package that imports Triton."""
    return importlib.import_module(f"lightning_estdgm.sparse.backends.triton._{module}")


def _precision(device: torch.device) -> str:
    """Precision of float32 products: as torch's own are set to, where the device can."""
    matmul = torch.backends.cuda.matmul
    # torch >= 2.9 has fp32_precision; once that was set, reading allow_tf32 raises.
    wanted = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    amd_without = device.type == "cuda" and torch.version.hip is not None and not _is_gfx942(device)
    return "tf32" if wanted and not amd_without else "ieee"


def _is_gfx942(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")


@functools.cache
def _candidates(
    device: torch.device, sides: tuple[int, int], itemsize: int, precision: str, in_groups: bool
) -> tuple[Tiles, ...]:
    amd = torch.version.hip is not None
    shared = 2**16  # of every AMD GPU up to the MI300
    if device.type == "cpu":
        shared = 2**18
    elif not amd:
        shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", shared)
    exact = itemsize == 4 and precision == "ieee"
    if min(sides) > 1:
        return candidates(sides[0], itemsize, amd=amd, exact_float32=exact, shared_bytes=shared)
    return unit_candidates(max(sides), itemsize, in_groups=in_groups, amd=amd, exact_float32=exact, shared_bytes=shared)


def _device_seconds(run: Callable[[], object], calls: int = 5, rounds: int = 3) -> float:
    """Seconds of one call on the current device: the fastest of several rounds, after one call to compile."""
    run()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / calls)
    return min(times)


class TritonBackend:
    """One kernel for ``Y`` and ``dX`` and one for ``dW``, on active blocks of the dense weight, in place.

    So for linear layers and for convolutions, whose pixels are read where they lie in channels-last memory.

    Units of 8 to 32 outputs of one input have the same products in linear layers, over copies of what they gather.

    Sums are in float32, in an order that depends on the shapes and the cut of the work alone. Which cut is fastest is
    timed on the first call of a shape, dtype, block size and density (rounded up by `bucket_of`, so that a moving
    density is timed a few times); never while a CUDA graph is captured and never under
    ``torch.use_deterministic_algorithms(True)``, where an untimed default serves. The density is read from the device
    once after each change of a mask, and otherwise nothing waits for the device.

    Args:
        seconds: Clock of a call, in seconds. By default events of the device, and on the CPU nothing is timed.
    """

    name = "triton"
    remark = "triton's kernels were never timed on a GPU before their release"

    def __init__(self, seconds: Seconds | None = None) -> None:
        self._seconds = seconds
        self._tuner: Tuner | None = None
        # first tensor of a topology -> its version counter when the density was read, density bucket
        self._buckets = WeakTensorKeyDictionary()

    def unsupported(self, device: torch.device, dtype: torch.dtype, topology: BlockTopology) -> str | None:
        """Reason why a case cannot be run, or None."""
        if dtype not in DTYPES:
            return f"needs float16, bfloat16 or float32, got {dtype}"
        if topology.block_size not in BLOCK_SIZES and not _is_fine(topology):
            return (
                "needs blocks of 16, 32, 64 or 128, or units of 8, 16 or 32 outputs that share an input, "
                f"got {size_words(topology.block_size)}"
            )
        return device_refusal(device)

    def linear(self, x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology) -> Tensor:
        """``Y = X (W * M)^T + bias``: ``[T, in] -> [T, out]``."""
        return self._product("linear", x2d, weight, bias, topology)

    def grad_input(self, dy2d: Tensor, weight: Tensor, topology: BlockTopology) -> Tensor:
        """``dX = dY (W * M)``: ``[T, out] -> [T, in]``."""
        return self._product("grad_input", dy2d, weight.t(), None, topology.transpose())

    def grad_weight(self, dy2d: Tensor, x2d: Tensor, topology: BlockTopology) -> Tensor:
        """``dW = (dY^T X) * M``: ``[T, out], [T, in] -> (out, in)``."""
        if x2d.shape[0] == 0:
            return x2d.new_zeros(topology.shape)
        if _as_float32(x2d):
            return self.grad_weight(dy2d.float(), x2d.float(), topology).to(x2d.dtype)
        precision = _precision(x2d.device)

        def run(tiles: Tiles) -> Tensor:
            return _kernels(topology).grad_weight(dy2d, x2d, topology, tiles, precision=precision)

        layout = (dy2d.stride(1) == 1, x2d.stride(1) == 1)
        return run(self._tiles("grad_weight", x2d.shape[0], x2d, topology, precision, layout, run))

    def conv_unsupported(
        self, device: torch.device, dtype: torch.dtype, topology: BlockTopology, geometry: ConvGeometry
    ) -> str | None:
        """Reason why a convolution cannot be run, or None."""
        if max(geometry.kernel_size) > MAX_TAPS:
            return f"needs kernels of at most {MAX_TAPS} taps a side, got {geometry.kernel_size}"
        if topology.block_size not in BLOCK_SIZES:
            return f"needs blocks of 16, 32, 64 or 128, got {size_words(topology.block_size)}"
        return self.unsupported(device, dtype, topology)

    def conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """``Y = conv2d(X, W * M) + bias``: ``[N, in, H, W] -> [N, out, H', W']``."""
        size = geometry.output_size(*x.shape[2:])
        if x.shape[0] == 0:
            return _no_images(x, topology.shape[0], size)
        if _as_float32(x):
            wide = None if bias is None else bias.float()
            return self.conv(x.float(), weight.float(), wide, topology, geometry).to(x.dtype)
        precision = _precision(x.device)

        def run(tiles: Tiles) -> Tensor:
            return _of("conv").conv(x, weight, bias, topology, geometry, tiles, precision=precision)

        rows = x.shape[0] * size[0] * size[1]
        return run(self._tiles("conv", rows, x, topology, precision, (geometry, _layout(weight)), run))

    def conv_grad_input(
        self, dy: Tensor, weight: Tensor, size: tuple[int, int], topology: BlockTopology, geometry: ConvGeometry
    ) -> Tensor:
        """Gradient of the input: ``[N, out, H', W'] -> [N, in, *size]``."""
        if dy.shape[0] == 0:
            return _no_images(dy, topology.shape[1], size)
        if _as_float32(dy):
            return self.conv_grad_input(dy.float(), weight.float(), size, topology, geometry).to(dy.dtype)
        precision = _precision(dy.device)

        def run(tiles: Tiles) -> Tensor:
            return _of("conv").conv_grad_input(dy, weight, size, topology, geometry, tiles, precision=precision)

        rows = dy.shape[0] * size[0] * size[1]
        transposed = topology.transpose()
        return run(self._tiles("conv_grad_input", rows, dy, transposed, precision, (geometry, _layout(weight)), run))

    def conv_grad_weight(self, dy: Tensor, x: Tensor, topology: BlockTopology, geometry: ConvGeometry) -> Tensor:
        """Gradient of the weight, ``(out, in, kh, kw)``, 0 in inactive blocks."""
        if x.shape[0] == 0:
            return x.new_zeros(*topology.shape, *geometry.kernel_size)
        if _as_float32(x):
            return self.conv_grad_weight(dy.float(), x.float(), topology, geometry).to(x.dtype)
        precision = _precision(x.device)

        def run(tiles: Tiles) -> Tensor:
            return _of("conv_grad_weight").conv_grad_weight(dy, x, topology, geometry, tiles, precision=precision)

        rows = dy.shape[0] * dy.shape[2] * dy.shape[3]
        return run(self._tiles("conv_grad_weight", rows, x, topology, precision, geometry, run))

    def _product(
        self, product: str, x2d: Tensor, weight: Tensor, bias: Tensor | None, topology: BlockTopology
    ) -> Tensor:
        if x2d.shape[0] == 0:
            return x2d.new_empty(0, topology.shape[0])
        if _as_float32(x2d):
            wide = None if bias is None else bias.float()
            return self._product(product, x2d.float(), weight.float(), wide, topology).to(x2d.dtype)
        precision = _precision(x2d.device)

        def run(tiles: Tiles) -> Tensor:
            return _kernels(topology).linear(x2d, weight, bias, topology, tiles, precision=precision)

        layout = (x2d.stride(1) == 1, weight.stride(1) == 1)
        return run(self._tiles(product, x2d.shape[0], x2d, topology, precision, layout, run))

    def _tiles(
        self,
        product: str,
        rows: int,
        x: Tensor,
        topology: BlockTopology,
        precision: str,
        case: Hashable,
        run: Callable[[Tiles], Tensor],
    ) -> Tiles:
        """The cut for a product on ``rows`` tokens or pixels; ``case``: what else its time depends on."""
        in_groups = product != "grad_weight" and topology.sides[0] == 1
        found = _candidates(x.device, topology.sides, x.element_size(), precision, in_groups)
        if len(found) == 1 or torch.are_deterministic_algorithms_enabled():
            return found[0]
        if self._tuner is None:
            self._tuner = Tuner(_of("launch").TOO_BIG)
        seconds = self._seconds_on(x.device)
        size = (rows - 1).bit_length()  # the last batch of an epoch is not timed again
        bucket = self._bucket(topology, may_wait=seconds is not None)
        key = (product, size, *topology.shape, topology.block_size, x.dtype, x.device, precision, case, bucket)
        return self._tuner.best(key, found, run, seconds)

    def _seconds_on(self, device: torch.device) -> Seconds | None:
        if self._seconds is not None:
            return self._seconds
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        return _device_seconds

    def _bucket(self, topology: BlockTopology, *, may_wait: bool) -> int | None:
        """Rounded density, read from the device at the first call after a change of the mask."""
        lists = topology.row_ptr
        if lists.is_inference():  # these do not count their changes
            return None
        version, bucket = self._buckets.get(lists, (None, None))
        if may_wait and version != lists._version:
            bucket = bucket_of(topology.density)
            self._buckets[lists] = (lists._version, bucket)
        return bucket


def _is_fine(topology: BlockTopology) -> bool:
    length, single = sorted(topology.sides, reverse=True)
    return single == 1 and length in UNIT_LENGTHS


def _kernels(topology: BlockTopology) -> ModuleType:
    return _of("units" if _is_fine(topology) else "linear")


def _as_float32(operand: Tensor) -> bool:
    # Triton's interpreter holds bfloat16 as integers, multiplies those, and truncates where the device rounds.
    return operand.dtype == torch.bfloat16 and _of("launch").INTERPRETED


def _no_images(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    return like.new_empty(0, *size, channels).permute(0, 3, 1, 2)


def _layout(weight: Tensor) -> tuple[bool, bool]:
    """Whether neighbouring output, and input, channels are neighbours in memory."""
    return weight.stride(0) == 1, weight.stride(1) == 1


BACKEND = TritonBackend()
