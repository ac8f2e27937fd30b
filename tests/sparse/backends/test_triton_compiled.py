"""Every Triton kernel compiled for GPUs that are not here: it uses matrix units, spills nothing, fits their memory."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from helpers import triton_installed
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.triton._requirements import BLOCK_SIZES, UNIT_LENGTHS
from lightning_estdgm.sparse.backends.triton._tiles import Tiles, candidates, unit_candidates

if not triton_installed.is_installed():
    pytest.skip(triton_installed.REASON, allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lightning_estdgm.sparse.backends.triton import _conv as conv
from lightning_estdgm.sparse.backends.triton import _linear as linear
from lightning_estdgm.sparse.backends.triton import _units as units
from lightning_estdgm.sparse.backends.triton._conv_grad_weight import conv_grad_weight

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# target, shared memory of one program in bytes, products on matrix units
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024, r"\bmma\.sync"),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024, r"\bwgmma\.mma_async"),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 64 * 1024, r"\bv_mfma_"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024, r"\bv_mfma_"),
}


class _Driver:
    """What Triton asks of a device before it compiles."""

    def __init__(self, name):
        self._name = name

    def get_current_target(self):
        return TARGETS[self._name][0]

    def get_current_device(self):
        return self._name

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compile_for(monkeypatch):
    """Makes launches compile for a target instead of running; returns what they compiled: [(kernel's name, kernel)]."""

    def prepare(name):
        compiled = []
        run = JITFunction.run

        def compile_only(self, *args, grid, warmup, **kwargs):
            compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

        monkeypatch.setattr(JITFunction, "run", compile_only)
        monkeypatch.setattr(driver, "_active", _Driver(name))
        return compiled

    return prepare


def _cases(name):
    """(dtype, precision, block size, tiles, products): all tiles and dtypes that this device could be given."""
    _, shared, _ = TARGETS[name]
    amd = name.startswith("gfx")
    for i, block_size in enumerate(BLOCK_SIZES):
        # float16 and bfloat16 compile alike: each block size takes one, and another target the other.
        narrow = (torch.float16, torch.bfloat16)[(i + list(TARGETS).index(name)) % 2]
        kinds = [(narrow, "ieee"), (torch.float32, "ieee")]
        if name != "gfx90a":
            kinds.append((torch.float32, "tf32"))
        for dtype, precision in kinds:
            exact = dtype == torch.float32 and precision == "ieee"
            found = candidates(block_size, dtype.itemsize, amd=amd, exact_float32=exact, shared_bytes=shared)
            for at, tiles in enumerate(found):
                products = {"grad_weight"}
                products |= {"linear", "grad_input"} if len(found) == 1 else {("linear", "grad_input")[at % 2]}
                yield dtype, precision, block_size, tiles, products


def _launch(product, dtype, precision, block_size, tiles):
    topology = BlockTopology.from_mask(torch.ones(4, 16, dtype=torch.bool), block_size)
    out, features = topology.shape
    # With many tokens the weight gradient may be split, and the second stage is compiled too: once per block size.
    tokens = 256 if dtype == torch.float32 else 1024
    x, dy, weight = (torch.empty(shape, dtype=dtype) for shape in ((tokens, features), (tokens, out), (out, features)))
    if product == "linear":
        linear.linear(x, weight, x.new_empty(out), topology, tiles, precision=precision)
    elif product == "grad_input":
        linear.linear(dy, weight.t(), None, topology.transpose(), tiles, precision=precision)
    else:
        linear.grad_weight(dy, x, topology, tiles, precision=precision)


def _conv_cases(name):
    """As above, for convolutions: not every block size in every dtype."""
    for dtype, precision, block_size, tiles, products in _cases(name):
        if dtype != torch.float32 and block_size != 32:
            yield dtype, precision, block_size, tiles, products
        elif dtype == torch.float32 and block_size == 32:
            yield dtype, precision, block_size, tiles, products - {"grad_weight"}
        elif dtype == torch.float32 and block_size == 128:
            yield dtype, precision, block_size, tiles, {"grad_weight"}


def _launch_conv(product, dtype, precision, block_size, tiles):
    topology = BlockTopology.from_mask(torch.ones(4, 16, dtype=torch.bool), block_size)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1))
    out, channels = topology.shape
    number = 1 if dtype == torch.float32 else 4  # then the pixels may be split, as above
    x, dy, weight = (
        torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        for shape in ((number, channels, 16, 16), (number, out, 16, 16), (out, channels, 3, 3))
    )
    if product == "linear":
        conv.conv(x, weight, x.new_empty(out), topology, geometry, tiles, precision=precision)
    elif product == "grad_input":
        conv.conv_grad_input(dy, weight, (16, 16), topology, geometry, tiles, precision=precision)
    else:
        conv_grad_weight(dy, x, topology, geometry, tiles, precision=precision)


