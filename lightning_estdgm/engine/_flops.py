"""Training FLOPs of linear and convolution layers: what the masks ask for, what is computed, what dense would be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.modules._candidates import Candidate

_PRODUCTS = 3.0  # of a layer: output, input gradient, weight gradient


class FlopCounter:
    """Sums of training FLOPs over the steps of a run.

    Attributes:
        analytic: what the masks ask for.
        executed: as `analytic`, but counting layers that run dense with a mask as dense.
        dense: what dense training would have taken.

    """

    def __init__(self) -> None:
        self.analytic = self.executed = self.dense = 0.0

    @property
    def ratio(self) -> float:
        """FLOPs that the masks ask for, over dense ones; 1 before the first step."""
        return self.analytic / self.dense if self.dense else 1.0

    @property
    def executed_ratio(self) -> float:
        """FLOPs that were computed, over dense ones; 1 before the first step."""
        return self.executed / self.dense if self.dense else 1.0

    def count(
        self,
        candidates: Sequence[Candidate],
        weights: Sequence[MaskedWeight],
        positions: Mapping[str, int],
        *,
        observing: bool,
    ) -> None:
        """Add one step: three products a layer, each by the share of weights that takes part.

        Args:
            candidates: all linear and convolution layers.
            weights: the masked ones.
            positions: number of positions that each layer's weight is applied to, by name; 1 where unknown.
            observing: whether the step's weight gradients are whole.

        """
        by_name = {weight.name: weight for weight in weights}
        for candidate in candidates:
            product = 2.0 * math.prod(candidate.shape) * positions.get(candidate.name, 1)
            analytic = executed = _PRODUCTS
            weight = by_name.get(candidate.name)
            if weight is not None:
                through = 1.0 if weight.inactive.act_in_forward else weight.density
                analytic = 2.0 * through + (1.0 if observing else weight.inactive.learning_density(weight))
                executed = analytic if weight.backend not in ("dense", "reference") else _PRODUCTS
            self.analytic += product * analytic
            self.executed += product * executed
            self.dense += product * _PRODUCTS

    def state_dict(self) -> dict[str, float]:
        """Return the sums."""
        return {"analytic": self.analytic, "executed": self.executed, "dense": self.dense}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over what `state_dict` returned."""
        self.analytic, self.executed, self.dense = state["analytic"], state["executed"], state["dense"]
