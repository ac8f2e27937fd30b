"""The driver of exports: what it checks, says and refuses, whatever the target."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import exported
from helpers.exact import differences
from helpers.models import NO_VALIDATION_LOADER
from lightning_estdgm.export import ExportError, ExportInput, export_model, load_packed
from lightning_estdgm.export import _export as export_module
from lightning_estdgm.export._copies import clean_zeros_
from lightning_estdgm.export._sparse_layers import sparse_linear_layers
from lightning_estdgm.export.targets import _protocol
from lightning_estdgm.export.targets._protocol import ExportTarget, discover, missing_runtime
from lightning_estdgm.method._masks import BlockSize

X = torch.randn(3, 128, generator=torch.Generator().manual_seed(3))


@dataclass
class Faulty:
    """A target that writes two files and goes wrong where it is told to."""

    fault: str = ""
    name: str = "faulty"
    suffix: str = ".bin"
    values: tuple[str, ...] = ("fp32",)
    requires: tuple[str, ...] = ()
    extra: str = "faulty"
    runs_here: bool = True

    def write(self, given: ExportInput, path: Path) -> list[str]:
        path.with_suffix(".weights").write_bytes(b"weights")
        path.write_bytes(b"graph")
        if self.fault == "write":
            raise ExportError("layer net.3 cannot be held")
        return ["a note"]

    def load(self, path: Path, given: ExportInput) -> Callable[..., Any]:
        if self.fault == "load":
            raise RuntimeError("runtime says no")
        factor = {"wrong": 1.01, "nan": float("nan")}.get(self.fault, 1.0)
        if self.fault == "shape":
            return lambda x: given.model(x)[:1]
        return lambda x: given.model(x) * factor

    def tolerance(self, values: str) -> float | None:
        return 1e-4


def use(target: ExportTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "discover", lambda: {target.name: target})


def test_the_targets_are_found_and_follow_the_protocol() -> None:
    found = discover()
    assert {"torch-csr", "onnx", "2:4"} <= found.keys()
    assert all(target.name == name for name, target in found.items())


def test_files_appear_together_and_the_report_says_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Faulty(), monkeypatch)
    report = export_model(exported.mlp(), X, "faulty", tmp_path / "sub" / "net", evaluate=lambda run: run(X).sum())
    assert report.files == (tmp_path / "sub" / "net.bin", tmp_path / "sub" / "net.weights")
    assert sorted(os.listdir(tmp_path / "sub")) == ["net.bin", "net.weights"]
    assert report.size_bytes == 12
    assert report.dense_bytes == 4 * (2 * 128 * 256 + 256 + 128)
    assert report.difference == 0.0
    assert report.quality is not None
    assert report.quality[0] == report.quality[1]
    text = str(report)
    for said in ("12 bytes", "largest difference", "ms a call, dense PyTorch", "evaluated", "- a note"):
        assert said in text


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("write", ExportError, "layer net.3 cannot be held"),
        ("load", RuntimeError, "runtime says no"),
        ("wrong", ExportError, "differs from the model by"),
        ("nan", ExportError, "differs from the model by inf"),
        ("shape", ExportError, "tensors of shapes"),
    ],
)
def test_nothing_is_left_of_an_export_that_fails(
    fault: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Faulty(fault), monkeypatch)
    with pytest.raises(error, match=message):
        export_model(exported.mlp(), X, "faulty", tmp_path / "net.bin")
    assert os.listdir(tmp_path) == []


def test_files_that_are_there_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Faulty(), monkeypatch)
    (tmp_path / "net.weights").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"net\.weights is there already"):
        export_model(exported.mlp(), X, "faulty", tmp_path / "net")
    assert os.listdir(tmp_path) == ["net.weights"]
    (tmp_path / "other.bin").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"other\.bin is there already"):
        export_model(exported.mlp(), X, "faulty", tmp_path / "other")
    assert (tmp_path / "other.bin").read_bytes() == b"mine"


def test_bad_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, out = exported.mlp(), tmp_path / "net"
    with pytest.raises(ValueError, match=r"to: got 'tflite', expected aoti, mnn, onnx, packed, torch-csr, 2:4"):
        export_model(net, X, "tflite", out)
    with pytest.raises(ValueError, match="values: got 'int3', expected fp32 for onnx"):
        export_model(net, X, "onnx", out, values="int3")
    with pytest.raises(ValueError, match="dynamic: got 'all'"):
        export_model(net, X, "onnx", out, dynamic="all")
    with pytest.raises(ValueError, match="example: got str, expected a tensor"):
        export_model(net, "x", "torch-csr", out)
    with pytest.raises(ValueError, match="example: the model fails on it: RuntimeError"):
        export_model(net, X[:, :7], "torch-csr", out)
    with pytest.raises(ValueError, match="meta device"):
        export_model(nn.Linear(4, 4, device="meta"), X, "torch-csr", out)
    use(Faulty(requires=("no_such_runtime",)), monkeypatch)
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_runtime: pip install 'lightning-estdgm\[faulty\]'"):
        export_model(net, X, "faulty", out)
    assert os.listdir(tmp_path) == []


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.masked_fill(torch.arange(y.shape[-1]) < 3, -torch.inf)


def test_outputs_that_are_infinite_in_both_are_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Faulty(), monkeypatch)
    report = export_model(Masked(128, 8), X, "faulty", tmp_path / "net")
    assert report.difference == 0.0
    assert 0 < report.largest < 100
    use(Faulty("wrong"), monkeypatch)
    with pytest.raises(ExportError, match=r"of outputs up to \d.*; nothing was written$"):
        export_model(Masked(128, 8), X, "faulty", tmp_path / "other")
    use(Faulty("nan"), monkeypatch)
    with pytest.raises(ExportError, match="infinite or NaN in one of the two only"):
        export_model(Masked(128, 8), X, "faulty", tmp_path / "other")


def test_the_model_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Faulty(), monkeypatch)
    net = exported.mlp().train()
    before = copy.deepcopy(net.state_dict())
    export_model(net, X, "faulty", tmp_path / "net")
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert differences(dict(before), dict(net.state_dict())) == []
    assert negative_zeros(net) > 1000, "the control: its zeros are of both signs still"


@pytest.mark.filterwarnings(NO_VALIDATION_LOADER)
@pytest.mark.parametrize(
    ("to", "kind", "unit"),
    [
        ("packed", "convolution", 1),
        ("torch-csr", "experts", (4, 1)),
        ("onnx", "linear", 1),
        ("mnn", "convolution", (4, 1)),
        ("2:4", "linear", (4, 1)),
    ],
    ids=str,
)
def test_a_model_that_was_trained_packed_is_exported(to: str, kind: str, unit: BlockSize, tmp_path: Path) -> None:
    if lack := missing_runtime(discover()[to]):
        pytest.skip(lack)
    if to in ("onnx", "mnn"):
        exported.skip_without_onnx("conv")
    module, x = exported.trained_packed(kind, unit)
    before, expected = exported.parts(module), module(x)
    report = export_model(
        module, x, to, tmp_path / "net", evaluate=lambda run: exported.relative_difference(run(x), expected)
    )
    assert differences(exported.parts(module), before) == []
    assert report.quality is not None
    assert report.quality[0] < 1e-5
    assert to == "2:4" or report.quality[1] < 1e-4


def negative_zeros(model: nn.Module) -> int:
    return sum(int(((p == 0) & p.signbit()).sum()) for p in model.parameters())


class _Keeping(nn.Module):
    """Keeps tensors with a graph: the weight of a layer, and what it has computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = exported.mlp()
        with pytest.warns(FutureWarning, match="weight_norm"):
            self.last = nn.utils.weight_norm(nn.Linear(128, 8))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [self.first(x)]
        return self.last(self.seen[0])


