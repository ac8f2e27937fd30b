"""`YoungUnits`: units of one weight that were grown not long ago, each with the optimizer's count of its own steps.

Optimizers that count steps correct their moments by that count, and keep one for a whole tensor. A unit that begins
anew late would take steps of another size than a fresh parameter. So the units of one update are a *cohort* while they
are young, which the optimizer steps as a parameter of its own; see `_young_steps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_estdgm.distributed._collectives import from_any_rank

if TYPE_CHECKING:
    from lightning_estdgm.engine._masked_weight import MaskedWeight


@dataclass
class Cohort:
    """Units of one weight that were grown at one mask update. Indices are 32 bits wide, into flattened tensors.

    Attributes:
        units: indices into the local mask.
        elements: indices into the local weight, oriented ``(out, in, ...)``; `units` themselves for single weights.
            ``None``: the units lie one after the other, from unit `start` of the parameter on.
        age: number of steps since.
        numbers: what the optimizer keeps for them beside tensors of their size, such as the count of steps; empty
            before the first step, and on a rank that does not step the weight.
        start: see `elements`.

    """

    units: Tensor
    elements: Tensor | None
    age: int
    numbers: dict[str, Any]
    start: int = 0


class YoungUnits:
    """The young units of one weight.

    Attributes:
        lifetime: number of steps after which a unit is young no more; 0: no unit ever is.
        own_state: whether entries of the state are written back after steps of their own. That is not needed where
            only the weight's step depends on the count: the step of the whole weight makes the same of the entries.
        cohorts: the young units, by the update that grew them, the oldest first. Where they lie in that order in the
            parameter, those that are young no more are among them until the next update, so that none moves before.
        views: what is kept of them from step to step, until they change; see `_unit_views`.

    """

    def __init__(self) -> None:
        self.views: Any = None
        self.lifetime = 0
        self.own_state = True
        self.cohorts: list[Cohort] = []

    def live(self, lifetime: int, *, own_state: bool = True) -> None:
        """Set `lifetime` and `own_state`; with a lifetime of 0, units are young no more."""
        self.lifetime, self.own_state = lifetime, own_state
        if not lifetime:
            self._keep([])

    @property
    def living(self) -> list[Cohort]:
        """Cohorts that are young."""
        return [cohort for cohort in self.cohorts if cohort.age < self.lifetime]

    def grow(self, weight: MaskedWeight, grown: Tensor) -> None:
        """Add the units that an update has grown, and let go of those that it dropped.

        Args:
            weight: weight, with its new mask.
            grown: bool of the local mask's shape.

        """
        if not self.lifetime:
            return
        active, cohorts = weight.mask.reshape(-1), self.living
        for cohort in cohorts:
            stay = cohort.units[active[cohort.units.long()]]
            if len(stay) < len(cohort.units):
                cohort.units, cohort.elements = stay, _elements(weight, stay)
        cohorts.append(_cohort(weight, grown, 0, {}))
        self._keep([c for c in cohorts if len(c.units) or weight.placement.is_sharded])  # other ranks may have some

    def after_step(self) -> None:
        """Count a step of the weight."""
        oldest = 0
        for cohort in self.cohorts:
            cohort.age += 1
            oldest = max(oldest, cohort.age)
        if self.cohorts and oldest >= self.lifetime:
            self._keep([c for c in self.cohorts if c.age < self.lifetime or c.elements is None])

    def let_go(self, *, is_sharded: bool) -> None:
        """Have no unit be young any more, as where an optimizer begins anew: its count is that of all units.

        Args:
            is_sharded: whether other ranks may not see it: they all have the same cohorts, so that these stay, empty.

        """
        for cohort in self.cohorts:
            if is_sharded and cohort.elements is not None:
                cohort.units, cohort.elements, cohort.numbers = cohort.units[:0], cohort.elements[:0], {}
            else:
                cohort.age = self.lifetime
        self._keep(self.cohorts)

    def _keep(self, cohorts: list[Cohort]) -> None:
        self.cohorts, self.views = cohorts, None

    # ------------------------------------------------------------------ state

    def state_dict(self, weight: MaskedWeight) -> list[dict[str, Any]]:
        """Return age, numbers and indices into the whole mask of each cohort; every rank has to call it if sharded."""
        found = []
        all_numbers = from_any_rank(weight.shard, [_on_cpu(cohort.numbers) for cohort in self.cohorts])
        for cohort, numbers in zip(self.cohorts, all_numbers, strict=True):
            local = torch.zeros(weight.mask.numel(), dtype=torch.bool, device=weight.mask.device)
            local[cohort.units.long()] = True
            units = _indices(weight.placement.to_whole(local.view(weight.mask.shape)))
            found.append({"age": cohort.age, "units": units, "numbers": numbers})
        return found

    def load_state_dict(
        self, state: Sequence[dict[str, Any]], weight: MaskedWeight, mask_shape: tuple[int, ...]
    ) -> None:
        """Load what `state_dict` returned.

        Args:
            state: state.
            weight: weight.
            mask_shape: shape of the whole mask.

        """
        cohorts = []
        for saved in state:
            whole = torch.zeros(mask_shape, dtype=torch.bool, device="cpu")
            whole.view(-1)[saved["units"].long().cpu()] = True
            numbers = _on_cpu(saved["numbers"])
            cohorts.append(_cohort(weight, weight.placement.to_local(whole), saved["age"], numbers))
        self._keep(cohorts)


def _on_cpu(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.cpu().clone() if isinstance(value, Tensor) else value for key, value in numbers.items()}


def _cohort(weight: MaskedWeight, units: Tensor, age: int, numbers: dict[str, Any]) -> Cohort:
    indices = _indices(units.to(weight.weight.device))
    return Cohort(indices, _elements(weight, indices), age, numbers)


def _indices(mask: Tensor) -> Tensor:
    return mask.reshape(-1).nonzero().squeeze(1).int()


def _elements(weight: MaskedWeight, units: Tensor) -> Tensor | None:
    elements = weight.placement.elements(units, weight.mask, weight.weight)
    return None if elements is None else elements.int()
