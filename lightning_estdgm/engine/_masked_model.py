"""`MaskedModel`: all masked weights of one model, and what acts on all of them: budgets, masks, comparison of ranks.

It knows nothing of steps and schedules: the controller calls it with a density.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_estdgm.config import DGMConfig
from lightning_estdgm.distributed._collectives import agree
from lightning_estdgm.distributed._mask_check import check_same_on_all_ranks, mask_digest
from lightning_estdgm.engine._budget import unit_budgets
from lightning_estdgm.engine._decisions import LayerDecision, layer_decisions
from lightning_estdgm.engine._gradient_mask import mask_gradients_
from lightning_estdgm.engine._inactive import Treatment
from lightning_estdgm.engine._initialisation import draw_masks, masked_weights
from lightning_estdgm.engine._mask_update import update_masks
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.engine._optimizer_state import OptimizerStates
from lightning_estdgm.modules._candidates import Candidate, clean_name
from lightning_estdgm.modules._packed_forward import PackedForward
from lightning_estdgm.modules._swap import set_observing


class MaskedModel:
    """The masked weights of one model.

    Args:
        candidates: linear and convolution layers of the model.
        config: settings.
        state: state of a controller that will be loaded, or None.
        wait: whether weights wait to be taken in, all active.
        treatment: treatment of a layer's inactive weights; ``None``: `DGMConfig.inactive` of all.
        group: process group of the ranks that have to hold the same masks; ``None``: no other rank is asked.

    Attributes:
        candidates: linear and convolution layers of the model.
        every: all weights that can be masked.
        weights: those that are masked; the others wait, or stay dense.
        rule: update rule.
        group: process group of the ranks that have to hold the same masks.
        replaced: names of masked layers that the model no longer has; another is in their place, which counts as dense.

    Raises:
        ValueError: if a unit does not fit a layer.

    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        config: DGMConfig,
        state: Mapping[str, Any] | None,
        group: dist.ProcessGroup | None,
        *,
        wait: bool = False,
        treatment: Callable[[Candidate], Treatment] | None = None,
    ) -> None:
        self.candidates = candidates
        self.every = masked_weights(candidates, config, state, wait=wait, treatment=treatment)
        self.weights = [] if wait else list(self.every)
        self.rule = config.resolved_update_rule
        self._chosen = not wait
        self._config = config
        self.group = group
        self.replaced: set[str] = set()

    def wake(self, candidates: Sequence[Candidate]) -> list[MaskedWeight]:
        """Return the weights of layers that begin to train in mid-run, all active; they keep their order in the model.

        Args:
            candidates: these layers, as candidates that are masked.

        Raises:
            ValueError: if a unit does not fit a layer; nothing is changed then.

        """
        known = {weight.name: weight for weight in self.every}
        new = [c for c in candidates if c.name not in known]
        made = masked_weights(new, self._config, None, wait=True)
        as_now = {candidate.name: candidate for candidate in new}
        self.candidates = [as_now.get(candidate.name, candidate) for candidate in self.candidates]
        order = {candidate.name: i for i, candidate in enumerate(self.candidates)}
        self.every = sorted([*self.every, *made], key=lambda weight: order[weight.name])
        self.__dict__.pop("needs_gradients", None)
        return [*made, *(known[c.name] for c in candidates if c.name in known)]

    def take_in(self, weights: Sequence[MaskedWeight]) -> None:
        """Have weights masked that were waiting; they keep their order in the model."""
        self.choose()
        self.__dict__.pop("needs_gradients", None)  # their units are known only now
        for weight in weights:
            if weight not in self.weights:
                weight.take_in()
        self.weights[:] = [weight for weight in self.every if weight in self.weights or weight in weights]

    @property
    def shown(self) -> list[MaskedWeight]:
        """The masked weights; before the first are chosen, all that can be."""
        return self.weights if self._chosen else self.every

    def choose(self) -> None:
        """Note that masked weights have been chosen, if only none."""
        self._chosen = True

    # ------------------------------------------------------------------ densities and budgets

    @property
    def density(self) -> float:
        """Active share of the masked weights; before any is, of those that can be."""
        return _share(self.shown, [self._computed_units(weight) for weight in self.shown])

    @property
    def layer_densities(self) -> dict[str, float]:
        """Active share of each masked layer; before any is masked, of each that can be."""
        return {weight.name: self._computed_units(weight) / weight.units for weight in self.shown}

    def _computed_units(self, weight: MaskedWeight) -> int:
        return weight.units if weight.name in self.replaced else weight.active

    @property
    def explored(self) -> float:
        """Share of the masked weights that have been active at any time."""
        return _share(self.shown, [weight.explored_units for weight in self.shown])

    @cached_property
    def needs_gradients(self) -> bool:
        """Whether updates need observed gradients."""
        return any(self.rule.needs_gradients(weight.block_size) for weight in self.every)

    @property
    def observed(self) -> bool:
        """Whether the window of any weight holds a gradient."""
        return any(weight.observed for weight in self.weights)

    def budgets(self, density: float, weights: Sequence[MaskedWeight] | None = None) -> list[list[int]]:
        """Return the number of active units of each part of each layer for a density of the whole.

        Args:
            density: density of the whole.
            weights: weights to share it among; ``None``: all masked ones.

        """
        sizes = [weight.sizes for weight in (self.weights if weights is None else weights)]
        return unit_budgets(sizes, self._config.units.distribution, density) if sizes else []

    def layer_densities_at(self, density: float) -> list[float]:
        """Return each layer's density for a density of the whole."""
        return [sum(k) / weight.units for weight, k in zip(self.weights, self.budgets(density), strict=True)]

    def densities_with(self, new: Sequence[MaskedWeight], density: float) -> list[float]:
        """Return the density of each of some weights that are about to be masked, for a density of the whole then."""
        weights = [weight for weight in self.every if weight in self.weights or weight in new]
        share = {w: sum(k) / w.units for w, k in zip(weights, self.budgets(density, weights), strict=True)}
        return [share[weight] for weight in new]

    def density_at(self, density: float) -> float:
        """Return the nearest density of the whole that whole units allow; before any is masked, of all that can be."""
        weights = self.weights or self.every
        return _share(weights, [sum(k) for k in self.budgets(density, weights)])

    def decisions(
        self, final_density: float, why_dense: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[LayerDecision, ...]:
        """Return the decision for every layer of a run that ends at a density of the whole.

        Args:
            final_density: density of the whole at the end.
            why_dense: reasons why layers stay dense, by name.

        """
        return layer_decisions(self.candidates, self.weights, self.layer_densities_at(final_density), why_dense)

    # ------------------------------------------------------------------ masks

    def draw(
        self,
        weights: Sequence[MaskedWeight],
        density: float,
        *,
        largest: bool = False,
        arrive: Callable[[MaskedWeight], None] = lambda weight: None,
        drawn: Callable[[MaskedWeight, float], None] = lambda weight, scale: None,
    ) -> list[int]:
        """Draw masks of weights for a density of them all, see `draw_masks`; return what that returns."""
        budgets = self.budgets(density, weights)
        return draw_masks(weights, budgets, self._config, largest=largest, arrive=arrive, drawn=drawn)

    @torch.no_grad()
    def update(self, density: float, drop_fraction: float, states: OptimizerStates, update: int) -> float:
        """Update all masks, and bring weights, gradients and optimizer states in line with them.

        Args:
            density: density of the whole after the update.
            drop_fraction: share of the active units given up for new ones.
            states: state of the optimizers.
            update: index of the update, for random scores.

        Returns:
            Share of the active weights that the update brought in.

        """
        for weight in self.weights:
            weight.leave_storage_()
            weight.inactive.before_update(weight)
        before = {weight.name: weight.mask for weight in self.weights}
        grown = 0
        if self._config.trains_inactive_weights:
            drop_fraction = 0.0
        for weight, changed, grown_units in update_masks(
            self.weights, self.budgets(density), drop_fraction, self.rule, seed=self._config.seed, update=update
        ):
            grown += grown_units * weight.unit_size
            weight.inactive.apply_mask_(weight)
            mask_gradients_([weight])
            if not weight.inactive.learn:
                states.reset_(weight, changed, before=before[weight.name])
                weight.young.grow(weight, weight.mask & ~before[weight.name])
                weight.inactive.arrange(weight)
        states.forget_curvature()
        return grown / sum(weight.active * weight.unit_size for weight in self.weights)

    def check_ranks(self, words: Mapping[str, int], when: str) -> None:
        """Raise MasksDifferError on every rank if masks or `words` differ; see `check_same_on_all_ranks`."""
        if self.group is None:
            return
        whole = [weight for weight in self.weights if not weight.placement.mask_is_local]
        masks = {f"the mask of layer {weight.name!r}": mask_digest(weight.mask) for weight in whole}
        check_same_on_all_ranks({**words, **masks}, self.every[0].device, when, self.group)

    # ------------------------------------------------------------------ weights and gradients

    def yield_whole_gradients(self, observing: bool) -> None:
        """Make the layers' backward yield whole weight gradients if they are observed or inactive weights learn."""
        for weight in self.weights:
            set_observing(weight.candidate, observing or weight.inactive.learn)

    def refuse_nan(self) -> None:
        """Raise ValueError if a weight is NaN: its gradients will never be finite, so the update would never come."""
        for weight in self.weights:
            if agree([weight.shard], bool(weight.weight.isnan().any())):
                raise ValueError(
                    f"the run has diverged: layer {weight.name!r} holds NaN weights, and at the mask update that is "
                    "due no gradient had been finite: begin again from an earlier checkpoint with a lower learning "
                    "rate, or clip gradients (gradient_clip_val=)"
                )

    @torch.no_grad()
    def mask_copy_(self, copy: nn.Module, *, as_stored: bool = False) -> None:
        """Zero the inactive weights of a copy of the model; see `DGMController.mask_copy_`."""
        modules = {clean_name(name): module for name, module in copy.named_modules()}
        pairs: list[tuple[MaskedWeight, Any]] = []
        for weight in self.weights:
            if weight.inactive.act_in_forward:
                continue
            module = modules.get(weight.candidate.module_name)
            shape = _whole_shape(weight, module)
            if shape != weight.candidate.stored_shape:
                found = "no such layer" if shape is None else f"a weight of shape {shape}"
                raise ValueError(
                    f"expected a copy of the model, with a layer {weight.name!r} of shape "
                    f"{weight.candidate.stored_shape}, got {found} in {type(copy).__name__}"
                )
            pairs.append((weight, module))
        for weight, module in pairs:
            if as_stored or isinstance(module, PackedForward):
                weight.inactive.store_copy_(weight, module)
            if not isinstance(module, PackedForward):
                tensor = getattr(module, weight.candidate.kind.weight_name)
                weight.inactive.mask_copy_(weight, weight.candidate.shard.local(tensor))


def _whole_shape(weight: MaskedWeight, module: Any) -> tuple[int, ...] | None:
    """Return the shape of a layer's whole weight in a copy of the model; None where there is no such layer."""
    if isinstance(module, PackedForward):
        return module._estdgm_packing.stored_shape
    tensor = getattr(module, weight.candidate.kind.weight_name, None)
    if not isinstance(tensor, Tensor):
        return None
    return weight.candidate.stored_shape if weight.candidate.shard.holds(tensor) else tuple(tensor.shape)


def _share(weights: Sequence[MaskedWeight], units: Sequence[int]) -> float:
    """Return the share of weights in a number of units of each; 1 for none."""
    size = sum(weight.units * weight.unit_size for weight in weights)
    return sum(n * weight.unit_size for n, weight in zip(units, weights, strict=True)) / size if size else 1.0
