"""`estdgm train`: each recipe from its published layout on disk to a checkpoint and back, by the command itself."""

import json
import sys

import pytest
import torch
import yaml
from typer.testing import CliRunner

from helpers.recipe_data import images, ogb, planetoid, wikitext
from lightning_estdgm import DGMCallback, DGMConfig
from lightning_estdgm.cli import app
from lightning_estdgm.recipes import GPT
from lightning_estdgm.tools._train import CONFIGS, arguments, bundled_configs, callback_for, prepare

pytest.importorskip("jsonargparse")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`val_check_interval` .*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),  # a resumed run gets a folder of its own
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]

QUIET = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
QUIET += ["--trainer.enable_model_summary=false", "--trainer.num_sanity_val_steps=0"]
SMALL_GPT = ["--model.width=64", "--model.layers=1", "--model.heads=2", "--data.context=16", "--data.batch_size=4"]
SMALL_GPT += ["--trainer.accumulate_grad_batches=1", "--trainer.val_check_interval=4", "--data.val_windows=8"]
SMALL_GPT += ["--data.workers=0"]
SMALL_RESNET = [
    "--model.layers=[1,1,1,1]",
    "--model.width=8",
    "--data.size=32",
    "--data.batch_size=3",
    "--data.workers=0",
]
RECIPES = {
    "gpt": ("gpt", wikitext, SMALL_GPT, "token", 64),
    "resnet": ("resnet", images, SMALL_RESNET, "sample", 3),
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
    assert not (again / "checkpoints/step=4.ckpt").exists(), "it goes on from there"
    resumed, middle = checkpoint(again, 8), checkpoint(run, 4)
    assert all(torch.equal(whole["state_dict"][key], value) for key, value in resumed["state_dict"].items())
    assert not all(torch.equal(middle["state_dict"][key], value) for key, value in resumed["state_dict"].items())


def test_the_settings_that_a_run_wrote_down_repeat_it(tmp_path):
    more = ["--data", wikitext(tmp_path / "data", "raw"), "--output", tmp_path / "runs", "--seed_everything=3"]
    first = estdgm("gpt", *QUIET, *SMALL_GPT, *more, "--trainer.max_steps=6", "--method=dense")
    assert first.exit_code == 0, first.output
    again = estdgm("gpt", "--config", tmp_path / "runs/dense/version_0/config.yaml")
    assert again.exit_code == 0, again.output
    saved = [torch.load(file, weights_only=True) for file in sorted(tmp_path.rglob("*.ckpt"))]
    assert len(saved) == 2
    assert all(torch.equal(saved[0]["state_dict"][key], value) for key, value in saved[1]["state_dict"].items())
    assert saved[0]["state_dict"]["tokens.weight"].shape == (256, 64)
    assert saved[0]["hyper_parameters"]["context"] == 16


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt-125m", 125e6), ("gpt-350m", 350e6), ("gpt-1.3b", 1.3e9)],
)
def test_the_gpt_configurations_have_the_sizes_that_name_them(name, expected):
    """With GPT-2's tokens; and each step is half a million or a million of them."""
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        model = GPT(**settings["model"], context=settings["data"]["context"], vocabulary=50_257)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=0.02)
    of_bytes = sum(p.numel() for p in model.parameters()) - (50_257 - 256) * settings["model"]["width"]
    assert round(of_bytes / 1e6) == {"gpt-125m": 86, "gpt-350m": 303, "gpt-1.3b": 1211}[name]
    step = settings["data"]["context"] * settings["data"]["batch_size"] * settings["trainer"]["accumulate_grad_batches"]
    assert step == (2**20 if name == "gpt-1.3b" else 2**19)


@pytest.mark.parametrize("name", bundled_configs())
def test_every_configuration_is_complete_but_for_the_data(name, tmp_path):
    recipe = {"gpt": "gpt", "res": "resnet", "gcn": "gnn", "gat": "gnn", "sag": "gnn"}[name[:3]]
    done = estdgm(recipe, "--config", name, "--data", tmp_path, "--print_config=skip_null")
    assert done.exit_code == 0, done.output
    printed = yaml.safe_load(done.output)
    own = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert own["model"].items() <= printed["model"].items()
    assert own["data"].items() <= printed["data"].items()


def test_a_bundled_configuration_stands_in_for_the_recipes_own_and_a_file_goes_over_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {hidden: 5}\n")
    assert arguments("gnn", ["--data=Cora"]) == ["--config", str(CONFIGS / "gcn-cora.yaml"), "--data.path", "Cora"]
    assert arguments("gnn", ["--config", "sage-arxiv"]) == ["--config", str(CONFIGS / "sage-arxiv.yaml")]
    given = ["--config", str(tmp_path / "mine.yaml"), "--data", "x", "--print_config"]
    printed = yaml.safe_load(estdgm("gnn", *given).output)
    assert (printed["model"]["hidden"], printed["model"]["layers"]) == (5, 2)


def test_dgm_is_the_callback_without_settings():
    assert callback_for("dense") is None
    assert callback_for("dgm").config == DGMCallback().config == DGMConfig()


