"""kill -9: of a rank in the middle of a step, and of a process in the middle of writing a checkpoint."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from helpers import distributed_jobs as jobs
from helpers import fault_jobs
from helpers.exact import differences
from helpers.fault_jobs import EVERY, STEPS, checkpoints, content, temporaries
from lightning_estdgm import SparseCheckpointIO


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The end of an uninterrupted run of two ranks, on each."""
    return jobs.run(fault_jobs.train, 2, tmp_path_factory.mktemp("straight"))


RANDOM = random.Random(0)


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_after_backward", RANDOM.randrange(EVERY, STEPS)),
        ("on_before_optimizer_step", 13),  # inside an observation window
        ("", RANDOM.randrange(EVERY, STEPS - 3)),
    ],
    ids=["after the backward", "before the step", "anywhere"],
)
def test_killed_rank_costs_the_work_since_the_last_checkpoint(
    straight: list[dict[str, Any]], hook: str, step: int, tmp_path: Path
) -> None:
    with pytest.raises(jobs.JobError, match="rank 1: the process died") as caught:
        jobs.run(fault_jobs.killed_rank, 2, tmp_path, hook, step)
    assert "rank 0: Traceback" in str(caught.value)  # it stops and does not wait for ever
    saved = checkpoints(tmp_path)
    last = max(saved)
    assert step - EVERY <= last
    if hook:
        assert last <= step
    ends = jobs.run(fault_jobs.train, 2, tmp_path, ckpt=saved[last])
    assert differences(ends, straight) == []


def test_comparison_sees_a_run_that_lost_a_step(straight: list[dict[str, Any]], tmp_path: Path) -> None:
    checkpoint = SparseCheckpointIO().load_checkpoint(_save_one(tmp_path))
    checkpoint["optimizer_states"][0]["state"][0]["exp_avg"].zero_()
    SparseCheckpointIO().save_checkpoint(checkpoint, tmp_path / "spoiled.ckpt")
    ends = jobs.run(fault_jobs.train, 2, tmp_path, ckpt=tmp_path / "spoiled.ckpt")
    assert differences(ends, straight) != []


def _save_one(folder: Path) -> Path:
    with pytest.raises(jobs.JobError):
        jobs.run(fault_jobs.killed_rank, 2, folder, "on_after_backward", EVERY + 1)
    return checkpoints(folder)[EVERY]


SIZE = 2_000_000


@pytest.mark.parametrize(
    ("where", "limit", "value"),
    [
        ("at the first byte", 0, 1.0),
        ("in the header", 100, 1.0),
        ("half way", SIZE // 2, 1.0),
        ("near the end", SIZE, 1.0),
        ("file synced", None, 1.0),
        ("before renaming", None, 1.0),
        ("folder not synced yet", None, 2.0),
    ],
)
def test_writer_killed_leaves_a_whole_checkpoint(where: str, limit: int | None, value: float, tmp_path: Path) -> None:
    """The old one, until the new one is complete."""
    path = tmp_path / "last.ckpt"
    with pytest.raises(jobs.JobError, match="the process died"):
        jobs.run(fault_jobs.killed_writer, 1, path, where, limit)
    assert differences(SparseCheckpointIO().load_checkpoint(path), content(value)) == []
    assert path.stat().st_size > SIZE  # so the limits above lie inside the file
    others = [name for name in os.listdir(tmp_path) if name != path.name]
    assert others == temporaries(tmp_path)  # nothing that Lightning would take for a checkpoint
    assert len(others) == (value == 1.0)


def test_run_killed_while_saving_resumes_from_the_checkpoint_before(tmp_path: Path) -> None:
    (straight,) = jobs.run(fault_jobs.train, 1, tmp_path / "straight")
    folder = tmp_path / "killed"
    with pytest.raises(jobs.JobError, match="the process died"):
        jobs.run(fault_jobs.killed_while_saving, 1, folder, 3)
    assert sorted(checkpoints(folder)) == [EVERY, 2 * EVERY]
    (end,) = jobs.run(fault_jobs.train, 1, folder, ckpt=checkpoints(folder)[2 * EVERY])
    assert differences(end, straight) == []
