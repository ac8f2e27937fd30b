"""The geometry of a convolution."""

import pytest

from lightning_estdgm.sparse._conv_geometry import ConvGeometry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": (0, 3)}, r"kernel_size must be two numbers of at least 1, got \(0, 3\)"),
        ({"stride": (1, 0)}, r"stride must be two numbers of at least 1, got \(1, 0\)"),
        ({"padding": (-1, 0)}, r"padding must be two numbers of at least 0, got \(-1, 0\)"),
        ({"stride": 2}, "stride must be two numbers of at least 1, got 2"),
        ({"dilation": (1,)}, r"dilation must be two numbers of at least 1, got \(1,\)"),
    ],
)
def test_a_bad_geometry_raises(change, message):
    with pytest.raises(ValueError, match=message):
        ConvGeometry(**{"kernel_size": (3, 3), **change})
