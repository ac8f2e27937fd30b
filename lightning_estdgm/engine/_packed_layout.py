"""Layout of a weight of which the active units alone are stored: its `Shard`, its `Placement` and its window.

"Local" tensors are the parameter's: ``[units, rows, columns]``. First come the units that are not young, then those of
each cohort, the oldest first; among them it is the mask's reading order. So an optimizer is shown each cohort as a view
(`_young_steps`). The mask itself is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_estdgm.engine._observation import Window
from lightning_estdgm.engine._placement import WholeWeight
from lightning_estdgm.method._masks import BlockSize, mask_shape, pool_norm

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight
    from lightning_estdgm.engine._young_units import Cohort
    from lightning_estdgm.modules._packed_forward import PackedForward


class Store(Protocol):
    """What the treatment of one weight asks about the run.

    Attributes:
        group: process group of the ranks whose gradients are averaged; ``None``: there is no other.
        has_one_backward: whether a step is known to have one backward, on one rank.
        keeps_originals: whether whole weights are kept until the run has begun, to be put back.

    """

    group: Any
    has_one_backward: bool
    keeps_originals: bool

    def states_of(self, weight: MaskedWeight) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and tensor of each state entry of a weight that has an element for each of its."""
        ...

    def pack_loaded_states(self, weight: MaskedWeight) -> None:
        """Pack the state of a weight that an optimizer has loaded whole."""
        ...

    def sums_gradients(self, block_size: BlockSize) -> bool:
        """Whether scores need the sum of the gradients of several steps."""
        ...

    def note_resized(self) -> None:
        """Note that a parameter has another size."""
        ...


class SeenGradient:
    """Whole gradient of one weight since the last step, ``(out, in, ...)``; none unless observed.

    It is added up as autograd adds up the parameter's own: by each backward that accumulates gradients, and anew where
    that was cleared between two. Where norms of units are all that is asked of a step's one backward, they are taken as
    soon as there is a gradient: so the whole gradient of one layer at a time is there.

    Args:
        norms: function that returns these norms; ``None``: sums are kept until `take`.

    Attributes:
        added: whether a backward has added to the parameter's gradient since the last step: not that of
            ``torch.autograd.grad``, whose result a loop may make the parameter's gradient by itself.

    """

    def __init__(self, norms: Callable[[Tensor], Tensor] | None = None) -> None:
        self.added = False
        self._norms = norms
        self._sum: Tensor | None = None
        # Of the latest backward: its number, its gradient, and whether the parameter's gradient was cleared before it.
        # The parameter's may come before or after this one, and a backward may run within another.
        self._backward = -1
        self._new: Tensor | None = None
        self._cleared = False

    def begin(self, accumulated: Tensor | None) -> None:
        """Note that a backward is about to add to the parameter's gradient, which is `accumulated` so far."""
        self._turn_to_this_backward()
        self._cleared = accumulated is None or (self._sum is not None and not bool(accumulated.any()))

    def end(self) -> None:
        """Note that a backward has added to the parameter's gradient."""
        self.added = True

    def __call__(self, gradient: Tensor) -> None:
        """Take the gradient of all uses in one backward."""
        self._turn_to_this_backward()
        self._new = gradient if self._norms is None else self._norms(gradient)

    def _turn_to_this_backward(self) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._add()
            self._backward = backward

    def _add(self) -> None:
        """Add the gradient of the latest backward."""
        if self._new is not None:
            # If a step that should have one backward has two, the sum of norms is a bound.
            self._sum = self._new if self._sum is None or self._cleared else self._sum + self._new
        self._new, self._cleared = None, False

    def take(self) -> Tensor | None:
        """Return the sum, or its norms, and forget it."""
        self._add()
        taken, self._sum = self._sum, None
        return taken

    def forget(self) -> None:
        """Begin a step: free what was seen in the last one."""
        self.take()
        self.added = False


