"""BlockTopology: the index lists say what the mask says, whatever the mask."""

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_estdgm.sparse._topology import BlockTopology

TENSORS = ("row_ptr", "col_idx", "col_ptr", "row_idx")


@st.composite
def grids(draw: st.DrawFn, count: int = 1) -> list[torch.Tensor]:
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    cells = st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols)
    return [torch.tensor(draw(cells), dtype=torch.bool).view(rows, cols) for _ in range(count)]


block_sizes = st.sampled_from([1, 3, 16, 128, (4, 1), (2, 5)])


def lists(ptr: torch.Tensor, idx: torch.Tensor) -> list[list[int]]:
    bounds = ptr.tolist()
    return [idx[a:b].tolist() for a, b in itertools.pairwise(bounds)]


@given(grids(), block_sizes)
def test_the_lists_hold_the_active_blocks_of_each_row_and_column(grid, block_size):
    (mask,) = grid
    rows, cols = mask.shape
    topology = BlockTopology.from_mask(mask, block_size)
    assert lists(topology.row_ptr, topology.col_idx) == [[c for c in range(cols) if mask[r, c]] for r in range(rows)]
    assert lists(topology.col_ptr, topology.row_idx) == [[r for r in range(rows) if mask[r, c]] for c in range(cols)]
    assert topology.shape == (rows * topology.sides[0], cols * topology.sides[1])
    assert topology.nnz == int(mask.sum())
    assert topology.density == int(mask.sum()) / (rows * cols)


@given(grids(), block_sizes)
def test_mask_round_trip(grid, block_size):
    (mask,) = grid
    assert torch.equal(BlockTopology.from_mask(mask, block_size).mask(), mask)


@given(grids(), block_sizes)
def test_transpose_is_the_transposed_mask_and_twice_is_identity(grid, block_size):
    (mask,) = grid
    topology = BlockTopology.from_mask(mask, block_size)
    assert torch.equal(topology.transpose().mask(), mask.t())
    assert topology.transpose().shape == topology.shape[::-1]
    twice = topology.transpose().transpose()
    assert all(getattr(twice, name) is getattr(topology, name) for name in TENSORS)
    assert (twice.block_rows, twice.block_cols) == (topology.block_rows, topology.block_cols)


@given(grids(count=2), block_sizes)
def test_update_in_place_equals_a_new_topology(grid, block_size):
    before, after = grid
    topology = BlockTopology.from_mask(before, block_size)
    transposed = topology.transpose()
    tensors = [getattr(topology, name) for name in TENSORS]
    places = [(t.data_ptr(), t.shape) for t in tensors]
    topology.update_(after)
    assert [(t.data_ptr(), t.shape) for t in tensors] == places
    fresh = BlockTopology.from_mask(after, block_size)
    for name in TENSORS:
        assert torch.equal(getattr(topology, name), getattr(fresh, name)), name
    assert torch.equal(transposed.mask(), after.t())


@given(grids())
def test_index_lists_have_room_for_every_block(grid):
    (mask,) = grid
    topology = BlockTopology.from_mask(mask, 8)
    for name in ("col_idx", "row_idx"):
        assert getattr(topology, name).shape == (mask.numel(),)
    topology.update_(torch.ones_like(mask))
    assert topology.nnz == mask.numel()
    assert bool(topology.mask().all())


@given(grids(2), block_sizes)
def test_a_compact_topology_holds_the_active_blocks_alone(grid, block_size):
    first, second = grid
    topology = BlockTopology.from_mask(first, block_size, compact=True)
    transposed, tensors = topology.transpose(), [getattr(topology, name) for name in TENSORS]
    for mask in (first, second, torch.ones_like(first), second):
        topology.update_(mask)
        expected = BlockTopology.from_mask(mask, block_size)
        assert topology.col_idx.shape == topology.row_idx.shape == (expected.nnz,)
        assert torch.equal(topology.mask(), mask)
        assert torch.equal(transposed.mask(), mask.t())
        assert lists(topology.row_ptr, topology.col_idx) == lists(expected.row_ptr, expected.col_idx)
        assert lists(topology.col_ptr, topology.row_idx) == lists(expected.col_ptr, expected.row_idx)
        assert all(getattr(topology, name) is tensor for name, tensor in zip(TENSORS, tensors, strict=True))
    assert topology.apply(torch.clone).compact


