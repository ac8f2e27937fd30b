"""``estdgm bench quality``: a network that was really trained, packed by each type of values."""

from __future__ import annotations

import random
from pathlib import Path

from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.tools.bench._quality import measure_quality, quality_table
from lightning_estdgm.tools.demo._demo_config import DemoConfig


def test_packed_values_are_compared_with_the_trained_network(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    words = random.Random(0)
    text.write_text(" ".join(words.choice(("spam", "eggs", "ham", "bacon")) for _ in range(4000)))
    sizes = {"width": 64, "heads": 2, "layers": 2, "context": 32, "batch_size": 4, "val_windows": 16}
    config = DemoConfig(steps=40, text=text, dgm=DGMConfig(units=Units(size=16), backend="native"), **sizes)
    result = measure_quality(config)
    perplexity = result["perplexity"]
    assert list(perplexity) == ["trained", "fp32", "bf16", "int8"]
    assert 1 < perplexity["trained"] < 256
    assert abs(perplexity["fp32"] / perplexity["trained"] - 1) < 1e-5
    for name in ("bf16", "int8"):
        assert 0 < abs(perplexity[name] / perplexity["trained"] - 1) < 0.05, name
    held = result["bytes"]
    assert held["int8"] < held["bf16"] < held["fp32"] < held["trained"]
    assert quality_table(result).row_count == 4
