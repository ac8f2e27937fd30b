"""Published methods over two processes: random growth is one on all ranks, and what sharded weights cannot have."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from helpers import distributed_jobs as jobs
from helpers.distributed_sharded import train
from helpers.models import TinyMLP, make_trainer
from lightning_estdgm import DGMCallback
from lightning_estdgm.method._backward_set import BackwardSet
from lightning_estdgm.method._patterns import FanIn

METHODS = ("set", "granet", "srigl", "top-kast")


def fitted(methods: tuple[str, ...], spoil: bool = False) -> list[tuple[str, dict[str, Tensor], int]]:
    """How fits by some methods ended on this rank: error, masks, number of updates."""
    rank = torch.distributed.get_rank()

    class Spoil(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if spoil and rank == 1:
                controller = next(c for c in trainer.callbacks if isinstance(c, DGMCallback)).controller
                object.__setattr__(controller.config, "seed", 1)

    ended = []
    for method in methods:
        pl.seed_everything(
            rank, verbose=False
        )  # ranks differ in chance, but for the weights: DDP's are the first one's
        callback = DGMCallback.from_preset(method, 0.3, update_every=4)
        trainer = make_trainer(Spoil(), callback, devices=2, strategy="ddp", max_epochs=1)
        try:
            trainer.fit(TinyMLP(), TinyMLP.batches(40))
        except Exception as error:
            ended.append((f"{type(error).__name__}: {error}", {}, 0))
        else:
            ended.append(("", callback.masks(), callback.controller.updates))
    return ended


def test_masks_are_the_same_on_both_ranks_random_growth_included() -> None:
    for (error, masks, updates), (_, others, _) in zip(*jobs.run(fitted, 2, METHODS), strict=True):
        assert error == ""
        assert updates >= 7
        assert all(torch.equal(mask, others[name]) for name, mask in masks.items())


def test_control_another_seed_on_one_rank_is_seen() -> None:
    for ((error, _, _),) in jobs.run(fitted, 2, ("set",), spoil=True):
        assert re.match(r"MasksDifferError: .* where masks were drawn, at step 1", error)


def refused() -> list[str]:
    """What this rank is told of rules that weights of FSDP2 cannot be updated by."""
    rules: tuple[dict[str, Any], ...] = (
        {"update_rule": {"grow": "random"}},
        {"update_rule": {"keep": len}},
        {"update_rule": {"pattern": FanIn(), "regrow": True}},
        {"update_rule": {"redistribute": "global"}},
        {"inactive": BackwardSet()},
    )
    told = []
    for rule in rules:
        with pytest.raises(ValueError, match="sharded over ranks") as error:
            train("FSDP2", block_size=1, rule=rule)
        told.append(str(error.value))
    return told


def test_sharded_weights_refuse_what_they_cannot_have_by_name() -> None:
    for told in jobs.run(refused, 2):
        named = ("grow='random'", "keep=<built-in", "pattern=FanIn", "redistribute='global'", "BackwardSet")
        for message, what in zip(told, named, strict=True):
            assert message.startswith("layer 'wide' is sharded over ranks")
            assert what in message
