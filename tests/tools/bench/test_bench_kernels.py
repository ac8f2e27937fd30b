"""``estdgm bench kernels``: ratios agree with times, wrong results get no ratio; speed is no test's business."""

import json
from dataclasses import replace

import matplotlib.image
import pytest
import torch
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.sparse.backends.cpu import CPUBackend
from lightning_estdgm.sparse.topology import BlockTopology
from lightning_estdgm.tools.bench.goals import goals_columns, kernel_goals
from lightning_estdgm.tools.bench.kernels import peers, timing
from lightning_estdgm.tools.bench.kernels.convolution import conv_layers, conv_rows
from lightning_estdgm.tools.bench.kernels.kernels_config import KernelsConfig, quick_kernels
from lightning_estdgm.tools.bench.kernels.linear import linear_rows
from lightning_estdgm.tools.bench.kernels.report import draw_kernels, kernels_columns
from lightning_estdgm.tools.bench.kernels.rows import product_row, row

TINY = KernelsConfig(
    shapes=((24, 64, 32),),
    block_sizes=(16, 32),
    densities=(0.5, 1.0),
    dtypes=("float32",),
    most_layers=2,
    image_size=32,
    images=1,
    device="cpu",
    rounds=1,
)


def check_ratios(row, flops):
    """Every ratio of a row is the quotient of the times in it."""
    if row["dense_s"] is not None:
        assert row["speedup"] == pytest.approx(row["dense_s"] / row["sparse_s"])
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["density"])
    for product in filter(None, row["products"].values()):
        assert product["speedup"] == pytest.approx(product["dense_s"] / product["sparse_s"])
        assert product["dense_flop_per_s"] * product["dense_s"] == pytest.approx(flops)
        assert product["useful_flop_per_s"] * product["sparse_s"] == pytest.approx(flops * row["density"])
        assert product["efficiency"] == pytest.approx(product["useful_flop_per_s"] / product["dense_flop_per_s"])


def test_linear_rows_cover_the_grid_and_their_ratios_are_those_of_their_times():
    said = []
    rows = list(linear_rows(TINY, said.append))
    own = [r for r in rows if r["backend"] == "cpu"]
    assert {(r["block_size"], r["density"]) for r in own} == {(16, 0.5), (16, 1.0), (32, 0.5), (32, 1.0)}
    for found in rows:
        check_ratios(found, 2 * 24 * 64 * 32)
        assert not found["wrong"]
    for found in own:
        assert set(found["products"]) == {"Y", "dX", "dW"}
        assert all(found["products"].values())


def test_every_peer_is_measured_or_left_out_with_a_reason_once():
    said = []
    rows = list(linear_rows(TINY, said.append))
    for peer in peers.PEERS:
        mine = [r for r in rows if r["backend"] == peer.name]
        reasons = [text for text in said if text.startswith(f"{peer.name} left out: ")]
        assert bool(mine) != bool(reasons)
        for found in mine:  # what a peer does not offer, it says
            assert all(found["products"][p] or p in found["notes"] for p in ("Y", "dX", "dW"))
    assert len(said) == len(set(said))
    assert any(text.startswith("torch 2:4 left out: ") for text in said) == (not torch.cuda.is_available())
    assert not [r for r in linear_rows(replace(TINY, peers=False)) if r["backend"].startswith("torch")]


def test_two_four_keeps_the_two_larger_of_four(monkeypatch):
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: dense)
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0], [0.1, 0.2, -0.4, 0.3]])
    topology = BlockTopology.from_mask(torch.ones(1, 2, dtype=torch.bool), 2)
    _, pruned = peers.torch_two_four(peers.Weights(weight, topology))
    assert pruned.tolist() == torch.tensor([[0.0, -4.0, 3.0, 0.0], [0.0, 0.0, -0.4, 0.3]]).tolist()
    x, dy = torch.randn(3, 4), torch.randn(3, 2)
    found = peers.measure_peer(peers.PEERS[2], x, peers.Weights(weight, topology), dy, rounds=1)
    assert found.density == 0.5
    assert set(found.products) == {"Y", "dX", "dW"}


