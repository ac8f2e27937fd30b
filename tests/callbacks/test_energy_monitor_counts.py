"""Steps, samples and the user's own units, to which joules are related."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.energy_runs import Net, data, monitor, no_thread, rows, trainer
from lightning_estdgm.callbacks._internal.work_counters import batch_size

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")  # as they mean to


def test_real_steps_are_counted_and_logged_once_each(tmp_path: Path) -> None:
    mon = monitor()
    run = trainer(tmp_path, mon, accumulate_grad_batches=2, logger=CSVLogger(tmp_path, "csv", ""), log_every_n_steps=1)
    run.fit(Net(), data())
    assert mon.summary()["steps"] == 4
    assert mon.summary()["samples"] == 32
    assert [int(row["step"]) for row in rows(tmp_path / "csv")] == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_a_skipped_step_is_no_step(tmp_path: Path) -> None:
    mon = monitor()
    run = trainer(tmp_path, mon)
    run.fit(Net(skip=(1, 5)), data())
    assert run.global_step == 8
    assert mon.summary()["steps"] == 6


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_batch_size_is_known_only_where_all_tensors_agree() -> None:
    x = torch.zeros(3, 2)
    assert batch_size(x) == 3
    assert batch_size({"x": x, "y": [x[:, 0], torch.tensor(1.0)], "name": "n"}) == 3
    assert batch_size((x, torch.zeros(5))) is None
    assert batch_size(["text"]) is None
    assert batch_size(torch.tensor(1.0)) is None
    assert batch_size((x, x.to_sparse(), torch.empty(3, device="meta"))) == 3
    assert batch_size(torch.nested.nested_tensor([x[0], x[0, :1]])) == 2


def test_an_unknown_batch_size_leaves_joules_per_sample_out(tmp_path: Path) -> None:
    class Odd(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0]).square().mean()

    loader = DataLoader([(torch.randn(4), torch.randn(2))] * 8, batch_size=None)
    mon = monitor()
    trainer(tmp_path, mon, logger=CSVLogger(tmp_path, "csv", "")).fit(Odd(), loader)
    assert mon.summary()["joules_per_sample"] is None
    assert mon.summary()["joules_per_step"] is not None
    assert not [name for row in rows(tmp_path / "csv") for name in row if "per_sample" in name]


def test_joules_per_token_of_the_users_own_count(tmp_path: Path) -> None:
    mon = monitor(per={"token": lambda batch: batch[0].numel(), "sample": lambda batch: 2 * len(batch[0])})
    trainer(tmp_path, mon, logger=CSVLogger(tmp_path, "csv", "")).fit(Net(), data())
    summary = mon.summary()
    assert summary["counts"] == {"sample": 64, "token": 128}
    assert summary["joules_per_token"] == summary["train_joules"] / 128
    last = rows(tmp_path / "csv")[-1]
    assert last["energy/joules_per_token"] == pytest.approx(last["energy/train_joules"] / 128)
    assert last["energy/joules_per_sample"] == pytest.approx(last["energy/train_joules"] / 64)


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (1.5, TypeError, r"per\['token'\] must return a whole number, got 1.5"),
        (None, TypeError, r"per\['token'\] must return a whole number, got None"),
        (-1, ValueError, r"per\['token'\] must return a number of at least 0, got -1"),
    ],
)
def test_a_count_that_is_no_count(tmp_path: Path, number: Any, error: type[Exception], message: str) -> None:
    mon = monitor(per={"token": lambda batch: number})
    with pytest.raises(error, match=message):
        trainer(tmp_path, mon).fit(Net(), data())
    assert no_thread()
    assert mon.total_joules is not None
