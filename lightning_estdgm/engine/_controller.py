"""`DGMController`: the method on one model through one run, for any training loop. Needs no Lightning.

A plain loop adds two calls::

    with DGMController(model, optimizer, total_steps=1000) as dgm:
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            dgm.mask_gradients()   # once the whole gradient is there, before clipping
            optimizer.step()       # hooks of the controller scale the rates and re-mask the weights
            dgm.advance()          # next phase, mask update when due

Longer than other modules: it holds one class, whose methods are what users call, with their documentation.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from lightning_estdgm._words import first_names
from lightning_estdgm.config import DGMConfig
from lightning_estdgm.engine._admission import Admission
from lightning_estdgm.engine._decisions import LayerDecision
from lightning_estdgm.engine._dispatch import Dispatch
from lightning_estdgm.engine._eager_hold import EagerHold
from lightning_estdgm.engine._flops import FlopCounter
from lightning_estdgm.engine._foreign_writes import ForeignWrites
from lightning_estdgm.engine._gradient_mask import mask_gradients_
from lightning_estdgm.engine._initialisation import describe_recovered
from lightning_estdgm.engine._intake import Intake
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.engine._observation import observe
from lightning_estdgm.engine._optimizer_state import OptimizerStates
from lightning_estdgm.engine._pace import Pace, saved_pace
from lightning_estdgm.engine._refusals import check_state
from lightning_estdgm.engine._step_hooks import StepHooks
from lightning_estdgm.engine._storage import Storage, storage_of
from lightning_estdgm.method._schedules import Schedule, sampled_densities, updates_in
from lightning_estdgm.modules._candidates import Candidate, new_layers, replaced_layers, thawed_layers

_STATE_VERSION = 1
_MANY_MET = 4  # optimizers made in mid-run from which on it is looked which of them are still in use


class DGMController:
    """Dynamic gradient masking of one model through one run.

    It masks the weights of linear and convolution layers, observes gradients before each mask update, and keeps
    weights, gradients and optimizer state in line with the masks through hooks on the optimizers' steps. Close it, or
    use it as a context manager, to take the hooks and the swapped forwards away; weights stay as they are.

    It has more methods than other classes, because it is the one object that users of a plain loop meet: calls of the
    loop, properties to read, state. The work is done by the parts that the constructor assembles, one module each.

    Args:
        model: model; its linear and convolution layers are found once, here.
        optimizers: one or several optimizers, possibly wrapped by anything that keeps torch's step hooks.
        config: settings; ``None`` takes the defaults.
        total_steps: number of optimizer steps of the run.
        state: result of `state_dict`, from which masks and counters go on; weights are left as they are. If its run had
            another length, the rest of its schedule is gone through in the steps left of `total_steps`.
        draw_masks: whether to draw masks if there is no `state`. Otherwise everything is dense until `recover` or
            `load_state_dict`, which a run from a checkpoint's weights has to call.
        audit: whether the first step runs dense, to see which layers train by their weights; only these are masked
            then, after it. Otherwise masks are drawn at once, and what the model declares is trusted: registration
            order for the output head, ``requires_grad`` for what trains. Packed weights are not audited.
        group: process group of the ranks that train this model together, each with its own controller: masks are
            compared after each update, and the first rank chooses the backends. ``None``: no other rank is asked.
        say: called before layers are timed, with a sentence on how many and about how long that takes (on the first
            rank only); ``print`` will do. ``None``: nothing is said.
        storage: how weights are stored, if that began before there were optimizers; ``None``: as `config` says.

    Attributes:
        config: settings.
        schedule: schedule of this run.
        steps: number of optimizer steps done.
        position: position in the schedule: the number of steps done, unless the run is limited by time, or was resumed
            with another length.
        pace: how steps become positions in the schedule.
        updates: number of mask updates done.
        churn: share of the active weights that the last update brought in.
        recovered: description of an earlier mask found in the weights; empty if there was none.

    Raises:
        ValueError: if there is nothing to mask, a forced unit or backend does not fit a layer, or `state` belongs to
            another model or schedule.
        MasksDifferError: on every rank of `group`, if the ranks do not hold the same masks.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        config: DGMConfig | None = None,
        *,
        total_steps: int,
        state: Mapping[str, Any] | None = None,
        draw_masks: bool = True,
        audit: bool = True,
        group: dist.ProcessGroup | None = None,
        say: Callable[[str], None] | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.config = config or DGMConfig()
        self._run_steps = total_steps
        same = state is not None and state.get("schedule") == self.config.schedule.to_dict()
        self.pace = saved_pace(state) if state is not None and same else Pace.even(total_steps)
        self.schedule: Schedule = self.config.schedule.resolve(self.pace.total_steps)
        self.steps = self.position = self.updates = 0
        self.churn = 0.0
        self.recovered = ""
        self._model = model
        self._largest = False  # whether masks are drawn of the largest units, as after `recover`
        self._waiting = False  # a mask update is due but nothing could be observed yet
        self._warned_nonfinite = False
        self._met: list[Optimizer] = []  # made since the run began, and met at a step
        self._many_met = _MANY_MET
        self._flops = FlopCounter()
        self._eagerly = EagerHold(self, model)
        every = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
        grows = len(self.schedule.densities) > 1 and not self.config.trains_inactive_weights
        self._hooks = StepHooks(every, self._mask_if_touched, self.config.step_size, self._take_over, grows=grows)
        self._states = OptimizerStates(every)
        self._storage = storage or storage_of(self.config)
        self._masked = self._storage.masked(model, state, self._hooks.held, group, audit=audit)
        candidates = self._masked.candidates
        can_mask = self._masked.every
        self._dispatch = Dispatch(self.config, candidates, self._masked.weights, can_mask, group, say)
        self._admission = Admission(model, candidates, can_mask, group)
        self._writes = ForeignWrites()
        self._intake = Intake(
            self.config, self._masked, self._states, self._dispatch, self._admission, self._hooks, self._changes_masks
        )
        try:
            if not can_mask and not self._admission.late.asleep:  # frozen and sharded
                raise ValueError(f"the model has no layer to mask; found {self._admission.reasons}")
            self._storage.begin(self._states, self.schedule(self.position).density)  # refuses before others warn
            self._intake.check(can_mask)
            if state is not None:
                self.load_state_dict(state)
            elif draw_masks:
                self._begin(audit)
            awaits_first = bool(self._admission.late.asleep)
            notes = self._admission.note_begun_step, self._admission.note_step
            self._hooks.register(self._intake.counted, *notes, awaits_first=awaits_first)
            self._dispatch.hook_up()
            self._storage.began()
            self._eagerly.hold(self.probing)
        except BaseException:
            self._storage.abandon()
            self.close()
            raise

    # ------------------------------------------------------------------ calls of a training loop

    def mask_gradients(self, optimizer: Optimizer | None = None, grad_scale: float = 1.0) -> None:
        """Zero the gradients of inactive units; in an observation window, record the whole gradients first.

        Call it after the last backward of a step and before clipping. Of several calls in one step the first records.

        Args:
            optimizer: optimizer whose weights are masked; ``None``: all weights.
            grad_scale: factor that the gradients still carry (a GradScaler's, before unscaling).

        """
        self._hooks.forget_raised_step()
        weights = self._masked.every if optimizer is None else self._hooks.weights_of(optimizer)
        self._mask_gradients(weights, 1.0 / grad_scale)

    @torch.no_grad()
    def mask_weights(self, *, every: bool = False) -> None:
        """Zero inactive weights that anything but an optimizer's step has written to, such as a hand-made average.

        Call it before a forward that may follow such a write. It costs next to nothing where nothing was written.
        Sharded weights are left to the next step. ``model.state_dict()`` does it by itself, for every weight.

        Args:
            every: whether to read every weight. Torch counts no writes through ``weight.data``; otherwise these are
                looked for at one place of one weight a call, on a GPU not at all.

        """
        self._writes.mask(self._masked.weights, every=every)
        if self.observing:
            self._storage.begin_observed()

    def advance(self, position: int | None = None) -> bool:
        """Go on to the next step if an optimizer has stepped, and update the masks when due.

        Args:
            position: new position in the schedule, for runs limited by time; ``None``: that of the steps done.

        Returns:
            Whether the masks have changed.

        Raises:
            ValueError: if `position` goes backwards.

        """
        for weight in self._masked.every:
            weight.begin_step()
        if not self._hooks.stepped:
            self._hooks.begin_step()
            self._dispatch.begin_batch()
            self._admission.warn_if_steps_are_not_seen(self._masked.weights)
            return False
        before = self.position
        after = self.pace.position_at(self.steps + 1) if position is None else position
        if after < before:
            raise ValueError(f"the schedule's position must not go backwards: was {before}, got {after}")
        self._hooks.begin_step()
        if is_first := self._dispatch.probing:
            self._dispatch.read_probes(self._admission.used_by_themselves())
        self._flops.count(
            self._masked.candidates, self._masked.weights, self._dispatch.step_positions, observing=self.observing
        )
        self.steps += 1
        self.position = after
        self._storage.end_step(self.steps)
        due = self._is_due(before)
        updated = self._update_if_observed(due) if self._masked.weights else False
        taken_in = self._take_in_trained()
        if due:
            self._intake.wake_late()
        if taken_in or is_first or (updated and self._masked.rule.moves_budgets):
            every_density = (self._final_density(), *sampled_densities(self.schedule))
            self._dispatch.choose_all([self._masked.layer_densities_at(density) for density in every_density])
        if updated or taken_in or is_first:
            self._dispatch.apply()
        self._masked.yield_whole_gradients(self.observing)
        self._eagerly.hold(self.probing)
        return updated or taken_in

    def _take_in_trained(self) -> bool:
        """Mask the weights that the steps so far have shown to train by their layers' forwards; return if any."""
        if not self._admission.waiting:
            if self.steps == 1 and not self._masked.every:
                self._warn_of_none()
            return False
        density = self.schedule(self.position).density
        new = self._intake.take_in_trained(self.steps, density, self._final_density(), largest=self._largest)
        if new:
            self._note_drawn()
        elif not self._masked.weights and not self._admission.waiting:
            self._warn_of_none()
        return new

    def _warn_of_none(self) -> None:
        reasons, asleep = self._admission.reasons, list(self._admission.late.asleep)
        warnings.warn(
            "the run goes on dense: the first step has shown no layer that can be masked"
            + f". {reasons} (name one in include= if it is no output head)" * bool(reasons)
            + f"; {len(asleep)} layers ({first_names(asleep)}) are masked once they train, which they do not now"
            * bool(asleep),
            RuntimeWarning,
            stacklevel=4,
        )

    def _is_due(self, before: int) -> bool:
        """Whether a mask update was due since position `before`."""
        crossed = range(before + 1, min(self.position, self.schedule.total_steps - 1) + 1)
        return self._waiting or updates_in(self.schedule, crossed)

    def _update_if_observed(self, due: bool) -> bool:
        """Update the masks if an update is due and the gradients it needs were observed; return whether it was made."""
        if due and self._masked.needs_gradients:
            self._storage.before_update()
        self._waiting = due and self._masked.needs_gradients and not self._masked.observed
        if self._waiting:
            self._masked.refuse_nan()
        elif due:
            self._update_masks()
        return due and not self._waiting

    def recover(self, steps: int, position: int) -> None:
        """Go on in the middle of a run whose state is lost: take the masks from the weights.

        A layer keeps its largest units, as many as the schedule gives it at `position`. If the weights were masked by
        that schedule, these are the units that are not zero. If fewer units are not zero, the rest is drawn; if more
        are, the smallest are dropped: their weights and optimizer state become zero (with "frozen", weights stay).
        Observation window, explored share and FLOPs start anew. `recovered` describes the zeros that were found.

        Args:
            steps: number of optimizer steps done.
            position: position in the schedule.

        """
        self.steps, self.position, self._largest = steps, position, True
        zeros = [
            weight
            for weight in self._masked.every
            if not self._storage.can_wait(weight) or weight.placement.unit_norms(weight.weight).eq(0).any()
        ]
        names = [weight.name for weight in zeros]
        held = self._take_in(self._admission.keep_waiting(names, {}), largest=True) if zeros else []
        self._storage.masks_changed()
        self.recovered = describe_recovered(zeros, held)
        self._eagerly.hold(self.probing)

    def probe_uncompiled(self) -> None:
        """Have all that torch.compile has made run uncompiled in steps whose forwards are looked at, see `probing`.

        A model with a compiled module in it has that anyway; a loss function that is compiled, or a compiled module
        around the model, is known to its user alone. `close` ends it.
        """
        self._eagerly.is_needed = True
        self._eagerly.hold(self.probing)

    def use_optimizers(self, optimizers: Optimizer | Sequence[Optimizer]) -> None:
        """Go on with other optimizers than before, such as ones made anew in mid-run.

        An optimizer that holds weights and was not given is met at its first step and added. Those that nothing else
        holds are let go of when there are many; this call lets go of all that are not given.

        Args:
            optimizers: all optimizers of the run from now on.

        Raises:
            ValueError: as when a controller is made: if steps cannot be seen, or state cannot be reset.

        """
        self._met = []
        self._use(list(optimizers) if isinstance(optimizers, Sequence) else [optimizers])

    def _use(self, every: Sequence[Optimizer], values: Mapping[int, Any] | None = None) -> None:
        self._states.optimizers = every
        self._storage.use(every)
        self._states.prepare(self._masked.every, changes_masks=self._changes_masks)
        self._hooks.use(every, values)

    def _take_over(self, optimizer: Optimizer) -> None:
        given, values = self._hooks.optimizers[: len(self._hooks.optimizers) - len(self._met)], None
        if len(self._met) >= self._many_met:
            values, met = self._hooks.values(), [weakref.ref(one) for one in self._met]
            self._met = []
            self._use(given)
            self._met = [one for known in met if (one := known()) is not None]
            self._many_met = _MANY_MET + 2 * len(self._met)
        self._met = [*self._met, optimizer]
        self._use([*given, *self._met], values)

    def mask_copy_(self, copy: nn.Module, *, as_stored: bool = False) -> None:
        """Zero the inactive weights of a copy of the model, such as an average of its weights over time.

        An average of weights under changing masks holds weights that are inactive now. Called after each mask update,
        this keeps the average zero where the model is. With "frozen" there is nothing to zero.

        Args:
            copy: model with layers of the same names and shapes, on any device; for an `AveragedModel`, its ``module``.
            Its layers that store active units alone follow the masks.
            as_stored: whether layers of the copy that store whole weights are stored as those of the model are, so
                that their parameters have the same sizes.

        Raises:
            ValueError: if a masked layer is missing in the copy or has another shape.

        """
        self._masked.mask_copy_(copy, as_stored=as_stored)

    def restore_layers(self) -> None:
        """Give the layers their own classes and forwards back, as for a script or an export at the end of a run.

        They compute dense from then on. Masks stay, and so do the hooks that keep weights in line with them.
        """
        self._dispatch.close()

    def close(self) -> None:
        """Remove all hooks and swapped forwards; weights and masks stay as they are. May be called twice."""
        self._eagerly.hold(False)
        self._hooks.remove()
        self._admission.close()
        self._dispatch.close()
        self._writes.close()
        self._storage.close()
        for weight in self._masked.every:
            weight.inactive.forget()

    def __enter__(self) -> DGMController:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._storage.explain(error)
        self.close()

    # ------------------------------------------------------------------ properties

    @property
    def observing(self) -> bool:
        """Whether the current step's gradients are observed whole."""
        past = self.position >= self.schedule.total_steps
        if past or not self._masked.weights or not self._masked.needs_gradients:
            return False
        return self._waiting or self.schedule(self.position).observe

    @property
    def update_waits(self) -> bool:
        """Whether a mask update is due that waits for a step with finite gradients."""
        return self._waiting

    @property
    def timed(self) -> tuple[str, ...]:
        """What each choice of backends has timed in this process and how long it took, in words."""
        return tuple(self._dispatch.timed)

    @property
    def stepped(self) -> bool:
        """Whether an optimizer has stepped since the last `advance`."""
        return self._hooks.stepped

    @property
    def probing(self) -> bool:
        """Whether the current step's forwards are looked at: what torch.compile has made runs uncompiled then."""
        return self._dispatch.probing or bool(self._admission.waiting)

    @property
    def phase(self) -> str:
        """Name of the current step's phase."""
        return self.schedule(self.position).phase

    @property
    def density(self) -> float:
        """Active share of the masked weights."""
        return self._masked.density

    @property
    def final_density(self) -> float:
        """Active share of the masked weights that the schedule ends with."""
        return self._masked.density_at(self._final_density())

    @property
    def explored(self) -> float:
        """Share of the masked weights that have been active at any time (Rs of ITOP)."""
        return self._masked.explored

    @property
    def flops(self) -> dict[str, float]:
        """Training FLOPs so far: "analytic" (needed by the masks), "executed" and "dense"."""
        return self._flops.state_dict()

    @property
    def flops_ratio(self) -> float:
        """Ratio of the training FLOPs so far that the masks need to dense ones, in linear and convolution layers."""
        return self._flops.ratio

    @property
    def flops_executed_ratio(self) -> float:
        """As `flops_ratio`, but of the FLOPs computed: masked layers that run on a dense backend count as dense."""
        return self._flops.executed_ratio

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The linear and convolution layers of the model, masked or not."""
        return tuple(self._masked.candidates)

    @property
    def masked_weights(self) -> tuple[MaskedWeight, ...]:
        """The weights that are or can be masked, for a communication hook such as `distributed.ActiveUnits`."""
        return tuple(self._masked.every)

    def masks(self) -> dict[str, Tensor]:
        """Return a copy of each masked layer's whole mask over units, oriented ``(out, in, ...)``, on the CPU.

        Before the first step has been audited, these are the layers that can be masked, all of whose units are active.
        If weights are sharded (FSDP), call it on every rank: masks of single weights are gathered.
        """
        return {weight.name: weight.whole_mask() for weight in self._masked.shown}

    def layer_densities(self) -> dict[str, float]:
        """Return the density of each layer that `masks` returns."""
        return self._masked.layer_densities

    def late_layers(self) -> list[str]:
        """Return the names of layers that have begun to train in mid-run, and that no mask update will take in."""
        late = self._admission.late
        begun = dict.fromkeys([*thawed_layers(self._masked.candidates, self._hooks.held), *late.begun()])
        left = range(self.position + 1, self.schedule.total_steps)
        are_taken_in = any(name in late.asleep for name in begun) and updates_in(self.schedule, left)
        return [name for name in begun if name not in late.asleep or not are_taken_in]

    def note_unmasked_layers(self) -> list[str]:
        """Return the names of layers that are masked no longer, as another is in their place, or that are new.

        Layers are found once, when the controller is made. What has taken the place of a dense layer is not named.
        Densities count those as dense from now on whose place another has taken.
        """
        candidates, held = self._masked.candidates, self._hooks.held
        replaced = replaced_layers(self._model, candidates, held)
        masked = {weight.name for weight in self._masked.shown}
        dense = set(replaced) - masked - self._admission.late.asleep.keys()
        new = [name for name in new_layers(self._model, candidates, held) if name not in dense]
        self._masked.replaced = masked.intersection(replaced)
        return list(dict.fromkeys([*(name for name in replaced if name in masked), *new]))

    def decisions(self) -> tuple[LayerDecision, ...]:
        """Return the decision for every linear and convolution layer of the model."""
        return self._masked.decisions(self._final_density(), self._admission.why_dense())

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run in plain types and tensors, which load with ``weights_only=True``.

        If weights are sharded (FSDP), call it on every rank and save rank 0's result: it is whole, and may be loaded on
        any number of ranks. Layers are gathered one after the other; the sums of an open observation window go to rank
        0 only, so a checkpoint is smallest between windows.
        """
        return {
            "version": _STATE_VERSION,
            "total_steps": self.schedule.total_steps,
            "schedule": self.config.schedule.to_dict(),
            "steps": self.steps,
            "position": self.position,
            "pace": self.pace.state_dict(),
            "updates": self.updates,
            "churn": self.churn,
            "waiting": self._waiting,
            "stepped": self._hooks.stepped,
            "rates": self._hooks.state_dict(),
            "flops": self._flops.state_dict(),
            **self._dispatch.state_dict(),
            "layers": {weight.name: weight.state_dict() for weight in self._masked.weights},
            **self._admission.state_dict(self._masked.candidates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load masks, windows and counters; weights and optimizers are restored by their owners, before it or after.

        The schedule is then the one of `state`. If that run had another length than this one, the rest of the schedule
        is gone through in the steps left of this one's `total_steps`.

        Raises:
            ValueError: if `state` belongs to another model, schedule or version; nothing is changed then.

        """
        woken = self._intake.wake_saved(state)  # they may be thawed only after this
        check_state(state, _STATE_VERSION, self.config.schedule.to_dict(), self._masked.every, self._storage.can_wait)
        self._intake.check(woken)
        self.pace = saved_pace(state)
        self.schedule = self.config.schedule.resolve(self.pace.total_steps)
        for name in ("steps", "position", "updates", "churn"):
            setattr(self, name, state[name])
        if self._run_steps != self.pace.run[0]:
            self.pace = self.pace.with_length(
                (self._run_steps, None), progress=self.steps, position=self.position, left=self._run_steps - self.steps
            )
        self._waiting, self._hooks.stepped = state["waiting"], state["stepped"]
        self._hooks.load_state_dict(state.get("rates", ()))
        self._flops.load_state_dict(state["flops"])
        self._dispatch.load_state_dict(state, probing=self.steps == 0)
        self._intake.load_state_dict(state, woken)
        self._writes.watch(self._masked.weights)
        self._masked.yield_whole_gradients(self.observing)
        self._eagerly.hold(self.probing)
        self._check_ranks("where the run was resumed")

    # ------------------------------------------------------------------ gradients and masks

    @torch.no_grad()
    def _mask_gradients(self, weights: Sequence[MaskedWeight], scale: float, *, if_touched: bool = False) -> None:
        self._admission.note_gradients(weights)
        masked = self._masked.weights
        if self.observing and not observe([weight for weight in weights if weight in masked], scale):
            self._warn_nonfinite()
        mask_gradients_(weights, if_touched=if_touched)

    def _mask_if_touched(self, weights: Sequence[MaskedWeight]) -> None:
        self._mask_gradients(weights, 1.0, if_touched=True)

    def _begin(self, audit: bool) -> None:
        """Begin a new run: draw masks, or have the weights wait; an earlier mask's zeros are kept."""
        density = self.schedule(self.position).density
        self.recovered = self._intake.keep_zeros(density)
        names = [weight.name for weight in self._masked.every if not (audit and self._storage.can_wait(weight))]
        if names:
            self._take_in(self._admission.keep_waiting(names, {}))

    def _take_in(self, weights: Sequence[MaskedWeight], *, largest: bool = False) -> list[int]:
        """Draw masks of weights for the current position; return each one's number of units that were not zero."""
        held = self._intake.take_in(weights, self.schedule(self.position).density, largest=largest)
        self._note_drawn()
        return held

    def _note_drawn(self) -> None:
        self._writes.watch(self._masked.weights)
        self._masked.yield_whole_gradients(self.observing)
        self._check_ranks(f"where masks were drawn, at step {self.steps}")

    def _update_masks(self) -> None:
        density = self.schedule(self.position).density
        drop_fraction = self._masked.rule.drop_share(self.schedule.drop_progress(self.position), density)
        self.churn = self._masked.update(density, drop_fraction, self._states, self.updates)
        self.updates += 1
        self._storage.masks_changed()
        self._check_ranks(f"after mask update {self.updates}")

    def _check_ranks(self, when: str) -> None:
        words = {"the number of steps": self.steps, "the schedule's position": self.position}
        self._masked.check_ranks(words, when)

    @property
    def _changes_masks(self) -> bool:
        return len(self.schedule.densities) > 1

    def _final_density(self) -> float:
        return self.schedule(self.schedule.total_steps - 1).density

    def _warn_nonfinite(self) -> None:
        if not self._warned_nonfinite:
            self._warned_nonfinite = True
            warnings.warn(
                f"step {self.steps}: a gradient was NaN or infinite; the observation window leaves such steps out "
                "(said once)",
                RuntimeWarning,
                stacklevel=3,
            )
