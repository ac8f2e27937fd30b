"""Sparse checkpoint files: damage is found before anything is loaded."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import Alien
from lightning_estdgm import SparseCheckpointIO, densify_checkpoint
from lightning_estdgm.plugins import _sparse_file as sparse_file


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole sparse checkpoint of some 10 kB."""
    weight = torch.zeros(40, 40)
    weight[::4] = 1.0
    path = tmp_path_factory.mktemp("small") / "x.ckpt"
    SparseCheckpointIO().save_checkpoint({"state_dict": {"a": weight, "b": torch.ones(40)}}, path)
    return path.read_bytes()


DAMAGE = "truncated or damaged|is damaged"


def test_truncated_anywhere_is_an_error(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    lengths = {*range(70), *range(0, len(small), 97), *range(len(small) - 200, len(small))}
    for length in sorted(lengths):
        path.write_bytes(small[:length])
        with pytest.raises(ValueError, match=DAMAGE):
            SparseCheckpointIO().load_checkpoint(path)
    path.write_bytes(small)
    assert set(SparseCheckpointIO().load_checkpoint(path)["state_dict"]) == {"a", "b"}


def test_any_altered_byte_is_an_error(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "altered.ckpt"
    places = {*range(64), *range(0, len(small), 61), *range(len(small) - 64, len(small))}
    for place in sorted(places):
        altered = bytearray(small)
        altered[place] ^= 1 << (place % 8)
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=DAMAGE):
            SparseCheckpointIO().load_checkpoint(path)
    path.write_bytes(small + b"\0")  # something appended
    with pytest.raises(ValueError, match=DAMAGE):
        SparseCheckpointIO().load_checkpoint(path)


def test_truncated_ordinary_checkpoint_is_an_error_too(tmp_path: Path) -> None:
    path = tmp_path / "ordinary.ckpt"
    torch.save({"state_dict": {"a": torch.ones(100)}}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged"):
        SparseCheckpointIO().load_checkpoint(path)


def test_version_of_the_future_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sparse_file, "_VERSION", 99)
        SparseCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="expected a sparse checkpoint of version 1, got 99"):
        SparseCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


def test_missing_file_and_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        SparseCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="expected a checkpoint file, got the folder"):
        SparseCheckpointIO().load_checkpoint(tmp_path)
    with pytest.raises(TypeError, match="storage_options"):
        SparseCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt", storage_options={})
    SparseCheckpointIO().remove_checkpoint(tmp_path / "none.ckpt")  # as Lightning's own


def test_objects_are_not_unpickled_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Alien, "loaded", 0)
    path = tmp_path / "alien.ckpt"
    SparseCheckpointIO().save_checkpoint({"hyper_parameters": {"alien": Alien()}}, path)
    for read in (SparseCheckpointIO().load_checkpoint, densify_checkpoint):
        with pytest.raises(pickle.UnpicklingError, match="weights_only"):
            read(path)
    assert Alien.loaded == 0
    assert os.listdir(tmp_path) == ["alien.ckpt"]
    assert SparseCheckpointIO().load_checkpoint(path, weights_only=False)["hyper_parameters"]["alien"].x == 1
    assert Alien.loaded == 1
