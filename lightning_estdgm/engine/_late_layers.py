"""`LateLayers`: layers that do not train in the first steps, and that are masked once they do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_estdgm.distributed._mask_check import tensor_digest
from lightning_estdgm.modules._candidates import Candidate

APART = (
    "its weights differ between ranks: DDP was made while it was frozen, and does not average its gradients. Freeze it "
    "in on_train_start or later, or have it train from the start"
)


SHARDED = (
    "its weight took no gradient when the run began, and sharded weights are not taken in later: thaw it before the "
    "fit, or begin another fit once it trains"
)


class LateLayers:
    """Layers that took no gradient so far, and which of them have begun to.

    What is thawed or given to an optimizer in mid-run, or is left out of the first forwards, is taken in at the mask
    update after it has got a gradient; with several ranks, after any has. What a wrapper such as DDP has not been made
    with, it does not average: such layers differ between ranks, and stay dense. Frozen weights that are sharded are
    not taken in.

    Args:
        candidates: linear and convolution layers of the model.
        group: process group of the ranks that train the model together; ``None``: no other rank is asked.

    Attributes:
        asleep: layers that took no gradient so far, as they will be once they train, by name.
        sharded: names of layers that took none either and are not taken in, since ranks share their weight.

    """

    def __init__(self, candidates: Sequence[Candidate], group: dist.ProcessGroup | None) -> None:
        late = [candidate.later for candidate in candidates if candidate.later is not None]
        late = [candidate for candidate in late if candidate.masked]
        self.sharded = [candidate.name for candidate in late if group is not None and candidate.shard.groups]
        self.asleep = {candidate.name: candidate for candidate in late if candidate.name not in self.sharded}
        self._begun: set[str] = set()
        self._group = group

    def add(self, candidates: Iterable[Candidate]) -> None:
        """Have layers looked at in whose first steps no gradient was seen."""
        self.asleep |= {candidate.name: candidate for candidate in candidates}

    def note(self) -> None:
        """Note the layers that have a gradient which is not zero. Call it before a step."""
        for name, candidate in self.asleep.items():
            gradient = candidate.weight.grad
            if gradient is not None and name not in self._begun and _is_nonzero(candidate):
                self._begun.add(name)

    def begun(self) -> list[str]:
        """Return the names of the layers that have begun to train."""
        return [name for name in self.asleep if name in self._begun]

    def take_begun(self) -> list[Candidate]:
        """Return the layers that have begun to train, on any rank, and let go of them; ranks call it together."""
        if not self.asleep:
            return []
        names = list(self.asleep)
        flags = [int(name in self._begun) for name in names]
        if self._group is not None:
            table = torch.tensor(flags, device=self.asleep[names[0]].weight.device)
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self._group)
            flags = table.tolist()
        return self.take([name for name, flag in zip(names, flags, strict=True) if flag])

    def apart(self, candidates: Sequence[Candidate]) -> set[str]:
        """Return the names of the layers that ranks train each by itself; ranks call it together, after a step."""
        if self._group is None or not candidates:
            return set()
        words = [[_digest(c, c.weight), _digest(c, c.weight.grad)] for c in candidates]
        lowest = torch.tensor(words, dtype=torch.int64, device=candidates[0].weight.device)
        highest = lowest.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._group)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group)
        differ = (lowest != highest).any(1).tolist()
        return {candidate.name for candidate, differs in zip(candidates, differ, strict=True) if differs}

    def take(self, names: Iterable[str]) -> list[Candidate]:
        """Return the layers of these names, and let go of them."""
        taken = [self.asleep.pop(name) for name in names if name in self.asleep]
        self._begun -= {candidate.name for candidate in taken}
        return taken

    def state_dict(self) -> dict[str, bool]:
        """Return for each layer whether it has begun to train."""
        return {name: name in self._begun for name in self.asleep}

    def load_state_dict(self, state: Mapping[str, bool], candidates: Sequence[Candidate]) -> None:
        """Load what `state_dict` returned, for the layers of this run."""
        known = {candidate.name: candidate.later or candidate for candidate in candidates}
        self.asleep = {name: known[name] for name in state if name in known and known[name].masked}
        self._begun = {name for name in self.asleep if state[name]}


def _is_nonzero(candidate: Candidate) -> bool:
    weight = candidate.weight
    assert isinstance(weight, nn.Parameter)
    gradient = weight.grad
    if gradient is None or not candidate.shard.holds(gradient):
        return False
    return bool(torch.count_nonzero(candidate.shard.local(gradient)))


def _digest(candidate: Candidate, tensor: Tensor | None) -> int:
    """Return a number by which ranks compare a tensor that each holds whole."""
    return 0 if tensor is None or candidate.shard.groups else tensor_digest(tensor)