class PackedShard:
    """Layout of the packed parameter, and of gradients and optimizer state of its shape.

    Args:
        module: the packed layer.
        shape: shape ``(out, in, ...)`` of the whole weight.

    """

    groups: tuple[Any, ...] = ()
    why_dense = ""

    def __init__(self, module: PackedForward, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.device = module.packed_weight.device
        self._module = module

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` has the parameter's shape."""
        return tensor.shape == self._module.packed_weight.shape

    def local(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor.detach()

    def part(self, whole: Tensor) -> Tensor:
        """Return a copy: windows hold whole gradients."""
        return whole.clone()

    def spread(self, local: Tensor) -> Tensor:
        """Return the whole tensor."""
        packing = self._module._estdgm_packing
        return packing.oriented(packing.unpack(local))

    def index(self, device: torch.device) -> Tensor:
        """Return the position of each stored element in the flattened whole weight."""
        every = torch.arange(int(torch.Size(self.shape).numel()), device=device).view(self.shape)
        packing = self._module._estdgm_packing
        return packing.pack(packing.oriented(every))

    def expand(self, units: Tensor, block_size: BlockSize) -> Tensor:
        """Return the flags of the stored units, to broadcast over the parameter."""
        raise NotImplementedError  # by the placement, which knows them

    def grain(self, block_size: BlockSize) -> BlockSize:
        """Return 1: flags are broadcast."""
        return 1

    def pool(self, squares: Tensor, block_size: BlockSize) -> Tensor:
        """Return the sum over each stored unit."""
        return squares.sum((1, 2))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it is."""
        return tensor


class PackedWeight(WholeWeight):
    """A weight that every rank holds whole, in packed form.

    Args:
        weight: the weight, whose mask is that of the stored units.
        module: the packed layer.
        store: the run; its group averages gradients, and it says whether windows sum them or norms of units only.

    Attributes:
        stored: mask of the stored units.
        seen: whole gradients that are observed.
        unseen: whether the parameter had a gradient when it was observed last, and no backward showed the whole one.
        added: whether some backward had added to that gradient, maybe one that left the layer out.

    """

    product = "packed"

    def __init__(self, weight: MaskedWeight, module: PackedForward, store: Store) -> None:
        self._shape, self._block_size = weight.shape, weight.block_size
        self.grain = 1
        self.stored = weight.mask
        self._module, self._store = module, store
        self._signed = store.sums_gradients(weight.block_size)
        at_once = store.has_one_backward and not self._signed
        self.seen = SeenGradient(partial(pool_norm, block_size=self._block_size) if at_once else None)
        self.unseen = self.added = False

    def mask_shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the shape of the whole mask."""
        return mask_shape(self._shape, self._block_size)

    def address(self, mask: Tensor) -> Tensor:
        """Return the flag of each stored unit, ``[units, 1, 1]``."""
        flags = mask.to(self.stored.device).flatten()[self.stored.flatten()]
        order = self.order
        if order is not None:
            flags = torch.empty_like(flags).index_copy_(0, order.long(), flags)
        return flags[:, None, None]

    @property
    def order(self) -> Tensor | None:
        """Place of each stored unit, in the mask's reading order; ``None``: that order."""
        return self._module._estdgm_packing.order

    def elements(self, units: Tensor, mask: Tensor, weight: Tensor) -> Tensor | None:
        """Return ``None``: `AbsentWeights.arrange` lays them out by age."""
        return None

    def by_age(self, cohorts: Sequence[Cohort]) -> Tensor:
        """Return the numbers of the stored units in the mask's reading order, those of each cohort after all others.

        Args:
            cohorts: the oldest first; their `start` is set.

        """
        rank = torch.zeros(self.stored.numel(), dtype=torch.int16, device=self.stored.device)
        start = int(torch.count_nonzero(self.stored)) - sum(len(cohort.units) for cohort in cohorts)
        for i, cohort in enumerate(cohorts, 1):
            rank[cohort.units.long()] = i
            cohort.start, start = start, start + len(cohort.units)
        return rank[self.stored.flatten()].argsort(stable=True)

    # ---- norms

    def _norms(self, weight: Tensor) -> Tensor:
        loaded, packing = self._module._estdgm_loaded, self._module._estdgm_packing
        if loaded is not None:
            return pool_norm(packing.oriented(loaded).to(weight), self._block_size)
        values = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        norms, order = values.new_zeros(self.stored.shape), self.order
        stored = values.abs().flatten() if self._block_size == 1 else torch.linalg.vector_norm(values, dim=(1, 2))
        norms[self.stored] = stored if order is None else stored[order]
        return norms

    def unit_norms(self, weight: Tensor) -> Tensor:
        """Return the norms on the CPU, 0 for units that are not stored."""
        return self._norms(weight).cpu()

    def score_norms(
        self, weight: Tensor, gradient_sum: Tensor | None, evidence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the norms of the units; of gradients, those that the window has, or of its sum."""
        if gradient_sum is None or gradient_sum.shape != self._shape:
            return self._norms(weight), gradient_sum
        return self._norms(weight), pool_norm(gradient_sum, self._block_size)

    # ---- observation

    def whole_gradient(self, gradient: Tensor | None) -> Tensor | None:
        """Return the whole gradient since the last step, averaged over ranks as the parameter's is, or its norms."""
        seen = self.seen.take()
        if gradient is None:  # cleared after a backward, and none came since
            seen = None
        is_seen = seen is not None
        group = self._store.group
        if group is not None and dist.get_world_size(group) > 1:
            if seen is None:
                seen = torch.zeros(self._shape, dtype=self._module.packed_weight.dtype, device=self.stored.device)
            dist.all_reduce(seen, group=group)
            is_seen = is_seen or bool(seen.any())
            seen = seen / dist.get_world_size(group)
        self._note(gradient, is_seen=is_seen)
        return seen

    def _note(self, gradient: Tensor | None, *, is_seen: bool) -> None:
        is_probed = self._module._estdgm_probe is not None  # not in the first step after the layer was thawed
        self.unseen = is_probed and not is_seen and gradient is not None and bool(gradient.any())
        self.added = self.seen.added

    def observation(self, gradient: Tensor | None, mask: Tensor) -> Tensor | None:
        """Return the norms of the gradient's units, which may have been taken before."""
        if gradient is None or gradient.shape != self._shape:
            return gradient
        return pool_norm(gradient, self._block_size)

    def window(self, weight: Tensor, mask: Tensor) -> Window:
        """Return an empty window."""
        return PackedWindow(self._shape, weight, mask) if self._signed else NormWindow(weight, mask)


class PackedWindow(Window):
    """Sums over the observed gradients of a weight that is stored packed.

    Args:
        shape: shape of the whole weight.
        weight: values of the parameter's dtype and device.
        mask: whole mask.

    """

    def __init__(self, shape: tuple[int, ...], weight: Tensor, mask: Tensor) -> None:
        super().__init__(weight.new_empty(()).expand(shape), mask)


class NormWindow(Window):
    """Sums over the norms of observed gradients, where these are enough: they are the gradients' sums as well."""

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        super().__init__(weight.new_empty(0), mask)
        self.gradient = self.norm

    def add(self, gradient: Tensor | None, norm: Tensor, scale: float) -> None:
        """Add `scale` times the norms of a gradient's units."""
        super().add(None, norm, scale)

    def load_state_dict(self, state: Mapping[str, Any], weight: MaskedWeight) -> None:
        """Load the state that `state_dict` returned, or that of a weight stored whole."""
        super().load_state_dict({**state, "gradient": state["norm"]}, weight)
