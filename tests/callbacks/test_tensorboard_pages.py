"""TensorBoard's own pages, from a real server in a real browser, on a dense and a sparse run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from playwright.sync_api import Browser, Page

from helpers.energy_runs import trainer
from lightning_estdgm import DGMCallback, DGMConfig, EnergyMonitor, Units
from lightning_estdgm.recipes import ByteGPT, StdlibText

PATIENCE_MS = 120_000.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Train twice, then serve; give the address."""
    root = tmp_path_factory.mktemp("tensorboard")
    for name in ("dense", "sparse"):
        callbacks = [EnergyMonitor(["cpu-estimate"])]
        if name == "sparse":
            callbacks.insert(0, DGMCallback(DGMConfig(units=Units(size=16), backend="dense")))
        logger = TensorBoardLogger(root, name="", version=name, default_hp_metric=False)
        model = ByteGPT(width=64, layers=1, heads=2, context=16, lr=0.003)
        fit = trainer(root, *callbacks, logger=logger, max_epochs=None, max_steps=20, limit_val_batches=0)
        fit.fit(model, StdlibText(context=16, batch_size=2))
        logger.finalize("success")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(root), "--port", "0", "--load_fast", "false"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as board:
        assert board.stderr is not None
        said = ""
        for line in board.stderr:  # ends where the server does
            said += line
            if found := re.search(r"http://localhost:\d+/", line):
                yield found[0]
                break
        else:
            if "No module named 'pkg_resources'" in said:
                pytest.skip("TensorBoard 2.15 needs setuptools before 82, which had pkg_resources, and asks for none")
            pytest.fail(f"TensorBoard did not start: {said}")
        board.kill()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    errors: list[Any] = []
    page.on("pageerror", lambda error: errors.append(error))
    yield page
    page.close()
    assert errors == []


def test_energy_by_phase_of_both_runs_comes_first(server: str, page: Page) -> None:
    page.goto(f"{server}#custom_scalars")
    matches = page.get_by_text("Matches (")
    first = page.get_by_text("Joules by phase")
    first.wait_for()
    matches.first.wait_for()
    assert page.get_by_text("Watts by GPU").count() == 0  # no GPU was read, and its chart would be empty
    places = {title: page.get_by_text(title, exact=True).bounding_box() for title in ("Joules by phase", "Joules")}
    assert places["Joules by phase"]["x"] < places["Joules"]["x"]  # side by side, and it is the left one
    assert places["Joules by phase"]["y"] == places["Joules"]["y"]
    matches.first.click()
    phases = page.get_by_text("energy/phase/")
    phases.first.wait_for(state="attached")  # the list of one of the charts may be folded
    shown = {word for text in phases.all_text_contents() for word in text.split()}
    names = ("train", "exploration", "consolidation", "refinement")
    assert {f"energy/phase/{name}_joules_estimated" for name in names} <= shown


def test_hyperparameters_name_method_unit_density_and_rate(server: str, page: Page) -> None:
    page.goto(f"{server}#hparams")
    page.get_by_text("Trial ID").first.wait_for()
    page.get_by_text("EST-DGM", exact=True).first.wait_for()
    cells = [text.strip() for text in page.locator("vaadin-grid-cell-content").all_inner_texts() if text.strip()]
    assert {"method", "unit", "density", "rate"} <= set(cells)
    assert {"dense", "none", "EST-DGM", "16"} <= set(cells)
    assert "0.0030000" in cells
    assert any(cell.startswith(("0.1", "0.09")) for cell in cells)
