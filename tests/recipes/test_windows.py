"""Ranks share the windows of an epoch."""

import pytest
from lightning import Trainer

from helpers.recipe_data import wikitext
from lightning_estdgm.recipes._windows import EpochSampler, RandomStarts
from lightning_estdgm.recipes.text_files import TextFiles


@pytest.mark.parametrize("make", [EpochSampler, lambda *given, **more: RandomStarts(50, *given, **more)])
def test_ranks_share_an_epoch_and_the_left_over_is_dropped(make):
    whole = list(make(11, seed=4))
    parts = [list(make(11, seed=4, rank=rank, ranks=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3] == [len(make(11, seed=4, rank=1, ranks=3))] * 3
    assert [parts[i % 3][i // 3] for i in range(9)] == whole[:9]
    other = make(11, seed=4)
    other.set_epoch(1)
    assert list(other) != whole
    assert list(make(11, seed=5)) != whole


def test_lightning_leaves_the_ranks_to_the_sampler(tmp_path):
    """With several ranks it would otherwise put a sampler around it that draws the same windows in every epoch."""
    data = TextFiles(str(wikitext(tmp_path / "text")), context=16, batch_size=2)
    data.setup()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    connector, loader = trainer._data_connector, data.train_dataloader()
    assert not connector._requires_distributed_sampler(loader)
    assert connector._requires_distributed_sampler(data.val_dataloader())
