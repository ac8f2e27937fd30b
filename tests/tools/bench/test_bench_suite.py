"""``estdgm bench all``: parts run once, and a page shows what they left."""

import json
import sys

import pytest
from typer.testing import CliRunner

from helpers.bench_cases import ARGUMENTS
from lightning_estdgm.cli import app
from lightning_estdgm.tools.bench import _suite as suite
from lightning_estdgm.tools.bench._goals import train_goals
from lightning_estdgm.tools.bench.train._choice import quick_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command leaves, and a part of the suite that was cut off."""
    folder = tmp_path_factory.mktemp("train")
    result = CliRunner().invoke(app, ["bench", "train", *ARGUMENTS, "--output", str(folder / "train.json")])
    assert result.exit_code == 0, result.output
    assert "sparse products" in result.output
    assert "no counter" in result.output or "joules: by" in result.output
    return folder


def test_the_page_shows_every_file_and_says_which_was_cut_off(folder):
    content = json.loads((folder / "train.json").read_text())
    cut = content | {"complete": False, "goals": train_goals(content["results"] * 0, None)}
    text = suite.page({"train": content, "train-cut": cut}, {"train"})
    assert text.count("## train") >= 2
    assert "train-cut - CUT OFF" in text
    assert f"`{content['command']}`, {content['date']}" in text
    whole = content["results"][0]["whole"]
    assert f"| {whole['speedup']:.2f}x |" in text
    assert "![train](train.png)" in text
    assert "train-cut.png" not in text, "there is none"


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


def test_the_page_shows_what_was_served():
    row = {"runtime": "torch", "seconds": {"1": 0.5}, "peak_bytes": None, "file_bytes": 4_000_000}
    result = {"config": {"tokens": [1], "network": "gpt"}, "rows": [row], "left_out": ["mnn: not here"]}
    result["generation"] = {"packed": 30.0, "torch": 10.0}
    content = {"complete": True, "command": "c", "date": "d", "goals": [], "served": result}
    content["environment"] = {"gpu": None, "cpu": "C", "threads": 1, "torch": "2"}
    text = suite.page({"serve-mlp": content}, ())
    assert "| torch | 2/s (1.00x) | - | 4.0 |" in text
    assert "- mnn: not here" in text
    assert "Text, one token a step: 30 tokens/s packed, 10 dense." in text


def check_ok():
    return type("Done", (), {"returncode": 0})()


def test_parts_are_commands_that_exist():
    for quick in (False, True):
        found = suite.parts(quick)
        assert len({part.name for part in found}) == len(found)
        assert {part.arguments[0] for part in found} == {"kernels", "train"} | ({"serve"} if not quick else set())
        assert all(("--quick" in part.arguments) == quick for part in found)
    assert quick_config(rounds=1).rounds == 1