def test_a_model_that_keeps_tensors_with_a_graph_is_exported(tmp_path: Path) -> None:
    net = _Keeping()
    expected = net(X)
    kept = net.seen[0]
    report = export_model(net, X, "packed", tmp_path / "net")
    assert report.difference < 1e-5
    assert net.seen[0] is kept
    assert kept.grad_fn is not None
    assert exported.relative_difference(load_packed(tmp_path / "net.pt", _Keeping())(X), expected) < 1e-5


def test_zeros_are_written_without_a_sign() -> None:
    net = exported.mlp()
    assert negative_zeros(net) > 1000
    assert negative_zeros(clean_zeros_(net)) == 0


def test_dense_layers_and_those_of_others_are_told_apart() -> None:
    net = nn.Sequential(exported.mlp(), nn.Linear(8, 8), nn.TransformerEncoderLayer(16, 2, 32), nn.Conv2d(8, 8, 3))
    shared = net[0][0]  # type: ignore[index]
    net.append(shared)
    exported.sparse_(net[2])
    exported.sparse_(net[3])
    found, kept = sparse_linear_layers(net)
    assert [layer.name for layer in found] == ["0.0", "0.2", "4"]
    assert found[0].module is found[2].module
    said = "\n".join(kept)
    assert "linear layers only: 3 (Conv2d)" in said
    assert "reads the weights of its layers itself: 2.linear1 (Linear), 2.linear2" in said
    assert "no sparse operator for attention projections: 2.self_attn (MultiheadAttention)" in said


def test_a_missing_extra_is_named_by_real_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_protocol, "find_spec", lambda name: None)
    for target in discover().values():
        lack = missing_runtime(target)
        assert (lack is None) == (not target.requires)
        if lack is not None:
            assert f"pip install 'lightning-estdgm[{target.extra}]'" in lack
