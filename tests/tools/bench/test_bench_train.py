"""``estdgm bench train`` and ``bench all``: from steps to a whole run, and files that agree."""

import json
import sys
import time
from dataclasses import replace
from functools import partial

import matplotlib.image
import pytest
import torch
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.energy.reading import Reading
from lightning_estdgm.energy.sources.cpu_estimate import CpuEstimate
from lightning_estdgm.method.schedules import EstDgm
from lightning_estdgm.tools.bench import suite
from lightning_estdgm.tools.bench.goals import train_goals
from lightning_estdgm.tools.bench.train import run
from lightning_estdgm.tools.bench.train.choice import TrainChoice, choose, quick_config
from lightning_estdgm.tools.bench.train.profile import PARTS, part_of, profile_train
from lightning_estdgm.tools.bench.train.run import measure_train, summarise
from lightning_estdgm.tools.bench.train.train_config import TrainConfig, compressed_schedule, fitting_layers
from lightning_estdgm.tools.bench.train.whole import PhaseTimes, Step, phase_times, whole_run
from lightning_estdgm.tools.bench.train.workloads import GptWorkload, ResNetWorkload, compile_blocks

TINY = TrainConfig(
    block_size=16,
    backend="cpu",
    device="cpu",
    densities=2,
    interval=7,
    observe_steps=4,
    dense_steps=2,
    rounds=2,
    profile_steps=1,
)
GPT = GptWorkload(width=64, layers=1, context=16, batch_size=2)
PHASES = ("exploration", "consolidation", "refinement")


# ---- arithmetic


def test_a_whole_run_adds_up_every_step_at_its_density():
    schedule = EstDgm().resolve(10_000)
    times = {name: PhaseTimes(((0.05, 0.05), (0.8, 0.8)), ((0.05, 2.0), (0.8, 2.0)), 30.0) for name in PHASES}
    phases = whole_run(times, schedule)
    plans = [schedule(step) for step in range(10_000)]
    assert [phases[name]["steps"] for name in PHASES] == [1500, 3500, 5000]
    assert sum(p["plain_s"] for p in phases.values()) == pytest.approx(sum(plan.density for plan in plans))
    assert sum(p["observed_steps"] for p in phases.values()) == sum(plan.observe for plan in plans)
    assert sum(p["observing_s"] for p in phases.values()) == pytest.approx(2.0 * sum(plan.observe for plan in plans))
    updates = sum(plan.update for plan in plans)
    assert sum(p["updates"] for p in phases.values()) == updates
    assert sum(p["updates_s"] for p in phases.values()) == pytest.approx(30.0 * updates)
    for phase in phases.values():
        assert phase["seconds"] == pytest.approx(phase["plain_s"] + phase["observing_s"] + phase["updates_s"])
    # About one window of 8 in 200 steps, but none in the frozen last quarter of refinement.
    assert phases["exploration"]["observed_steps"] == 8 * phases["exploration"]["updates"]
    assert phases["refinement"]["observed_steps"] < 0.8 * 5000 * 8 / 200


def steps_of(phase, density, plain_s, window_s=None, last_s=None, first_s=100.0):
    """Two slow first steps, two plain ones, and a window of four."""
    first = [Step(phase, density, False, False, age, first_s) for age in range(2)]
    plain = [Step(phase, density, False, False, 2 + i, plain_s) for i in range(2)]
    window = [] if window_s is None else [Step(phase, density, True, False, 4 + i, window_s) for i in range(3)]
    return first + plain + window + ([] if last_s is None else [Step(phase, density, True, True, 7, last_s)])


def test_phase_times_leave_first_steps_out_and_tell_windows_from_updates():
    steps = steps_of("exploration", 0.7, 2.0, 3.0, 7.0) + steps_of("exploration", 0.6, 1.0, 1.5, 5.5)
    found = phase_times(steps)["exploration"]
    assert found.plain_s == ((0.6, 1.0), (0.7, 2.0))
    assert found.observing_s == ((0.6, 0.5), (0.7, 1.0))
    assert found.update_s == 4.0


def test_a_window_without_its_update_does_not_count():
    steps = steps_of("refinement", 0.1, 1.0, 9.0)
    found = phase_times(steps)["refinement"]
    assert (found.observing_s, found.update_s) == ((), 0.0)


def test_a_window_that_compiles_first_costs_what_the_others_cost():
    steps = steps_of("exploration", 0.7, 2.0, 3.0, 7.0)
    steps[4] = Step("exploration", 0.7, True, False, 4, 60.0)
    assert phase_times(steps)["exploration"].observing_s == ((0.7, 1.0),)


