"""`PackedStorage`: a run that stores the active units of its masked weights alone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_estdgm._words import first_names
from lightning_estdgm.config import DGMConfig
from lightning_estdgm.engine._absent_weights import AbsentWeights
from lightning_estdgm.engine._element_trial import why_not_by_element
from lightning_estdgm.engine._freed_memory import map_allocations, return_freed_memory
from lightning_estdgm.engine._hooked_optimizers import nested_optimizers
from lightning_estdgm.engine._inactive import Treatment
from lightning_estdgm.engine._late_values import LateValues
from lightning_estdgm.engine._masked_model import MaskedModel
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.engine._optimizer_state import OptimizerStates
from lightning_estdgm.engine._optimizer_trial import TrialMemory
from lightning_estdgm.engine._packed_layout import PackedWeight
from lightning_estdgm.engine._packed_states import PackedStates
from lightning_estdgm.engine._reducers import rebuild_reducer_
from lightning_estdgm.engine._state_entries import entry_name
from lightning_estdgm.method._masks import BlockSize, sides
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.modules._candidates import Candidate, clean_name, find_candidates
from lightning_estdgm.modules._packed_forward import PackedForward, unpack_free_, why_not_packed

_UNTIMED = 100_000  # steps of a schedule of which the first density alone is asked
_AUDITED_STEPS = 20  # after which a weight that no gradient has reached ends the run

_why_not: TrialMemory[str] = TrialMemory()  # of `why_not_by_element`


class PackedStorage:
    """The active units alone, in one parameter a layer; layers that have no packed form stay whole.

    Masks of packed weights are there from the first step on, so there is no audit before: what the model declares is
    trusted, and what turns out otherwise is an error. Layers that stay whole wait for an audit as with dense storage.

    Args:
        config: settings.
        has_one_backward: see the attribute.

    Attributes:
        group: process group of the ranks whose gradients are averaged; ``None``: there is no other.
        wrappers: DDP wrappers of the model, whose buckets follow the sizes of parameters.
        has_one_backward: whether a step is known to have one backward, on one rank.
        keeps_originals: whether whole weights are kept until the run has begun, to be put back; not of a model that is
            on the meta device, which never has them all.

    """

    def __init__(self, config: DGMConfig, *, has_one_backward: bool = False) -> None:
        self.group: dist.ProcessGroup | None = None
        self.wrappers: list[DistributedDataParallel] = []
        self.has_one_backward = has_one_backward
        self.keeps_originals = True
        self._config = config
        self._masked: MaskedModel | None = None
        self._drawn = 0.0  # density of masks that were drawn before there were optimizers
        self._copies: dict[str, str] = {}
        self._states: OptimizerStates | None = None
        self._hooks: PackedStates | None = None
        self._resized = False
        self._observing = False
        self._maps = False

    def pack(self, model: nn.Module, length: Callable[[], int]) -> None:
        """Draw the first masks of packed weights, and store the active units alone: before there is any optimizer.

        What is on the meta device gets its first values layer by layer, each of which is packed at once.

        Args:
            model: the model.
            length: function that returns the number of optimizer steps; called if a schedule other than `EstDgm` fits
                one length only.

        """
        self._masked = self._found(model, None, None, None)
        self._map(True)
        schedule = self._config.schedule
        try:
            self._drawn = schedule.resolve(_UNTIMED)(0).density
        except ValueError:  # lengths in steps, of each of several optimizers maybe, whose number is not known yet
            if isinstance(schedule, EstDgm):
                self._drawn = schedule.first_density
            else:
                self._drawn = schedule.resolve(length())(0).density
        self._masked.take_in(self._weights)
        late = LateValues(model)
        self.keeps_originals = not any(weight.parameter.is_meta for weight in self._masked.every)

        def arrive(weight: MaskedWeight) -> None:
            late.reach(weight.candidate.module)
            if weight.mask.is_meta:
                weight.use_unit(weight.block_size, weight.note)  # on the device that it has now

        self._masked.draw(self._masked.weights, self._drawn, arrive=arrive)
        for weight in filter(self.can_wait, self._masked.every):
            arrive(weight)
        late.finish()

    def masked(
        self,
        model: nn.Module,
        state: Mapping[str, Any] | None,
        held: Collection[int],
        group: dist.ProcessGroup | None,
        *,
        audit: bool,
    ) -> MaskedModel:
        """Return the weights, packed already if `pack` was called."""
        # Fabric wraps DDP once more.
        self.wrappers += [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        if any(wrapper.static_graph for wrapper in self.wrappers):
            raise ValueError(
                "storage='packed' rebuilds DDP's buckets as parameters shrink, which static_graph=True does not take: "
                "leave it out, or use storage='dense'"
            )
        if self._masked is None:
            self._masked = self._found(model, state, held, group)
        self.group = self._masked.group = group
        unheld = [w.name for w in self._masked.every if id(w.parameter) not in held and self._packs(w)]
        if unheld:
            raise ValueError(
                f"no optimizer holds the weights of {len(unheld)} layers ({first_names(unheld)}), which would be "
                "stored packed and never train: freeze them before the fit (requires_grad_(False)), leave them out by "
                "Selection(exclude=...), or use storage='dense'"
            )
        self._copies = _copies(model, self._weights, held)
        return self._masked

    def _found(
        self,
        model: nn.Module,
        state: Mapping[str, Any] | None,
        held: Collection[int] | None,
        group: dist.ProcessGroup | None,
    ) -> MaskedModel:
        selection = self._config.selection
        unpack_free_(model)
        candidates = find_candidates(model, selection.include, selection.exclude, held, selection.experts)
        masked = MaskedModel(candidates, self._config, state, group, wait=True, treatment=self._treatment)
        for weight in masked.every:
            why = _why_whole(weight.candidate)
            if why:
                weight.note = "; ".join(filter(None, (weight.note, f"stored whole: {why}")))
        if not any(map(self._packs, masked.every)):
            reasons = {weight.name: _why_whole(weight.candidate) for weight in masked.every}
            raise ValueError(f"storage='packed' finds no layer that it can pack, got {reasons}: use storage='dense'")
        return masked

    def _treatment(self, candidate: Candidate) -> Treatment:
        return self._config.inactive if _why_whole(candidate) else partial(AbsentWeights, self)

    def can_wait(self, weight: MaskedWeight) -> bool:
        """Return whether a weight stays whole."""
        return not self._packs(weight)

    @staticmethod
    def _packs(weight: MaskedWeight) -> bool:
        return not _why_whole(weight.candidate)

    @property
    def _weights(self) -> list[MaskedWeight]:
        """The weights that are or will be packed."""
        return [] if self._masked is None else [weight for weight in self._masked.every if self._packs(weight)]

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """Shapes that weights have in a state dict which are stored packed."""
        modules: list[Any] = [weight.candidate.module for weight in self._weights]
        return {module._estdgm_packing.stored_shape for module in modules if isinstance(module, PackedForward)}

    # ------------------------------------------------------------------ what weights ask, see `Store`

    def states_of(self, weight: MaskedWeight) -> Iterator[tuple[str, Tensor]]:
        """Yield the state entries of a weight that have an element for each of its."""
        if self._states is not None:
            for optimizer, path, entry in self._states.entries(weight):
                yield entry_name(optimizer, path), entry

    def pack_loaded_states(self, weight: MaskedWeight) -> None:
        """Pack the state of a weight that an optimizer has loaded whole."""
        if self._hooks is not None:
            self._hooks.pack_left(weight)

    def sums_gradients(self, block_size: BlockSize) -> bool:
        """Whether scores need the sum of the gradients of several steps."""
        steps = getattr(self._config.schedule, "observe_steps", None)  # None: it depends on the run's length
        return steps != 1 and self._config.resolved_update_rule.needs_mean_gradient(block_size)

    def note_resized(self) -> None:
        """Note that a parameter has another size."""
        self._resized = True

    # ------------------------------------------------------------------ the run

    def begin(self, states: OptimizerStates, density: float) -> None:
        """Refuse optimizers that do not work element by element; begin anew if masks are drawn for another density.

        Warn of packed weights that groups of matrices have left out.
        """
        self._states = states
        self._check(states.optimizers)
        self._warn_of_no_decay(states.optimizers)
        if self._drawn not in (0.0, density):
            for weight in self._weights:
                module: Any = weight.candidate.module
                module._estdgm_loaded = getattr(weight.inactive, "original", None)

    def _check(self, optimizers: Sequence[Optimizer]) -> None:
        for optimizer in (inner for outer in optimizers for inner in nested_optimizers(outer)):
            for index, group in enumerate(optimizer.param_groups):
                held = {id(parameter) for parameter in group["params"]}
                for weight in self._weights:
                    if id(weight.parameter) not in held:
                        continue
                    like = _like(weight)
                    try_it = partial(why_not_by_element, optimizer, index, like, weight.shape)
                    if why := _why_not.recall(optimizer, index, like, try_it, tuple(like.shape), weight.shape):
                        raise ValueError(
                            f"layer {weight.name!r} cannot be stored packed under {type(optimizer).__name__}: "
                            f"{why}. Use storage='dense', or another optimizer"
                        )

    def _warn_of_no_decay(self, optimizers: Sequence[Optimizer]) -> None:
        """Warn if weight decay reaches each matrix and nothing else, as of groups by ``p.ndim == 2``.

        Groups by the names of layers have a layer's bias beside its weight; those by the names of weights, all weights.
        """
        packed = {id(weight.parameter) for weight in self._weights}
        decayed: dict[str, set[bool]] = {"packed": set(), "matrix": set(), "other": set()}
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            for parameter in group["params"]:
                kind = "packed" if id(parameter) in packed else "matrix" if parameter.dim() == 2 else "other"
                decayed[kind].add(bool(group.get("weight_decay")))
        if decayed == {"packed": {False}, "matrix": {True}, "other": {False}}:
            warnings.warn(
                "weight decay reaches the matrices that are stored whole, and none of the packed weights, which have "
                "the shape [units, rows, columns]: if parameters are chosen by p.ndim == 2, choose by p.ndim >= 2",
                RuntimeWarning,
                stacklevel=2,
            )

    def began(self) -> None:
        """Free the weights as they were, and have state dicts of optimizers show whole weights."""
        assert self._masked is not None
        assert self._states is not None
        left = [w for w in self._weights if w not in self._masked.weights and isinstance(w.inactive, AbsentWeights)]
        for weight in left:  # dense in the run that is gone on with
            weight.inactive.give_up(weight)  # type: ignore[attr-defined]
        self._masked.weights[:] = [weight for weight in self._masked.weights if weight not in left]
        for weight in self._weights:
            if isinstance(weight.inactive, AbsentWeights):
                weight.inactive.original = None
        self._hooks = PackedStates(self._weights, self._states.fresh_value)
        self._hooks.use(self._states.optimizers)
        self.masks_changed()  # which gives back what whole weights have left
        self._map(True)  # until the first step has made the optimizer's state

    def use(self, optimizers: Sequence[Optimizer]) -> None:
        """Check and hook these optimizers."""
        self._check(optimizers)
        if self._hooks is not None:
            self._hooks.use(optimizers)

    def masks_changed(self) -> None:
        """Rebuild the buckets of DDP if a parameter has another size; give freed memory back."""
        self._observing = False
        self._return_freed()
        self._map(False)
        if self._resized:
            self._resized = False
            for wrapper in self.wrappers:
                rebuild_reducer_(wrapper)

    def end_step(self, steps: int) -> None:
        """Warn of weights that the first step's gradients have not reached; refuse those that none has after some."""
        if not self._observing:
            self._map(False)
        if steps not in (1, _AUDITED_STEPS):
            return
        quiet = [w.name for w in self._weights if isinstance(w.inactive, AbsentWeights) and not w.inactive.has_trained]
        if not quiet:
            return
        found = f"no gradient has reached the weights of {len(quiet)} layers ({first_names(quiet)}) in the first "
        way_out = "leave them out by Selection(exclude=...), or use storage='dense', which masks layers once they train"
        if steps == 1:
            warnings.warn(
                f"{found}step, of which active units alone are stored: if none does, the run ends after "
                f"{_AUDITED_STEPS} steps. Then {way_out}",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        raise ValueError(f"{found}{steps} steps, of which active units alone are stored: {way_out}")

    def before_update(self) -> None:
        """Refuse gradients that no backward has shown whole, such as ``torch.autograd.grad``'s: none would be grown.

        Where some layers were observed, one may also have been left out by every loss, and have a penalty's gradient.
        """
        assert self._masked is not None
        unseen = {
            weight.name: weight.placement.added
            for weight in self._masked.weights
            if isinstance(weight.placement, PackedWeight) and weight.placement.unseen
            if self._masked.rule.needs_gradients(weight.block_size) and not _has_sums(weight)
        }
        if unseen and any(map(_has_sums, self._masked.weights)):
            unseen = {name: added for name, added in unseen.items() if not added}
        if unseen:
            raise ValueError(
                f"a mask update is due, and storage='packed' has not observed the gradients of {len(unseen)} layers "
                f"({first_names(list(unseen))}): they are not backward()'s, but come from torch.autograd.grad, "
                "backward(inputs=...) or the like, which leave out those of inactive units. Call backward(), use "
                "storage='dense', or grow without gradients: UpdateRule(keep='magnitude', grow='random')"
            )

    def begin_observed(self) -> None:
        """Give freed memory back before the first observed step since masks changed: these steps take the most."""
        if not self._observing:
            self._observing = True
            self._return_freed()
            self._map(True)

    def _return_freed(self) -> None:
        if any(weight.parameter.device.type == "cpu" for weight in self._weights):
            return_freed_memory()

    def _map(self, wanted: bool) -> None:
        if self._maps != wanted:
            self._maps = wanted
            map_allocations(self, wanted)

    def explain(self, error: BaseException) -> None:
        """Note on torch's error of two shapes that copies of a packed network follow it by ``state_dict()``."""
        if not self._copies or not isinstance(error, RuntimeError) or not re.search("shape|size|dimension", str(error)):
            return
        note = (
            "with storage='packed' masked weights are parameters of shape [units, rows, columns], so that parameters() "
            f"of a network and its copy ({first_names([f'{a} of {b}' for a, b in self._copies.items()])}) cannot be "
            "zipped: a copy that follows takes state_dict() of both, and load_state_dict()"
        )
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:  # Python 3.10
            error.args = (f"{error}\n{note}",)

    def abandon(self) -> None:
        """Put the whole weights back, as they were before the run."""
        for weight in self._weights:
            if isinstance(weight.inactive, AbsentWeights) and weight.inactive.original is not None:
                weight.inactive.give_up(weight)
        self.close()

    def close(self) -> None:
        """Let go of the layers, which stay packed."""
        self._map(False)
        for weight in self._weights:
            module = weight.candidate.module
            if isinstance(module, PackedForward):
                module._estdgm_held = False
                module.observe(False)
                module._estdgm_observer = None
                module._estdgm_loaded_states = {}


def _why_whole(candidate: Candidate) -> str:
    """Return the reason why a layer is stored whole; empty if it can be packed."""
    module = candidate.module
    if isinstance(module, PackedForward):
        return ""
    if candidate.weight.is_sparse or candidate.shard.groups:
        return "its weight is sharded"
    return why_not_packed(module, candidate.kind)


def _copies(model: nn.Module, weights: Sequence[MaskedWeight], held: Collection[int]) -> dict[str, str]:
    """Return the networks that do not train and have the class, names and shapes of one that is packed.

    Args:
        model: the model.
        weights: weights that are or will be packed.
        held: ids of the parameters that an optimizer holds.

    Returns:
        Name of the packed network by that of the copy; of networks in others, the outermost.

    """
    stored = {id(weight.parameter): weight.candidate.stored_shape for weight in weights}
    packed: dict[Any, str] = {}
    still: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):  # single layers are alike by chance
            continue
        parameters = dict(module.named_parameters())
        form = type(module), *((n, stored.get(id(p), tuple(p.shape))) for n, p in parameters.items())
        if any(id(p) in stored for p in parameters.values()):
            packed.setdefault(form, clean_name(name))
        elif not any(p.requires_grad and id(p) in held for p in parameters.values()):
            still[clean_name(name)] = form
    found: dict[str, str] = {}
    for name, form in still.items():
        if form in packed and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = packed[form]
    return found


def _has_sums(weight: MaskedWeight) -> bool:
    """Whether the window holds gradients; if no rank has seen any, those are zeros."""
    return weight.window is not None and bool(weight.window.norm.any())


def _like(weight: MaskedWeight) -> Tensor:
    """Return a tensor of all units of a weight, with its dtype and device, and the memory of one unit."""
    rows, columns = sides(weight.block_size)
    taps = int(torch.Size(weight.shape[2:]).numel()) if weight.block_size != 1 else 1
    unit = torch.empty(1, rows, columns * taps, dtype=weight.parameter.dtype, device=weight.parameter.device)
    return unit.expand(weight.units, -1, -1)
