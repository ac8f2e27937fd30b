"""Checkpoint files are whole or not there: nothing half-written, whatever fails."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checkpoints import Unpicklable
from lightning_estdgm import SparseCheckpointIO


def test_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SparseCheckpointIO().save_checkpoint({"x": torch.ones(3)}, path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="no state for you"):
        SparseCheckpointIO().save_checkpoint({"x": torch.ones(10**5), "y": Unpicklable()}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_file_is_synced_before_and_the_folder_after_the_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no time is there less than a whole checkpoint under the name."""
    path, seen = tmp_path / "last.ckpt", []
    SparseCheckpointIO().save_checkpoint({"x": 0}, path)
    real_fsync, real_replace = os.fsync, os.replace

    def state() -> int:
        return SparseCheckpointIO().load_checkpoint(path)["x"]

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        seen.append(("sync", os.path.isdir(f"/proc/self/fd/{descriptor}"), state()))

    def replace(old: Any, new: Any) -> None:
        assert Path(old).parent == Path(new).parent
        real_replace(old, new)
        seen.append(("rename", None, state()))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    SparseCheckpointIO().save_checkpoint({"x": 1}, path)
    assert [(what, value) for what, _, value in seen] == [("sync", 0), ("rename", 1), ("sync", 1)]
    if sys.platform == "linux":
        assert [is_folder for what, is_folder, _ in seen if what == "sync"] == [False, True]


def test_temporaries_of_killed_writers_go_after_a_day(tmp_path: Path) -> None:
    old, fresh, other = (tmp_path / name for name in (".estdgm-a.tmp", ".estdgm-b.tmp", ".other.tmp"))
    for file in (old, fresh, other):
        file.write_text("half")
        os.utime(file, (0, time.time() - (0 if file is fresh else 2 * 24 * 3600)))
    SparseCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt")
    assert sorted(os.listdir(tmp_path)) == [".estdgm-b.tmp", ".other.tmp", "x.ckpt"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        SparseCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt")
    finally:
        os.umask(before)
    assert (tmp_path / "x.ckpt").stat().st_mode & 0o777 == 0o640


def test_error_names_the_file_and_keeps_the_number(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").mkdir()
    with pytest.raises(OSError, match=r"x\.ckpt could not be written") as caught:
        SparseCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt")
    assert caught.value.errno in (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY)
    assert os.listdir(tmp_path) == ["x.ckpt"]
