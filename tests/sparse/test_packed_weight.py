"""Weights as their active units: which units are found, and what the lists of a small one are."""

import pytest
import torch

from helpers.packed_layers import UNITS, masked_weight
from lightning_estdgm.sparse._packed_weight import find_unit, pack_weight


@pytest.mark.parametrize("unit", UNITS)
def test_unit_is_found_from_the_zeros(unit):
    found = find_unit(masked_weight(unit))
    assert found == {(48, 48): (16, 16), (128, 128): (64, 64)}.get(unit, unit)


def test_a_zero_by_chance_does_not_change_the_unit():
    weight = masked_weight((16, 16))
    weight[weight.nonzero(as_tuple=True)[0][0]][:3] = 0.0
    assert find_unit(weight) == (16, 16)


def test_lists_of_units_are_in_the_order_of_use():
    weight = torch.zeros(4, 6)
    weight[:2, 2:4] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight[2:, 4:] = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    packed = pack_weight(weight, (2, 2))
    assert packed.values.tolist() == [1, 3, 2, 4, 5, 7, 6, 8]
    assert packed.ptr.tolist() == [0, 1, 2]
    assert packed.idx.tolist() == [1, 2]


def test_lists_of_single_weights_are_in_the_order_of_use():
    weight = torch.zeros(5, 100)
    weight[0, 3], weight[2, 1], weight[2, 7], weight[4, 97] = 1.0, 2.0, 3.0, 4.0
    packed = pack_weight(weight, (1, 1))
    assert packed.ptr.tolist() == [0, 1, 2]  # a stretch of 96 inputs, and one of 4
    assert packed.ends.tolist() == [2, 3]
    assert packed.outputs.view(2, 4)[:, :2].tolist() == [[2, 0], [4, 0]]
    assert packed.values.view(3, 4)[:, :2].tolist() == [[2, 1], [3, 0], [4, 0]]
    assert packed.idx.view(3, 4)[:, :2].tolist() == [[1, 3], [7, 96], [1, 96]]


@pytest.mark.parametrize(
    ("unit", "dtype", "most"),
    [
        ((16, 16), torch.float32, 0.12),
        ((64, 64), torch.float32, 0.12),
        ((4, 4), torch.float32, 0.12),
        ((1, 1), torch.float32, 0.16),
        ((16, 16), torch.int8, 0.05),
        ((4, 4), torch.int8, 0.05),
    ],
)
def test_bytes_of_a_weight_of_density_a_tenth(unit, dtype, most):
    rows, columns = 1024 // unit[0], 1024 // unit[1]
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    mask = (order < 0.1 * rows * columns).view(rows, columns)
    weight = torch.rand(1024, 1024) * mask.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)
    assert pack_weight(weight, dtype=dtype).nbytes <= most * weight.nbytes


def test_no_zero_is_negative():
    weight = -masked_weight((4, 4)).abs()
    weight[weight == 0] = -0.0
    weight[weight.nonzero(as_tuple=True)[0][0], weight.nonzero(as_tuple=True)[1][0]] = -0.0  # within an active unit
    values = pack_weight(weight, (4, 4)).values
    assert not torch.signbit(values[values == 0]).any()
    assert (values == 0).any()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="float16"):
        pack_weight(torch.ones(4, 4), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"3 x 3 do not divide a weight of shape \(4, 4\)"):
        pack_weight(torch.ones(4, 4), (3, 3))
