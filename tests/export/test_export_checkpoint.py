"""``estdgm export``: checkpoints of real runs, sparse and ordinary, on the command line and from Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from typer.testing import CliRunner

from helpers import exported
from helpers.checkpoints import STEPS, SaveAt, fit, ordinary
from helpers.models import MLP, NO_VALIDATION_LOADER
from lightning_estdgm import SparseCheckpointIO
from lightning_estdgm.cli import app
from lightning_estdgm.export import export_checkpoint
from lightning_estdgm.export._csr_layers import load
from lightning_estdgm.method._masks import mask_shape, unpack_bits

pytestmark = pytest.mark.filterwarnings(NO_VALIDATION_LOADER)

NAMED = ["--model", "helpers.models:MLP", "--example", "helpers.exported:trained_example"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Checkpoints of one run as Lightning makes them, half way and at the end."""
    folder = tmp_path_factory.mktemp("saved")
    fit(SaveAt(STEPS // 2, folder / "half.ckpt"), SaveAt(STEPS, folder / "last.ckpt"))
    return {name: ordinary(folder / f"{name}.ckpt") for name in ("half", "last")}


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["export", *arguments])
    return result.exit_code, " ".join(result.output.replace("│", "").split())


def test_a_sparse_checkpoint(saved: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SparseCheckpointIO().save_checkpoint(saved["last"], path)
    code, said = command(str(path), "--to", "torch-csr", *NAMED, "--evaluate", "helpers.exported:negative_mean")
    assert code == 0, said
    assert "last.pt" in said
    assert "evaluated: " in said
    assert "schedule" not in said
    net = MLP()
    net.load_state_dict(saved["last"]["state_dict"])
    x = exported.trained_example()
    torch.testing.assert_close(load(MLP(), str(tmp_path / "last.pt"))(x), net(x), rtol=1e-4, atol=1e-6)


def test_one_from_the_middle_and_one_without_masks_are_told(saved: dict[str, Any], tmp_path: Path) -> None:
    half, bare = tmp_path / "half.ckpt", tmp_path / "bare.pt"
    torch.save(saved["half"], half)
    torch.save(saved["last"]["state_dict"], bare)
    code, said = command(str(half), "--to", "torch-csr", *NAMED)
    assert code == 0, said
    layers = saved["half"]["callbacks"]["DGMCallback"]["layers"].values()
    masks = [unpack_bits(layer["mask"], mask_shape(layer["shape"], layer["block_size"])) for layer in layers]
    weights = [math.prod(layer["shape"]) for layer in layers]
    active = sum(float(mask.float().mean()) * n for mask, n in zip(masks, weights, strict=True))
    density = active / sum(weights)
    assert f"from position {STEPS // 2} of {STEPS} of its schedule, at density {density:.3f}" in said
    code, said = command(str(bare), "--to", "torch-csr", *NAMED, "-o", str(tmp_path / "other"))
    assert code == 0, said
    assert "holds no masks of DGMCallback" in said
    assert (tmp_path / "other.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "tflite", *NAMED], 2, "to: got 'tflite', expected"),
        (["--to", "torch-csr", "--model", "helpers.models:MLP"], 2, "MLP has no example_input_array"),
        (["--to", "torch-csr", "--model", "MLP"], 2, "--model must be given as package.module:name, got 'MLP'"),
        (["--to", "torch-csr", "--model", "helpers.models:ConvNet", *NAMED[2:]], 2, "does not load into ConvNet"),
        (["--to", "torch-csr", *NAMED[:2], "--example", "helpers.exported:nothing"], 2, "--example 'helpers.exported:"),
        (["--to", "torch-csr", *NAMED, "--values", "int8"], 2, "values: got 'int8', expected fp32"),
    ],
)
def test_bad_input(arguments: list[str], code: int, message: str, saved: dict[str, Any], tmp_path: Path) -> None:
    torch.save(saved["last"], tmp_path / "last.ckpt")
    found, said = command(str(tmp_path / "last.ckpt"), *arguments)
    assert found == code
    assert message in said
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_target_cannot_hold_is_no_usage_error(tmp_path: Path) -> None:
    torch.save(MLP().state_dict(), tmp_path / "dense.pt")
    code, said = command(str(tmp_path / "dense.pt"), "--to", "torch-csr", *NAMED, "-o", str(tmp_path / "x"))
    assert code == 1
    assert "estdgm export --to torch-csr: no linear layer is at most half active" in said


def test_the_modules_own_example_is_taken(saved: dict[str, Any], tmp_path: Path) -> None:
    class WithExample(MLP):
        example_input_array = exported.trained_example()

    torch.save(saved["last"], tmp_path / "last.ckpt")
    report = export_checkpoint(tmp_path / "last.ckpt", "torch-csr", model=WithExample)
    assert report.files[0] == tmp_path / "last.pt"
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list, expected a checkpoint or a state dict"):
        export_checkpoint(tmp_path / "list.ckpt", "torch-csr", model=WithExample)


class ConfiguredOnMeta(MLP):
    """Makes its layers on the meta device, as a model that is never whole."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = MLP().net


@pytest.mark.parametrize("model", [ConfiguredOnMeta, lambda: ConfiguredOnMeta()], ids=["class", "function"])
def test_a_model_that_is_made_by_configure_model(model: Any, saved: dict[str, Any], tmp_path: Path) -> None:
    torch.save(saved["last"], tmp_path / "last.ckpt")
    x = exported.trained_example()
    report = export_checkpoint(
        tmp_path / "last.ckpt", "packed", tmp_path / "last.pt", model=model, example=x, weights_only=True
    )
    assert report.difference <= 1e-4 * report.largest
