"""``mnn``: MNN runs what its converter wrote, in processes of their own; what it cannot hold is told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import exported
from lightning_estdgm.export import ExportError, export_model
from lightning_estdgm.export.targets import mnn

pytest.importorskip("MNN", reason="the extra mnn is not installed")
pytest.importorskip("onnxscript", reason="the extra mnn is not installed")
pytest.importorskip("torch_geometric", reason="the extra recipes is not installed")

X = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))


def test_a_sparse_file_and_the_modules_that_are_left_alone(tmp_path: Path) -> None:
    net = exported.mlp()
    report = export_model(net, X, "mnn", tmp_path / "net")
    assert (tmp_path / "net.mnn").stat().st_size < 0.35 * report.dense_bytes
    assert {path.name for path in tmp_path.iterdir()} <= {"net.mnn", "net.dense.mnn"}
    assert "_tools" not in sys.modules, "the converter runs in a process of its own"
    other = torch.randn(5, 128)
    assert exported.relative_difference(mnn._Runner(tmp_path / "net.mnn")(other), net(other)) < 1e-4


def test_a_file_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = export_model(exported.mlp(), X, "mnn", "net", values="int8")
    assert report.files == (Path("net.mnn"),)
    assert (tmp_path / "net.mnn").exists()


def test_symmetric_8_bits(tmp_path: Path) -> None:
    report = export_model(exported.mlp(), X, "mnn", tmp_path / "net", values="int8")
    assert report.size_bytes < 0.3 * report.dense_bytes
    assert 0 < report.difference < 0.05 * report.largest
    assert [path.name for path in tmp_path.iterdir()] == ["net.mnn"]


@pytest.mark.parametrize("kind", ["gpt", "conv"])
def test_networks(kind: str, tmp_path: Path) -> None:
    exported.skip_without_onnx(kind)
    net, example, dynamic = exported.network(kind)
    export_model(net, example, "mnn", tmp_path / "net", dynamic=dynamic)
    other = exported.other_size(kind)
    assert exported.relative_difference(mnn._Runner(tmp_path / "net.mnn")(*other), net(*other)) < 1e-4


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_a_graph_network_is_right_or_refused_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    """MNN converts it, and computes it wrong in some runs: the check says so."""
    net, example, dynamic = exported.network(kind)
    try:
        written = export_model(net, example, "mnn", tmp_path / "net", dynamic=dynamic).files
    except ExportError as e:
        refused, written = str(e), ()
    if not written:
        assert "mnn computes differs from the model" in refused
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in written)


def test_a_converter_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "converter.py"
    script.write_text("import sys\nprint('unknown operator Foo')\nsys.exit(3)\n")
    monkeypatch.setattr(mnn._mnn_process, "__file__", str(script))
    folder = tmp_path / "out"
    with pytest.raises(ExportError, match=r"converter failed \(exit status 3\):\nunknown operator Foo"):
        export_model(exported.mlp(), X, "mnn", folder / "net")
    assert os.listdir(folder) == []


def test_a_runtime_that_crashes_or_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "runner.py"
    monkeypatch.setattr(mnn._mnn_process, "__file__", str(script))
    script.write_text("import os, sys\nprint('no such shape', file=sys.stderr, flush=True)\nos.abort()\n")
    with pytest.raises(ExportError, match=r"cannot run what it converted \(exit status -6\)\nno such shape"):
        mnn._Runner(tmp_path / "net.mnn")(X)
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(mnn, "_ANSWER_S", 0.2)
    runner = mnn._Runner(tmp_path / "net.mnn")
    with pytest.raises(ExportError, match="did not answer within 0 s"):
        runner(X)
    process = runner._process
    del runner
    assert process.poll() is not None, "it ends with the function"


def test_the_converter_finds_no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "look.py"
    script.write_text("import os, sys\nprint(repr(os.environ['PATH']), os.environ['HOME'])\nsys.exit(1)\n")
    monkeypatch.setattr(mnn._mnn_process, "__file__", str(script))
    with pytest.raises(ExportError, match=f"'' {Path(__import__('tempfile').gettempdir())}"):
        export_model(nn.Sequential(exported.mlp()), X, "mnn", tmp_path / "net")
