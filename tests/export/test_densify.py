"""Ordinary checkpoints from sparse ones, as Lightning's own plugin would have saved; plain models from packed ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from typer.testing import CliRunner

from helpers import exported
from helpers.checkpoints import STEPS, Alien, SaveAt, fit, ordinary
from helpers.exact import differences
from helpers.models import MLP, NO_VALIDATION_LOADER
from lightning_estdgm import SparseCheckpointIO, densify_checkpoint
from lightning_estdgm.cli import app
from lightning_estdgm.export import densify_model
from lightning_estdgm.modules._packed_forward import PackedForward

pytestmark = pytest.mark.filterwarnings(NO_VALIDATION_LOADER)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of a run, as Lightning makes it."""
    path = tmp_path_factory.mktemp("saved") / "last.ckpt"
    fit(SaveAt(STEPS, path))
    return ordinary(path)


def test_densified_checkpoint_is_the_ordinary_one(saved: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SparseCheckpointIO().save_checkpoint(saved, path)
    before = path.read_bytes()
    dense = densify_checkpoint(path)
    assert dense == tmp_path / "last.dense.ckpt"
    assert path.read_bytes() == before
    TorchCheckpointIO().save_checkpoint(saved, tmp_path / "ordinary.ckpt")
    assert differences(ordinary(dense), ordinary(tmp_path / "ordinary.ckpt")) == []
    module = MLP.load_from_checkpoint(dense)
    assert differences(dict(module.state_dict()), dict(saved["state_dict"])) == []
    with pytest.raises(FileExistsError, match=r"last\.dense\.ckpt is there already"):
        densify_checkpoint(path)


def test_densify_command(saved: dict[str, Any], tmp_path: Path) -> None:
    path, out = tmp_path / "last.ckpt", tmp_path / "folder" / "out.ckpt"
    SparseCheckpointIO().save_checkpoint(saved, path)
    result = CliRunner().invoke(app, ["densify", str(path), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert f"{out.stat().st_size:,} bytes, from {path.stat().st_size:,}" in " ".join(result.output.split())
    assert differences(ordinary(out), SparseCheckpointIO().load_checkpoint(path)) == []
    content = out.read_bytes()
    for arguments, message in (
        ([str(path), "-o", str(out)], "there already"),
        ([str(out)], "not a (complete) sparse checkpoint"),
        ([str(tmp_path / "none.ckpt")], "not found"),
    ):
        refused = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["densify", *arguments])
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.replace("│", "").split())
    assert out.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["folder", "last.ckpt"]


def test_densify_command_with_objects_in_it(tmp_path: Path) -> None:
    path = tmp_path / "alien.ckpt"
    SparseCheckpointIO().save_checkpoint({"hyper_parameters": {"alien": Alien()}}, path)
    refused = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["densify", str(path)])
    assert refused.exit_code == 2
    assert "if you trust it: --no-weights-only" in " ".join(refused.output.replace("│", "").split())
    done = CliRunner().invoke(app, ["densify", str(path), "--no-weights-only"])
    assert done.exit_code == 0, done.output
    assert torch.load(tmp_path / "alien.dense.ckpt", weights_only=False)["hyper_parameters"]["alien"].x == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kind", exported.PACKED_IN_TRAINING)
def test_the_plain_copy_of_a_packed_model(kind: str) -> None:
    module, x = exported.trained_packed(kind)
    module.net[0].requires_grad_(False)
    before = exported.parts(module)
    plain = densify_model(module)
    assert differences(exported.parts(module), before) == []
    assert module._trainer is not None
    assert any(isinstance(layer, PackedForward) for layer in module.modules())
    assert [layer for layer in plain.modules() if isinstance(layer, PackedForward)] == []
    assert not [name for layer in plain.modules() for name in vars(layer) if name.startswith("_estdgm_")]
    assert differences(dict(plain.state_dict()), {name: t.clone() for name, t in module.state_dict().items()}) == []
    for (name, parameter), (_, packed) in zip(plain.named_parameters(), module.named_parameters(), strict=True):
        assert parameter.shape == plain.state_dict()[name].shape
        assert parameter.requires_grad == packed.requires_grad
        assert parameter is not packed
    assert [layer.training for layer in plain.modules()] == [layer.training for layer in module.modules()]
    made = torch.jit.script(plain.net), torch.export.export(plain.net, (x,)).module()
    for form in (plain, *made):
        torch.testing.assert_close(form(x), module(x))