def run_of_all_phases(factor=1.0):
    values = (("exploration", 0.6), ("consolidation", 0.3), ("refinement", 0.1))
    return [s for name, d in values for s in steps_of(name, d, factor * d, factor * (d + 0.01), factor * (d + 0.05))]


def test_a_summary_compares_the_same_steps_and_shows_each_round():
    dense = [[Step("dense", 1.0, False, False, age, s) for age in range(5)] for s in (1.0, 1.2, 1.4)]
    energy = {"watts": {"dense": 100.0, **dict.fromkeys(PHASES, 50.0)}, "sources": ["nvml"]}
    found = summarise(dense, [run_of_all_phases(), run_of_all_phases(2.0)], 256, energy)
    whole, phases = found["whole"], found["phases"]
    assert found["dense"]["step_s"] == 1.2
    assert found["dense"]["items_per_s"] == pytest.approx(256 / 1.2)
    assert whole["seconds"] == pytest.approx(sum(p["seconds"] for p in phases.values()))
    assert whole["dense_seconds"] == pytest.approx(1.2 * whole["steps"])
    assert whole["speedup"] == pytest.approx(whole["dense_seconds"] / whole["seconds"])
    assert whole["joules"] == pytest.approx(50.0 * whole["seconds"])
    assert whole["joules_ratio"] == pytest.approx(100 * whole["dense_seconds"] / (50 * whole["seconds"]))
    for phase in phases.values():
        assert phase["speedup"] == pytest.approx(1.2 * phase["steps"] / phase["seconds"])
        assert phase["items_per_s"] == pytest.approx(256 / phase["step_s"])
        assert phase["plain_speedup"] >= phase["speedup"]
    first, second = found["by_round"]
    assert (first["dense_step_s"], second["dense_step_s"]) == pytest.approx((1.1, 1.3))  # of their neighbours
    assert first["whole"] / 1.1 == pytest.approx(2 * second["whole"] / 1.3)
    assert found["one_off"]["run_s"] == pytest.approx(2 * (100 - 0.9))
    without = summarise(dense, [run_of_all_phases()], 256, None)
    assert without["energy"] == "no counter"
    assert without["whole"]["joules"] is None


def test_the_compressed_schedule_has_the_default_phases_densities_and_a_window_before_each_change():
    config = TrainConfig(device="cpu")
    schedule = compressed_schedule(config).resolve(3 * config.densities * config.interval)
    plans = [schedule(step) for step in range(schedule.total_steps)]
    assert [p.density for p in plans[:: config.interval]] == pytest.approx(
        [0.7, 0.65, 0.6, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1]
    )
    assert [p.phase for p in plans[:: config.interval]] == [name for name in PHASES for _ in range(3)]
    for index, plan in enumerate(plans[: -config.interval]):
        assert plan.observe == (index % config.interval >= config.interval - config.observe_steps)
    assert not any(plan.observe for plan in plans[-config.interval :])


def test_layers_follow_memory_and_time():
    assert fitting_layers(2048, 8192, 80e9, 10.0, 4e14) == (24, "as published models")
    layers, reason = fitting_layers(2048, 8192, 20e9, 10.0, 4e14)
    assert reason == "memory"
    assert layers * (12 * 2048**2 * 26 + 8192 * 2048 * 68) <= 0.8 * 20e9
    assert fitting_layers(1024, 1024, 8e9, 1.5, 1e11) == (1, "time")
    assert fitting_layers(4096, 1024, 2e9, 100.0, 1e11)[0] == 0
    said = []
    settings = {"context": 16, "batch": 2, "layers": 3}
    found = choose(TrainChoice(widths=(64, 128), **settings), TINY, said.append)
    assert found == [GptWorkload(64, 3, 16, 2), GptWorkload(128, 3, 16, 2), ResNetWorkload(224, 2)]
    assert "3 layers of 12 (as asked for)" in said[0]


# ---- real training


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

    monkeypatch.setattr(run, "compile_blocks", partial(compile_blocks, backend=count))
    found = measure_train(
        GptWorkload(width=64, layers=2, context=16, batch_size=2), replace(TINY, rounds=1, compiled=True)
    )
    torch.compiler.reset()
    assert found["mode"] == "compiled"
    assert 2 <= len(graphs) <= 6  # dense, sparse, and its windows; both blocks of a model share theirs


