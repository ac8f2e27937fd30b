"""``estdgm bench serve``: each runtime in a process of its own, and what was left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.tools.bench import _serve
from lightning_estdgm.tools.bench._goals import goals_columns, serve_goals
from lightning_estdgm.tools.bench._serve import ServeConfig, measure_serving, serve_columns
from lightning_estdgm.tools.bench._serve_process import example


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    arguments = ["--width", "64", "--tokens", "1", "--tokens", "4", "--runtime", "torch", "--runtime", "torch-csr"]
    arguments += ["--runtime", "packed", "--generated", "4", "--json", str(out)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "serve", *arguments])
    assert result.exit_code == 0, result.output
    assert "mlp of width 64, density 0.1, units of 16" in result.output
    assert "one token a step with a key-value cache" in result.output
    assert json.loads(out.read_text())["goals"] == [], "they are for one width"
    found = json.loads(out.read_text())["served"]
    assert [row["runtime"] for row in found["rows"]] == ["torch", "torch-csr", "packed"]
    assert found["left_out"] == []
    for row in found["rows"]:
        assert row["seconds"].keys() == {"1", "4"}
        assert min(row["seconds"].values()) > 0
        assert row["peak_bytes"] > 0, "of this process, not of the one that started it"
        assert row["peak_bytes"] < 100e6
    sizes = {row["runtime"]: row["file_bytes"] for row in found["rows"]}
    assert sizes["packed"] < 0.3 * sizes["torch"]
    weights = {row["runtime"]: row["weight_bytes"] for row in found["rows"]}
    assert weights["packed"] < 0.3 * weights["torch"]
    assert weights["torch-csr"] is None
    assert found["generation"].keys() == {"torch", "packed"}


def test_what_cannot_be_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_serve, "find_spec", lambda name: None)
    config = ServeConfig(width=64, tokens=(1,), runtimes=("openvino-int8",), generated=0)
    result = measure_serving(config, lambda text: None)
    assert result["rows"] == []
    assert result["left_out"] == [
        "openvino-int8: openvino, nncf not installed: pip install 'lightning-estdgm[openvino]'"
    ]
    assert result["generation"] is None
    assert serve_columns(result)[1] == []


def test_sequences_threads_and_types_of_values() -> None:
    runtimes = ("torch", "packed-twice", "packed-int8")
    config = ServeConfig("gpt", 64, tokens=(2, 8), runtimes=runtimes, generated=0, sequence=4, threads=1)
    result = measure_serving(config, lambda text: None)
    cores = len(os.sched_getaffinity(0))
    told = [] if cores > 1 else ["packed-twice: 2 threads, and 1 cores"]
    assert result["left_out"] == told
    assert [row["runtime"] for row in result["rows"]] == [r for r in runtimes if not told or r != "packed-twice"]
    assert example("gpt", 64, 8, 4).shape == (2, 4, 64)
    assert example("gpt", 64, 2, 4).shape == (1, 2, 64)


def served(block_size: int = 16, **seconds: float) -> dict[str, Any]:
    """A result of the width and density of the goals; each runtime has as many seconds at any number of tokens."""
    rows = [
        {
            "runtime": (runtime := name.replace("_", "-")),
            "seconds": dict.fromkeys(("1", "256"), s),
            "file_bytes": {"torch": 1000, "packed": 105}.get(runtime, 60),
            "weight_bytes": {"torch": 1000, "packed": 130}.get(runtime, 60),
        }
        for name, s in seconds.items()
    ]
    config = {
        "network": "mlp",
        "width": 1024,
        "density": 0.1,
        "threads": 1,
        "block_size": block_size,
        "tokens": [1, 256],
    }
    return {"config": config, "rows": rows, "cache_bytes": 2000}


def test_goals_are_checked_against_the_fastest_dense_runtime() -> None:
    times = {"torch": 10.0, "onnx": 7.0, "openvino_int8": 1.0, "packed": 1.0, "packed_bf16": 0.8, "packed_twice": 0.5}
    found = {goal["what"]: (goal["goal"], goal["measured"], goal["reached"]) for goal in serve_goals(served(**times))}
    assert found["mlp, units of 16, 1 token: times onnx, the fastest dense"] == (6.0, 7.0, True)
    assert found["mlp, units of 16, 256 tokens: times onnx, the fastest dense"] == (5.0, 7.0, True)
    assert found["mlp, units of 16, 1 token: bf16 values over fp32"] == (1.4, 1.25, False)
    assert found["mlp, units of 16, 256 tokens: two threads over one"] == (1.6, 2.0, True)
    assert found["mlp, units of 16: resident weights over dense"] == (0.12, 0.13, False)
    assert found["mlp, units of 16: file over dense"] == (0.11, 0.105, True)
    larger = serve_goals(served(**times) | {"cache_bytes": 500})
    assert (larger[0]["goal"], larger[0]["reached"]) == (9.0, False), "the dense weights exceed the cache"
    single = {goal["what"]: goal["goal"] for goal in serve_goals(served(1, **times))}
    assert single["mlp, units of 1, 1 token: times onnx, the fastest dense"] == 3.0
    assert single["mlp, units of 1: file over dense"] == 0.14
    assert ["at most 0.12", "0.130", "not reached: 8%"] in [
        line[2:] for line in goals_columns(serve_goals(served(**times)))[1]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "resnet"], "network: got 'resnet', expected mlp or gpt"),
        (["--width", "100"], "width: got 100, expected a multiple of 64"),
        (["--tokens", "300", "--sequence", "256"], "sequence: got 256, expected a divisor of each of tokens=(300,)"),
        (["--output", "serve.txt"], "expected a file name that ends in .json"),
        (["--runtime", "tflite"], "runtimes: got tflite, expected some of torch"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["bench", "serve", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())
