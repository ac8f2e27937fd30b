"""GPTs of published sizes and others: their shapes and parameters."""

from __future__ import annotations

import pytest

from lightning_estdgm.tools.planner._gpt_sizes import GPT_SIZES, gpt, gpt_shape


@pytest.mark.parametrize(("name", "parameters"), [("125M", 125e6), ("350M", 350e6), ("1.3B", 1.3e9), ("13B", 13e9)])
def test_a_gpt_of_a_published_size_has_its_shape_and_about_its_parameters(name: str, parameters: float) -> None:
    assert gpt_shape(parameters) == GPT_SIZES[name]
    model = gpt(parameters)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)


@pytest.mark.parametrize("parameters", [60e6, 200e6, 20e9, 30e9, 70e9, 150e9])
def test_a_gpt_of_another_size_has_as_many_blocks_as_it_takes(parameters: float) -> None:
    _, width = gpt_shape(parameters)
    assert width in {w for _, w in GPT_SIZES.values()}
    counted = sum(p.numel() for p in gpt(parameters).parameters())
    one_block = 12 * width**2
    assert abs(counted - parameters) < max(0.08 * parameters, one_block)
