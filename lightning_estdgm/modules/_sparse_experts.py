"""Forward on active blocks for stacked experts: the class that a swapped module of experts takes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_estdgm.modules._expert_adapter import dense_product, flat_rows
from lightning_estdgm.modules._kinds import is_computed
from lightning_estdgm.modules._sparse_forward import SparseForward
from lightning_estdgm.sparse._expert_topology import ExpertTopology
from lightning_estdgm.sparse._experts import masked_experts


@dataclass
class ExpertStack:
    """How one parameter of a swapped module, which stacks its experts' matrices, is computed.

    Attributes:
        layout: ``"eoi"`` for ``(experts, out, in)``, ``"eio"`` for ``(experts, in, out)``.
        topology: Active blocks of the matrices as stored, written in place as masks change; ``None``: all are.
        backend: Name of a backend, or ``"dense"``.
        frozen: Whether inactive weights keep their value: only the weight gradient is sparse.
        observing: Whether the backward yields the whole weight gradient.

    """

    layout: str
    topology: ExpertTopology | None = None
    backend: str = "dense"
    frozen: bool = False
    observing: bool = False

    def product(self, name: str, x: Tensor, counts: Tensor | None, stored: Tensor) -> Tensor:
        """Return the products of `ExpertProduct` with the parameter of that name."""
        is_transposed = self.layout == "eio"
        rows, rows_of_each = flat_rows(name, x, counts, stored, self.layout)
        stack = stored.transpose(1, 2) if is_transposed else stored
        if self.backend == "dense" or self.topology is None:
            y = dense_product(rows, rows_of_each, stack)
        else:
            y = masked_experts(
                rows,
                stack,
                rows_of_each,
                self.topology.transpose() if is_transposed else self.topology,
                backend=self.backend,
                dense_grad=self.observing,
                frozen=self.frozen,
            )
        return y.view(*x.shape[:-1], y.shape[-1])


class SparseExperts(SparseForward):
    """Experts on active blocks, expert by expert; those without rows cost nothing.

    The forward is that of `LayerKind.forward`, unless every stack is dense: then it is the module's own.
    """

    _estdgm_stacks: dict[str, ExpertStack]
    _estdgm_forward: Callable[..., Any]

    def _move_topologies(self, fn: Callable[[Tensor], Tensor]) -> None:
        for stack in self._estdgm_stacks.values():
            stack.topology = stack.topology and stack.topology.apply(fn)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if all(stack.backend == "dense" for stack in self._estdgm_stacks.values()):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._estdgm_forward(self, self._estdgm_product, *args, **kwargs)

    def _estdgm_product(self, name: str, x: Tensor, counts: Tensor | None = None) -> Tensor:
        stack = self._estdgm_stacks[name]
        if is_computed(self, name):
            stack = ExpertStack(stack.layout)
        return stack.product(name, x, counts, getattr(self, name))
