"""Real jobs of several gloo processes, each with its own Trainers, for tests.

The processes are forked from one server that has imported torch and Lightning, so a job starts in a moment. They meet
through a file, so no port can be taken; Lightning sees what torchrun would have set.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT_S = 300.0
_COLLECTIVE_TIMEOUT_S = 90.0  # after which a rank that waits for a lost one raises
_GRACE_S = 30.0  # that the other ranks have once one has failed, before they are killed


class JobError(AssertionError):
    """A rank failed, or the job took too long; the message holds every rank's traceback and output."""


def run(job: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = TIMEOUT_S, **kwargs: Any) -> list[Any]:
    """Call ``job(*args, **kwargs)`` in `ranks` processes that form one gloo group, and return what each returned.

    Args:
        job: a function at the top of a module.
        ranks: how many processes. With 1 there is no process group.
        args: picklable.
        timeout_s: when to give the job up, in seconds.
        kwargs: picklable.

    Returns:
        One result a rank, in order: plain types and tensors.

    Raises:
        JobError: if a rank raised or died, or time ran out.
        pytest.skip.Exception: if torch itself cannot do what was asked, see `skip_where_fsdp2_fails`.

    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning.pytorch", "lightning_estdgm"])
    folder = Path(tempfile.mkdtemp(prefix="estdgm-job-"))
    children, pipes = [], []
    try:
        for rank in range(ranks):
            pipe, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_rank, args=(rank, ranks, folder, theirs, job, args, kwargs))
            child.start()
            theirs.close()
            children.append(child)
            pipes.append(pipe)
        answers = _collect(pipes, timeout_s)
    finally:
        for child in children:
            if child.is_alive():
                child.join(5.0)
            if child.is_alive():
                child.kill()
            child.join()
        outputs = [_output(folder, rank) for rank in range(ranks)]
        shutil.rmtree(folder, ignore_errors=True)
    if any(error for _, error in answers):
        parts = [f"--- rank {rank}: {error or 'fine'}\n{outputs[rank]}" for rank, (_, error) in enumerate(answers)]
        skip_where_fsdp2_fails("\n".join(parts))
        raise JobError("\n".join(parts))
    return [result for result, _ in answers]


def skip_where_fsdp2_fails(error: str) -> None:
    """Skip a test that met a fault of FSDP2 on CPUs in torch 2.6: it asks streams for events, which have none there."""
    if not hasattr(torch.cpu.Stream, "record_event") and "'Stream' object has no attribute 'record_event'" in error:
        pytest.skip("FSDP2 of torch 2.6 itself fails on CPUs: its Stream has no record_event")


def _collect(pipes: list[Connection], timeout_s: float) -> list[tuple[Any, str]]:
    """Return each rank's result and error, waiting for all, but not long for those left behind by a failure."""
    answers: list[tuple[Any, str]] = [(None, f"no answer after {timeout_s:g} s, or left waiting: killed")] * len(pipes)
    waiting: dict[Connection, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout_s
    while waiting and time.monotonic() < deadline:
        for pipe in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(pipe, Connection)
            try:
                answers[waiting[pipe]] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except EOFError:
                answers[waiting[pipe]] = (None, "the process died")
            if answers[waiting.pop(pipe)][1]:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    return answers


def _output(folder: Path, rank: int) -> str:
    path = folder / f"{rank}.txt"
    return path.read_text(errors="replace")[-8000:] if path.exists() else ""


def _rank(
    rank: int, ranks: int, folder: Path, pipe: Connection, job: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    """Run in the child."""
    descriptor = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w", buffering=1) for _ in range(2))
    torch.set_num_threads(1)
    error, result = "", None
    try:
        if ranks > 1:
            _join(rank, ranks, folder)
        result = job(*args, **kwargs)
        if ranks > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except BaseException:
        error = traceback.format_exc()
    buffer = io.BytesIO()
    torch.save((result, error), buffer)
    pipe.send_bytes(buffer.getvalue())
    sys.stdout.flush()
    os._exit(0)  # a group with a lost rank could hang in its destructors


def _join(rank: int, ranks: int, folder: Path) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    as_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in as_torchrun.items()}
    os.environ |= {"TORCHELASTIC_RUN_ID": "job", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
    )
