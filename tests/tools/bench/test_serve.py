"""``estdgm bench serve``: each runtime in a process of its own, and what was left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.tools.bench import _serve
from lightning_estdgm.tools.bench._serve import ServeConfig, measure_serving, serve_columns


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    arguments = ["--width", "64", "--tokens", "1", "--tokens", "4", "--runtime", "torch", "--runtime", "torch-csr"]
    arguments += ["--runtime", "packed", "--generated", "4", "--json", str(out)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "serve", *arguments])
    assert result.exit_code == 0, result.output
    assert "mlp of width 64, density 0.1, units of 16" in result.output
    assert "one token a step with a key-value cache" in result.output
    found = json.loads(out.read_text())
    assert [row["runtime"] for row in found["rows"]] == ["torch", "torch-csr", "packed"]
    assert found["left_out"] == []
    for row in found["rows"]:
        assert row["seconds"].keys() == {"1", "4"}
        assert min(row["seconds"].values()) > 0
        assert row["peak_bytes"] >= 0
    sizes = {row["runtime"]: row["file_bytes"] for row in found["rows"]}
    assert sizes["packed"] < 0.3 * sizes["torch"]
    assert found["generation"].keys() == {"torch", "packed"}


def test_what_cannot_be_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_serve, "find_spec", lambda name: None)
    config = ServeConfig(width=64, tokens=(1,), runtimes=("openvino-int8",), generated=0)
    result = measure_serving(config, lambda text: None)
    assert result["rows"] == []
    assert result["left_out"] == ["openvino-int8: openvino, nncf not installed"]
    assert result["generation"] is None
    assert serve_columns(result)[1] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "resnet"], "network: got 'resnet', expected mlp or gpt"),
        (["--width", "100"], "width: got 100, expected a multiple of 64"),
        (["--runtime", "tflite"], "runtimes: got tflite, expected some of torch"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["bench", "serve", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())
