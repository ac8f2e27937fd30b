"""SIGTERM, and SLURM's requeue signal: the run stops or is queued again, and the next one goes on exactly."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from helpers import distributed_jobs as jobs
from helpers import fault_jobs
from helpers.exact import differences
from helpers.fault_jobs import checkpoints
from helpers.models import NO_VALIDATION_LOADER
from lightning_estdgm import RequeueBetweenSteps

POINTS = ["batch fetched", "forward", "gradients", "optimizer stepped", "batch over"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (end,) = jobs.run(fault_jobs.train, 1, tmp_path_factory.mktemp("straight"))
    return end


def test_terminated_run_saves_and_resumes_exactly(straight: dict[str, Any], tmp_path: Path) -> None:
    ((step,),) = jobs.run(fault_jobs.terminated, 1, tmp_path, 7)
    assert step >= 7
    (end,) = jobs.run(fault_jobs.train, 1, tmp_path, ckpt=checkpoints(tmp_path / "last")[step])
    assert differences(end, straight) == []


@pytest.mark.parametrize("point", [*POINTS, ""], ids=[*POINTS, "anywhere"])
def test_requeued_run_resumes_exactly(straight: dict[str, Any], point: str, tmp_path: Path) -> None:
    """Step 8 is the first of an observation window, whose sums are in the checkpoint."""
    ((calls, saved, end),) = jobs.run(fault_jobs.requeued, 1, tmp_path, point, 8)
    assert calls == "requeue 4711\n"
    assert saved == ["hpc_ckpt_1.ckpt"]
    assert differences(end, straight) == []


def test_control_lightning_alone_saves_in_the_middle_of_a_step(straight: dict[str, Any], tmp_path: Path) -> None:
    """Why `RequeueBetweenSteps` is there. Should this fail one day, Lightning does it by itself."""
    ((calls, _, end),) = jobs.run(fault_jobs.requeued, 1, tmp_path, "forward", 8, between_steps=False)
    assert calls == "requeue 4711\n"
    assert "weights" in " ".join(differences(end, straight))


def test_accumulating_run_is_saved_when_the_gradients_are_used(tmp_path: Path) -> None:
    (straight,) = jobs.run(fault_jobs.train, 1, tmp_path / "straight", accumulate_grad_batches=2)
    ((_, _, end),) = jobs.run(fault_jobs.requeued, 1, tmp_path, "forward", 4, accumulate_grad_batches=2)
    assert differences(end, straight) == []


def test_ranks_signalled_in_different_steps_save_after_the_same_one(tmp_path: Path) -> None:
    straight = jobs.run(fault_jobs.train, 2, tmp_path / "straight")
    ranks = jobs.run(fault_jobs.requeued, 2, tmp_path, "gradients", 8)
    assert differences([end for *_, end in ranks], straight) == []
    assert ranks[0][1][0] == "hpc_ckpt_1.ckpt"
    assert set(ranks[0][0].splitlines()) == {"requeue 4711"}


def test_signal_in_a_validation_waits_for_its_end(tmp_path: Path) -> None:
    ((events, saved),) = jobs.run(fault_jobs.in_validation, 1, tmp_path)
    assert events == ["validation 0", "validation 1", "validation 2", "saved at 6"]
    assert saved == ["hpc_ckpt_1.ckpt"]


@pytest.mark.filterwarnings(NO_VALIDATION_LOADER)
def test_without_a_handler_nothing_is_installed(tmp_path: Path) -> None:
    seen: list[Any] = []
    look = fault_jobs.At("on_train_batch_end", 3, lambda: seen.append(signal.getsignal(signal.SIGUSR1)))
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    fault_jobs.train(tmp_path, RequeueBetweenSteps(), look)
    assert seen == [signal.SIG_DFL]


def test_wrong_signal_is_refused() -> None:
    with pytest.raises(TypeError, match=r"requeue_signal must be one of signal\.Signals or None, got 10"):
        RequeueBetweenSteps(10)  # type: ignore[arg-type]