def _unit_cases(name):
    """As above, for units of several outputs: not every cut in every dtype, and other dtypes on the next target."""
    _, shared, _ = TARGETS[name]
    at_target = list(TARGETS).index(name)
    for i, length in enumerate(UNIT_LENGTHS):
        narrow = (torch.float16, torch.bfloat16)[(i + at_target) % 2]
        wide = "tf32" if name != "gfx90a" and (i + at_target) % 2 else "ieee"
        for dtype, precision in ((narrow, "ieee"), (torch.float32, wide)):
            exact = dtype == torch.float32 and precision == "ieee"
            for in_groups, products in ((False, {"linear", "grad_weight"}), (True, {"grad_input"})):
                found = unit_candidates(
                    length,
                    dtype.itemsize,
                    in_groups=in_groups,
                    amd=name.startswith("gfx"),
                    exact_float32=exact,
                    shared_bytes=shared,
                )
                for tiles in found if dtype == narrow else found[:1]:
                    yield dtype, precision, length, tiles, products


def _launch_units(product, dtype, precision, length, tiles):
    topology = BlockTopology.from_mask(torch.ones(128 // length, 150, dtype=torch.bool), (length, 1))
    out, features = topology.shape
    tokens = 1000  # no whole number of tiles, and enough that the weight gradient may be split
    x, dy, weight = (torch.empty(shape, dtype=dtype) for shape in ((tokens, features), (tokens, out), (out, features)))
    if product == "linear":
        units.linear(x, weight, x.new_empty(out), topology, tiles, precision=precision)
    elif product == "grad_input":
        units.linear(dy, weight.t(), None, topology.transpose(), tiles, precision=precision)
    else:
        units.grad_weight(dy, x, topology, tiles, precision=precision)


def _spilled_bytes(kernel, folder):
    """Bytes of registers kept in memory, per thread."""
    if "amdgcn" in kernel.asm:
        found = re.findall(r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size):\s+(\d+)", kernel.asm["amdgcn"])
        assert len(found) == 3
        return sum(map(int, found))
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    return sum(map(int, found.groups()))


def _text(kernel):
    return kernel.asm["amdgcn"] if "amdgcn" in kernel.asm else kernel.asm["ptx"]


# cases, their launch, kernels that multiply, and others
LAYERS = {
    "linear": (_cases, _launch, {"_linear_kernel", "_grad_weight_kernel"}, set()),
    "conv": (_conv_cases, _launch_conv, {"_conv_kernel", "_conv_grad_weight_kernel"}, set()),
    "units": (
        _unit_cases,
        _launch_units,
        {"_gather_kernel", "_linear_kernel", "_grad_weight_kernel"},
        {"_pack_kernel", "_mark_kernel"},
    ),
}
# Exact float32 has no matrix units on NVIDIA. ptxas holds its registers down so that more programs fit: that may cost
# an address or two.
SPILL_OF_EXACT_CONV = 32


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_use_matrix_units_and_do_not_spill(name, layer, compile_for, tmp_path):
    compiled = compile_for(name)
    cases, launch, multiplying, others = LAYERS[layer]
    _, shared, matrix_units = TARGETS[name]
    seen = set()
    for dtype, precision, block_size, tiles, products in cases(name):
        for product in sorted(products):
            compiled.clear()
            launch(product, dtype, precision, block_size, tiles)
            for function, kernel in compiled:
                case = f"{function} of {product}, {name}, {dtype}, {precision}, block {block_size}, {tiles}"
                seen.add(function)
                exact_on_nvidia = name.startswith("sm") and (dtype, precision) == (torch.float32, "ieee")
                allowed = SPILL_OF_EXACT_CONV if exact_on_nvidia and layer == "conv" else 0
                assert _spilled_bytes(kernel, tmp_path) <= allowed, case
                assert kernel.metadata.shared <= shared, case
                multiplies = function in multiplying
                assert bool(re.search(matrix_units, _text(kernel))) == (multiplies and not exact_on_nvidia), case
    assert seen == multiplying | others | {"_sum_parts_kernel"}


@pytest.mark.parametrize("name", ["sm_80", "gfx942"])
def test_a_spill_is_seen(name, compile_for, tmp_path):
    compiled = compile_for(name)
    _launch("linear", torch.bfloat16, "ieee", 128, Tiles(256, 16, 1, 2))  # the tile alone needs twice the registers
    ((_, kernel),) = compiled
    assert _spilled_bytes(kernel, tmp_path) > 0