def test_a_wrong_product_gets_no_ratio(monkeypatch):
    right = CPUBackend.grad_weight
    monkeypatch.setattr(CPUBackend, "grad_weight", lambda *args: 1.01 * right(*args))
    assert CliRunner().invoke(app, ["bench", "kernels", *ARGUMENTS]).exit_code == 1
    rows = [r for r in linear_rows(replace(TINY, peers=False)) if r["backend"] == "cpu"]
    assert all(r["wrong"] and r["speedup"] is None and r["efficiency"] is None for r in rows)
    assert all(r["products"]["dW"]["efficiency"] is None for r in rows)
    assert all(r["products"]["Y"]["efficiency"] is not None for r in rows)
    head, cells = kernels_columns(rows)
    assert {line[head.index("speed-up")] for line in cells} == {"WRONG"}


def test_a_backend_that_raises_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no such instruction")

    monkeypatch.setattr(CPUBackend, "grad_input", fail)
    path = tmp_path / "kernels.json"
    result = CliRunner().invoke(app, ["bench", "kernels", *ARGUMENTS, "--output", str(path)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "OSError: no such instruction" in result.output
    rows = json.loads(path.read_text())["rows"]
    assert {r["backend"] for r in rows if "failed" in r["notes"]} == {"cpu"}
    assert all(r["speedup"] is None for r in rows if r["backend"] == "cpu")
    assert any(r["products"]["Y"] for r in rows if r["backend"] != "cpu")


def test_calls_on_a_gpu_lie_between_events_with_a_cold_cache(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")
            self.at = len(order)

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)

    cache = torch.ones(4)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))

    def call():
        assert cache.count_nonzero() == 0
        cache.fill_(1.0)
        order.append("call")

    assert timing._between_events(call, cache, 2) == [2.0, 2.0]
    assert order == ["event", "call", "event", "event", "call", "event", "wait"]


def test_the_convolutions_are_those_of_a_resnet50():
    layers = conv_layers(224)
    assert sum(layers.values()) == 52  # of 53, without the stem
    macs = 0
    for (out, inner, height, width, geometry), count in layers.items():
        out_h, out_w = geometry.output_size(height, width)
        macs += count * out * inner * geometry.kernel_size[0] * geometry.kernel_size[1] * out_h * out_w
    stem, head = 64 * 3 * 49 * 112**2, 2048 * 1000
    assert macs + stem + head == pytest.approx(4.09e9, rel=0.005)  # as published for v1.5


