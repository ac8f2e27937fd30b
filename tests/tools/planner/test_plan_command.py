"""`estdgm plan`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.tools.planner._gpt_sizes import gpt
from lightning_estdgm.tools.planner._model_plan import plan_model
from lightning_estdgm.tools.planner._planned_model import load_model
from lightning_estdgm.tools.planner._setup import TrainingSetup

DOC = Path(__file__).parents[3] / "docs" / "guides" / "scaling.md"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "160"})


def test_the_command_of_the_readme_prints_layers_memory_traffic_and_work(tmp_path: Path) -> None:
    done = run("--params", "13e9", "--gpus", "8", "--density", "0.1", "--json", str(tmp_path / "plan.json"))
    assert done.exit_code == 0, done.output
    for text in ("12,851,543,040 parameters", "blocks.0.query ... blocks.39.proj", "128 x 128", "0.133 to 0.134"):
        assert text in done.output
    for text in (
        "DDP, 8 GPUs",
        "2-D, 4 x 2 GPUs",
        "observation window",
        "ring, EST-DGM",
        "calculated, not measured",
    ):
        assert text in done.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["calculated"] is True
    expected = plan_model(gpt(13e9), TrainingSetup())
    assert written["strategies"].keys() == expected["strategies"].keys()
    for name, numbers in expected["strategies"].items():
        assert written["strategies"][name]["memory_bytes"] == pytest.approx(numbers["memory_bytes"], rel=1e-6)
    assert f"{expected['strategies']['fsdp2']['memory_bytes']['gathered'] / 1e9:.3g} GB" in done.output


def test_options_reach_the_plan(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = run(
        "--model", "test_plan_command:make_small", "--gpus", "6", "--density", "0.25", "--strategy", "2d",
        "--tensor-parallel", "3", "--precision", "bf16-true", "--optimizer", "sgd", "--block-size", "16",
        "--distribution", "uniform", "--tokens", "64", "--update-every", "20", "--observe-steps", "2",
        "--json", str(out),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert written["setup"] == {
        "gpus": 6, "density": 0.25, "tensor_parallel": 3, "precision": "bf16-true", "optimizer": "sgd",
        "block_size": 16, "distribution": "uniform", "tokens": 64, "update_every": 20, "observe_steps": 2,
    }  # fmt: skip
    (numbers,) = written["strategies"].values()
    assert [layer["name"] for layer in numbers["layers"]] == ["0", "2"]
    assert numbers["layers"][0]["density"] == 0.25
    assert "all-reduce of activations" not in numbers["traffic_bytes_per_step"], "its width is not known"


def make_small() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def make_nothing() -> int:
    return 3


def make_by_argument(width: int) -> nn.Module:
    return nn.Linear(width, width)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --params and --model"),
        (["--params", "1e9", "--model", "a:b"], "expected one of --params and --model"),
        (["--params", "0"], "params must be a positive number such as 13e9, got 0.0"),
        (["--params", "-1e9"], "params must be a positive number such as 13e9, got -1000000000.0"),
        (["--params", "nan"], "params must be a positive number such as 13e9, got nan"),
        (["--params", "1e6"], "params must be at least"),
        (["--params", "many"], "Invalid value for '--params'"),  # the rest is typer's, and differs by version
        (["--params", "1e9", "--density", "0"], "density must lie in (0, 1], got 0.0"),
        (["--params", "1e9", "--density", "1.5"], "density must lie in (0, 1], got 1.5"),
        (["--params", "1e9", "--gpus", "0"], "gpus must be at least 1, got 0"),
        (["--params", "1e9", "--gpus", "9"], "tensor_parallel=2 does not divide gpus=9"),
        (["--params", "1e9", "--strategy", "deepspeed"], "must be one of ('ddp', 'fsdp2', '2d'), got 'deepspeed'"),
        (["--params", "1e9", "--precision", "16"], "precision must be one of"),
        (["--params", "1e9", "--optimizer", "adam"], "optimizer must be one of"),
        (["--params", "1e9", "--distribution", "even"], "distribution must be one of"),
        (
            ["--params", "1e9", "--block-size", "48"],
            "block_size must be 'auto', 'finest', 'fastest' or one of (1, (2, 1),",
        ),
        (["--params", "1e9", "--observe-steps", "300"], "observe_steps must not exceed update_every, got 300 and 200"),
        (["--model", "test_plan_command:make_small", "--block-size", "128"], "Units(size=128) does not fit layer '0'"),
        (["--model", "test_plan_command"], "model must be given as package.module:factory, got 'test_plan_command'"),
        (["--model", "no.such.module:x"], "model 'no.such.module:x' cannot be found: No module named 'no'"),
        (["--model", "test_plan_command:missing"], "model 'test_plan_command:missing' cannot be found"),
        (["--model", "test_plan_command:make_nothing"], "must make an nn.Module, got int"),
        (["--model", "test_plan_command:make_by_argument"], "cannot be made without arguments: TypeError"),
        (["--model", "torch.nn:ReLU"], "the model has no layer to mask"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    text = " ".join(done.output.replace("│", " ").split())
    assert message in text


def test_load_model_makes_no_storage() -> None:
    assert {p.device.type for p in load_model("test_plan_command:make_small").parameters()} == {"meta"}


def test_the_tables_of_the_document_are_those_the_command_prints() -> None:
    """If not: put the output of ``estdgm plan --scaling`` between the two comments."""
    text = DOC.read_text(encoding="utf-8")
    _, _, rest = text.partition("<!-- estdgm plan --scaling -->\n")
    tables, end, _ = rest.partition("\n<!-- end -->")
    assert end
    assert tables.strip() == run("--scaling").output.strip()
