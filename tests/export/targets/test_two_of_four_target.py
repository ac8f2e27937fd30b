"""``2:4``: the mask fitted to it, and the layout that PyTorch's sparse tensor cores take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from helpers import exported
from lightning_estdgm.export import ExportError, export_model
from lightning_estdgm.export import _export as export_module
from lightning_estdgm.export._semi_structured_layers import load
from lightning_estdgm.export.targets._protocol import ExportInput
from lightning_estdgm.export.targets.two_of_four import TwoOfFour, fit_2_of_4
from lightning_estdgm.recipes import GraphNet

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))


def test_the_largest_two_of_four_stay() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.5, 0.0, 0.0]])
    assert fit_2_of_4(weight).tolist() == [[0.0, -4.0, 3.0, 0.0, 0.0, 0.5, 0.0, 0.0]]
    large = torch.randn(64, 64)
    assert bool(((fit_2_of_4(large) != 0).reshape(-1, 4).sum(1) == 2).all())


@pytest.mark.parametrize("values", ["bf16", "fp16"])
def test_what_is_loaded_are_the_fitted_weights(values: str, tmp_path: Path) -> None:
    net = exported.mlp()
    report = export_model(net, X, "2:4", tmp_path / "net", values=values)
    assert report.size_bytes < 0.32 * report.dense_bytes  # 16 bits, half of the values, and 2 bits for each
    assert report.call_s is None
    assert "no speed is claimed" in str(report)
    loaded = load(exported.mlp(), str(tmp_path / "net.pt"), device="cpu")
    dtype = torch.bfloat16 if values == "bf16" else torch.float16
    for mine, theirs in ((loaded[0], net[0]), (loaded[2], net[2])):  # type: ignore[index]
        assert torch.equal(mine.weight, fit_2_of_4(theirs.weight).to(dtype))
        assert torch.equal(mine.bias, theirs.bias.to(dtype))


class _Wrong(TwoOfFour):
    """Outputs that are a hundredth too large."""

    def load(self, path: Path, given: ExportInput) -> Callable[..., Any]:
        run = super().load(path, given)
        return lambda *args: 1.01 * run(*args)


def test_a_wrong_file_is_not_taken_for_what_fitting_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "discover", lambda: {"2:4": _Wrong()})
    with pytest.raises(ExportError, match=r"what 2:4 computes differs from the model with the weights that it stores"):
        export_model(exported.mlp(), X, "2:4", tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_mask_of_2_of_4_loses_nothing(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(128, 128))
    with torch.no_grad():
        net[0].weight.copy_(fit_2_of_4(net[0].weight))
    report = export_model(net, X, "2:4", tmp_path / "net", evaluate=lambda run: float(run(X).float().std()))
    assert "fitting kept 8,192 of 8,192 active weights (100.0%)" in str(report)
    assert report.quality is not None
    assert report.quality[0] == pytest.approx(report.quality[1], rel=0.01)


def test_the_layout_is_the_one_that_torch_makes(tmp_path: Path) -> None:
    """What its constructor for GPUs takes, without a GPU: the sparse tensor, and back to dense by its own method."""
    net = exported.mlp()
    export_model(net, X, "2:4", tmp_path / "net")
    layer = torch.load(tmp_path / "net.pt")["layers"][0]
    with pytest.warns(UserWarning, match="SparseSemiStructuredTensor"):
        sparse = SparseSemiStructuredTensorCUTLASS(
            torch.Size(layer["shape"]), layer["values"], layer["meta"], None, None, None
        )
    fitted = fit_2_of_4(net[0].weight.detach()).bfloat16()  # type: ignore[index]
    made = SparseSemiStructuredTensorCUTLASS.from_dense
    assert sparse.shape == fitted.shape
    assert torch.equal(sparse.packed, layer["values"])
    assert callable(made)


def test_what_it_cannot_hold_is_named(tmp_path: Path) -> None:
    net = nn.Sequential(exported.mlp(), exported.sparse_(nn.Linear(128, 10)))
    report = export_model(net, X, "2:4", tmp_path / "net")
    assert "outputs in multiples of 32, inputs of 64: 1 (10, 128)" in str(report)
    conv, images, _ = exported.network("conv")
    with pytest.raises(ExportError, match=r"no linear layer can be held in 2:4\n(.|\n)*model.conv1 \(Conv2d\)"):
        export_model(conv, images, "2:4", tmp_path / "conv")


def two_of_four_(model: nn.Module) -> nn.Module:
    """Fit every matrix that 2:4 can hold, as training with such a pattern leaves it."""
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if parameter.dim() == 2):
            if matrix.shape[1] % 4 == 0:
                matrix.copy_(fit_2_of_4(matrix))
    return model


@pytest.mark.parametrize("kind", ["gcn", "gat", "sage"])
def test_graph_networks(kind: str, tmp_path: Path) -> None:
    """Layers of torch_geometric's own class become 2:4 as well; of a network so trained nothing is left out."""
    pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    net = two_of_four_(GraphNet(64, 32, kind, hidden=64)).eval()
    graph = torch.randn(30, 64), torch.randint(0, 30, (2, 90))
    report = export_model(net, graph, "2:4", tmp_path / "net", dynamic="shape")
    assert "(100.0%)" in str(report)
    assert "stays dense" not in str(report)
    assert report.difference < 0.02 * report.largest  # 16 bits
    loaded = load(GraphNet(64, 32, kind, hidden=64), str(tmp_path / "net.pt"), device="cpu")
    layers = list(torch.load(tmp_path / "net.pt")["names"])
    assert len(layers) >= 2
    for name in layers:
        weight = net.get_submodule(name).weight.detach()  # type: ignore[union-attr]
        assert torch.equal(loaded.get_submodule(name).weight, weight.bfloat16())
    larger = torch.randn(50, 64), torch.randint(0, 50, (2, 200))
    with torch.no_grad():
        expected, found = net(*larger), loaded(larger[0].bfloat16(), larger[1]).float()
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_a_graph_network_of_another_pattern_loses_weights_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    net, graph, dynamic = exported.network("gcn", 4)
    report = export_model(net, graph, "2:4", tmp_path / "net", dynamic=dynamic)
    assert "(50.0%)" in str(report)
    assert "stays dense, as 2:4 takes outputs in multiples of 32, inputs of 64: model.convs.1.lin (8, 64)" in str(
        report
    )
