"""Plans: the model that is counted, the limits of the formulas, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lightning_estdgm import DGMConfig, DGMController
from lightning_estdgm.cli import app
from lightning_estdgm.config import Units
from lightning_estdgm.recipes import ByteGPT
from lightning_estdgm.tools.planner.plan import (
    GPT_SIZES,
    STRATEGIES,
    Setup,
    gpt,
    gpt_shape,
    inspect,
    load_model,
    memory,
    plan,
    traffic,
    update_cost,
)

DOC = Path(__file__).parents[3] / "docs" / "scaling.md"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "160"})


# --------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize(("name", "parameters"), [("125M", 125e6), ("350M", 350e6), ("1.3B", 1.3e9), ("13B", 13e9)])
def test_a_gpt_of_a_published_size_has_its_shape_and_about_its_parameters(name: str, parameters: float) -> None:
    assert gpt_shape(parameters) == GPT_SIZES[name]
    model = gpt(parameters)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)


@pytest.mark.parametrize("parameters", [60e6, 200e6, 20e9, 30e9, 70e9, 150e9])
def test_a_gpt_of_another_size_has_as_many_blocks_as_it_takes(parameters: float) -> None:
    _, width = gpt_shape(parameters)
    assert width in {w for _, w in GPT_SIZES.values()}
    counted = sum(p.numel() for p in gpt(parameters).parameters())
    one_block = 12 * width**2
    assert abs(counted - parameters) < max(0.08 * parameters, one_block)


@pytest.mark.parametrize("block_size", ["auto", 1, 16])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_layers_units_and_densities_are_those_of_a_run(block_size: Any, distribution: str) -> None:
    """The same model, made and masked by the controller."""
    model = ByteGPT(width=128, layers=2, heads=2, context=16)
    setup = Setup(density=0.7, block_size=block_size, distribution=distribution)
    planned = inspect(model, setup)
    config = DGMConfig(units=Units(size=block_size, distribution=distribution))
    with DGMController(model, torch.optim.SGD(model.parameters(), lr=0.1), config, total_steps=1000) as dgm:
        decided = dgm.decisions()
    assert [x.name for x in planned.layers] == [d.name for d in decided]
    for layer, decision in zip(planned.layers, decided, strict=True):
        assert layer.shape == decision.shape
        assert layer.weights == math.prod(decision.shape)
        assert layer.block_size == decision.block_size
        assert layer.density == decision.density
    assert planned.masked_weights == sum(math.prod(d.shape) for d in decided if d.masked)


def test_layers_of_a_user_s_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 64, 3),
            nn.Linear(256, 768),
            nn.MultiheadAttention(128, 2),
            nn.Conv2d(128, 256, 3),
            nn.Conv2d(256, 256, 3, groups=4),
            nn.Linear(256, 10),
        )
    found = inspect(model, Setup(density=0.5))
    planned = {layer.name: layer for layer in found.layers}
    names = ("0", "1", "2", "2.out_proj", "3", "4", "5")
    assert [planned[n].block_size for n in names] == [1, 32, 1, 1, 16, 1, 0]
    assert (planned["3"].units, planned["3"].has_operator) == (8 * 16, True)
    assert (planned["4"].has_operator, planned["4"].why) == (False, "grouped convolution: no sparse operator")
    lists = [2 * 24 * 8 + 24 + 8 + 2, 2 * 16 * 8 + 16 + 8 + 2]  # of the linear layer and the convolution
    assert memory(found, Setup(gpus=1, density=0.5), "ddp")["block index lists"] == 4 * sum(lists)
    assert planned["2"].parts == 3
    assert planned["5"].why == "output head"
    total = sum(x.weights for x in planned.values() if x.block_size)
    assert sum(x.active_weights for x in planned.values() if x.block_size) == pytest.approx(total / 2, abs=32 * 32)


def test_units_of_the_2d_plan_are_single_weights_but_where_blocks_are_asked_for() -> None:
    model = gpt(125e6)
    assert {x.block_size for x in inspect(model, Setup(), "2d").masked} == {1}
    assert {x.block_size for x in inspect(model, Setup(block_size=16), "2d").masked} == {16}
    assert not any(x.has_operator for x in inspect(model, Setup(block_size=16), "2d").masked)
    assert {x.block_size for x in inspect(model, Setup(tensor_parallel=1), "2d").masked} == {64}


# --------------------------------------------------------------------------- limits of the formulas


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gpu_sends_nothing(strategy: str) -> None:
    setup = Setup(gpus=1, tensor_parallel=1)
    model = inspect(gpt(125e6), setup, strategy)
    assert traffic(model, setup, strategy) == {}
    cost = update_cost(model, setup, strategy)
    assert [cost[name] for name in cost if name.startswith("sent")] == [0.0] * 3
    held = memory(model, setup, strategy)
    assert held["gathered"] == held["DDP's buckets"] == 0.0
    assert held["weights"] == 4.0 * model.parameters


def test_more_gpus_hold_less_each_and_send_no_less() -> None:
    module = gpt(1.3e9)
    eight, many = Setup(gpus=8), Setup(gpus=64)
    for strategy in ("fsdp2", "2d"):
        held = [memory(inspect(module, s, strategy), s, strategy) for s in (eight, many)]
        assert held[1]["optimizer state"] == held[0]["optimizer state"] / 8
        assert held[1]["observation window"] < held[0]["observation window"]
    sent = [traffic(inspect(module, s), s, "ddp")["ring, dense"] for s in (eight, many)]
    assert sent == pytest.approx([2 * 7 / 8 * 4 * 1_315_280_896, 2 * 63 / 64 * 4 * 1_315_280_896])


def test_a_dense_mask_needs_no_weights_of_before_and_saves_no_traffic() -> None:
    setup = Setup(density=1.0)
    model = inspect(gpt(125e6), setup)
    assert memory(model, setup, "ddp")["weights before the step"] == 0.0
    sent = traffic(model, setup, "ddp")
    assert sent["all-reduce, active units"] == sent["all-reduce, dense"] == sent["all-reduce, mean"]
    assert update_cost(model, setup, "ddp")["FLOPs of observing"] == 0.0


def test_low_precision_and_optimizers_without_state_hold_less() -> None:
    def held(**settings: Any) -> dict[str, float]:
        setup = Setup(**settings)
        return memory(inspect(gpt(125e6), setup), setup, "ddp")

    full = held()
    assert held(precision="bf16-mixed") == full
    low = held(precision="bf16-true")
    assert low["weights"] == full["weights"] / 2
    assert low["observation window"] == full["observation window"]
    assert held(optimizer="sgd")["optimizer state"] == 0.0
    assert held(optimizer="sgd-momentum")["optimizer state"] == full["optimizer state"] / 2


# --------------------------------------------------------------------------- the command


def test_the_command_of_the_readme_prints_layers_memory_traffic_and_work(tmp_path: Path) -> None:
    done = run("--params", "13e9", "--gpus", "8", "--density", "0.1", "--json", str(tmp_path / "plan.json"))
    assert done.exit_code == 0, done.output
    for text in ("12,851,543,040 parameters", "blocks.0.query ... blocks.39.proj", "128 x 128", "0.133 to 0.134"):
        assert text in done.output
    for text in (
        "DDP, 8 GPUs",
        "2-D, 4 x 2 GPUs",
        "weights before the step",
        "ring, EST-DGM",
        "calculated, not measured",
    ):
        assert text in done.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["calculated"] is True
    expected = plan(gpt(13e9), Setup())
    assert written["strategies"].keys() == expected["strategies"].keys()
    for name, numbers in expected["strategies"].items():
        assert written["strategies"][name]["memory_bytes"] == pytest.approx(numbers["memory_bytes"], rel=1e-6)
    assert f"{expected['strategies']['fsdp2']['memory_bytes']['gathered'] / 1e9:.3g} GB" in done.output


def test_options_reach_the_plan(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = run(
        "--model", "test_plan:make_small", "--gpus", "6", "--density", "0.25", "--strategy", "2d", "--tensor-parallel",
        "3", "--precision", "bf16-true", "--optimizer", "sgd", "--block-size", "16", "--distribution", "uniform",
        "--tokens", "64", "--update-every", "20", "--observe-steps", "2", "--json", str(out),
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
        (["--params", "many"], "unable to parse string as a number"),
        (["--params", "1e9", "--density", "0"], "density must lie in (0, 1], got 0.0"),
        (["--params", "1e9", "--density", "1.5"], "density must lie in (0, 1], got 1.5"),
        (["--params", "1e9", "--gpus", "0"], "gpus must be at least 1, got 0"),
        (["--params", "1e9", "--gpus", "9"], "tensor_parallel=2 does not divide gpus=9"),
        (["--params", "1e9", "--strategy", "deepspeed"], "must be one of ('ddp', 'fsdp2', '2d'), got 'deepspeed'"),
        (["--params", "1e9", "--precision", "16"], "precision must be one of"),
        (["--params", "1e9", "--optimizer", "adam"], "optimizer must be one of"),
        (["--params", "1e9", "--distribution", "even"], "distribution must be one of"),
        (["--params", "1e9", "--block-size", "48"], "block_size must be 'auto', 1 or one of (16, 32, 64, 128), got 48"),
        (["--params", "1e9", "--observe-steps", "300"], "observe_steps must not exceed update_every, got 300 and 200"),
        (["--model", "test_plan:make_small", "--block-size", "128"], "block_size=128 does not fit layer '0'"),
        (["--model", "test_plan"], "model must be given as package.module:factory, got 'test_plan'"),
        (["--model", "no.such.module:x"], "model 'no.such.module:x' cannot be found: No module named 'no'"),
        (["--model", "test_plan:missing"], "model 'test_plan:missing' cannot be found"),
        (["--model", "test_plan:make_nothing"], "must make an nn.Module, got int"),
        (["--model", "test_plan:make_by_argument"], "cannot be made without arguments: TypeError"),
        (["--model", "torch.nn:ReLU"], "the model has no layer to mask"),
    ],
)
def test_bad_input_is_named(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    text = " ".join(done.output.replace("│", " ").split())
    assert message in text


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"gpus must be an int, got 8\.0"):
        Setup(gpus=8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strategy must be one of"):
        memory(inspect(gpt(125e6), Setup()), Setup(), "zero")


def test_load_model_makes_no_storage() -> None:
    assert {p.device.type for p in load_model("test_plan:make_small").parameters()} == {"meta"}


def test_the_tables_of_the_document_are_those_the_command_prints() -> None:
    """If not: put the output of ``estdgm plan --scaling`` between the two comments."""
    text = DOC.read_text(encoding="utf-8")
    _, _, rest = text.partition("<!-- estdgm plan --scaling -->\n")
    tables, end, _ = rest.partition("\n<!-- end -->")
    assert end
    assert tables.strip() == run("--scaling").output.strip()
