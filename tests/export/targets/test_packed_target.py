"""``packed``: files of packed layers from the exporter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import exported
from lightning_estdgm.export import ExportError, PackedLinear, export_model, load_packed
from lightning_estdgm.export import _export as export_module
from lightning_estdgm.export.targets._protocol import ExportInput
from lightning_estdgm.export.targets.packed import Packed
from lightning_estdgm.recipes import ByteGPT

pytest.importorskip("torch_geometric")

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("values", "share"), [("fp32", 0.14), ("bf16", 0.09), ("int8", 0.07)])
def test_sizes_by_type_of_the_values(values: str, share: float, tmp_path: Path) -> None:
    net = exported.mlp(unit=16, width=512)
    x = torch.randn(3, 512)
    report = export_model(net, x, "packed", tmp_path / "net", values=values)
    assert report.size_bytes < share * report.dense_bytes
    assert report.difference < (1e-5 if values == "fp32" else 0.05) * report.largest
    loaded = load_packed(tmp_path / "net.pt", exported.mlp(unit=16, width=512))
    assert exported.relative_difference(loaded(x), net(x)) == pytest.approx(report.difference / report.largest)


@pytest.mark.parametrize("kind", exported.NETWORKS)
def test_networks(kind: str, tmp_path: Path) -> None:
    net, example, _ = exported.network(kind)
    export_model(net, example, "packed", tmp_path / "net")
    loaded = load_packed(tmp_path / "net.pt", exported.network(kind)[0])
    inputs = exported.other_size(kind)
    assert exported.relative_difference(loaded(*inputs), net(*inputs)) < 1e-4


@pytest.mark.parametrize("values", ["bf16", "int8"])
@pytest.mark.parametrize("kind", exported.NETWORKS)
def test_rounded_values_compute_what_pytorch_does_with_them(kind: str, values: str, tmp_path: Path) -> None:
    net, example, _ = exported.network(kind)
    assert export_model(net, example, "packed", tmp_path / "net", values=values).difference > 0.0


class _Wrong(Packed):
    """Packed layers one of whose outputs is a little off when they are loaded."""

    def load(self, path: Path, given: ExportInput) -> Callable[..., Any]:
        model = super().load(path, given)
        assert isinstance(model, nn.Module)
        layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
        assert layer.scale is not None
        layer.scale[0] *= 1.1
        return model


def test_a_wrong_product_is_not_taken_for_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "discover", lambda: {"packed": _Wrong()})
    with pytest.raises(ExportError, match="differs from the model with the weights that it stores by"):
        export_model(exported.mlp(), X, "packed", tmp_path / "net", values="int8")
    assert list(tmp_path.iterdir()) == []


def test_an_input_may_be_passed_by_name(tmp_path: Path) -> None:
    net, x = exported.ByName(), torch.randn(3, 32, 2, 1)
    export_model(net, x, "packed", tmp_path / "net")
    loaded = load_packed(tmp_path / "net.pt", exported.ByName())
    assert not any(isinstance(layer, nn.Linear | nn.Conv2d) for layer in loaded.children())
    assert exported.relative_difference(loaded(x), net(x)) < 1e-4


def test_a_gpt_generates_the_same_text_from_it(tmp_path: Path) -> None:
    net, example, _ = exported.network("gpt", unit=16)
    export_model(net, example, "packed", tmp_path / "gpt")
    with torch.device("meta"):
        made = ByteGPT(64, 2, 4, 32)
    loaded = load_packed(tmp_path / "gpt.pt", made)
    prompt = torch.randint(0, 256, (2, 5), generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.generate(prompt, 20), net.generate(prompt, 20))  # type: ignore[operator]


def test_nothing_to_pack_is_an_error_and_what_stays_dense_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nothing to pack"):
        export_model(nn.Sequential(nn.Linear(128, 8)), X, "packed", tmp_path / "net")
    grouped = exported.sparse_(nn.Conv2d(32, 32, 3, groups=2, padding=1))
    net = nn.Sequential(grouped, exported.sparse_(nn.Conv2d(32, 32, 1)))
    report = export_model(net, torch.randn(1, 32, 8, 8), "packed", tmp_path / "conv")
    assert "cannot be packed, and stay dense: 0 (grouped convolution" in str(report)
