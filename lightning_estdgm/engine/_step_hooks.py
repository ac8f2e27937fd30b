"""`StepHooks`: hooks on the optimizers' steps that mask gradients before a step and treat inactive weights around it.

The treatment itself is in `_inactive`; here it is decided which calls of `step` are steps of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_estdgm._words import first_names
from lightning_estdgm.distributed._collectives import agree, local_tensor
from lightning_estdgm.engine._hooked_optimizers import closure_of, parameters_of, with_closure, with_step_hooks
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.engine._step_size import StepScaling

if TYPE_CHECKING:
    from lightning_estdgm.config import StepSize


class StepHooks:
    """Hooks on the steps of all optimizers of one run.

    An optimizer may wrap others (Fabric, EMA and SAM wrappers, ZeRO): all that run torch's step hooks are hooked, and
    of nested steps only the outermost is treated. The weights that a step moves are those that its optimizer holds. An
    optimizer that was made since and holds weights is met at its first step, by torch's hooks for all optimizers.

    Args:
        optimizers: optimizers of the run.
        mask_gradients: function that masks the gradients of the given weights, unless they are masked already.
        step_size: settings of the scaling of steps.
        meet: function that is called before the first step of an optimizer that holds weights and is none of these.
        grows: whether units are grown whose state is reset.

    Attributes:
        optimizers: optimizers of the run.
        stepped: whether an optimizer has stepped since `begin_step`.

    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        mask_gradients: Callable[[Sequence[MaskedWeight]], None],
        step_size: StepSize,
        meet: Callable[[Optimizer], None] = lambda _: None,
        *,
        grows: bool = False,
    ) -> None:
        self.stepped = False
        self.optimizers = list(optimizers)
        self._hooked = [inner for optimizer in optimizers for inner in with_step_hooks(optimizer)]
        self._meet = meet
        self._mask_gradients = mask_gradients
        self._note_begun: Callable[[Sequence[MaskedWeight]], None] = lambda _: None
        self._note_step: Callable[[Sequence[MaskedWeight]], None] = lambda _: None
        self._scaling = StepScaling(optimizers, step_size, grows=grows)
        self._weights: dict[int, MaskedWeight] = {}  # by the id of its parameter
        self._awaits_first = False
        self._depth = 0  # number of nested steps that have begun and not ended
        self._idle = False  # whether the current step is not one of training
        # Of the current step, noted before it, as an optimizer may clear gradients in it; None: not known yet.
        self._moved: list[MaskedWeight] | None = None  # weights with a gradient
        self._has_any = False  # whether there is any gradient
        self._unevenly_held: dict[int, bool] = {}  # by optimizer: whether some rank holds no part of any parameter
        self._handles: list[Any] = []
        self._global_handle: Any = None

    @property
    def held(self) -> frozenset[int]:
        """Ids of the parameters that an optimizer holds."""
        return frozenset(id(p) for optimizer in self.optimizers for p in parameters_of(optimizer))

    @property
    def _counts_all(self) -> bool:
        return self._awaits_first and not self._weights

    def weights_of(self, optimizer: Optimizer) -> list[MaskedWeight]:
        """Return the masked weights that an optimizer, or a wrapper of one, holds."""
        weights = (self._weights.get(id(parameter)) for parameter in parameters_of(optimizer))
        return [weight for weight in weights if weight is not None]

    def register(
        self,
        weights: Sequence[MaskedWeight],
        note_begun: Callable[[Sequence[MaskedWeight]], None] = lambda _: None,
        note_step: Callable[[Sequence[MaskedWeight]], None] = lambda _: None,
        *,
        awaits_first: bool = False,
    ) -> None:
        """Hook the optimizers that hold weights.

        Args:
            weights: weights that are or can be masked.
            note_begun: function that is called with the weights that a step is about to move, once it has gradients.
            note_step: function that is called with the weights that a step of training has moved.
            awaits_first: whether all optimizers are hooked, and their steps count, while there is no weight: layers may
                begin to train in mid-run, and the schedule goes on until then.

        Raises:
            ValueError: if a weight is held by no optimizer that runs torch's step hooks.

        """
        self._note_begun, self._note_step, self._awaits_first = note_begun, note_step, awaits_first
        self._weights = {id(weight.parameter): weight for weight in weights}
        self._hook()
        self._scaling.register(self._weights)  # after the hooks above: they see the groups as the user made them
        meet = WeakMethod(self._meet_if_new)  # torch would keep a run that is never closed
        self._global_handle = register_optimizer_step_pre_hook(lambda *step: (known := meet()) and known(*step))

    def values(self) -> dict[int, dict[str, dict[str, Any]]]:
        """Return what optimizers keep of their groups beside the user's, by the ids of the optimizers."""
        return self._scaling.values()

    def use(
        self, optimizers: Sequence[Optimizer], values: Mapping[int, dict[str, dict[str, Any]]] | None = None
    ) -> None:
        """Go on with other optimizers; what those that stay keep of their groups stays.

        Args:
            optimizers: all optimizers from now on.
            values: `values` of before some were let go of; ``None``: those of now.

        Raises:
            ValueError: if an optimizer holds a weight, and none that runs torch's step hooks does.

        """
        self._abandon()
        self._unhook()
        self.optimizers = list(optimizers)
        self._hooked = [inner for optimizer in optimizers for inner in with_step_hooks(optimizer)]
        self._unevenly_held.clear()
        self._hook()
        self._scaling.use(optimizers, self._weights, values)

    def _hook(self) -> None:
        held = self.held
        unseen = {key: weight for key, weight in self._weights.items() if key in held}
        for optimizer in self._hooked:
            for weight in self.weights_of(optimizer):
                unseen.pop(id(weight.parameter), None)
            if self.weights_of(optimizer) or self._counts_all:
                self._handles.append(optimizer.register_step_pre_hook(self._before_step))
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if unseen:
            names = [weight.name for weight in unseen.values()]
            kinds = ", ".join(sorted({type(optimizer).__name__ for optimizer in self.optimizers}))
            raise ValueError(
                f"the optimizer steps of {len(names)} masked layers ({first_names(names)}) cannot be seen: {kinds} "
                "runs no step hooks of torch's, and holds no optimizer that does. Have its class call "
                "torch.optim.Optimizer.__init__, or keep the optimizer that steps as an attribute"
            )

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _meet_if_new(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._depth == 0 and not any(optimizer is known for known in self._hooked) and self.weights_of(optimizer):
            self._meet(optimizer)

    def keep(self, weights: Sequence[MaskedWeight]) -> None:
        """Treat and count the steps of these weights only."""
        before, self._weights = self._weights, {id(weight.parameter): weight for weight in weights}
        if self._global_handle is not None and not self._weights.keys() <= before.keys():
            self.use(self.optimizers)

    def begin_step(self) -> None:
        """Reset `stepped`, and the count of nested steps, which an exception may have left above 0."""
        self.stepped = False
        self._abandon()

    def forget_raised_step(self) -> None:
        """Give the optimizers' groups back if a step that raised has left them split."""
        if self._scaling.entered:
            self._abandon()

    def _abandon(self) -> None:
        self._depth = 0
        self._scaling.give_back()

    def remove(self) -> None:
        """Remove all hooks. May be called twice."""
        self._scaling.remove()
        self._unhook()
        if self._global_handle is not None:
            self._global_handle.remove()

    def state_dict(self) -> list[dict[str, dict[str, Any]]]:
        """Return what optimizers keep of their groups beside the user's; see `StepScaling.state_dict`."""
        return self._scaling.state_dict()

    def load_state_dict(self, state: Sequence[dict[str, dict[str, Any]]]) -> None:
        """Load what `state_dict` returned."""
        self._scaling.load_state_dict(state)

    # ------------------------------------------------------------------ around one step

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._depth += 1
        if self._depth > 1:
            return None
        closure = closure_of(args, kwargs)
        self._idle = closure is None and self._is_idle(optimizer)
        self._moved, self._has_any = None, False
        if self._idle:
            return None
        weights = self.weights_of(optimizer)
        if closure is None:  # the gradients are there: mask them if the loop did not, or changed them since
            self._mask_gradients(weights)
        for weight in weights:
            weight.inactive.before_step(weight)
        if closure is None:
            self._with_gradients(optimizer, weights)
            return None
        return with_closure(args, kwargs, self._around(optimizer, closure))

    def _with_gradients(self, optimizer: Optimizer, weights: Sequence[MaskedWeight]) -> None:
        self._note_begun(weights)
        self._note_gradients(optimizer, weights)
        grad_scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales by itself
        for weight in weights:
            weight.inactive.with_gradients(weight, 1.0 if grad_scale is None else grad_scale)

    def _note_gradients(self, optimizer: Optimizer, weights: Sequence[MaskedWeight]) -> None:
        self._moved = [weight for weight in weights if weight.has_gradient]
        self._has_any = self._has_gradients(optimizer, weights)

    def _around(self, optimizer: Optimizer, closure: Any) -> Any:
        """Return a closure that runs without inactive weights that learn, and adds them at its end."""

        def around() -> Any:
            with torch.no_grad():
                for weight in self.weights_of(optimizer):  # in, if the closure is called again
                    weight.inactive.withdraw(weight)
            try:
                with torch.enable_grad():
                    loss = closure()
            except BaseException:
                self._depth = 0  # the step ends here, and no hook will be told
                raise
            with torch.no_grad():
                self._with_gradients(optimizer, self.weights_of(optimizer))
            return loss

        return around

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth > 0:
            return
        weights = self.weights_of(optimizer)
        if self._moved is None and not self._idle:  # its closure was not called
            self._note_gradients(optimizer, weights)
        if self._idle or not self._has_any or _skipped_by_scaler(optimizer):
            for weight in weights:
                weight.inactive.withdraw(weight)
            return
        self.stepped = True
        self._note_step(weights)
        for weight in weights:
            weight.masked_gradient.forget()
            if weight in (self._moved or ()) or weight.placement.is_sharded:  # ranks without a part count, too
                weight.young.after_step()
        for weight in self._moved or ():
            weight.inactive.after_step(weight)
            weight.note_written()

    # ------------------------------------------------------------------ kinds of steps

    def _is_idle(self, optimizer: Optimizer) -> bool:
        """Whether a step is not one of training: torch's distributed checkpoints take one to make an optimizer's state.

        Such a step has a learning rate and gradients of 0. It may come after a checkpoint's weights are loaded and
        before its masks are, when the old masks would zero loaded weights. The ranks agree on it, because a rank's
        gradients may all be 0 in a step of training too.
        """
        rates = [group.get("lr") for group in optimizer.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            return False  # not torch's own zero, and a look at it would wait for the device
        if any(rate is None or float(rate) != 0.0 for rate in rates):
            return False
        gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        moving = any(bool(torch.count_nonzero(_values(local_tensor(gradient)))) for gradient in gradients)
        return not agree([weight.shard for weight in self.weights_of(optimizer)], moving)

    def _has_gradients(self, optimizer: Optimizer, weights: Sequence[MaskedWeight]) -> bool:
        """Whether there are gradients to step by.

        With sharded weights a rank may hold no part of the masked ones, so all parameters count; if a rank holds no
        part of any parameter, the ranks agree.
        """
        is_sharded = any(weight.placement.is_sharded for weight in weights)
        if not is_sharded and not self._counts_all:
            return bool(self._moved)
        parameters = parameters_of(optimizer)
        here = any(parameter.grad is not None for parameter in parameters)
        if not is_sharded:
            return here
        shards = [weight.shard for weight in weights]
        if id(optimizer) not in self._unevenly_held:
            nothing_here = all(parameter.numel() == 0 for parameter in parameters)
            self._unevenly_held[id(optimizer)] = agree(shards, nothing_here)
        return agree(shards, here) if self._unevenly_held[id(optimizer)] else here


def _values(tensor: Tensor) -> Tensor:
    """Return the stored values of a tensor in a sparse layout, as of an embedding's gradient; another as it is."""
    if tensor.layout is torch.sparse_coo:
        return tensor.coalesce().values()
    return tensor if tensor.layout is torch.strided else tensor.values()


def _skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer, which a GradScaler always calls, skipped this step for infinite gradients."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and bool(found_inf.item())
