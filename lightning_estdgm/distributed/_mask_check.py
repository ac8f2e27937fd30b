"""Comparison of masks between ranks: each rank updates its own masks, and they have to come out the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

_WORD_BYTES = 8


class MasksDifferError(RuntimeError):
    """Ranks that should hold the same masks hold different ones."""


def mask_digest(mask: Tensor) -> int:
    """Return 64 bits of BLAKE2b over a bool tensor's packed bits, as a signed integer."""
    return _word(np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1)).tobytes())


def tensor_digest(tensor: Tensor) -> int:
    """Return 64 bits of BLAKE2b over a tensor's values, to the bit, as a signed integer."""
    return _word(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _word(content: bytes) -> int:
    digest = hashlib.blake2b(content, digest_size=_WORD_BYTES).digest()
    return int.from_bytes(digest, "little", signed=True)


def check_same_on_all_ranks(
    words: Mapping[str, int], device: torch.device, when: str, group: dist.ProcessGroup | None = None
) -> None:
    """Compare 64-bit words over the ranks of a group: one all-gather, and the same verdict on every rank.

    Args:
        words: words by their descriptions for errors; the same number on every rank.
        device: device that the group's collectives run on.
        when: end of the error's "... differs between ranks ...", such as "after mask update 3".
        group: process group; ``None``: all ranks.

    Raises:
        MasksDifferError: on every rank, if any word differs; it names the first such word and the ranks on each side.

    """
    size = dist.get_world_size(group)
    mine = torch.tensor(list(words.values()), dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine, group=group)
    table = torch.stack(gathered).cpu()
    differing = (table != table[0]).any(0)
    if not differing.any():
        return
    names = [name for name, differs in zip(words, differing.tolist(), strict=True) if differs]
    column = table[:, int(differing.nonzero()[0])].tolist()
    global_ranks = range(size) if group is None else dist.get_process_group_ranks(group)
    holders: dict[int, list[int]] = {}
    for rank, word in zip(global_ranks, column, strict=True):
        holders.setdefault(word, []).append(rank)
    sides = " against ".join(f"rank{'s' * (len(ranks) > 1)} {ranks}" for ranks in holders.values())
    others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    raise MasksDifferError(
        f"{names[0]}{others} differs between ranks {when}: {sides}. Every rank must see the same averaged gradients, "
        "hold the same weights and be given the same settings; going on would train different models"
    )
