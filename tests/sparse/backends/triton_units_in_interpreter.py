"""Triton kernels of units of several outputs, in the interpreter: test_triton_interpreted.py runs this, told so."""

import itertools

import pytest
import torch

from helpers import triton_installed
from helpers.sparse_linear import TOLERANCES, make_operands
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.reference import BACKEND as REFERENCE
from lightning_estdgm.sparse.backends.triton._requirements import UNIT_LENGTHS

if not triton_installed.is_installed():
    pytest.skip(triton_installed.REASON, allow_module_level=True)

from lightning_estdgm.sparse.backends.triton import _launch as launch
from lightning_estdgm.sparse.backends.triton import _split_k as split_k
from lightning_estdgm.sparse.backends.triton import _units as units
from lightning_estdgm.sparse.backends.triton._backend import TritonBackend
from lightning_estdgm.sparse.backends.triton._tiles import GROUPS, unit_candidates

PRODUCTS = ("linear", "grad_input", "grad_weight")
ORIENTATIONS = pytest.mark.parametrize("of_one_output", [False, True], ids=["r x 1", "1 x r"])


def _topology(length=16, panels=3, inputs=37, density=0.3, of_one_output=False, seed=0):
    """Random, but for one empty panel and one input without units; the last group of inputs is never whole."""
    mask = torch.rand(panels, inputs, generator=torch.Generator().manual_seed(seed)) < density
    mask[panels // 2] = False
    mask[:, inputs // 2] = False
    return BlockTopology.from_mask(*((mask.t(), (1, length)) if of_one_output else (mask, (length, 1))))


def _operands(topology, tokens, dtype=torch.float32):
    """x, weight (NaN where inactive), bias, dy."""
    x, weight, bias, dy = (t.to(dtype) for t in make_operands(topology, tokens, dtype))
    return x, weight.masked_fill(~topology.weight_mask(), float("nan")), bias, dy


def _expected(x, weight, bias, dy, topology):
    x, weight, bias, dy = (t.double() for t in (x, weight, bias, dy))
    return (
        REFERENCE.linear(x, weight, bias, topology),
        REFERENCE.grad_input(dy, weight, topology),
        REFERENCE.grad_weight(dy, x, topology),
    )


def _cuts(length, dtype, in_groups, **changed):
    device = {"amd": False, "exact_float32": False, "shared_bytes": 2**18, **changed}
    return unit_candidates(length, dtype.itemsize, in_groups=in_groups, **device)


def _products(x, weight, bias, dy, topology, gathering, grouping):
    """The three products: `gathering` is the cut of those that gather inputs, `grouping` of those in groups."""
    of_y, of_dx = (grouping, gathering) if topology.sides[0] == 1 else (gathering, grouping)
    return (
        units.linear(x, weight, bias, topology, of_y, precision="ieee"),
        units.linear(dy, weight.t(), None, topology.transpose(), of_dx, precision="ieee"),
        units.grad_weight(dy, x, topology, gathering, precision="ieee"),
    )


def _assert_right(got, operands, topology):
    dtype = operands[0].dtype
    for name, mine, right in zip(PRODUCTS, got, _expected(*operands, topology), strict=True):
        assert mine.dtype == dtype
        assert mine.is_contiguous()
        # Sums of up to 600 products, where TOLERANCES thinks of 256.
        tolerance = {**TOLERANCES[dtype], "atol": 1e-4}
        torch.testing.assert_close(mine.double(), right, **tolerance, msg=lambda m, at=name: f"{at}: {m}")
    assert not got[2][~topology.weight_mask()].any()


def _check(topology, tokens, dtype=torch.float32):
    operands, length = _operands(topology, tokens, dtype), max(topology.sides)
    cuts = (_cuts(length, dtype, in_groups)[0] for in_groups in (False, True))
    _assert_right(_products(*operands, topology, *cuts), operands, topology)


@ORIENTATIONS
@pytest.mark.parametrize("length", UNIT_LENGTHS)
def test_every_cut_computes_what_the_reference_does(length, of_one_output):
    topology = _topology(length, inputs=150, of_one_output=of_one_output)
    operands = _operands(topology, 150)  # the last tile of tokens is ragged, whether of 128 or 256
    of_devices = [{"amd": amd, "exact_float32": exact} for amd, exact in itertools.product((False, True), repeat=2)]
    gathering, grouping = (
        {(t.rows, t.depth, t.columns): t for device in of_devices for t in _cuts(length, x.dtype, in_groups, **device)}
        for x, in_groups in ((operands[0], False), (operands[0], True))
    )
    for cuts in itertools.zip_longest(gathering.values(), grouping.values()):
        first = next(iter(gathering.values())), next(iter(grouping.values()))
        _assert_right(_products(*operands, topology, *map(_or, cuts, first)), operands, topology)


def _or(cut, default):
    return default if cut is None else cut


@ORIENTATIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", UNIT_LENGTHS)
def test_every_dtype_through_the_backend(length, dtype, of_one_output):
    topology = _topology(length, of_one_output=of_one_output)
    x, weight, bias, dy = operands = _operands(topology, 21, dtype)
    backend = TritonBackend()
    got = (
        backend.linear(x, weight, bias, topology),
        backend.grad_input(dy, weight, topology),
        backend.grad_weight(dy, x, topology),
    )
    _assert_right(got, operands, topology)


@ORIENTATIONS
@pytest.mark.parametrize("tokens", [1, 128, 129, 600])
def test_any_number_of_tokens(tokens, of_one_output, monkeypatch):
    monkeypatch.setattr(launch, "SWIZZLE", 2)  # of 600 tokens two tiles, then two, then one share a sweep
    _check(_topology(of_one_output=of_one_output), tokens)


@ORIENTATIONS
@pytest.mark.parametrize(("density", "inputs"), [(0.0, 9), (1.0, 9), (0.5, 1), (0.02, 300), (1.0, 256)])
def test_any_density_and_any_number_of_inputs(density, inputs, of_one_output):
    _check(_topology(8, inputs=inputs, density=density, of_one_output=of_one_output), 20)


def test_transposed_and_strided_operands():
    topology = _topology()
    x, weight, bias, dy = _operands(topology, 128)  # a whole tile: x that lies input by input is not copied
    odd = [torch.zeros(2 * t.shape[0], 3 * t.shape[1])[::2, ::3].copy_(t) for t in (x, weight, dy)]
    cuts = _cuts(16, x.dtype, False)[0], _cuts(16, x.dtype, True)[0]
    for a, w, d in ((x.t().contiguous().t(), weight.t().contiguous().t(), dy.t().contiguous().t()), odd):
        operands = a, w, torch.stack((bias, bias), 1)[:, 0], d
        _assert_right(_products(*operands, topology, *cuts), operands, topology)


def test_inputs_that_no_active_unit_reads_reach_nothing():
    topology = _topology()
    x, weight, bias, dy = _operands(topology, 20)
    x[:, topology.block_cols // 2] = float("nan")
    y, _, dw = _products(x, weight, bias, dy, topology, _cuts(16, x.dtype, False)[0], _cuts(16, x.dtype, True)[0])
    assert y.isfinite().all()
    assert dw.isfinite().all()
    assert dw.any()


@pytest.mark.parametrize("length", [8, 32])
@ORIENTATIONS
def test_split_sums_equal_the_reference(length, of_one_output, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)  # four programs for two units
    monkeypatch.setattr(split_k, "MIN_STEPS", 1)
    topology = _topology(length, of_one_output=of_one_output)
    x, _, _, dy = operands = _operands(topology, 300)
    right = _expected(*operands, topology)[2]
    for amd in (False, True):
        tiles = _cuts(length, x.dtype, False, amd=amd)[0]
        dw = units.grad_weight(dy, x, topology, tiles, precision="ieee")
        torch.testing.assert_close(dw.double(), right, rtol=1e-5, atol=2e-4)


def test_results_are_bitwise_repeatable_and_never_read_a_count_on_the_host(monkeypatch):
    topology = _topology()
    operands = _operands(topology, 100)
    monkeypatch.setattr(split_k, "MIN_STEPS", 1)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(units, "_groups", units.Groups())
    monkeypatch.setattr(BlockTopology, "nnz", property(lambda self: pytest.fail("waits for the device")))
    cuts = _cuts(16, torch.float32, False)[0], _cuts(16, torch.float32, True)[0]
    for first, second in zip(*(_products(*operands, topology, *cuts) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("inputs", [16, 37, 300])
def test_a_group_is_active_where_any_of_its_units_is(group, inputs):
    topology = _topology(8, panels=5, inputs=inputs, density=0.05)
    found = units.grouped(topology, group)
    assert found.sides == (8, group)
    padded = torch.nn.functional.pad(topology.mask(), (0, -inputs % group))
    assert torch.equal(found.mask(), padded.view(5, -1, group).any(-1))


def test_groups_are_made_once_a_mask_and_follow_it_in_place(monkeypatch):
    made = []
    grouped = units.grouped
    monkeypatch.setattr(units, "grouped", lambda *asked: made.append(asked) or grouped(*asked))
    topology = _topology()
    for _ in range(2):
        _check(topology, 10)
    assert len(made) == 1
    topology.update_(topology.mask().roll(1, 0))  # the empty panel is another one, so groups differ too
    for _ in range(2):
        _check(topology, 10)
    assert len(made) == 2


def test_groups_of_lists_that_count_no_changes_are_not_kept():
    with torch.inference_mode():
        topology = _topology()
        _check(topology, 10)
        topology.update_(topology.mask().roll(1, 0))
        _check(topology, 10)


@ORIENTATIONS
def test_no_tokens(of_one_output):
    topology = _topology(of_one_output=of_one_output)
    out, inputs = topology.shape
    x, weight, bias, dy = _operands(topology, 0)
    backend = TritonBackend()
    assert backend.linear(x, weight, bias, topology).shape == (0, out)
    assert backend.grad_input(dy, weight, topology).shape == (0, inputs)
    dw = backend.grad_weight(dy, x, topology)
    assert dw.shape == (out, inputs)
    assert not dw.any()
