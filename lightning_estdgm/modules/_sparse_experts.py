"""Forward on active blocks for stacked experts: the class that a swapped experts module of transformers takes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.method._masks import BlockSize
from lightning_estdgm.modules._sparse_forward import SparseForward
from lightning_estdgm.sparse._linear import masked_linear
from lightning_estdgm.sparse._topology import BlockTopology


@dataclass
class ExpertStack:
    """How one parameter of a swapped module, which stacks its experts' matrices, is computed.

    Attributes:
        topologies: Active blocks of each expert's matrix as stored, written in place as masks change.
        backend: Name of a backend, or ``"dense"``.
        frozen: Whether inactive weights keep their value: only the weight gradient is sparse.
        observing: Whether the backward yields the whole weight gradient.

    """

    topologies: list[BlockTopology]
    backend: str
    frozen: bool
    observing: bool = False

    @classmethod
    def from_mask(cls, mask: Tensor, experts: int, block_size: BlockSize, backend: str, frozen: bool) -> ExpertStack:
        """Stack of a mask ``(experts * rows / block_size, columns / block_size)``."""
        return cls([BlockTopology.from_mask(part, block_size) for part in mask.chunk(experts)], backend, frozen)

    def update_(self, mask: Tensor, backend: str) -> None:
        """Follow another mask of the same shape, in place, and another backend."""
        for topology, part in zip(self.topologies, mask.chunk(len(self.topologies)), strict=True):
            topology.update_(part)
        self.backend = backend

    def product(self, expert: int, x: Tensor, matrix: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
        """Return one expert's product with the rows of `x`; `matrix` is stored ``(in, out)`` if transposed."""
        matrix = matrix.t() if is_transposed else matrix
        if self.backend == "dense":
            return F.linear(x, matrix, bias)
        topology = self.topologies[expert].transpose() if is_transposed else self.topologies[expert]
        return masked_linear(
            x, matrix, bias, topology, backend=self.backend, dense_grad=self.observing, frozen=self.frozen
        )


class SparseExperts(SparseForward):
    """Experts of transformers on active blocks, expert by expert; those without tokens cost nothing.

    What lies between the products is that of ``grouped_mm_experts_forward``. How many tokens each expert gets is read
    on the host.

    Source: transformers, ``integrations/moe.py``.
    """

    _estdgm_stacks: dict[str, ExpertStack]

    def _move_topologies(self, fn: Callable[[Tensor], Tensor]) -> None:
        for stack in self._estdgm_stacks.values():
            stack.topologies = [topology.apply(fn) for topology in stack.topologies]

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if all(stack.backend == "dense" for stack in self._estdgm_stacks.values()):
            dense: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc]
            return dense
        chosen = top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        # Indices past the last expert stand for experts of other ranks: they come last, and add nothing.
        counts = torch.bincount(experts, minlength=self.num_experts)[: self.num_experts].tolist()
        here = order[: sum(counts)]
        if not len(here):
            return torch.zeros_like(hidden_states)
        y = self._estdgm_products("gate_up_proj" if self.has_gate else "up_proj", hidden_states[here // chosen], counts)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = self._estdgm_products("down_proj", y, counts)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[here].unsqueeze(-1)
        # Each pair of token and expert has its own row: a sum over them is deterministic, unlike index_add.
        pairs = y.new_zeros(len(order), y.shape[-1]).index_copy(0, here, y)
        return pairs.view(-1, chosen, y.shape[-1]).sum(1).to(hidden_states.dtype)

    def _estdgm_products(self: Any, own: str, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the products of each expert's matrix with its rows of `x`, ``counts[expert]`` at a time."""
        # Unbound at once: the backward of an index would fill a gradient of the whole stack for every expert.
        matrices = getattr(self, own).unbind(0)
        biases = getattr(self, f"{own}_bias").unbind(0) if self.has_bias else [None] * len(matrices)
        stack = self._estdgm_stacks.get(own) or ExpertStack([], "dense", False)
        return torch.cat(
            [
                stack.product(expert, rows, matrices[expert], biases[expert], self.is_transposed)
                for expert, rows in enumerate(x.split(counts))
                if len(rows)
            ]
        )
