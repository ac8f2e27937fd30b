"""Copying the active blocks of a weight alone: the same as on the whole weight, whatever its strides."""

import pytest
import torch

from lightning_estdgm.engine._block_slices import BlockSlices
from lightning_estdgm.method._masks import mask_shape, unit_view

LAYOUTS = {
    "row-major": (lambda: torch.randn(8, 12), 4),
    "transposed": (lambda: torch.randn(12, 8).t(), 4),
    "convolution": (lambda: torch.randn(8, 12, 3, 2), 24),
    "1x1": (lambda: torch.randn(8, 12, 1, 1), 4),
    "channels-last": (lambda: torch.randn(8, 12, 3, 2).to(memory_format=torch.channels_last), 4),
    "a part of a larger one": (lambda: torch.randn(16, 12)[8:], 4),
}


@pytest.mark.parametrize(("make", "length"), LAYOUTS.values(), ids=LAYOUTS)
def test_active_blocks_are_read_and_their_step_scaled_and_no_other_is_touched(make, length):
    torch.manual_seed(0)
    before, mask = make(), torch.tensor([[True, False, True], [False, False, True]])
    after = make()
    slices = BlockSlices.of(after, mask, 4)
    assert slices.length == length
    snapshot = slices.read(before)
    assert sorted(snapshot.flatten().tolist()) == sorted(unit_view(before, 4).transpose(1, 2)[mask].flatten().tolist())
    assert slices.read(before, into=snapshot) is snapshot
    on = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)[(...,) + (None,) * (before.dim() - 2)]
    expected = torch.where(on, before + 2.5 * (after - before), after)
    strides = after.stride()
    slices.scale_step_(after, snapshot, 2.5)
    torch.testing.assert_close(after, expected)
    assert after.stride() == strides


def test_a_weight_with_gaps_has_no_slices_and_one_in_another_layout_does_not_fit():
    mask = torch.ones(mask_shape((8, 12), 4), dtype=torch.bool)
    weight = torch.randn(8, 12)
    assert BlockSlices.of(torch.randn(8, 24)[:, ::2], mask, 4) is None
    slices = BlockSlices.of(weight, mask, 4)
    assert slices.fit(weight)
    assert not slices.fit(torch.randn(12, 8).t())


def test_no_active_block_is_no_slice():
    weight = torch.randn(8, 12)
    slices = BlockSlices.of(weight, torch.zeros(2, 3, dtype=torch.bool), 4)
    before = slices.read(weight)
    slices.scale_step_(weight, before, 2.0)
    assert before.shape == (0, 4)
