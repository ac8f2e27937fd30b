"""``estdgm bench kernels``: ratios agree with times, wrong results get no ratio; speed is no test's business."""

import json
from dataclasses import replace

import matplotlib.image
import pytest
import torch
from typer.testing import CliRunner

from helpers.bench_cases import TINY_KERNELS
from lightning_estdgm.cli import app
from lightning_estdgm.method._masks import size_entry
from lightning_estdgm.sparse.backends.cpu import CPUBackend
from lightning_estdgm.tools.bench.kernels import _timing as timing
from lightning_estdgm.tools.bench.kernels._convolution import conv_layers, conv_rows
from lightning_estdgm.tools.bench.kernels._linear import linear_rows
from lightning_estdgm.tools.bench.kernels._report import draw_kernels, kernels_columns


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
    rows = list(linear_rows(TINY_KERNELS, said.append))
    own = [r for r in rows if r["backend"] == "cpu"]
    assert {(r["block_size"], r["density"]) for r in own} == {(16, 0.5), (16, 1.0), (32, 0.5), (32, 1.0)}
    for found in rows:
        check_ratios(found, 2 * 24 * 64 * 32)
        assert not found["wrong"]
    for found in own:
        assert set(found["products"]) == {"Y", "dX", "dW"}
        assert all(found["products"].values())


def test_a_wrong_product_gets_no_ratio(monkeypatch):
    right = CPUBackend.grad_weight
    monkeypatch.setattr(CPUBackend, "grad_weight", lambda *args: 1.01 * right(*args))
    assert CliRunner().invoke(app, ["bench", "kernels", *ARGUMENTS]).exit_code == 1
    rows = [r for r in linear_rows(replace(TINY_KERNELS, peers=False)) if r["backend"] == "cpu"]
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
    rows = list(conv_rows(replace(TINY_KERNELS, densities=(0.5,))))
    assert {tuple(r["kernel_size"]) for r in rows} >= {(3, 3)}
    assert all(r["products"][p] and r["dense_s"] for r in rows for p in ("Y", "dX", "dW"))
    for found in rows:
        taps = found["kernel_size"][0] * found["kernel_size"][1]
        pixels = (found["height"] // found["stride"][0]) ** 2
        check_ratios(found, 2 * pixels * taps * found["out_channels"] * found["in_channels"])
        assert not found["wrong"]
        assert found["count"] >= 1


def test_convolutions_are_measured_on_fine_units_and_single_weights():
    units = (1, (4, 1), 4)
    rows = list(conv_rows(replace(TINY_KERNELS, block_sizes=units, densities=(0.1,), most_layers=1)))
    assert {row["backend"] for row in rows} == {"native"}
    assert [row["block_size"] for row in rows] == [size_entry(unit) for unit in units]
    assert not any(row["wrong"] for row in rows)
    assert all(row["density"] == pytest.approx(0.1, rel=0.02) for row in rows)  # of single weights, taps are drawn


def test_a_density_of_less_than_one_block_is_left_out():
    said = []
    rows = list(conv_rows(replace(TINY_KERNELS, block_sizes=(32,), densities=(0.001, 1.0), most_layers=1), said.append))
    assert {row["density"] for row in rows} == {1.0}
    assert any("density 0.001: it has" in text for text in said)


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
