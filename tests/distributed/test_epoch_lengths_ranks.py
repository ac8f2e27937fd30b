"""Epochs that turn out to have other lengths than expected, on two ranks of a real gloo group.

Ranks whose loaders say different lengths are not here: Lightning itself waits for ever with them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers import distributed_jobs as jobs
from helpers.models import TinyMLP, make_trainer
from lightning_estdgm import DGMCallback

EPOCHS = 6
LENGTHS: dict[str, Callable[[int], tuple[int, int]]] = {
    "data end before the loader's length": lambda epoch: (12, 8),
    "shorter later": lambda epoch: (12, 12) if epoch < 2 else (8, 8),
    "longer later": lambda epoch: (8, 8) if epoch < 2 else (12, 12),
}
"""Batches in an epoch: as the loader says, and as it gives."""


class Said:
    """A loader that may say more batches than it gives, as where samples are filtered out on the way."""

    def __init__(self, said: int, given: int) -> None:
        self.said = said
        self.batches = TinyMLP.batches(given)

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Data(pl.LightningDataModule):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return Said(*LENGTHS[self.case](self.trainer.current_epoch))


class Positions(pl.Callback):
    """Positions in the schedule after each batch."""

    def __init__(self, dgm: DGMCallback) -> None:
        self.dgm = dgm
        self.seen: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.dgm.controller is not None
        self.seen.append(self.dgm.controller.position)


def fit(case: str) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    module, dgm = TinyMLP(), DGMCallback()
    positions = Positions(dgm)
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "devices": 2, "strategy": "ddp"}
    settings |= {"use_distributed_sampler": False, "reload_dataloaders_every_n_epochs": 1}
    make_trainer(dgm, positions, **settings).fit(module, Data(case))
    return {
        "positions": positions.seen,
        "total": dgm.schedule.total_steps,
        "density": dgm.density,
        "ended": dgm.run_summary()["ended_as_asked"],
        "masks": dgm.masks(),
    }


@pytest.mark.parametrize("case", LENGTHS)
def test_the_schedule_ends_with_the_run_on_both_ranks(case: str) -> None:
    one, other = jobs.run(fit, 2, case)
    given = [LENGTHS[case](epoch)[1] for epoch in range(EPOCHS)]
    assert len(one["positions"]) == sum(given)
    assert one["total"] == EPOCHS * LENGTHS[case](0)[0] != sum(given)  # as expected at the start
    assert one["positions"] == other["positions"]
    assert one["positions"][-1] == one["total"] > one["positions"][-2]
    assert one["density"] == round(0.1 * 2 * 16 * 16) / (2 * 16 * 16)
    assert one["ended"]
    assert other["ended"]
    assert all(torch.equal(mask, other["masks"][name]) for name, mask in one["masks"].items())
