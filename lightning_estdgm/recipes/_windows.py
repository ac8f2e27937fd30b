"""Batches that are the same on every run and resumable in mid-epoch, and random windows of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_estdgm._checks import expect_int

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""


class Windows(Dataset[Batch]):
    """Windows of a text; the index is the token where one starts. Indexed in whole batches: one gather."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.span = text, torch.arange(context + 1)

    def __len__(self) -> int:
        return len(self.text) - len(self.span) + 1

    def __getitem__(self, start: int) -> Batch:
        x, y = self.__getitems__([start])
        return x[0], y[0]

    def __getitems__(self, starts: Sequence[int]) -> Batch:
        """Inputs and targets (inputs one byte on), int64 [len(starts), context] each."""
        at = torch.tensor(starts)[:, None] + self.span
        if self.text.dtype == torch.uint16:  # torch 2.6 gathers no unsigned integers but bytes
            window = self.text.view(torch.int16)[at].long() & 0xFFFF
        else:
            window = self.text[at].long()
        return window[:, :-1], window[:, 1:]


class EpochSampler(DistributedSampler[Any]):
    """Sampler of a rank's share of an epoch, drawn anew for each: ``draw(generator)`` gives the whole epoch's indices.

    The generator is seeded by ``seed`` and the epoch, so that nothing else that is random moves them; rank r of n takes
    every n-th index from the r-th on, and what is left over by n is dropped. It is a DistributedSampler so that
    Lightning leaves it as it is.
    """

    def __init__(self, count: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.count, self.seed, self.epoch = count, seed, 0
        self.rank, self.num_replicas = rank, ranks

    def draw(self, generator: torch.Generator) -> Tensor:
        """The epoch's ``count`` indices: here a permutation."""
        return torch.randperm(self.count, generator=generator)

    def __len__(self) -> int:
        return self.count // self.num_replicas

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        whole = len(self) * self.num_replicas
        return iter(self.draw(generator)[:whole][self.rank :: self.num_replicas].tolist())


class ImageOrder(EpochSampler):
    """A permutation of the images each epoch; indices are (epoch, image), so that the image is drawn by both."""

    def __iter__(self) -> Any:
        return ((self.epoch, image) for image in super().__iter__())


def generator_of(seed: int, epoch: int, image: int) -> torch.Generator:
    """Return the generator of what is drawn for an image in an epoch."""
    return torch.Generator().manual_seed(hash((seed, epoch, image)) % 2**63)


class RandomStarts(EpochSampler):
    """Sampler of ``count`` window starts below ``high`` an epoch."""

    def __init__(self, high: int, count: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(count, seed, rank, ranks)
        self.high = high

    def draw(self, generator: torch.Generator) -> Tensor:
        """The epoch's ``count`` starts, some perhaps twice."""
        return torch.randint(self.high, (self.count,), generator=generator)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that goes on in mid-epoch: Lightning keeps what `state_dict` returns in its checkpoints.

    The position counts the batches that were handed out, so workers may read ahead. It belongs to one epoch of the
    sampler: the iteration after `load_state_dict` skips that many batches of this epoch, and none of any other.
    """

    _handed_out: dict[str, int] | None = None
    _resumed: dict[str, int] | None = None

    def __iter__(self) -> Any:
        """Yield the batches of the sampler's present epoch that are still to come."""
        # A generator starts at its first batch: Lightning makes iterators ahead of time, and only then sets the epoch.
        epoch, resumed = int(getattr(self.sampler, "epoch", 0)), self._resumed
        self._resumed = None
        position = resumed["position"] if resumed and resumed["epoch"] == epoch else 0
        for batch in islice(super().__iter__(), position, None):
            position += 1
            self._handed_out = {"epoch": epoch, "position": position}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch of the last iteration and number of its batches that were handed out."""
        return self._resumed or self._handed_out or {"epoch": 0, "position": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Have the next iteration go on from what `state_dict` returned."""
        self._resumed = dict(state)


class TextWindows(LightningDataModule):
    """Windows of ``self.text["train"]`` and ``self.text["val"]``, which a subclass's `setup` reads.

    Training batches are random windows drawn from ``seed`` alone: the same on every run, whatever else uses random
    numbers, and a run resumed in mid-epoch goes on with the next one; several ranks share them out. Validation is a
    fixed set of ``val_windows`` evenly spaced windows, not overlapping as long as they fit.
    A batch is (x, y), int64 [batch_size, context], y one token ahead of x.
    """

    def __init__(self, context: int, batch_size: int, seed: int, val_windows: int, workers: int = 0) -> None:
        super().__init__()
        for name, value in (("context", context), ("batch_size", batch_size), ("val_windows", val_windows)):
            expect_int(name, value, at_least=1)
        expect_int("seed", seed, at_least=0)
        expect_int("workers", workers, at_least=0)
        self.context, self.batch_size, self.seed = context, batch_size, seed
        self.val_windows, self.workers = val_windows, workers
        self.text: dict[str, Tensor] = {}

    def check_lengths(self, source: str, unit: str) -> None:
        """Check that each part of the text has a window.

        Raises:
            ValueError: A part is too short.
        """
        for part, text in self.text.items():
            if len(text) <= self.context:
                raise ValueError(
                    f"{part} text of {source}: got {len(text)} {unit}, expected more than context={self.context}"
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Random windows; an epoch is as many as would cover the text once."""
        windows = Windows(self.text["train"], self.context)
        rank, ranks = ranks_of(self)
        count = max(self.batch_size * ranks, len(self.text["train"]) // self.context)
        starts = RandomStarts(len(windows), count, self.seed, rank, ranks)
        return self._loader(ResumableLoader, windows, starts, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The same windows each time."""
        windows = Windows(self.text["val"], self.context)
        count = min(self.val_windows, len(windows))
        starts = [i * (len(windows) - 1) // max(1, count - 1) for i in range(count)]
        return self._loader(DataLoader, windows, starts, drop_last=False)

    def _loader(self, kind: type[DataLoader[Any]], windows: Windows, starts: Any, drop_last: bool) -> DataLoader[Any]:
        # Without a generator, a DataLoader takes a number from the global one at each start.
        return kind(
            windows,
            batch_size=self.batch_size,
            sampler=starts,
            drop_last=drop_last,
            num_workers=self.workers,
            collate_fn=_as_is,
            generator=torch.Generator().manual_seed(self.seed),
        )


def check_val_fraction(value: float) -> None:
    """Check the share of a text that is for validation.

    Raises:
        ValueError: It is not in (0, 1).
    """
    if not 0 < value < 1:
        raise ValueError(f"val_fraction: got {value}, expected a fraction in (0, 1)")


def val_start(length: int, val_fraction: float) -> int:
    """Start of the part for validation at the end of a text.

    >>> val_start(1000, 0.05)
    950
    """
    return length - round(length * val_fraction)


def ranks_of(data: LightningDataModule) -> tuple[int, int]:
    """Rank and number of ranks of the data module's Trainer; (0, 1) without one."""
    return (data.trainer.global_rank, data.trainer.world_size) if data.trainer is not None else (0, 1)


def _as_is(batch: Any) -> Any:
    return batch  # Windows.__getitems__ has made the batch
