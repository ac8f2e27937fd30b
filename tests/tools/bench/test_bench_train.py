"""``estdgm bench train``: real runs are timed, and the command leaves what it measured."""

import json
import time
from dataclasses import replace
from functools import partial

import matplotlib.image
import pytest
import torch
from typer.testing import CliRunner

from helpers.bench_cases import ARGUMENTS, GPT, PHASES, TINY
from lightning_estdgm.cli import app
from lightning_estdgm.energy._reading import Reading
from lightning_estdgm.energy.sources.cpu_estimate import CpuEstimate
from lightning_estdgm.tools.bench.train import _run as run
from lightning_estdgm.tools.bench.train import _single_run as single_run
from lightning_estdgm.tools.bench.train._run import measure_train
from lightning_estdgm.tools.bench.train._workloads import GptWorkload, ResNetWorkload, compile_blocks


@pytest.fixture(scope="module")
def measured():
    return measure_train(GPT, TINY)


def test_real_runs_are_timed_phase_by_phase(measured):
    assert len(measured["by_round"]) == 2
    assert set(measured["phases"]) == set(PHASES)
    for phase in measured["phases"].values():
        assert phase["speedup"] == pytest.approx(measured["dense"]["step_s"] / phase["step_s"])
        assert len(phase["measured"]["plain_s"]) == 2
    assert measured["whole"]["steps"] == 10_000
    assert measured["workload"]["items_per_step"] == 32
    assert {d["backend"] for d in measured["decisions"] if d["masked"]} == {"cpu"}


class Steady(CpuEstimate):
    """A counter that shows 100 W at all times."""

    name, method = "steady", "counter"

    def read(self, devices=None):
        now_ns = time.monotonic_ns()
        return {device: Reading(now_ns, energy_uj=now_ns // 10) for device in self.devices()}


def test_joules_come_from_a_counter_where_there_is_one(monkeypatch):
    monkeypatch.setattr(run, "counters", lambda: [Steady()])
    found = measure_train(GPT, TINY)
    assert found["energy"] == ["steady"]
    for part in (found["dense"], *found["phases"].values()):
        assert part["watts"] == pytest.approx(100, rel=0.02)
    assert found["whole"]["joules"] == pytest.approx(100 * found["whole"]["seconds"], rel=0.02)


def test_a_resnet_is_trained_too_its_stem_dense_where_blocks_are_forced():
    small = ResNetWorkload(image_size=32, batch_size=2, blocks=(1, 1, 1, 1), width=16)
    found = measure_train(small, replace(TINY, rounds=1))
    assert found["workload"]["unit"] == "images"
    assert [d["name"] for d in found["decisions"] if not d["masked"]] == ["model.conv1", "model.fc"]


def test_compiled_blocks_are_compiled_and_stay_so_at_all_densities(monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(single_run, "compile_blocks", partial(compile_blocks, backend=count))
    found = measure_train(
        GptWorkload(width=64, layers=2, context=16, batch_size=2), replace(TINY, rounds=1, compiled=True)
    )
    torch.compiler.reset()
    assert found["mode"] == "compiled"
    assert 2 <= len(graphs) <= 6  # dense, sparse, and its windows; both blocks of a model share theirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command leaves, and a part of the suite that was cut off."""
    folder = tmp_path_factory.mktemp("train")
    result = CliRunner().invoke(app, ["bench", "train", *ARGUMENTS, "--output", str(folder / "train.json")])
    assert result.exit_code == 0, result.output
    assert "sparse products" in result.output
    assert "no counter" in result.output or "joules: by" in result.output
    return folder


def test_the_command_writes_json_and_a_picture(folder):
    content = json.loads((folder / "train.json").read_text())
    assert content["complete"] is True
    (result,) = content["results"]
    assert result["whole"]["speedup"] == pytest.approx(
        result["whole"]["dense_seconds"] / result["whole"]["seconds"], rel=1e-5
    )
    assert set(result["profile"]) == {"dense", "refinement"}
    picture = matplotlib.image.imread(folder / "train.png")
    assert len({tuple(pixel) for pixel in picture[::3, ::3].reshape(-1, picture.shape[2]).tolist()}) > 20


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model", "bert"], ["bert", "resnet50"]),
        (["--width", "100", "--layers", "1"], ["100", "multiple"]),
        (["--layers", "0", "--batch", "-2"], ["expected at least 1"]),
        (["--interval", "3"], ["3", "at least"]),
        (["--rounds", "0"], ["rounds", "0"]),
        (["--minutes", "-1"], ["-60", "more than 0"]),
        (["--backend", "cuda"], ["cuda", "native"]),
        (["--block-size", "17"], ["17"]),
        (["--output", "."], ["'.'", ".json"]),
    ],
)
def test_bad_flags_are_refused_with_what_was_got_and_expected(arguments, names):
    result = CliRunner().invoke(app, ["bench", "train", "--quick", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert all(name in result.output for name in names)
