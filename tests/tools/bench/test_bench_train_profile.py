"""The profile divides a step's time into parts."""

import pytest

from helpers.bench_cases import GPT, TINY
from lightning_estdgm.tools.bench.train._profile import PARTS, part_of, profile_train


def test_the_profile_divides_a_step_without_rest():
    found = profile_train(GPT, TINY)
    for arm in found.values():
        assert set(arm["seconds"]) == set(PARTS)
        assert sum(arm["seconds"].values()) == pytest.approx(arm["wall_s"])
        assert sum(arm["share"].values()) == pytest.approx(1.0)
        assert min(arm["seconds"][p] for p in ("dense products", "attention", "optimizer")) > 0
    assert found["dense"]["seconds"]["sparse products"] == found["dense"]["seconds"]["masks"] == 0
    assert min(found["refinement"]["seconds"][p] for p in ("sparse products", "masks")) > 0


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::mm", "aten::linear", "[Strategy]training_step"], "dense products"),
        (["aten::addmm", "estdgm::masked_linear", "[Strategy]training_step"], "sparse products"),
        (["aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"], "attention"),
        (["aten::gelu", "[Strategy]training_step", "Optimizer.step#AdamW.step"], "norms, activations, loss"),
        (["aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimizer"),
        (["aten::add_", "Optimizer.step#SGD.step"], "optimizer"),
        (["aten::masked_fill_", "[Callback]DGMCallback, hook", "Optimizer.step#AdamW.step"], "masks"),
        (["Optimizer.step#AdamW.step"], "other"),
        (["aten::norm", "[LightningModule]ByteGPT.configure_gradient_clipping"], "optimizer"),
        (["cudaLaunchKernel"], "other"),
    ],
)
def test_operations_are_told_by_what_is_around_them(names, part):
    assert part_of(names) == part
