"""``onnx``: recipes' networks through onnxruntime, at other sizes than those of the example."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from helpers import exported
from lightning_estdgm.export import ExportError, export_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torch_geometric")

X = torch.randn(1, 128, generator=torch.Generator().manual_seed(3))


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.mark.parametrize("kind", exported.NETWORKS)
def test_networks(kind: str, tmp_path: Path) -> None:
    exported.skip_without_onnx(kind)
    net, example, dynamic = exported.network(kind)
    export_model(net, example, "onnx", tmp_path / "net", dynamic=dynamic)
    inputs = exported.other_size(kind)
    assert exported.relative_difference(run(tmp_path / "net.onnx", *inputs), net(*inputs)) < 1e-4


def test_the_file_states_its_opset_and_holds_no_negative_zeros_and_no_paths(tmp_path: Path) -> None:
    report = export_model(exported.mlp(), X, "onnx", tmp_path / "net")
    assert "opset 18, inputs: input [any, 128]" in str(report)
    assert "no ONNX runtime gains from them" in str(report)
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    weights = [onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer]
    large = [weight for weight in weights if weight.size > 1000]
    assert len(large) == 2
    for weight in large:
        assert 0.05 < numpy.count_nonzero(weight) / weight.size < 0.15
        assert not numpy.signbit(weight[weight == 0]).any()
    assert b"site-packages" not in (tmp_path / "net.onnx").read_bytes()


def test_without_dynamic_sizes_the_example_is_the_only_one(tmp_path: Path) -> None:
    report = export_model(exported.mlp(), X, "onnx", tmp_path / "net", dynamic="none")
    assert "inputs: input [1, 128]" in str(report)
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        run(tmp_path / "net.onnx", X.expand(2, 128).contiguous())


def test_named_inputs_and_several_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = exported.mlp()

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            y = self.net(x) * scale
            return {"y": y, "mean": y.mean(-1)}

    def evaluate(run: Callable[..., Any]) -> float:
        outputs = run(x=X, scale=torch.ones(1, 128))  # as the model takes and returns them, not a list
        return float(outputs["y"].mean() - outputs["mean"].mean())

    example = {"x": X, "scale": torch.ones(1, 128)}
    report = export_model(Two(), example, "onnx", tmp_path / "two", evaluate=evaluate)
    assert "x [any, 128]" in str(report)
    assert report.quality == pytest.approx((0.0, 0.0), abs=1e-5)


@pytest.mark.parametrize("is_complex", [False, True])
def test_an_evaluation_gets_one_tensor_of_a_model_that_returns_one(is_complex: bool, tmp_path: Path) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = exported.mlp()

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return torch.complex(y, 2 * y) if is_complex else y

    report = export_model(One(), X, "onnx", tmp_path / "one", evaluate=lambda run: run(X).abs().square().mean().item())
    assert report.quality is not None
    assert report.quality[1] == pytest.approx(report.quality[0], rel=1e-4)


def test_a_converter_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ExportError, match=r"torch\.export cannot trace the model: "):
        export_model(Branches(), X, "onnx", tmp_path / "net")

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j1(x)

    with pytest.raises(ExportError, match=r'torch\.onnx\.export failed:(.|\n)*bessel_j1(.|\n)*dynamic="none"'):
        export_model(Unknown(), X, "onnx", tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_maximum_of_one_tensor_is_that_tensor(tmp_path: Path) -> None:
    """torch.onnx writes a GCN's with one input, on which MNN's converter crashes."""
    net, example, dynamic = exported.network("gcn")
    export_model(net, example, "onnx", tmp_path / "net", dynamic=dynamic)
    nodes = onnx.load(str(tmp_path / "net.onnx")).graph.node
    assert [node for node in nodes if node.op_type == "Identity"]
    assert not [node for node in nodes if node.op_type == "Max" and len(node.input) == 1]


def test_a_type_that_the_runtime_lacks_is_said_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"NotImplemented.*The model is in torch.bfloat16: model.float\(\) may run"):
        export_model(exported.mlp().bfloat16(), X.bfloat16(), "onnx", tmp_path / "net")
    assert not any(tmp_path.iterdir())
