"""`Storage`: how a run stores the weights that it masks, a class for each value of `DGMConfig.storage`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightning_estdgm.config import DGMConfig
from lightning_estdgm.engine._masked_model import MaskedModel
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.engine._optimizer_state import OptimizerStates
from lightning_estdgm.engine._packed_storage import PackedStorage
from lightning_estdgm.engine._pattern_fit import leave_unfitting_dense
from lightning_estdgm.modules._candidates import find_candidates
from lightning_estdgm.modules._packed_forward import unpack_free_


class Storage(Protocol):
    """How a run stores the weights that it masks."""

    def can_wait(self, weight: MaskedWeight) -> bool:
        """Return whether a weight can be dense until the first step has shown that its layer trains by it."""
        ...

    def masked(
        self,
        model: nn.Module,
        state: Mapping[str, Any] | None,
        held: Collection[int],
        group: dist.ProcessGroup | None,
        *,
        audit: bool,
    ) -> MaskedModel:
        """Return the weights of a model that can be masked.

        Args:
            model: the model.
            state: state of a controller that will be loaded, or None.
            held: ids of the parameters that an optimizer holds.
            group: process group of the ranks that have to hold the same masks; ``None``: no other rank is asked.
            audit: whether they wait for an audit.

        """
        ...

    def begin(self, states: OptimizerStates, density: float) -> None:
        """Prepare for the first masks: the optimizers are known now, and the density."""
        ...

    def began(self) -> None:
        """Note that the run has begun: masks are drawn or loaded, or will be recovered."""
        ...

    def use(self, optimizers: Sequence[Optimizer]) -> None:
        """Go on with these optimizers."""
        ...

    def masks_changed(self) -> None:
        """Bring in line what depends on the sizes of parameters."""
        ...

    def end_step(self, steps: int) -> None:
        """Check what a step has shown."""
        ...

    def before_update(self) -> None:
        """Check what was observed for a mask update that is due."""
        ...

    def begin_observed(self) -> None:
        """Prepare for a step whose gradients are observed."""
        ...

    def explain(self, error: BaseException) -> None:
        """Add a note to an error that has ended the run, if it may come from how weights are stored."""
        ...

    def abandon(self) -> None:
        """Put the weights back as they were before the run, if it has not begun."""
        ...

    def close(self) -> None:
        """Let go of the layers; what they store stays as it is."""
        ...


class DenseStorage:
    """Whole weights, which are zero where they are inactive.

    Args:
        config: settings.

    """

    def __init__(self, config: DGMConfig) -> None:
        self._config = config

    def can_wait(self, weight: MaskedWeight) -> bool:
        """Return true: all weights are whole."""
        return True

    def masked(
        self,
        model: nn.Module,
        state: Mapping[str, Any] | None,
        held: Collection[int],
        group: dist.ProcessGroup | None,
        *,
        audit: bool,
    ) -> MaskedModel:
        """Return the weights, which wait for the audit if there is one."""
        selection = self._config.selection
        unpack_free_(model)
        candidates = find_candidates(
            model,
            selection.include,
            selection.exclude,
            held,
            selection.experts,
            mask_heads=audit,
            masks_late=audit,
        )
        candidates = leave_unfitting_dense(candidates, self._config)
        return MaskedModel(candidates, self._config, state, group, wait=True)

    def begin(self, states: OptimizerStates, density: float) -> None:
        """Do nothing."""

    def began(self) -> None:
        """Do nothing."""

    def use(self, optimizers: Sequence[Optimizer]) -> None:
        """Do nothing."""

    def masks_changed(self) -> None:
        """Do nothing."""

    def end_step(self, steps: int) -> None:
        """Do nothing."""

    def before_update(self) -> None:
        """Do nothing."""

    def begin_observed(self) -> None:
        """Do nothing."""

    def explain(self, error: BaseException) -> None:
        """Do nothing."""

    def abandon(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def storage_of(config: DGMConfig) -> Storage:
    """Return the storage of a run's settings."""
    return _STORAGES[config.storage](config)


_STORAGES: dict[str, type[DenseStorage] | type[PackedStorage]] = {"dense": DenseStorage, "packed": PackedStorage}
