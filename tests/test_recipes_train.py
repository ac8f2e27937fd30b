"""`estdgm train`: each recipe from its published layout on disk to a checkpoint and back, by the command itself."""

import json

import pytest
import torch
import yaml
from recipe_data import images, ogb, planetoid, wikitext
from typer.testing import CliRunner

from lightning_estdgm.cli import app

pytest.importorskip("jsonargparse")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`val_check_interval` .*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),  # a resumed run gets a folder of its own
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]

QUIET = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
QUIET += ["--trainer.enable_model_summary=false", "--trainer.num_sanity_val_steps=0"]
GPT = ["--model.width=64", "--model.layers=1", "--model.heads=2", "--data.context=16", "--data.batch_size=4"]
GPT += ["--trainer.accumulate_grad_batches=1", "--trainer.val_check_interval=4", "--data.val_windows=8"]
GPT += ["--data.workers=0"]
RESNET = ["--model.layers=[1,1,1,1]", "--model.width=8", "--data.size=32", "--data.batch_size=3", "--data.workers=0"]
RECIPES = {
    "gpt": ("gpt", wikitext, GPT, "token", 64),
    "resnet": ("resnet", images, RESNET, "sample", 3),
    "gcn": ("gnn", planetoid, ["--model.dropout=0"], "node", 560),
    "sage": ("gnn", ogb, ["--config=sage-arxiv", "--model.hidden=16", "--model.dropout=0"], "node", 60),
}


@pytest.fixture(autouse=True)
def _quiet_parser(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI of lightning 2.6.6 uses such


def estdgm(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def trained(name, folder, *more, data=None):
    """Train for 8 steps with a checkpoint every 4, and return the run's folder."""
    recipe, make, settings, _, _ = RECIPES[name]
    if name in ("gcn", "sage"):
        pytest.importorskip("torch_geometric")
    data = data or make(folder / "data")
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=4"]
    keep += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.filename={step}"]
    steps = ["--trainer.max_steps=8", "--trainer.max_epochs=-1"]
    arguments = [recipe, "--data", data, "--output", folder / "runs", *QUIET, *settings, *keep, *steps, *more]
    done = estdgm(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return max(folder.glob("runs/*/version_*"), key=lambda run: (run / "config.yaml").stat().st_mtime_ns)


def checkpoint(run, step):
    return torch.load(run / f"checkpoints/step={step}.ckpt", weights_only=True)


@pytest.mark.parametrize("method", ["dense", "dgm"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_from_its_published_layout_and_resumes(name, method, tmp_path):
    _, _, _, unit, each = RECIPES[name]
    run = trained(name, tmp_path, f"--method={method}")
    assert run == tmp_path / "runs" / method / "version_0"
    energy = json.loads((run / "energy.json").read_text())
    assert energy["run"]["global_step"] == 8
    assert energy["energy"]["counts"][unit] == 8 * each
    assert (energy["method"] or {}).get("name") == {"dense": None, "dgm": "EST-DGM"}[method]
    assert list(run.glob("events.out.tfevents*"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["method"], settings["trainer"]["max_steps"]) == (method, 8)

    whole = checkpoint(run, 8)
    assert ("DGMCallback" in whole["callbacks"]) == (method == "dgm")
    zeros = [float((w == 0).float().mean()) for w in whole["state_dict"].values() if w.ndim > 1]
    assert (max(zeros) > 0.8) == (method == "dgm")

    again = trained(
        name, tmp_path, f"--method={method}", f"--ckpt_path={run}/checkpoints/step=4.ckpt", data=tmp_path / "data"
    )
    assert again == tmp_path / "runs" / method / "version_1"
    resumed, middle = checkpoint(again, 8), checkpoint(run, 4)
    assert all(torch.equal(whole["state_dict"][key], value) for key, value in resumed["state_dict"].items())
    assert not all(torch.equal(middle["state_dict"][key], value) for key, value in resumed["state_dict"].items())
