"""Case of the never-slower rule for stacked experts: a stack sparse, against the module's own dense products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.sparse._expert_topology import ExpertTopology
from lightning_estdgm.sparse._experts import masked_experts
from lightning_estdgm.sparse.autotune._cases import DENSE, Case, _check, _Problem, _random, _topology

_TIMED_WEIGHTS = 2**28
"""Of a larger stack fewer experts are timed, with their share of the rows: operands must fit beside the model."""


@dataclass(frozen=True)
class ExpertCase(Case):
    """A stack of experts, each a linear layer with its own rows of the input. Backends see one of its matrices.

    Args:
        tokens: Number of rows of all experts together, spread evenly: of pairs of a token and an expert that it is
            sent to.
        experts: Number of matrices.
        dense: How the module computes them by itself: ``"grouped"`` (one grouped product), ``"batched"`` (one batched
            product, as many rows for each) or ``"loop"`` (one after the other).

    Raises:
        ValueError: A size or density is out of range, or `dense` is none of these.
    """

    experts: int = 1
    dense: str = "grouped"

    def __post_init__(self) -> None:
        _check(self, ["tokens", "experts"], ["out_features", "in_features"])
        if self.dense not in DENSE_FORMS:
            raise ValueError(f"dense must be one of {', '.join(DENSE_FORMS)}, got {self.dense!r}")

    @property
    def timed_experts(self) -> int:
        """Number of experts that are timed."""
        return max(1, min(self.experts, _TIMED_WEIGHTS // (self.out_features * self.in_features)))

    def counts(self) -> list[int]:
        """Rows of each timed expert."""
        experts = self.timed_experts
        rows = max(1, self.tokens * experts // self.experts)
        if self.dense == "batched":
            return [-(-rows // experts)] * experts
        return [rows // experts + (expert < rows % experts) for expert in range(experts)]

    def problem(self) -> _Problem:
        """Random operands, and the products of all timed experts with them."""
        random, counts = _random(self), self.counts()
        experts, out, inner = len(counts), self.out_features, self.in_features
        mask = _topology(self, experts * out, inner).mask()
        topology = ExpertTopology.from_mask(mask, experts, self.block_size)
        active = torch.cat([matrix.weight_mask() for matrix in topology.experts()]).view(experts, out, inner)
        weight = random(experts, out, inner) * active
        stored = weight.transpose(1, 2).contiguous() if self.transposed else weight
        leaves = [random(sum(counts), inner), stored]
        rows = torch.tensor(counts, device=self.device)

        def forward(name: str) -> Tensor:
            x, stored = leaves
            stack = stored.transpose(1, 2) if self.transposed else stored
            if name == DENSE:
                return DENSE_FORMS[self.dense](x, stack, counts)
            return masked_experts(x, stack, rows, topology, backend=name, frozen=self.frozen)

        return _Problem(leaves, random(sum(counts), out), forward)


def _has_grouped_product(x: Tensor) -> bool:
    """Whether torch has one for such operands: since 2.10, and on NVIDIA GPUs of compute capability 8.0 and later."""
    old_gpu = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0)
    return hasattr(F, "grouped_mm") and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and not old_gpu


def _grouped(x: Tensor, stack: Tensor, counts: list[int]) -> Tensor:
    if not _has_grouped_product(x):  # one after the other, without the detours of `_loop`
        return torch.cat([F.linear(rows, m) for rows, m in zip(x.split(counts), stack.unbind(0), strict=True)])
    ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
    y: Tensor = F.grouped_mm(x, stack.transpose(1, 2), offs=ends)
    return y


def _batched(x: Tensor, stack: Tensor, counts: list[int]) -> Tensor:
    return torch.bmm(x.view(len(counts), counts[0], -1), stack.transpose(1, 2)).flatten(0, 1)


def _loop(x: Tensor, stack: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([F.linear(rows, stack[expert]) for expert, rows in enumerate(x.split(counts))])


DENSE_FORMS: Mapping[str, Callable[[Tensor, Tensor, list[int]], Tensor]] = {
    "grouped": _grouped,
    "batched": _batched,
    "loop": _loop,
}
"""How modules compute stacked experts by themselves: from rows, stack ``(experts, out, in)`` and rows of each."""
