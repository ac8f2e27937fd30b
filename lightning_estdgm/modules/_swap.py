"""Swap of a layer's forward: active blocks only and back, by the module's class alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_estdgm.method._masks import BlockSize
from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.modules._packed_forward import PackedForward
from lightning_estdgm.modules._sparse_experts import ExpertStack, SparseExperts
from lightning_estdgm.modules._sparse_forward import STATE_PREFIX, SparseForward, dense_class, swapped_class
from lightning_estdgm.sparse._expert_topology import ExpertTopology
from lightning_estdgm.sparse._topology import BlockTopology


def sparsify_(candidate: Candidate, mask: Tensor, block_size: BlockSize, backend: str, frozen: bool = False) -> None:
    """Make a layer compute on the active blocks of `mask`; called again, follow a new mask or backend, in place.

    Only the module's class changes (and attributes come): parameters, buffers, state-dict keys, hooks and names stay.
    `restore_dense_` undoes it. A layer under FSDP2 keeps its place there, whether it was swapped before or after.

    Args:
        candidate: Layer with an operator.
        mask: Bool, of the shape of `method._masks.mask_shape`: single weights of a convolution have taps.
        block_size: Side of a block, or its rows and columns.
        backend: Name of a backend, or ``"dense"`` for the layer's own forward.
        frozen: Whether inactive weights keep their value: only the weight gradient is sparse.

    """
    module: Any = candidate.module
    if candidate.kind.experts:
        _sparsify_experts_(candidate, mask, block_size, backend, frozen)
        return
    if isinstance(module, SparseForward):
        module._estdgm_topology.update_(mask.flatten(1))
        module._estdgm_backend = backend
        return
    module._estdgm_topology = BlockTopology.from_mask(mask.flatten(1), block_size)
    module._estdgm_backend = backend
    module._estdgm_transposed = candidate.kind.transposed
    module._estdgm_observing = False
    module._estdgm_frozen = frozen
    module.__class__ = swapped_class(type(module))


def _sparsify_experts_(candidate: Candidate, mask: Tensor, block_size: BlockSize, backend: str, frozen: bool) -> None:
    module: Any = candidate.module
    kind = candidate.kind
    if not isinstance(module, SparseExperts):
        module._estdgm_stacks = {name: ExpertStack(layout) for name, layout in kind.layouts.items()}
        module._estdgm_forward = kind.forward
        module.__class__ = swapped_class(type(module), SparseExperts)
    stack = module._estdgm_stacks[kind.weight_name]
    stack.backend, stack.frozen = backend, frozen
    if stack.topology is None:
        stack.topology = ExpertTopology.from_mask(mask, kind.experts, block_size)
    else:
        stack.topology.update_(mask)


def set_observing(candidate: Candidate, observing: bool) -> None:
    """Have a swapped layer's backward yield the whole weight gradient, or the active blocks' only."""
    if isinstance(candidate.module, SparseExperts):
        candidate.module._estdgm_stacks[candidate.kind.weight_name].observing = observing
        return
    module = candidate.module
    if isinstance(module, PackedForward):
        module.observe(observing)
    elif isinstance(module, SparseForward) and module._estdgm_observing != observing:
        module._estdgm_observing = observing  # setting an attribute of a module takes its time


def restore_dense_(candidate: Candidate) -> None:
    """Give a swapped layer its own class and forward back; does nothing to any other layer."""
    module = candidate.module
    if not isinstance(module, SparseForward):
        return
    module.__class__ = dense_class(type(module))
    for name in [name for name in vars(module) if name.startswith(STATE_PREFIX)]:
        delattr(module, name)
