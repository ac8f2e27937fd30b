"""Published methods over two processes: random growth is one on all ranks, and what sharded weights cannot have."""

from __future__ import annotations

import re
from typing import Any

import jobs
import lightning.pytorch as pl
import pytest
import torch
from models import TinyMLP, make_trainer
from sharded import train
from torch import Tensor

from lightning_estdgm import DGMCallback
from lightning_estdgm.patterns import FanIn
from lightning_estdgm.reserve import Reserve


def fitted(spoil: bool) -> tuple[str, dict[str, Tensor], int]:
    """How a fit by SET ended on this rank."""
    rank = torch.distributed.get_rank()
    pl.seed_everything(
        rank, verbose=False
    )  # the ranks' global states differ, but not the model's weights: DDP's are one
    callback = DGMCallback.from_preset("set", 0.3, update_every=4)
    trainer = make_trainer(callback, devices=2, strategy="ddp", max_epochs=1)

    class Spoil(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if spoil and rank == 1:
                object.__setattr__(callback.controller._rule, "seed", 1)

    trainer.callbacks.insert(0, Spoil())
    try:
        trainer.fit(TinyMLP(), TinyMLP.batches(40))
    except Exception as error:
        return f"{type(error).__name__}: {error}", {}, 0
    return "", callback.masks(), callback.controller.updates


def test_random_growth_is_the_same_on_both_ranks() -> None:
    (error, masks, updates), (_, others, _) = jobs.run(fitted, 2, False)
    assert error == ""
    assert updates == 9
    assert all(torch.equal(mask, others[name]) for name, mask in masks.items())


def test_control_another_seed_on_one_rank_is_seen() -> None:
    for error, _, _ in jobs.run(fitted, 2, True):
        assert re.match(r"MasksDifferError: .* after mask update 1", error)


def refused() -> list[str]:
    """What this rank is told of rules that weights of FSDP2 cannot be updated by."""
    rules: tuple[dict[str, Any], ...] = (
        {"grow": "random"},
        {"keep": len},
        {"pattern": FanIn(), "regrow": True},
        {"redistribute": "global"},
        {"reserve": Reserve()},
    )
    told = []
    for rule in rules:
        with pytest.raises(ValueError, match="sharded over ranks") as error:
            train("FSDP2", block_size=1, rule=rule)
        told.append(str(error.value))
    return told


def test_sharded_weights_refuse_what_they_cannot_have_by_name() -> None:
    for told in jobs.run(refused, 2):
        named = ("grow='random'", "keep=<built-in", "pattern=FanIn", "redistribute=<function", "reserve")
        for message, what in zip(told, named, strict=True):
            assert message.startswith("layer 'wide' is sharded over ranks")
            assert what in message