def test_the_profile_divides_a_step_without_rest():
    found = profile_train(GPT, TINY)
    for arm in found.values():
        assert set(arm["seconds"]) == set(PARTS)
        assert sum(arm["seconds"].values()) == pytest.approx(arm["wall_s"])
        assert sum(arm["share"].values()) == pytest.approx(1.0)
        assert min(arm["seconds"][p] for p in ("dense products", "attention", "optimizer")) > 0
    assert found["dense"]["seconds"]["sparse products"] == found["dense"]["seconds"]["masks"] == 0
    assert min(found["refinement"]["seconds"][p] for p in ("sparse products", "masks")) > 0


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::mm", "aten::linear", "[Strategy]training_step"], "dense products"),
        (["aten::addmm", "estdgm::masked_linear", "[Strategy]training_step"], "sparse products"),
        (["aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"], "attention"),
        (["aten::gelu", "[Strategy]training_step", "Optimizer.step#AdamW.step"], "norms, activations, loss"),
        (["aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimizer"),
        (["aten::add_", "Optimizer.step#SGD.step"], "optimizer"),
        (["aten::masked_fill_", "[Callback]DGMCallback, hook", "Optimizer.step#AdamW.step"], "masks"),
        (["Optimizer.step#AdamW.step"], "other"),
        (["aten::norm", "[LightningModule]ByteGPT.configure_gradient_clipping"], "optimizer"),
        (["cudaLaunchKernel"], "other"),
    ],
)
def test_operations_are_told_by_what_is_around_them(names, part):
    assert part_of(names) == part


# ---- commands

ARGUMENTS = (
    *("--quick", "--model", "gpt", "--width", "64", "--layers", "1", "--context", "16", "--batch", "2"),
    *("--block-size", "16", "--backend", "cpu", "--rounds", "1", "--interval", "7", "--profile-steps", "1"),
)


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


def test_the_page_shows_every_file_and_says_which_was_cut_off(folder):
    content = json.loads((folder / "train.json").read_text())
    cut = content | {"complete": False, "goals": train_goals(content["results"] * 0, None)}
    text = suite.page({"train": content, "train-cut": cut})
    assert text.count("## train") >= 2
    assert "train-cut - CUT OFF" in text
    assert f"`{content['command']}`, {content['date']}" in text
    whole = content["results"][0]["whole"]
    assert f"| {whole['speedup']:.2f}x |" in text
    assert "![train](train.png)" in text


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


def test_all_runs_each_part_once_and_goes_on_after_one_that_fails(tmp_path, monkeypatch):
    kernels = ("kernels", "--shape", "8x32x32", "--block-size", "16", "--density", "0.5", "--dtype", "float32")
    good = suite.Part("good", (*kernels, "--kind", "linear", "--rounds", "1", "--no-peers"))
    monkeypatch.setattr(suite, "parts", lambda quick: [suite.Part("bad", ("kernels", "--kind", "none")), good])
    arguments = ["bench", "all", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "bad: FAILED" in result.output
    written = (tmp_path / "good.json").read_text()
    assert "## good\n" in (tmp_path / "README.md").read_text()
    result = CliRunner().invoke(app, [*arguments, "--part", "good"])
    assert result.exit_code == 0
    assert "good: there already" in result.output
    (tmp_path / "good.json").write_text(written.replace('"complete": true', '"complete": false'))
    ran = []
    monkeypatch.setattr(suite.subprocess, "run", lambda command, check: ran.append(command) or check_ok())
    suite.run_parts([good], tmp_path, again=False, say=lambda text: None)  # cut off: measured anew
    (tmp_path / "good.json").write_text(written)
    suite.run_parts([good], tmp_path, again=True, say=lambda text: None)
    other = suite.Part("good", (*good.arguments, "--quick"))
    suite.run_parts([other], tmp_path, again=False, say=lambda text: None)  # other settings: measured anew
    assert len(ran) == 3
    assert ran[0][:4] == [sys.executable, "-m", "lightning_estdgm.cli", "bench"]
    result = CliRunner().invoke(app, [*arguments, "--part", "better"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "better" in result.output


def check_ok():
    return type("Done", (), {"returncode": 0})()


def test_parts_are_commands_that_exist():
    for quick in (False, True):
        found = suite.parts(quick)
        assert len({part.name for part in found}) == len(found)
        assert all(part.arguments[0] in ("kernels", "train") for part in found)
        assert all(("--quick" in part.arguments) == quick for part in found)
    assert quick_config(rounds=1).rounds == 1
