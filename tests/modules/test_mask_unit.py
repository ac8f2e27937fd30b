"""Units of masks: the block that fits a layer, and why there is none."""

import pytest
from torch import nn

from helpers.swapped_layers import candidate
from lightning_estdgm.modules._candidates import find_candidates
from lightning_estdgm.modules._mask_unit import fitting_block_sizes, largest_block, unit_of


@pytest.mark.parametrize(
    ("module", "size", "why"),
    [
        (nn.Linear(1024, 2048), 128, ""),
        (nn.Linear(1024, 1000), 1, "no block of 16, 32, 64, 128 divides both dimensions"),
        (nn.Linear(384, 1152), 32, ""),
        (nn.Linear(128, 144), 16, ""),
        (nn.Linear(64, 64), 1, "fewer than 8 blocks of 16 a side"),
        (nn.Conv2d(256, 512, 3), 32, ""),
        (nn.Conv1d(128, 128, 5, padding="same"), 16, ""),
        (nn.Conv2d(128, 128, (2, 3), dilation=(2, 1), padding="same"), 16, ""),
        (nn.Conv2d(3, 64, 7), 1, "no block of 16, 32, 64, 128 divides both dimensions"),
        (nn.Conv2d(64, 64, 3), 1, "fewer than 8 blocks of 16 a side"),
        (nn.Conv2d(256, 256, 3, groups=2), 1, "grouped convolution: no sparse operator"),
        (nn.Conv1d(256, 256, 3, groups=256), 1, "grouped convolution: no sparse operator"),
        (nn.Conv2d(256, 256, 3, padding_mode="reflect"), 1, "no sparse operator for padding_mode='reflect'"),
        (nn.Conv2d(256, 256, (2, 3), padding="same"), 1, "no sparse operator for padding='same' with a kernel of 2x3"),
        (nn.Conv3d(256, 256, 3), 1, "no sparse operator for Conv3d"),
        (type("MyConv2d", (nn.Conv2d,), {})(256, 256, 3), 1, "no sparse operator for MyConv2d"),
        (nn.ConvTranspose2d(256, 256, 3), 1, "no sparse operator for transposed convolutions"),
        (nn.MultiheadAttention(256, 2), 1, "no sparse operator for attention projections"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(256, 256), 1, "no sparse operator for NonDynamically"),
    ],
)
def test_automatic_blocks_are_the_largest_that_fit_and_say_why_not(module, size, why):
    got, said = largest_block(candidate(module))
    assert got == size
    assert said.startswith(why)
    assert bool(said) == (got == 1)


def test_a_block_size_that_is_asked_for_does_not_hide_why_a_layer_is_dense():
    assert unit_of(candidate(nn.Conv2d(64, 64, 3)), 16) == (16, "")
    assert unit_of(candidate(nn.Conv2d(64, 64, 3, groups=2)), 16) == (16, "grouped convolution: no sparse operator")
    assert unit_of(candidate(nn.Conv3d(64, 64, 3)), 16) == (16, "no sparse operator for Conv3d")


def test_a_unit_of_several_outputs_and_one_input_fits_where_its_outputs_do():
    layer = candidate(nn.Linear(7, 12))
    assert unit_of(layer, (4, 1)) == ((4, 1), "")
    with pytest.raises(ValueError, match=r"Units\(size=\(8, 1\)\) does not fit .* are \[1, \(2, 1\), \(4, 1\)\]"):
        unit_of(layer, (8, 1))


def test_fitting_block_sizes():
    assert fitting_block_sizes((128, 64)) == (16, 32, 64)
    assert fitting_block_sizes((100, 64)) == ()


def test_blocks_of_a_fused_projection_fit_its_parts():
    # 216 x 72: no block divides 72. 240 x 80: blocks of 16 divide the whole, and leave only 5 x 5 in each of the parts.
    for width in (72, 80):
        model = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "last": nn.Linear(8, 4)})
        assert largest_block(find_candidates(model)[0])[0] == 1
    model = nn.ModuleDict({"qkv": nn.Linear(128, 384), "last": nn.Linear(8, 4)})
    assert largest_block(find_candidates(model)[0]) == (16, "")