def test_convolution_rows_have_their_geometry_and_ratios():
    rows = list(conv_rows(replace(TINY, densities=(0.5,))))
    assert {tuple(r["kernel_size"]) for r in rows} >= {(3, 3)}
    assert all(r["products"][p] and r["dense_s"] for r in rows for p in ("Y", "dX", "dW"))
    for found in rows:
        taps = found["kernel_size"][0] * found["kernel_size"][1]
        pixels = (found["height"] // found["stride"][0]) ** 2
        check_ratios(found, 2 * pixels * taps * found["out_channels"] * found["in_channels"])
        assert not found["wrong"]
        assert found["count"] >= 1


def test_a_density_of_less_than_one_block_is_left_out():
    said = []
    rows = list(conv_rows(replace(TINY, block_sizes=(32,), densities=(0.001, 1.0), most_layers=1), said.append))
    assert {row["density"] for row in rows} == {1.0}
    assert any("density 0.001: it has" in text for text in said)


def test_calls_take_turns_after_one_to_warm_up(monkeypatch):
    order = []
    ticks = iter([0.0, 5.0, 10.0, 11.0, 20.0, 23.0, 30.0, 37.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert timing.take_turns(calls, torch.device("cpu"), rounds=2) == {"a": 3.0, "b": 1.0}
    assert order == ["a", "b", "a", "b", "a", "b"]


def goal_row(block_size, density, efficiency, backend="triton", **changes):
    shape = {"tokens": 8192, "out_features": 4096, "in_features": 4096} | changes
    product = product_row(1.0, density / efficiency, 1e9, density, 0.0, False)
    products = dict.fromkeys(("Y", "dX", "dW"), product)
    seconds = (1.0, density / efficiency)
    return row("linear", shape, torch.bfloat16, block_size, density, backend, seconds, products)


def test_goals_of_an_h100_are_checked_product_by_product():
    rows = [goal_row(128, 0.25, 0.9), goal_row(128, 0.125, 0.8), goal_row(32, 0.125, 0.13), goal_row(16, 0.125, 1)]
    rows.append(goal_row(64, 0.25, 0.9, backend="torch BSR"))  # a peer reaches none of our goals
    goals = kernel_goals(rows, "NVIDIA H100 80GB HBM3")
    assert [(g["goal"], g["reached"]) for g in goals] == [(0.85, True)] * 3 + [(0.85, False)] * 3 + [(1.0, True)]
    assert "not reached: -6%" in [line[-1] for line in goals_columns(goals)[1]]
    assert kernel_goals(rows, "NVIDIA A100") == []
    small = goal_row(64, 0.25, 0.71, tokens=2048, out_features=1024, in_features=1024)
    assert [(g["goal"], g["reached"]) for g in kernel_goals([small], None)] == [(0.7, True)]


def test_defaults_of_a_gpu_hold_the_shapes_of_the_goals():
    for config in (KernelsConfig(device="cuda"), quick_kernels("cuda")):
        assert {(8192, 4096, 4096), (8192, 2048, 2048)} <= set(config.shapes)
        assert "bfloat16" in config.dtypes
        assert {32, 64, 128} <= set(config.block_sizes)
        assert {0.125, 0.25} <= set(config.densities)


ARGUMENTS = (
    *("--shape", "24x64x32", "--block-size", "16", "--density", "0.25", "--density", "0.5", "--dtype", "float32"),
    *("--rounds", "1", "--kind", "linear"),
)


def test_the_command_writes_json_and_a_picture(tmp_path):
    path = tmp_path / "new" / "kernels.json"
    result = CliRunner().invoke(app, ["bench", "kernels", *ARGUMENTS, "--output", str(path)])
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    assert content["complete"] is True
    assert content["environment"]["cpu"]
    assert content["date"][:2] == "20"
    assert content["timing"] == timing.METHOD["cpu"]
    assert any(text.startswith("torch 2:4") for text in content["left_out"]) or torch.cuda.is_available()
    for found in content["rows"]:
        assert found["speedup"] is None or found["speedup"] == pytest.approx(found["dense_s"] / found["sparse_s"])
    picture = matplotlib.image.imread(path.with_suffix(".png"))
    assert len({tuple(pixel) for pixel in picture[::3, ::3].reshape(-1, picture.shape[2]).tolist()}) > 20


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--kind", "attention"], ["attention", "convolution"]),
        (["--shape", "24x64"], ["24x64", "TOKENSxOUTxIN"]),
        (["--shape", "24x60x32", "--block-size", "16"], ["60", "16"]),
        (["--density", "0"], ["0.0", "(0, 1]"]),
        (["--dtype", "int8"], ["int8", "float32"]),
        (["--dtype", "float3"], ["float3", "float32"]),
        (["--images", "-1"], ["-1", "at least 1"]),
        (["--output", "x.png"], ["x.png", ".json"]),
    ],
)
def test_bad_flags_are_refused_with_what_was_got_and_expected(arguments, names):
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert all(name in result.output for name in names)


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        draw_kernels([], tmp_path / "x.png", "here")
