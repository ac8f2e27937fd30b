"""Triton kernels in the interpreter. test_triton_interpreted.py runs this, with TRITON_INTERPRET set from the start."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.reference import BACKEND as REFERENCE
from lightning_estdgm.sparse.backends.triton import _launch as launch
from lightning_estdgm.sparse.backends.triton import _linear as linear
from lightning_estdgm.sparse.backends.triton import _split_k as split_k
from lightning_estdgm.sparse.backends.triton._backend import TritonBackend
from lightning_estdgm.sparse.backends.triton._requirements import BLOCK_SIZES
from lightning_estdgm.sparse.backends.triton._tiles import Tiles, candidates

TOLERANCES = {  # as in helpers/sparse_linear.py: one rounding to the dtype, and the float32 sum before it
    torch.float32: {"rtol": 1e-5, "atol": 5e-5},
    torch.float16: {"rtol": 2**-11, "atol": 5e-5},
}


def _topology(rows=3, cols=5, block_size=16, density=0.5, seed=0):
    """Random, but for one empty block row and one empty block column."""
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density
    mask[rows // 2] = False
    mask[:, cols // 2] = False
    return BlockTopology.from_mask(mask, block_size)


def _operands(topology, tokens, dtype=torch.float32, seed=1):
    """x, weight (NaN where inactive), bias, dy."""
    generator = torch.Generator().manual_seed(seed)
    out, features = topology.shape
    shapes = ((tokens, features), (out, features), (out,), (tokens, out))
    x, weight, bias, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight.masked_fill(~topology.weight_mask(), float("nan")), bias, dy


def _expected(x, weight, bias, dy, topology):
    x, weight, bias, dy = (t.double() for t in (x, weight, bias, dy))
    return {
        "linear": REFERENCE.linear(x, weight, bias, topology),
        "grad_input": REFERENCE.grad_input(dy, weight, topology),
        "grad_weight": REFERENCE.grad_weight(dy, x, topology),
    }


def _products(x, weight, bias, dy, topology, tiles):
    return {
        "linear": linear.linear(x, weight, bias, topology, tiles, precision="ieee"),
        "grad_input": linear.linear(dy, weight.t(), None, topology.transpose(), tiles, precision="ieee"),
        "grad_weight": linear.grad_weight(dy, x, topology, tiles, precision="ieee"),
    }


def _assert_right(operands, topology, tiles):
    got, expected = _products(*operands, topology, tiles), _expected(*operands, topology)
    for name, right in expected.items():
        assert got[name].dtype == operands[0].dtype
        torch.testing.assert_close(
            got[name].double(), right, **TOLERANCES[operands[0].dtype], msg=lambda m, at=name: f"{at}, {tiles}: {m}"
        )
    assert not got["grad_weight"][~topology.weight_mask()].any()


def _all_tiles(block_size, itemsize):
    cases = itertools.product((False, True), (False, True), (2**15, 2**18))
    found = [
        candidates(block_size, itemsize, amd=amd, exact_float32=exact, shared_bytes=shared)
        for amd, exact, shared in cases
    ]
    return sorted(set(itertools.chain(*found)), key=lambda tiles: (tiles.rows, tiles.depth, tiles.warps, tiles.stages))


def test_kernels_are_interpreted_here():
    assert launch.INTERPRETED


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_tile_computes_what_the_reference_does(block_size, dtype):
    topology = _topology(block_size=block_size)
    operands = _operands(topology, 150, dtype)  # the last tile of tokens is ragged, whether of 128 or 256
    shapes = {(tiles.rows, tiles.depth): tiles for tiles in _all_tiles(block_size, dtype.itemsize)}
    for tiles in shapes.values():
        _assert_right(operands, topology, tiles)


@pytest.mark.parametrize("tokens", [1, 128, 129, 600])
def test_any_number_of_tokens(tokens, monkeypatch):
    monkeypatch.setattr(launch, "SWIZZLE", 2)  # of 600 tokens two tiles, then two, then one share a sweep
    _assert_right(_operands(_topology(), tokens), _topology(), Tiles(128, 32, 4, 2))


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_any_density(density):
    topology = _topology(4, 9, density=density)
    _assert_right(_operands(topology, 20), topology, Tiles(128, 64, 4, 2))


def test_transposed_and_strided_operands():
    topology = _topology()
    x, weight, bias, dy = _operands(topology, 40)
    odd = [torch.zeros(2 * t.shape[0], 3 * t.shape[1])[::2, ::3].copy_(t) for t in (x, weight, dy)]
    for a, w, d in ((x.t().contiguous().t(), weight.t().contiguous().t(), dy.t().contiguous().t()), odd):
        _assert_right((a, w, torch.stack((bias, bias), 1)[:, 0], d), topology, Tiles(128, 32, 4, 2))


@pytest.mark.parametrize("block_size", [16, 64])
def test_activations_that_no_active_block_reads_reach_nothing(block_size):
    mask = torch.tensor([[False, True, False], [False, False, True], [False, True, True]])
    topology = BlockTopology.from_mask(mask, block_size)
    x, weight, bias, dy = _operands(topology, 20)
    x[:, :block_size] = float("nan")  # block column 0 is never active
    tiles = Tiles(128, 64, 4, 2)
    assert linear.linear(x, weight, bias, topology, tiles, precision="ieee").isfinite().all()
    dw = linear.grad_weight(dy, x, topology, tiles, precision="ieee")
    assert dw.isfinite().all()
    assert dw.any()


def test_a_mask_changed_in_place_is_followed():
    topology = _topology(seed=0)
    other = _topology(seed=5)
    assert not torch.equal(topology.mask(), other.mask())
    topology.update_(other.mask())
    _assert_right(_operands(other, 30), topology, Tiles(128, 32, 4, 2))


def test_results_are_bitwise_repeatable_and_never_read_a_count_on_the_host(monkeypatch):
    topology = _topology()
    operands = _operands(topology, 100)
    monkeypatch.setattr(split_k, "MIN_STEPS", 1)
    monkeypatch.setattr(BlockTopology, "nnz", property(lambda self: pytest.fail("waits for the device")))
    first, second = (_products(*operands, topology, Tiles(128, 16, 4, 2)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------- gradient of the weight


@triton.jit
def _splits_kernel(out, items, steps, programs, MIN_STEPS: tl.constexpr, MAX_SPLITS: tl.constexpr, WAVES: tl.constexpr):
    tl.store(out, split_k.split_count(items, steps, programs, MIN_STEPS, MAX_SPLITS, WAVES))


@pytest.mark.parametrize(
    ("items", "steps", "splits"),
    [
        (1024, 128, 1),  # enough work: 8 waves
        (132, 128, 1),  # one wave, all busy
        (128, 128, 1),  # 97 % busy
        (66, 128, 2),  # half would idle
        (102, 128, 1),  # halves would take two waves, as long as one of wholes
        (1, 128, 15),
        (1, 16, 2),  # at least MIN_STEPS steps each
        (1, 15, 1),
        (0, 128, 1),
    ],
)
def test_the_weight_gradient_is_split_where_programs_would_idle(items, steps, splits):
    out = torch.zeros(1, dtype=torch.int32)
    _splits_kernel[(1,)](out, items, steps, 132, split_k.MIN_STEPS, split_k.MAX_SPLITS, split_k.WAVES)
    assert int(out) == splits


@pytest.mark.parametrize(("block_size", "multiprocessors"), [(16, 1), (16, 5), (128, 1), (128, 12)])
def test_split_sums_equal_the_reference(block_size, multiprocessors, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(split_k, "MIN_STEPS", 1)
    topology = _topology(block_size=block_size, density=0.3)
    tiles = Tiles(128, 64, 4, 2)
    x, weight, bias, dy = _operands(topology, 300)
    dw = linear.grad_weight(dy, x, topology, tiles, precision="ieee")
    expected = _expected(x, weight, bias, dy, topology)["grad_weight"]
    torch.testing.assert_close(dw.double(), expected, rtol=1e-5, atol=2e-4)


@triton.jit
def _blocks_kernel(out, row_ptr, col_idx, block_rows, JOIN: tl.constexpr, CHUNK: tl.constexpr):
    unit = tl.program_id(0)
    row, first, stop = split_k.unit_blocks(row_ptr, block_rows, unit, JOIN, CHUNK)
    _, _, total = split_k.units_before(row_ptr, block_rows, unit, JOIN, CHUNK)
    tl.store(out + unit * 4, row)
    tl.store(out + unit * 4 + 1, first)
    tl.store(out + unit * 4 + 2, stop)
    tl.store(out + unit * 4 + 3, total)


@pytest.mark.parametrize("join", [1, 2, 8])
@pytest.mark.parametrize("chunk", [2, 16])
@pytest.mark.parametrize("seed", range(2))
def test_units_cover_every_active_block_once(join, chunk, seed):
    topology = _topology(5, 4, seed=seed)
    ptr = topology.row_ptr.tolist()
    expected = [
        (row, first, min(first + join, ptr[row + 1]))
        for row in range(5)
        for first in range(ptr[row], ptr[row + 1], join)
    ]
    out = torch.zeros(len(expected), 4, dtype=torch.int32)
    _blocks_kernel[(len(expected),)](out, topology.row_ptr, topology.col_idx, 5, join, chunk)
    assert out.tolist() == [[*blocks, len(expected)] for blocks in expected]


# ------------------------------------------------------------------------------------------------------------ tuning


class _Clock:
    """Says that each candidate is faster than the one before; counts what it timed."""

    def __init__(self):
        self.timed = 0

    def __call__(self, run):
        run()
        self.timed += 1
        return 1.0 / self.timed


def _three(backend, topology, tokens):
    x, weight, bias, dy = _operands(topology, tokens, torch.float16)
    got = {
        "linear": backend.linear(x, weight, bias, topology),
        "grad_input": backend.grad_input(dy, weight, topology),
        "grad_weight": backend.grad_weight(dy, x, topology),
    }
    for name, right in _expected(x, weight, bias, dy, topology).items():
        torch.testing.assert_close(got[name].double(), right, **TOLERANCES[torch.float16])


def test_a_cyclic_schedule_is_timed_once_per_bucket_of_density():
    clock = _Clock()
    backend = TritonBackend(clock)
    topology = _topology(4, 8)

    def timed_by(mask, tokens=20):
        topology.update_(mask)
        before = clock.timed
        _three(backend, topology, tokens)
        return clock.timed - before

    def mask(active):
        return (torch.arange(32) < active).view(4, 8)

    candidates_each = 2
    assert timed_by(mask(8)) == 3 * candidates_each  # each product by itself
    assert timed_by(mask(16)) == 3 * candidates_each
    assert timed_by(mask(8).flip(0)) == 0  # another mask of a density that is known
    assert timed_by(mask(16).flip(0)) == 0
    assert timed_by(mask(15)) == 0  # rounded up to 16 of 32
    assert timed_by(mask(8), tokens=17) == 0  # a smaller last batch
    assert timed_by(mask(8), tokens=40) == 3 * candidates_each
    torch.use_deterministic_algorithms(True)
    try:
        assert timed_by(mask(4)) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert timed_by(mask(4)) == 3 * candidates_each


def test_the_density_is_read_once_per_mask(monkeypatch):
    reads = []
    density = BlockTopology.density
    monkeypatch.setattr(BlockTopology, "density", property(lambda self: reads.append(1) or density.fget(self)))
    backend = TritonBackend(_Clock())
    topology = _topology()
    for _ in range(3):
        _three(backend, topology, 10)
    assert len(reads) == 2  # the block rows' lists and, for the gradient of the input, the columns'
    topology.update_(_topology(seed=5).mask())
    for _ in range(3):
        _three(backend, topology, 10)
    assert len(reads) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_no_tokens(dtype):
    topology = _topology()
    x, weight, bias, dy = _operands(topology, 0, dtype)
    backend = TritonBackend()
    assert backend.linear(x, weight, bias, topology).shape == (0, 48)
    assert backend.grad_input(dy, weight, topology).shape == (0, 80)
    dw = backend.grad_weight(dy, x, topology)
    assert dw.shape == (48, 80)
    assert not dw.any()
    assert dw.dtype == dtype
