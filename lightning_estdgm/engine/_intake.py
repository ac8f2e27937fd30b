"""`Intake`: the ways of weights under masks: in the first steps, late in a run, and from a checkpoint.

Which weights pass is decided by `_admission`, how masks are drawn by `_initialisation`; here the parts of a run that
have to know of new weights are told of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_estdgm.config import DGMConfig
from lightning_estdgm.engine._admission import Admission
from lightning_estdgm.engine._dispatch import Dispatch
from lightning_estdgm.engine._initialisation import describe_zeros, keep_zeros
from lightning_estdgm.engine._late_layers import APART
from lightning_estdgm.engine._masked_model import MaskedModel
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.engine._optimizer_state import OptimizerStates
from lightning_estdgm.engine._pattern_fit import check_pattern, leave_unfitting_dense
from lightning_estdgm.engine._refusals import check_rule
from lightning_estdgm.engine._step_hooks import StepHooks
from lightning_estdgm.modules._candidates import HEAD


class Intake:
    """Ways of weights under masks.

    Args:
        config: settings.
        masked: the weights that are and can be masked.
        states: state of the optimizers.
        dispatch: backends of the layers.
        admission: verdicts on the weights that wait.
        hooks: hooks on the optimizers' steps.
        changes_masks: whether the schedule has any mask update.

    """

    def __init__(
        self,
        config: DGMConfig,
        masked: MaskedModel,
        states: OptimizerStates,
        dispatch: Dispatch,
        admission: Admission,
        hooks: StepHooks,
        changes_masks: bool,
    ) -> None:
        self._config = config
        self._masked = masked
        self._states = states
        self._dispatch = dispatch
        self._admission = admission
        self._hooks = hooks
        self._changes_masks = changes_masks

    @property
    def counted(self) -> list[MaskedWeight]:
        """Weights whose steps count: those that are masked or wait; all that can be masked if there is none."""
        return [*self._masked.weights, *self._admission.waiting] or self._masked.every

    def check(self, weights: Sequence[MaskedWeight]) -> None:
        """Find what the optimizers' fresh state of weights is.

        Raises:
            ValueError: if weights cannot be masked by this run's settings.

        """
        trains_inactive = self._config.trains_inactive_weights
        check_rule(self._masked.rule, weights, changes_masks=self._changes_masks, trains_inactive=trains_inactive)
        self._dispatch.check_forced(weights)
        self._states.prepare(weights, changes_masks=self._changes_masks)

    def keep_zeros(self, density: float) -> str:
        """Have zeros that an earlier mask left stay masked until first masks are drawn; return a sentence on them.

        Raises:
            ValueError: if a pattern does not fit a layer at this density.

        """
        every = [weight for weight in self._masked.every if weight not in self._masked.weights]
        certain = [weight for weight in every if not weight.candidate.seems_head]
        check_pattern(self._config.update_rule.pattern, certain, self._masked.budgets(density, certain))
        return describe_zeros(keep_zeros(every, self._masked.budgets(density, every)), len(certain))

    def take_in(self, weights: Sequence[MaskedWeight], density: float, *, largest: bool = False) -> list[int]:
        """Draw masks of weights for a density of them all; return each one's number of units that were not zero."""
        self._masked.take_in(weights)
        held = self._masked.draw(weights, density, largest=largest, drawn=self._states.follow_drawn_)
        for weight in weights:
            self._dispatch.begin(weight)
        return held

    def take_in_trained(self, steps: int, density: float, final_density: float, *, largest: bool) -> bool:
        """Mask the weights that the steps so far have shown to train by their layers' forwards; return if any.

        Args:
            steps: number of steps done.
            density: density of the whole now.
            final_density: density of the whole at the end of the run.
            largest: whether their largest units stay, as where masks are recovered from weights.

        """
        new = self._admission.settle(steps, none_masked=not self._masked.weights)
        new = [weight for weight in new if self._states.knows(weight) or self._is_fit(weight)]
        late = [weight for weight in new if weight.name in self._admission.reopened]
        for weight in late:
            weight.since = steps
        self._dispatch.choose_units(new, self._masked.densities_with(new, final_density))
        if late:  # trained already, or loaded: what is largest matters most
            self.take_in(late, density, largest=True)
        if first := [weight for weight in new if weight not in late]:
            self.take_in(first, density, largest=largest)
        if self._masked.weights or self._admission.waiting:
            self._treat_known()
        else:
            self._masked.choose()
        return bool(new)

    def wake_late(self) -> None:
        """Have layers that have begun to train wait for an audit of the next step; what does not fit stays dense."""
        woken: list[MaskedWeight] = []
        begun = self._admission.late.take_begun()
        apart = self._admission.late.apart(begun)
        self._admission.reasons |= dict.fromkeys(sorted(apart), APART)
        for candidate in begun:
            if candidate.name in apart:
                continue
            try:
                leave_unfitting_dense([candidate], self._config)
                weights = self._masked.wake([candidate])
                self.check(weights)
                woken += weights
            except ValueError as error:
                self._admission.reasons[candidate.name] = str(error)
        if woken:
            self._admission.reopen(woken, self._masked.candidates)
            self._treat_known()

    def _is_fit(self, weight: MaskedWeight) -> bool:
        """Whether a weight can be masked that no optimizer held when it was looked at; else it stays dense."""
        try:
            self.check([weight])
        except ValueError as error:
            self._admission.reasons[weight.name] = str(error)
            return False
        return True

    def wake_saved(self, state: Mapping[str, Any]) -> list[MaskedWeight]:
        """Return weights of layers that a state masks, or has wait, and that do not train yet in this run."""
        names = [*state.get("layers", ()), *state.get("waiting_layers", ())]
        return self._masked.wake(self._admission.late.take(names))

    def load_state_dict(self, state: Mapping[str, Any], woken: Sequence[MaskedWeight]) -> None:
        """Load the masks of a controller's state, and who waits or stays dense.

        Args:
            state: result of `DGMController.state_dict`.
            woken: result of `wake_saved`.

        """
        self._admission.waiting += woken
        undecided = {*state["layers"], *state.get("waiting_layers", ())}  # not there: decided before the first step
        reasons = {weight.name: HEAD for weight in self._masked.every if weight.name not in undecided}
        reasons |= state.get("dense_layers", {})
        self._masked.take_in(self._admission.keep_waiting(state["layers"], reasons))
        for weight in self._masked.weights:
            weight.load_state_dict(state["layers"][weight.name])
            self._dispatch.resume(weight)
        self._admission.load_state_dict(state, self._masked.candidates)
        if woken:
            self._treat_known()

    def _treat_known(self) -> None:
        self._hooks.keep(self.counted)
