"""``torch-csr``: what is written is PyTorch alone, exact, and in the fast form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import exported
from lightning_estdgm.export import ExportError, export_model
from lightning_estdgm.export._csr_layers import CSRLinear, load
from lightning_estdgm.export.targets.torch_csr import _verdict

pytest.importorskip("torch_geometric")

X = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))


def test_it_is_a_fifth_of_dense_and_the_same(tmp_path: Path) -> None:
    net = exported.mlp()
    report = export_model(net, X, "torch-csr", tmp_path / "net")
    assert report.size_bytes < 0.25 * report.dense_bytes
    assert "tokens" in str(report)
    loaded = load(exported.mlp(), str(tmp_path / "net.pt"))
    for layer in (loaded[0], loaded[2]):  # type: ignore[index]
        assert isinstance(layer, CSRLinear)
        assert layer.weight.crow_indices().dtype == layer.weight.col_indices().dtype == torch.int32
        assert int((layer.weight.values() == 0).sum()) == 0
    for shape in ((128,), (1, 128), (0, 128), (7, 128), (2, 3, 128)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(loaded(x), net(x), rtol=1e-4, atol=1e-6)


def test_the_program_that_runs_it_imports_torch_only(tmp_path: Path) -> None:
    net = exported.mlp()
    export_model(net, X, "torch-csr", tmp_path / "my-net")
    torch.save((X, net(X)), tmp_path / "pair.pt")
    program = (
        "import sys, torch\n"
        "from torch import nn\n"
        "from my_net_csr import load\n"
        "net = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))\n"
        "net = load(net, 'my-net.pt')\n"
        "x, y = torch.load('pair.pt')\n"
        "torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-6)\n"
        "assert 'lightning_estdgm' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["gpt", "gcn", "sage"])
def test_networks(kind: str, tmp_path: Path) -> None:
    net, example, _ = exported.network(kind)
    export_model(net, example, "torch-csr", tmp_path / "net")
    loaded = load(exported.network(kind)[0], str(tmp_path / "net.pt"))
    assert sum(isinstance(module, CSRLinear) for module in loaded.modules()) >= 2
    inputs = exported.other_size(kind)
    assert exported.relative_difference(loaded(*inputs), net(*inputs)) < 1e-5


def test_an_input_may_be_passed_by_name(tmp_path: Path) -> None:
    net, x = exported.ByName(), torch.randn(3, 32, 2, 1)
    export_model(net, x, "torch-csr", tmp_path / "net")
    torch.testing.assert_close(load(exported.ByName(), str(tmp_path / "net.pt"))(x), net(x), rtol=1e-4, atol=1e-6)


def test_shared_layers_are_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = exported.sparse_(nn.Linear(128, 128))
    net = nn.Sequential(layer, nn.ReLU(), layer)
    export_model(net, X, "torch-csr", tmp_path / "net")
    loaded = load(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)), str(tmp_path / "net.pt"))
    assert loaded[0] is loaded[2]  # type: ignore[index]
    torch.testing.assert_close(loaded(X), net(X), rtol=1e-4, atol=1e-6)


def test_what_it_cannot_hold_is_named(tmp_path: Path) -> None:
    net, images, _ = exported.network("conv")
    report = export_model(net, images, "torch-csr", tmp_path / "conv")
    assert "stays dense, as this form holds linear layers only: model.conv1 (Conv2d), model.layer1.0.conv1" in str(
        report
    )
    with pytest.raises(ExportError, match=r"0 is torch\.bfloat16; .* export model\.float"):
        export_model(exported.mlp().bfloat16(), X.bfloat16(), "torch-csr", tmp_path / "bf16")
    with pytest.raises(ExportError, match="no linear layer is at most half active"):
        export_model(nn.Sequential(nn.Linear(128, 8)), X, "torch-csr", tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conv.pt", "conv_csr.py"]


def test_verdict() -> None:
    assert _verdict({1: 0.8, 16: 2.0, 2048: 0.7}) == "it loses from 2048 tokens a call on, and below 16"
    assert _verdict({1: 1.8, 16: 2.0, 2048: 0.7}) == "it loses from 2048 tokens a call on"
    assert _verdict({1: 0.8}) == "it loses at any number of tokens"
    assert _verdict({1: 1.2, 16: 2.0}) == "it wins from 1 to 16 tokens a call"