def test_a_copy_is_independent():
    topology = BlockTopology.from_mask(torch.eye(3, dtype=torch.bool), 4)
    other = copy.deepcopy(topology)
    other.update_(torch.ones(3, 3, dtype=torch.bool))
    assert torch.equal(topology.mask(), torch.eye(3, dtype=torch.bool))


def test_fields_cannot_be_replaced():
    topology = BlockTopology.from_mask(torch.eye(3, dtype=torch.bool), 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        topology.block_size = 8  # type: ignore[misc]


def test_an_ambient_device_does_not_matter():
    mask = torch.tensor([[True, False], [False, True]], device="cpu")
    with torch.device("meta"):
        topology = BlockTopology.from_mask(mask, 4)
        assert torch.equal(topology.mask(), mask)
    assert topology.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("mask", "block_size", "error", "message"),
    [
        ([[True]], 4, TypeError, "mask must be a bool tensor, got list"),
        (torch.ones(2, 2), 4, TypeError, "mask must be a bool tensor, got dtype torch.float32"),
        (torch.ones(4, dtype=torch.bool), 4, ValueError, r"mask must be 2-D .* got shape \(4,\)"),
        (torch.ones(0, 3, dtype=torch.bool), 4, ValueError, r"at least one block .* got shape \(0, 3\)"),
        (torch.ones(2, 2, dtype=torch.bool), 0, ValueError, "block_size must be at least 1, got 0"),
        (torch.ones(2, 2, dtype=torch.bool), -16, ValueError, "block_size must be at least 1, got -16"),
        (torch.ones(2, 2, dtype=torch.bool), 16.0, TypeError, "block_size must be an int or a pair of them, got 16.0"),
        (torch.ones(2, 2, dtype=torch.bool), True, TypeError, "block_size must be an int or a pair of them, got True"),
    ],
)
def test_bad_masks_and_block_sizes_raise(mask, block_size, error, message):
    with pytest.raises(error, match=message):
        BlockTopology.from_mask(mask, block_size)


def test_update_with_another_shape_raises_and_changes_nothing():
    mask = torch.eye(3, dtype=torch.bool)
    topology = BlockTopology.from_mask(mask, 4)
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 3\), got \(3, 2\)"):
        topology.update_(torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"got dtype torch\.int64"):
        topology.update_(torch.ones(3, 3, dtype=torch.int64))
    assert torch.equal(topology.mask(), mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_rows": 0}, "block_rows must be at least 1, got 0"),
        ({"row_ptr": torch.zeros(3, dtype=torch.int32)}, r"row_ptr must be int32 of shape \(4,\)"),
        ({"col_idx": torch.zeros(9, dtype=torch.int64)}, r"col_idx must be int32 .* got torch\.int64"),
        ({"row_idx": torch.zeros(9, dtype=torch.int32, device="meta")}, "on one device: .* row_idx on meta"),
    ],
)
def test_constructor_refuses_tensors_that_do_not_fit(change, message):
    good = BlockTopology.from_mask(torch.eye(3, dtype=torch.bool), 4)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **change)


def test_a_square_is_known_by_its_side_and_another_block_has_none():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert BlockTopology.from_mask(mask, (8, 8)).block_size == BlockTopology.from_mask(mask, 8).side == 8
    upright = BlockTopology.from_mask(mask, (4, 1))
    assert (upright.sides, upright.transpose().block_size) == ((4, 1), (1, 4))
    with pytest.raises(ValueError, match="blocks are 4 x 1, no squares"):
        _ = upright.side
