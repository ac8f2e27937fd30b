"""Shards of one weight in one process: a thread a rank, and sums that wait for all of them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_estdgm.distributed.adapters.fsdp1 import RangeShard
from lightning_estdgm.distributed.adapters.fsdp2 import BoxShard


class Meeting:
    """Stands in for a process group."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.calls = ranks, 0
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._brought: list[Tensor | None] = [None] * ranks

    def sum_(self, rank: int, tensor: Tensor) -> Tensor:
        self._brought[rank] = tensor.clone()
        if self._barrier.wait() == 0:  # one of them
            self.calls += 1
        total = sum(self._brought[1:], self._brought[0])
        self._barrier.wait()
        return tensor.copy_(total)

    def run(self, job: Callable[[int], Any]) -> list[Any]:
        """Call `job` with each rank, all at once; raise what any of them raised."""
        results: list[Any] = [None] * self.ranks

        def in_thread(rank: int) -> None:
            try:
                results[rank] = job(rank)
            except BaseException as error:
                results[rank] = error
                if not isinstance(error, ValueError):  # those are raised on every rank
                    self._barrier.abort()

        threads = [threading.Thread(target=in_thread, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in sorted(results, key=lambda r: isinstance(r, threading.BrokenBarrierError)):
            if isinstance(result, BaseException):
                raise result
        return results


def _meeting_in(shard: Any, meeting: Meeting, rank: int) -> Any:
    shard.groups = (meeting,)
    shard.sum_ = lambda tensor: meeting.sum_(rank, tensor)
    return shard


def spread(layout: tuple[Any, ...], meeting: Meeting | None = None) -> list[Any]:
    """Return each rank's shard for a layout that `layouts` drew."""
    kind, shape, cuts, transposed = layout
    shards: list[Any]
    if kind == "range":
        shards = [RangeShard(shape, a, b - a, transposed=transposed) for a, b in _spans(cuts)]
    else:
        rows, columns = (_spans(c) for c in cuts)
        rest = shape[2:]
        shards = [
            BoxShard(shape, (a, c, *(0 for _ in rest)), (b - a, d - c, *rest), transposed=transposed)
            for a, b in rows
            for c, d in columns
        ]
    return shards if meeting is None else [_meeting_in(s, meeting, rank) for rank, s in enumerate(shards)]


def ranks_of(layout: tuple[Any, ...]) -> int:
    return len(spread(layout))


def _spans(cuts: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cuts))


@st.composite
def layouts(draw: Any, shapes: st.SearchStrategy[tuple[int, ...]]) -> tuple[Any, ...]:
    """Ways to spread a weight over ranks: any cuts, empty parts included."""
    shape = draw(shapes)
    transposed = len(shape) == 2 and draw(st.booleans())

    def cuts(size: int, most: int) -> list[int]:
        inner = draw(st.lists(st.integers(0, size), max_size=most - 1))
        return [0, *sorted(inner), size]

    if draw(st.booleans()):
        return "range", shape, cuts(int(torch.Size(shape).numel()), 4), transposed
    return "box", shape, (cuts(shape[0], 3), cuts(shape[1], 2)), transposed


def local_of(shard: Any, whole: Tensor) -> Tensor:
    """This rank's part, as a fresh tensor."""
    return shard.part(whole)


def assembled(shards: Sequence[Any], locals_: Sequence[Tensor]) -> Tensor:
    """Put the parts together again."""
    numbers = [x.to(torch.uint8) if x.dtype == torch.bool else x for x in locals_]
    whole = sum(s.spread(x) for s, x in zip(shards, numbers, strict=True))
    assert isinstance(whole, Tensor)
    return whole.to(locals_[0].dtype)
