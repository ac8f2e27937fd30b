"""A disk that fills up while a checkpoint is saved; here a limit on the size of files, which needs no privileges."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers import distributed_jobs as jobs
from helpers import fault_jobs
from helpers.exact import differences
from helpers.fault_jobs import EVERY, checkpoints


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """The end of an undisturbed run, and the size of its second checkpoint in bytes."""
    folder = tmp_path_factory.mktemp("straight")
    (end,) = jobs.run(fault_jobs.train, 1, folder)
    return end, checkpoints(folder)[2 * EVERY].stat().st_size


@pytest.mark.parametrize(("share", "asynchronous"), [(0.0, False), (0.5, False), (1.0, False), (0.5, True)], ids=str)
def test_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    straight: tuple[dict[str, Any], int], share: float, asynchronous: bool, tmp_path: Path
) -> None:
    end, size = straight
    limit = int(share * size) - (share == 1.0)
    ((kind, message, after),) = jobs.run(fault_jobs.full_disk, 1, tmp_path, limit, asynchronous)
    assert kind == "OSError"
    step = r"\d+" if asynchronous else 2 * EVERY  # a thread's error is told at a later save
    assert re.search(rf"checkpoint {tmp_path}/step={step}\.ckpt could not be written \(File too large\)", message)
    assert "what was there under that name is as it was" in message
    assert after["saved"] == [EVERY]
    assert after["temporaries"] == []
    assert differences(after["end"], end) == []
