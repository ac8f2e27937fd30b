"""The choice of backends by the first rank for all: what it says, what it measures later, and where it fails."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist

from helpers import distributed_jobs as jobs
from helpers.controller_runs import SCHEDULE, STEPS, batch, loss_of, sgd
from lightning_estdgm import DGMConfig, DGMController, Units
from lightning_estdgm.sparse.autotune._choice import BackendSelector

CONFIG = DGMConfig(SCHEDULE, units=Units(size=16))


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, dgm: DGMController, number: int) -> None:
    """Do a step; ranks see batches of other sizes, and so other token counts."""
    optimizer.zero_grad()
    loss_of(net, batch(number, 32)[: 8 - 6 * dist.get_rank()]).backward()
    for parameter in net.parameters():
        dist.all_reduce(parameter.grad)
    dgm.mask_gradients()
    optimizer.step()
    dgm.advance()


def measured_by(measure: Any) -> None:
    BackendSelector.__init__.__kwdefaults__["measure"] = measure


def chosen() -> tuple[list[str], list[str], tuple[str, ...], list[Any], list[Any]]:
    """Backends of a run and of one resumed from its state without the choices; what was said, timed and asked."""
    said: list[str] = []
    asked: list[Any] = []

    def measure(case: Any, names: Any) -> dict[str, float]:
        asked.append((case.tokens, case.density))
        return {name: 2.0 if name == "dense" else 1.0 for name in names}

    measured_by(measure)
    net = model()
    optimizer, group = sgd(net), dist.group.WORLD
    with DGMController(net, optimizer, CONFIG, total_steps=STEPS, group=group, say=said.append) as dgm:
        step(net, optimizer, dgm, 0)
        first, state, timed = [d.backend for d in dgm.decisions()], dgm.state_dict(), dgm.timed
    before = list(asked)
    state["selector"] = {"choices": []}
    with DGMController(net, optimizer, CONFIG, total_steps=STEPS, group=group, state=state) as dgm:
        for number in range(1, 8):
            step(net, optimizer, dgm, number)
        return first + [d.backend for d in dgm.decisions()], said, timed, before, asked[len(before) :]


def test_the_first_rank_alone_measures_and_says_so_whenever_it_does() -> None:
    (backends, said, timed, asked, later), (others, *rest) = jobs.run(chosen, 2)
    assert backends == others == ["cpu", "dense"] * 2
    assert len(said) == len(timed) == 1
    assert {tokens for tokens, _ in asked} == {8}
    assert later  # densities that nothing answered
    assert rest == [[], (), [], []]


def failing() -> str:
    """What is raised where the first rank cannot measure."""

    def measure(case: Any, names: Any) -> dict[str, float]:
        raise MemoryError("no room for the operands")

    measured_by(measure)
    net = model()
    optimizer = sgd(net)
    with DGMController(net, optimizer, CONFIG, total_steps=STEPS, group=dist.group.WORLD) as dgm:
        try:
            step(net, optimizer, dgm, 0)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_no_rank_waits_for_a_first_one_that_cannot_measure() -> None:
    first, second = jobs.run(failing, 2)
    assert first == "MemoryError: no room for the operands"
    assert second == (
        "RuntimeError: the first rank, which chooses the backends of all, failed to: "
        "MemoryError('no room for the operands')"
    )
