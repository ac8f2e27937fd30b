"""Exact top-k of scores that are sharded over ranks: the mask that `_masks.top_k` gives for the gathered scores.

A radix select. Scores become integers of the same order, and each pass finds eight bits of the k-th largest one: ranks
count the values of those bits among the elements still in question, add the counts up, and see in which of the 256 it
lies. A pass sends 2 KB per layer, whatever the layer's size, and all layers share one all-reduce: four passes for
float32, and up to as many again over the bits of the index if equal scores have to be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_estdgm.distributed._collectives import all_reduce
from lightning_estdgm.distributed._shard import Shard

_BITS = 8
_BINS = 1 << _BITS


@dataclass(frozen=True)
class Ranking:
    """Scores of one weight, and the number of the largest to choose in each of its parts.

    Attributes:
        shard: layout of the weight over ranks.
        scores: function that returns this rank's scores, float32 or float64 in the local shape; called once a pass, so
            that not all layers' scores are held at once.
        counts: number to choose in each part; parts are equal slices of the whole weight's first dimension.

    """

    shard: Shard
    scores: Callable[[], Tensor]
    counts: Sequence[int]

    def part_of(self, device: torch.device) -> Tensor | None:
        """Return the index of each local element's part; None if there is only one part."""
        if len(self.counts) == 1:
            return None
        return self.shard.index(device) // (math.prod(self.shard.shape) // len(self.counts))


def top_k(rankings: Sequence[Ranking]) -> list[Callable[[], Tensor]]:
    """Return for each ranking a function to its local mask of the largest scores, exactly `counts` in each part.

    Ties go to the lowest index in the whole weight. All ranks must call it, for the same weights in the same order.

    Raises:
        ValueError: on every rank, if a count is out of range or a score is NaN.

    """
    for ranking in rankings:
        size = math.prod(ranking.shard.shape) // len(ranking.counts)
        if not all(0 <= k <= size for k in ranking.counts):
            raise ValueError(f"k must lie in [0, {size}] for {size} scores, got {list(ranking.counts)}")
    shards = [ranking.shard for ranking in rankings]
    missing = all_reduce(shards, [torch.isnan(r.scores()).sum()[None] for r in rankings])
    if any(int(count) for count in missing):
        raise ValueError("scores must not be NaN")
    by_score = [_Search(r, lambda r=r: _descending(r.scores()), r.counts) for r in rankings]  # type: ignore[misc]
    _run(by_score)
    by_index = [_tie_search(search) for search in by_score]
    _run([search for search in by_index if search is not None])

    def mask_of(score: _Search, index: _Search | None) -> Callable[[], Tensor]:
        def mask() -> Tensor:
            chosen, tied = score.split()
            if index is not None:
                below, last = index.split()
                tied &= below | last
            return chosen | tied

        return mask

    return [mask_of(*pair) for pair in zip(by_score, by_index, strict=True)]


class _Search:
    """Search for the `k` smallest integer keys in each part of one weight, over its ranks.

    Attributes:
        k: number of keys in each part that are still to be found among those that share the known bits.
        equal: number of keys in each part that share the known bits.

    """

    def __init__(
        self,
        ranking: Ranking,
        keys: Callable[[], tuple[Tensor, int, int]],
        counts: Sequence[int],
        among: Callable[[], Tensor] | None = None,
    ) -> None:
        self.ranking, self.keys, self.among = ranking, keys, among
        self.k = list(counts)
        self.equal = [0 if k == 0 else -1 for k in counts]
        self.prefix = [0] * len(counts)  # the bits known so far
        self.known_bits = 0
        self.bits = keys()[1]

    def histogram(self) -> Tensor:
        """Count the values of the next bits, ``(parts, 256)``, among local keys that share the known ones."""
        keys, bits, lowest = self.keys()
        shift = bits - self.known_bits - _BITS
        values = (keys >> shift) & (_BINS - 1)
        if self.known_bits == 0:
            open_now = torch.ones_like(keys, dtype=torch.bool)
            if lowest < 0:
                values ^= _BINS // 2  # the sign bit: negative keys come first
        else:
            above = shift + _BITS  # arithmetic shifts keep the sign
            open_now = (keys >> above) == self._of_part([p + (lowest >> above) for p in self.prefix], keys)
        if self.among is not None:
            open_now &= self.among()
        part = self.ranking.part_of(keys.device)
        if part is not None:
            values = values + part * _BINS
        counts = torch.bincount(values[open_now].flatten(), minlength=_BINS * len(self.k))
        return counts.view(len(self.k), _BINS)

    def narrow(self, histogram: Tensor) -> None:
        """Find the next bits of the k-th smallest key from the counts of all ranks."""
        for part, counts in enumerate(histogram.tolist()):
            if self.k[part] == 0:
                continue
            value = 0
            while counts[value] < self.k[part]:
                self.k[part] -= counts[value]
                value += 1
            self.prefix[part] = self.prefix[part] << _BITS | value
            self.equal[part] = counts[value]
        self.known_bits += _BITS

    def split(self) -> tuple[Tensor, Tensor]:
        """Return local masks of keys below each part's k-th smallest, and of those equal to it; empty if k was 0."""
        keys, _, lowest = self.keys()
        threshold = self._of_part([lowest + prefix for prefix in self.prefix], keys)
        wanted = self._of_part([k > 0 for k in self.k], keys)
        return (keys < threshold) & wanted, (keys == threshold) & wanted

    def _of_part(self, values: Sequence[int], keys: Tensor) -> Tensor:
        """Return the value of each local element's part."""
        table = torch.tensor(values, device=keys.device)
        part = self.ranking.part_of(keys.device)
        return table[0] if part is None else table[part]


def _run(searches: Sequence[_Search]) -> None:
    """Run searches to their end, with one all-reduce a pass for all of them."""
    while active := [search for search in searches if search.known_bits < search.bits]:
        sums = all_reduce([search.ranking.shard for search in active], [search.histogram() for search in active])
        for search, histogram in zip(active, sums, strict=True):
            search.narrow(histogram)


def _tie_search(score: _Search) -> _Search | None:
    """Return the search by index among the keys equal to the threshold; None if all of them are chosen."""
    if score.k == score.equal:
        return None
    ranking = score.ranking
    size = math.prod(ranking.shard.shape)
    bits = _BITS * -(-max(1, (size - 1).bit_length()) // _BITS)
    device = score.keys()[0].device
    return _Search(ranking, lambda: (ranking.shard.index(device), bits, 0), score.k, among=lambda: score.split()[1])


def _descending(scores: Tensor) -> tuple[Tensor, int, int]:
    """Return integers in the reverse order of the scores, their number of bits, and the lowest possible integer."""
    integer, bits = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}[scores.dtype]
    raw = (scores + 0.0).view(integer)  # + 0.0: -0 and 0 are one value
    # Of a negative float all bits but the sign are in reverse order.
    return ~(raw ^ ((raw >> (bits - 1)) & (2 ** (bits - 1) - 1))), bits, -(2 ** (bits - 1))
