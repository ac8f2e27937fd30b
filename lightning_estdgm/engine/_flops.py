"""`FlopCounter`: training FLOPs of linear and convolution layers: needed by the masks, computed, and dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.sparse._flop_formulas import DENSE_BACKENDS

_PRODUCTS = 3.0  # per layer: output, input gradient, weight gradient


class FlopCounter:
    """Sums of training FLOPs over the steps of a run.

    Attributes:
        analytic: FLOPs that the masks need.
        executed: FLOPs computed: as `analytic`, but masked layers that run on a dense backend count as dense.
        dense: FLOPs of dense training.

    """

    def __init__(self) -> None:
        self.analytic = self.executed = self.dense = 0.0

    @property
    def ratio(self) -> float:
        """Ratio of the FLOPs that the masks need to dense ones; 1 before the first step."""
        return self.analytic / self.dense if self.dense else 1.0

    @property
    def executed_ratio(self) -> float:
        """Ratio of the FLOPs computed to dense ones; 1 before the first step."""
        return self.executed / self.dense if self.dense else 1.0

    def count(
        self,
        candidates: Sequence[Candidate],
        weights: Sequence[MaskedWeight],
        positions: Mapping[str, int],
        *,
        observing: bool,
    ) -> None:
        """Add one step: three products per layer, each times the share of the weights that takes part.

        Args:
            candidates: all linear and convolution layers.
            weights: masked weights.
            positions: number of positions that each layer's weight is applied to in a batch, by name; 1 where unknown.
            observing: whether the step's weight gradients are whole.

        """
        by_name = {weight.name: weight for weight in weights}
        for candidate in candidates:
            product = 2.0 * candidate.position_weights * positions.get(candidate.name, 1)
            analytic = executed = _PRODUCTS
            weight = by_name.get(candidate.name)
            if weight is not None:
                through = 1.0 if weight.inactive.act_in_forward else weight.density
                analytic = 2.0 * through + (1.0 if observing else weight.inactive.learning_density(weight))
                executed = analytic if weight.backend not in DENSE_BACKENDS else _PRODUCTS
            self.analytic += product * analytic
            self.executed += product * executed
            self.dense += product * _PRODUCTS

    def state_dict(self) -> dict[str, float]:
        """Return the sums."""
        return {"analytic": self.analytic, "executed": self.executed, "dense": self.dense}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Load the sums."""
        self.analytic, self.executed, self.dense = state["analytic"], state["executed"], state["dense"]