def test_a_method_by_its_name_with_settings_of_its_own(tmp_path):
    pytest.importorskip("torch_geometric")
    data = ["--data", ogb(tmp_path / "data"), "--output", tmp_path / "runs", "--config=sage-arxiv"]
    method = [
        "--method=ac/dc",
        "--density=0.25",
        "--override.period=0.1",
        "--override.warmup=0.25",
        "--override.selection={exclude: [model.convs.0.*]}",
    ]
    done = estdgm("gnn", *data, *QUIET, *method, "--trainer.max_epochs=20", "--model.hidden=8")
    assert done.exit_code == 0, done.output
    energy = json.loads((tmp_path / "runs/ac-dc/version_0/energy.json").read_text())
    assert energy["method"]["name"] == "AC/DC"
    assert energy["method"]["final_density"] == pytest.approx(0.25, abs=0.01)
    (saved,) = tmp_path.rglob("*.ckpt")
    weights = torch.load(saved, weights_only=True)["state_dict"]
    dense = {k.rpartition(".lin")[0] for k, w in weights.items() if "lin" in k and w.ndim > 1 and (w != 0).all()}
    assert dense == {"model.convs.0", "model.convs.2"}, "the excluded layer, and the head"


@pytest.mark.parametrize(
    "given",
    [
        ["--override.units.size=1", "--override.units.distribution=erk"],
        ["--override.units={size: 1, distribution: erk}"],
        ["--override={units: {size: 1, distribution: erk}}"],
        ["--override.units.distribution", "erk", "--override.seed=0", "--override.units.size", "1"],
    ],
)
def test_fields_of_a_part_are_what_they_are_in_yaml(given, tmp_path):
    (tmp_path / "text").write_text("some text " * 1000)
    more = ["--data", str(tmp_path / "text"), "--method=rigl", "--trainer.accelerator=cpu", "--override.update_every=4"]
    run = prepare("gpt", [*given, *more])
    (callback,) = (each for each in run.trainer.callbacks if isinstance(each, DGMCallback))
    units = callback.config.units
    assert (units.size, units.distribution, callback.config.schedule.update_every) == (1, "erk", 4)


# Errors -------------------------------------------------------------------------------------------------------------


def said(result):
    """The message without the box around it."""
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("recipe", "there", "words"),
    [
        ("gpt", [], ["no such file or folder", "wiki.train.tokens", "wikitext-103-raw-v1.zip"]),
        ("gpt", ["wiki.train.tokens", "wiki.valid.raw"], ["no wiki.train.tokens with wiki.valid.tokens in it"]),
        ("resnet", [], ["no folder", "image-net.org", "val/n01440764/ILSVRC2012_val_00000293.JPEG"]),
        ("resnet", ["train/a/1.JPEG"], ["no folder", "data/val", "ILSVRC2012_img_val.tar"]),
        ("resnet", ["train/1.JPEG", "val/1.JPEG"], ["no folder of a class in", "data/train"]),
        ("resnet", ["train/a/1.JPEG", "val/b/1.JPEG"], ["expected the classes of val among those of train, got ['b']"]),
        ("gnn", [], ["missing", "raw/edge.csv.gz", "ind.cora.x", "kimiyoung/planetoid", "arxiv.zip"]),
        ("gnn", ["raw/ind.cora.allx", "raw/ind.cora.x"], ["missing", "raw/ind.cora.tx", "raw/ind.cora.test.index"]),
        ("gnn", ["raw/ind.cora.allx", "raw/ind.pubmed.allx"], ["got the files of cora, pubmed, expected those of one"]),
        ("gnn", [f"raw/{f}.csv.gz" for f in ("edge", "node-feat", "node-label")], ["one folder that holds train.csv"]),
    ],
)
def test_missing_data_says_what_was_looked_for_and_where_to_get_it(recipe, there, words, tmp_path):
    for name in there:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    done = estdgm(recipe, "--data", tmp_path / "data")
    assert done.exit_code == 2
    text = said(done).replace(" ", "")  # the box breaks long paths
    assert [word for word in words if word.replace(" ", "") not in text] == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["dgm"], "got 'dgm', expected first one of gpt, resnet, gnn"),
        (["gpt", "--method=best"], "method: got 'best', expected one of dense, dgm, ac/dc"),
        (["gpt", "--method=dense", "--density=0.1"], "dense takes no density and no override, got 0.1"),
        (["gpt", "--method=rigl", "--density=2"], "density"),
        (["gpt", "--method=rigl", "--override.beta=2"], "'rigl' takes"),
        (["gpt", "--model.heads=5"], "width: got 768, expected a multiple of heads=5"),
        (["gpt", "--data.tokenizer=no.json"], "tokenizer: got 'no.json', expected a tokenizer.json"),
    ],
)
def test_bad_arguments_are_named(given, words, tmp_path):
    (tmp_path / "text").write_text("some text " * 1000)
    done = estdgm(*given, "--data", tmp_path / "text", "--output", tmp_path)
    assert done.exit_code == 2
    assert words in said(done)


def test_an_unknown_option_is_refused(tmp_path):
    done = estdgm("gnn", "--data", tmp_path, "--trainer.max_stepz=3")
    assert done.exit_code == 2
    assert "unrecognized arguments: --trainer.max_stepz" in done.output


@pytest.mark.parametrize(("recipe", "package"), [("gpt", "jsonargparse"), ("gnn", "torch_geometric")])
def test_a_missing_package_is_named(recipe, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    done = estdgm(recipe, "--data", "x")
    assert done.exit_code == 1
    assert f"it needs {package}, which is not installed: pip install 'lightning-estdgm[recipes]'" in said(done)


def test_help_names_the_recipes_and_each_recipe_lists_its_options():
    assert "gpt|resnet|gnn" in estdgm("--help").output
    assert "gpt|resnet|gnn" in estdgm().output
    assert "--data.label" not in (shown := estdgm("resnet", "--help").output)
    for option in ("--method", "--density", "--output", "--ckpt_path", "--model.label_smoothing", "--trainer.devices"):
        assert option in shown
