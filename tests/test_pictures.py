"""The pictures of the documentation: all are committed and used, and nothing in them collides."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """The program behind ``make pictures``."""
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "_site" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def figures(module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figures as they are saved, by the name of their file."""
    found: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("pictures")

    def finish(figure: Any, path: Path) -> None:
        module_finish(figure, path)
        found[path.name] = figure

    module_finish = module._finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_finish", finish)
        module.draw(folder)
    assert {path.name for path in folder.iterdir()} == found.keys()
    return found


def texts(figure: Any) -> list[tuple[str, Any]]:
    """Every text that is shown, with its box in pixels."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    beyond = set()  # labels of ticks outside what the axes show
    for axis in itertools.chain.from_iterable((axes.xaxis, axes.yaxis) for axes in figure.axes):
        low, high = sorted(axis.get_view_interval())
        beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    shown = [text for text in found if text not in beyond]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in shown]


def test_the_committed_pictures_are_those_that_are_drawn(module: ModuleType) -> None:
    assert {path.name for path in (DOCS / "pictures").iterdir()} == module.PICTURES.keys()


def test_each_picture_is_on_a_page(module: ModuleType) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *DOCS.rglob("*.md")])
    assert [name for name in module.PICTURES if f"pictures/{name}" not in pages] == []


def test_no_text_lies_on_another_or_beyond_the_edge(figures: dict[str, Any]) -> None:
    for name, figure in figures.items():
        found = texts(figure)
        assert len(found) > 5, name
        for text, box in found:
            assert figure.bbox.x0 - 1 <= box.x0, (name, text)
            assert box.x1 <= figure.bbox.x1 + 1, (name, text)
        for (one, its), (other, others) in itertools.combinations(found, 2):
            wide = min(its.x1, others.x1) - max(its.x0, others.x0)
            high = min(its.y1, others.y1) - max(its.y0, others.y0)
            assert wide <= 0 or high <= 1.5, (name, one, other)


def test_the_phases_are_named_over_the_density(figures: dict[str, Any]) -> None:
    axes = figures["cycle.png"].axes[0]
    names = [text.get_text() for text in axes.texts if text.get_gid() == "phase"]
    assert names == ["exploration", "consolidation", "refinement"]


def test_masks_of_the_three_units_have_one_density(figures: dict[str, Any]) -> None:
    shown = [np.asarray(axes.images[0].get_array()) for axes in figures["units.png"].axes]
    assert [mask.shape[0] for mask in shown] == [64, 64, 256]
    assert [mask.mean() for mask in shown] == [0.125] * 3
    blocks = shown[2].reshape(4, 64, 4, 64)
    assert (blocks.max((1, 3)) == blocks.min((1, 3))).all()


def test_losses_and_joules_are_those_of_the_committed_runs(figures: dict[str, Any]) -> None:
    runs = json.loads((DOCS / "results" / "demo.json").read_text())["runs"]
    lines = {line.get_label(): line.get_xydata() for line in figures["loss-over-joules.png"].axes[0].lines}
    for label, mode in (("dense", "dense"), ("EST-DGM", "dgm"), ("smaller dense", "small")):
        ends = [run["validation"][-1] for run in runs if run["mode"] == mode]
        expected = [np.mean([end["train_j"] for end in ends]), np.mean([end["loss"] for end in ends])]
        assert lines[label][-1] == pytest.approx(expected)
    label = figures["loss-over-joules.png"].axes[0].get_xlabel()
    assert ("estimated" in label) == any(run["energy"]["estimated_joules"] is not None for run in runs)


def test_speeds_are_the_best_of_the_committed_benchmark(module: ModuleType, figures: dict[str, Any]) -> None:
    folders = sorted({file.parent for file in DOCS.glob("benchmarks/*/kernels-units.json")})
    assert folders
    drawn = figures["layer-speed.png"].axes
    assert len(drawn) == len(folders)
    for folder, axes in zip(folders, drawn, strict=True):
        rows = [row for file in folder.glob("kernels-units.json") for row in json.loads(file.read_text())["rows"]]
        speeds = {round(row["speedup"], 6) for row in rows if row["speedup"] and row["block_size"]}
        shown = {round(float(y), 6) for line in axes.lines if line.get_label() != "dense" for y in line.get_ydata()}
        assert shown <= speeds
        assert folder.name in axes.get_title(loc="left")
