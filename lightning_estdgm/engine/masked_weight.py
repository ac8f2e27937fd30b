"""One masked weight: its mask, what is observed of its gradient, and what a step and an update do to it.

Everything here is this rank's part of the weight (`distributed.Shard`): the whole of it where the weight is whole. What
needs the other ranks of a sharded weight, observing and deciding, is done for all layers at once, in few collectives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from lightning_estdgm.distributed.collectives import agree, all_reduce, gather
from lightning_estdgm.distributed.shard import Shard
from lightning_estdgm.distributed.top_k import Ranking, top_k
from lightning_estdgm.engine.block_slices import ActiveRuns
from lightning_estdgm.method import scores
from lightning_estdgm.method.backward_set import HeldBack, Reserve
from lightning_estdgm.method.masks import (
    active_units,
    exchange,
    keep_active_,
    kept_units,
    mask_shape,
    masked_select_units,
    pack_bits,
    pool_norm,
    unit_size,
    unpack_bits,
)
from lightning_estdgm.method.patterns import exchange_in_groups, fitted
from lightning_estdgm.method.redistribution import Budget, Scored
from lightning_estdgm.method.scores import Evidence
from lightning_estdgm.method.update_rule import Rule
from lightning_estdgm.modules.candidates import Candidate

__all__ = ["FEW", "MaskedLayer"]

FEW = 1 / 3  # density up to which copying the active blocks alone takes less time than copying the weight


class _Window:
    """Sums over the observed gradients of one layer; exists only inside an observation window."""

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.gradient = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        self.norm = torch.zeros(mask.shape, dtype=dtype, device=weight.device)
        self.samples = 0


class MaskedLayer:
    """The state of one masked weight. Tensors are the local part, oriented as `distributed.Shard` says.

    Attributes:
        mask: bool over units, true where active; replaced as a whole. For single weights of a sharded weight the local
            part, else whole.
        active: number of active units of the whole weight.
        units: number of all units.
        unit_size: weights in a unit.
        explored: bool over units, true where ever active.
        explored_units: how many those are, of the whole weight.
        backend: what computes the layer now.
        final_backend: what will at the final density; ``"?"`` until measured.
        why: the reason for that, in words.
        held_back: the inactive weights, where they go on learning.

    """

    def __init__(self, candidate: Candidate, block_size: int, note: str, reserve: Reserve | None = None) -> None:
        self.candidate = candidate
        self.block_size = block_size
        self.note = note
        self.shape = candidate.shape
        self.units = math.prod(mask_shape(self.shape, block_size))
        self.unit_size = unit_size(self.shape, block_size)
        self.backend = "dense"
        self.final_backend = "?"
        self.why = ""
        self._window: _Window | None = None
        self._sampled = False
        self._runs: ActiveRuns | None = None  # that the snapshot is of; of the whole weight without
        self._snapshot: Tensor | None = None
        self._masked: tuple[Any, int, int] | None = None  # the gradient masked last, and its versions then
        shape = tuple(self.weight.shape) if self.mask_is_local else mask_shape(self.shape, block_size)
        self._part_active = [self.units // candidate.parts] * candidate.parts
        self._take(torch.ones(shape, dtype=torch.bool), self.units)
        self.explored = torch.zeros_like(self.mask)
        self._explored_units = 0
        self.held_back = None if reserve is None else HeldBack(reserve, self.weight, self.mask, block_size)

    @property
    def name(self) -> str:
        """The layer's name in the model."""
        return self.candidate.name

    @property
    def shard(self) -> Shard:
        """How the weight lies over ranks."""
        return self.candidate.shard

    @property
    def parameter(self) -> Tensor:
        """The weight as stored."""
        return self.candidate.weight

    @property
    def device(self) -> torch.device:
        """That the layer computes on; a sharded weight itself may be offloaded to another."""
        return self.shard.device if self.shard.groups else self.weight.device

    @property
    def weight(self) -> Tensor:
        """The local part of the weight, sharing storage with the parameter."""
        return self.shard.local(self.parameter)

    @property
    def gradient(self) -> Tensor | None:
        """The local part of the weight's gradient, sharing storage with it; ``None`` without one, or not whole yet."""
        grad = self.parameter.grad
        return None if grad is None or not self.shard.holds(grad) else self.shard.local(grad)

    @property
    def has_operator(self) -> bool:
        """Whether a sparse operator can replace the layer's forward: it needs the whole mask, of matrices or blocks."""
        taps = self.block_size == 1 and self.candidate.is_convolution
        return self.candidate.has_operator and not self.mask_is_local and not taps

    @property
    def density(self) -> float:
        """Active share of the weights."""
        return self.active / self.units

    @property
    def is_dense(self) -> bool:
        """Whether every unit is active."""
        return self.active == self.units

    @property
    def explored_units(self) -> int:
        """How many units of the whole weight have ever been active."""
        return self._explored_units if self.mask_is_local else active_units(self.explored)

    def whole_norms(self) -> Tensor:
        """Return the norm of each unit of the whole weight, on the CPU; of a sharded weight, all ranks have to ask."""
        if self.shard.groups and not self.mask_is_local:
            return self._norm(all_reduce([self.shard], [self._squares(self.weight)])[0]).cpu()
        return gather(self.shard, scores.magnitude(self.weight, self.block_size))

    def whole_mask(self) -> Tensor:
        """Return a copy of the whole mask on the CPU; of a sharded weight, every rank has to ask for it."""
        return self._whole(self.mask)

    def set_mask(self, mask: Tensor, explored: Tensor | None = None) -> None:
        """Take over a whole mask, and the units explored so far (``None``: its own); weights are left alone."""
        explored = mask if explored is None else explored
        self._take(self._part(mask), active_units(mask))
        self._part_active = [active_units(part) for part in mask.chunk(self.candidate.parts)]
        self.explored = self._part(explored).to(self.mask.device, copy=True)
        self._explored_units = active_units(explored)

    def fill_inactive_(self, tensor: Tensor) -> None:
        """Zero a local tensor of the weight's shape where the mask is inactive."""
        if not self.is_dense:
            keep_active_(tensor, self._active_here.to(tensor.device), self._grain)

    @property
    def mask_is_local(self) -> bool:
        """Whether `mask` is this rank's part only: of single weights of a sharded weight."""
        return bool(self.shard.groups) and self.block_size == 1

    @property
    def _grain(self) -> int:
        return self.shard.grain(self.block_size)

    def _take(self, mask: Tensor, active: int) -> None:
        self.mask = mask.to(self.weight.device)
        self._active_here = self.shard.expand(self.mask, self.block_size)
        self.active = active
        self._runs = self._snapshot = self._masked = None

    def _part(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a whole mask, or of anything of its shape."""
        return self.shard.part(whole) if self.mask_is_local else whole

    def _whole(self, part: Tensor) -> Tensor:
        """Undo `_part`; on the CPU."""
        return gather(self.shard, part) if self.mask_is_local else part.cpu().clone()

    # ------------------------------------------------------------------ the optimizer's step

    def _mask_gradient_(self, gradient: Tensor) -> None:
        """Zero the gradient of units that do not learn."""
        if self.held_back is not None:
            self.held_back.mask_gradient_(gradient)
        else:
            self.fill_inactive_(gradient)

    @property
    def learning_density(self) -> float:
        """Share of the weights whose gradient is needed in every step."""
        return self.density if self.held_back is None else self.held_back.density

    def put_in_held_back_(self, scale: float | Tensor = 1.0) -> None:
        """Make the weight whole for a step, and add the penalty's gradient; `scale` is what gradients carry."""
        if self.held_back is not None and (gradient := self.gradient) is not None:
            self.held_back.put_in_(self.weight)
            self.held_back.penalize_(gradient, self.weight, self.mask, scale)

    def take_out_held_back_(self) -> None:
        """Undo it, whether a step was made or not."""
        if self.held_back is not None:
            self.held_back.take_out(self.weight, self.mask)
            self.fill_inactive_(self.weight)

    @staticmethod
    def mask_gradients_(layers: Sequence[MaskedLayer], *, if_touched: bool = False) -> None:
        """Zero the gradients of inactive units; with `if_touched`, but those that nothing wrote to since the last time.

        Torch counts the writes to a tensor, together with those to other views of its memory.
        """
        for layer in layers:
            gradient = layer.gradient
            if gradient is not None and not (if_touched and layer._is_still_masked()):
                layer._mask_gradient_(gradient)
        for layer in layers:  # not before: gradients may be views of one buffer
            layer._masked = layer._gradient_as_it_is()

    def _gradient_as_it_is(self) -> tuple[Any, int, int] | None:
        """Return what tells later whether the gradient is the same tensor, not written to; None where nothing does."""
        whole, gradient = self.parameter.grad, self.gradient
        if whole is None or gradient is None or whole.is_inference():  # such tensors count no writes
            return None
        return TensorWeakRef(whole), whole._version, gradient._version

    def _is_still_masked(self) -> bool:
        then, now = self._masked, self._gradient_as_it_is()
        return then is not None and now is not None and then[0]() is now[0]() and then[1:] == now[1:]

    def forget_masked_gradient(self) -> None:
        """Take no gradient for masked: the next backward may write to it where torch does not see it (DDP does)."""
        self._masked = None

    def snapshot_weight(self, *, active_only: bool) -> None:
        """Remember the weight as it is before a step; with `active_only`, maybe of active units alone."""
        self._runs = self._few_runs() if active_only else None
        if self._runs is not None:
            self._snapshot = self._runs.read(self.weight, into=self._snapshot)
        elif self._snapshot is None:
            self._snapshot = self.weight.clone()
        else:
            self._snapshot.copy_(self.weight)

    def _few_runs(self) -> ActiveRuns | None:
        """Return where the active blocks of a whole weight lie, if they are so few that copying them alone pays."""
        if self.shard.groups or self.block_size == 1 or self.density > FEW:
            return None
        if self._runs is None or not self._runs.fit(self.weight):
            self._snapshot = None
            return ActiveRuns.of(self.weight, self.mask, self.block_size)
        return self._runs

    def forget_snapshot(self) -> None:
        """Free the memory of the last snapshot."""
        self._runs = self._snapshot = None

    def scale_step_(self, scale: float) -> None:
        """Make the step since the snapshot `scale` times as large."""
        if self._snapshot is None or scale == 1.0:
            return
        if self._runs is None:
            self.weight.lerp_(self._snapshot, 1.0 - scale)
        else:
            self._runs.scale_step_(self.weight, self._snapshot, scale)

    def undo_inactive_(self) -> None:
        """Give inactive weights the value they had at the snapshot."""
        if self._snapshot is not None:
            self.weight.copy_(masked_select_units(self._active_here, self.weight, self._snapshot, self._grain))

    # ------------------------------------------------------------------ observation

    @property
    def observed(self) -> bool:
        """Whether the window holds anything to decide by."""
        return self._window is not None and self._window.samples > 0

    def begin_step(self) -> None:
        """Allow the next `observe` of this layer."""
        self._sampled = False
        self.forget_masked_gradient()

    @staticmethod
    def observe(layers: Sequence[MaskedLayer], scale: float) -> bool:
        """Add the gradients of `layers` to their windows, unless one of them is not finite; once a step.

        All ranks of sharded weights must call it: one all-reduce tells them the norms of units that several hold parts
        of, which layers took part at all (a rank may hold nothing of one), and whether all was finite.

        Args:
            layers: those whose gradients belong to one step.
            scale: factor on the gradients.

        Returns:
            Whether the gradients were finite.

        """
        waiting = {layer: layer.gradient for layer in layers if not layer._sampled}
        sharded = [layer for layer in waiting if layer.shard.groups]
        sums = all_reduce([x.shard for x in sharded], [x._observation(waiting[x]) for x in sharded])
        taking_part = torch.stack([x[0] for x in sums]).tolist() if sums else []
        norms = {
            x: x._observed_norm(waiting[x], s[1:]) for x, s, n in zip(sharded, sums, taking_part, strict=True) if n
        }
        totals = [s[1:].sum() for s in sums]
        for layer, gradient in waiting.items():
            if gradient is not None and not layer.shard.groups:
                norms[layer] = pool_norm(gradient, layer.block_size)
                totals.append(norms[layer].sum())
        for layer in norms:
            layer._sampled = True
        finite = not totals or bool(torch.stack([total.isfinite() for total in totals]).all())
        if len({tuple(map(id, layer.shard.groups)) for layer in waiting}) > 1:
            finite = not agree([layer.shard for layer in waiting], not finite)
        if not finite:
            return False
        for layer, norm in norms.items():
            if layer._window is None:
                layer._window = _Window(layer.weight, layer.mask)
            if (observed := waiting[layer]) is not None:
                layer._window.gradient.add_(observed, alpha=scale)
            layer._window.norm.add_(norm, alpha=scale)
            layer._window.samples += 1
        return True

    def _observation(self, gradient: Tensor | None) -> Tensor:
        """Return what other ranks have to know of a sharded gradient: 1, and the squares of units (or, one number)."""
        if gradient is None:
            return torch.zeros(
                2 if self.mask_is_local else 1 + self.units, dtype=torch.float64, device=self.mask.device
            )
        one = torch.ones(1, dtype=torch.float64, device=gradient.device)
        if self.mask_is_local:
            return torch.cat([one, gradient.abs().sum(dtype=torch.float64)[None]])
        return torch.cat([one, self._squares(gradient)])

    def _observed_norm(self, gradient: Tensor | None, squares: Tensor) -> Tensor:
        """Return the norm of each unit of `mask`, from what all ranks sent."""
        if not self.mask_is_local:
            return self._norm(squares)
        return torch.zeros(self.mask.shape, device=self.mask.device) if gradient is None else pool_norm(gradient, 1)

    def _squares(self, local: Tensor) -> Tensor:
        """Return this rank's share of the sum of squares of each unit."""
        wide = local.to(torch.promote_types(local.dtype, torch.float32))
        return self.shard.pool(wide.square(), self.block_size).flatten().double()

    def _norm(self, squares: Tensor) -> Tensor:
        """Return the norm of each unit from its sum of squares."""
        dtype = torch.promote_types(self.parameter.dtype, torch.float32)
        return squares.sqrt().to(dtype).view(self.mask.shape)

    # ------------------------------------------------------------------ mask update

    @staticmethod
    def redecide(
        layers: Sequence[MaskedLayer],
        budgets: Sequence[Sequence[int]],
        drop_fraction: float,
        rule: Rule,
        update: int = 0,
    ) -> Iterator[tuple[MaskedLayer, Tensor, int]]:
        """Replace masks by ones decided from the weights and the windows; end the windows.

        All ranks of sharded weights must go through it to its end, and reach the same masks: unit scores are summed in
        one all-reduce, and single weights are ranked as `distributed.selection` does.

        Args:
            layers: all of them.
            budgets: for each, the active units of each of its parts; a redistribution keeps to their sum.
            drop_fraction: see `masks.decide`.
            rule: how to choose; `Rule.check_sharded` holds for sharded weights.
            update: number of the update, for random scores.

        Yields:
            Each layer with its new mask, the units of `mask` whose state changed, and how many were grown.

        Raises:
            ValueError: if a layer holds NaN weights, or does not fit the rule.

        """
        sharded = [layer for layer in layers if layer.shard.groups]
        sums = all_reduce([layer.shard for layer in sharded], [layer._evidence() for layer in sharded])
        for layer, evidence in zip(sharded, sums, strict=True):
            layer._refuse_nan(evidence)
        units = {x: s.chunk(2) for x, s in zip(sharded, sums, strict=True) if not x.mask_is_local}
        ranked = [(x, k) for x, k in zip(layers, budgets, strict=True) if x.mask_is_local]
        kept = {x: x._kept(k, drop_fraction, rule) for x, k in ranked}
        masks = _ranked(ranked, kept, rule)
        scored: dict[MaskedLayer, list[Scored]] = {}
        if rule.redistribute is not None:  # all layers' scores at once
            scored = {layer: layer._scored(len(k), rule, update) for layer, k in zip(layers, budgets, strict=True)}
            moved = iter(
                rule.redistribute(
                    [part for parts in scored.values() for part in parts],
                    sum(map(sum, budgets)),
                    drop_fraction,
                    rule.regrow,
                )
            )
        for layer, budget in zip(layers, budgets, strict=True):
            old = layer.mask
            if layer in masks:
                keep, grow = masks[layer]
                layer._take(keep() | grow(), sum(budget))
                layer._part_active = list(budget)
                grown = sum(budget) - sum(kept[layer])
                if rule.regrow:  # some of them were active before
                    grown = int(all_reduce([layer.shard], [(layer.mask & ~old).sum()[None]])[0])
            else:
                parts = scored.pop(layer, None) or layer._scored(len(budget), rule, update, units.get(layer))
                if rule.redistribute is not None:
                    limits = [next(moved) for _ in parts]
                else:
                    limits = [
                        layer._limits(part, k, drop_fraction, rule) for part, k in zip(parts, budget, strict=True)
                    ]
                mask = torch.cat([layer._decided(part, limit, rule) for part, limit in zip(parts, limits, strict=True)])
                layer._take(mask, active_units(mask))
                grown = active_units(layer.mask & ~old)
            layer.explored |= layer.mask
            layer._window = None
            yield layer, old ^ layer.mask, grown
        counts = all_reduce([x.shard for x, _ in ranked], [x.explored.sum()[None] for x, _ in ranked])
        for (layer, _), count in zip(ranked, counts, strict=True):
            layer._explored_units = int(count)

    def _evidence(self) -> Tensor:
        """Return what the ranks of a sharded weight sum up for a decision: units' squares, or the number of NaNs."""
        if self.mask_is_local:
            return self.weight.isnan().sum(dtype=torch.float64)[None]
        gradient = torch.zeros_like(self.weight) if self._window is None else self._window.gradient
        return torch.cat([self._squares(self.weight), self._squares(gradient)])

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Put the layer's name before a ValueError."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}: {error}") from error

    def _refuse_nan(self, scores: Tensor) -> None:
        if scores.isnan().any() or (self.mask_is_local and bool(scores.any())):
            raise ValueError(f"the run has diverged: layer {self.name!r} holds NaN weights at a mask update")

    def _share(self, drop_fraction: float, rule: Rule) -> float:
        """Return the drop fraction; 0 for a layer that took part in no observed step where it has to grow by that."""
        return drop_fraction if self._window is not None or not rule.needs_gradients(self.block_size) else 0.0

    def _kept(self, budget: Sequence[int], drop_fraction: float, rule: Rule) -> list[int]:
        """Return how many active units of each part stay."""
        size = self.units // self.candidate.parts
        share = self._share(drop_fraction, rule)
        return [
            kept_units(n, size - n, k, share, regrow=rule.regrow)
            for n, k in zip(self._part_active, budget, strict=True)
        ]

    def _local_scores(self, which: str | Callable[[Evidence], Tensor], taken: Tensor, rule: Rule) -> Tensor:
        """Return scores of this rank's part of a sharded weight, those of `taken` units last."""
        weight_norm = scores.magnitude(self.weight, 1)
        if which == "magnitude":  # looked at in many passes: what it needs nothing of is not computed
            return weight_norm.masked_fill(taken, -torch.inf)
        norm = None if self._window is None else pool_norm(self._window.gradient, 1)
        return rule.score(which, self._seen(weight_norm, norm, rule, torch.Generator())).masked_fill(taken, -torch.inf)

    def _seen(self, weight: Tensor, gradient_norm: Tensor | None, rule: Rule, generator: torch.Generator) -> Evidence:
        """Put together what scores are made of; `gradient_norm` is that of the window's sum."""
        window = self._window
        if window is None or gradient_norm is None:
            mean_gradient = mean_norm = torch.zeros(self.mask.shape, device=self.mask.device)
        else:
            mean_gradient, mean_norm = gradient_norm / window.samples, window.norm / window.samples
        return Evidence(self.mask, weight, mean_gradient, mean_norm, rule.gamma, generator)

    def _scored(self, parts: int, rule: Rule, update: int, squares: Sequence[Tensor] | None = None) -> list[Scored]:
        """Return the scores of each part of a layer with a whole mask; `squares` of weight and gradient if sharded."""
        if squares is None:
            weight_norm = scores.magnitude(self.weight, self.block_size)
            self._refuse_nan(weight_norm)
            gradient_norm = None if self._window is None else pool_norm(self._window.gradient, self.block_size)
        else:
            weight_norm, gradient_norm = (self._norm(x) for x in squares)
        digest = hashlib.sha256(f"{rule.seed}/{update}/{self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        evidence = self._seen(weight_norm, gradient_norm, rule, generator)
        # With a reserve all units are in the running: inactive ones have weights, too.
        mask = evidence.mask if self.held_back is None else torch.ones_like(evidence.mask)
        found = (mask, rule.score(rule.keep_by(self.block_size), evidence), rule.score(rule.grow, evidence))
        return [Scored(*part) for part in zip(*(x.chunk(parts) for x in found), strict=True)]

    def _limits(self, part: Scored, k: int, drop_fraction: float, rule: Rule) -> Budget:
        """Return the budget of one part where nothing is redistributed."""
        n, share = active_units(part.mask), self._share(drop_fraction, rule)
        if rule.pattern is not None:
            with self.naming_errors():
                k = fitted(rule.pattern, part.mask.shape, k)
            if self.held_back is not None:
                return Budget(n, k)
        return Budget(kept_units(n, part.mask.numel() - n, k, share, regrow=rule.regrow), k)

    def _decided(self, part: Scored, budget: Budget, rule: Rule) -> Tensor:
        """Return the next mask of one part."""
        if rule.pattern is None:
            return exchange(part.mask, part.keep, part.grow, budget.k, budget.keep, regrow=rule.regrow)
        with self.naming_errors():
            return exchange_in_groups(rule.pattern, part.mask, part.keep, part.grow, budget.k, budget.keep)

    def clear_optimizer_state_(self, optimizer: Optimizer, units: Tensor) -> None:
        """Zero every state tensor of the weight's shape at `units`; step counts and the like stay."""
        for value in optimizer.state.get(self.parameter, {}).values():
            if isinstance(value, Tensor) and self.shard.holds(value):
                keep_active_(self.shard.local(value), self.shard.expand(~units, self.block_size), self._grain)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return mask, window and backend in plain types, whole; of a sharded weight, every rank has to ask for it.

        Of a sharded weight only rank 0 gets the window, which is as large as the weight.
        """
        return {
            "shape": list(self.shape),
            "block_size": self.block_size,
            "mask": pack_bits(self.whole_mask()),
            "explored": pack_bits(self._whole(self.explored)),
            "backend": self.backend,
            "final_backend": self.final_backend,
            "why": self.why,
            "window": self._window and self._window_state(self._window),
        } | ({} if self.held_back is None else {"held_back": self.held_back.state_dict()})

    def _window_state(self, window: _Window) -> dict[str, Any]:
        tensors = {"gradient": window.gradient, "norm": window.norm}
        if not self.shard.groups:
            return {"samples": window.samples} | {name: x.clone() for name, x in tensors.items()}
        whole = {"gradient": gather(self.shard, window.gradient), "norm": self._whole(window.norm)}
        return {"samples": window.samples} | (whole if torch.distributed.get_rank() == 0 else dict.fromkeys(whole))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned for a layer of the same shape and block size."""
        shape = mask_shape(self.shape, self.block_size)
        self.set_mask(unpack_bits(state["mask"], shape), unpack_bits(state["explored"], shape))
        self.backend, self.final_backend, self.why = state["backend"], state["final_backend"], state["why"]
        if (self.held_back is None) != ("held_back" not in state):
            found = "none" if self.held_back is not None else "some"
            raise ValueError(
                f"layer {self.name!r}: the checkpoint holds {found} of the weights that `reserve` holds back"
            )
        if self.held_back is not None:
            self.held_back.load_state_dict(state["held_back"])
        self._window = None
        if state["window"]:
            if state["window"]["gradient"] is None:
                raise ValueError(
                    f"layer {self.name!r}: the state of an open observation window is whole on rank 0 only: "
                    "expected the state that rank 0 saved"
                )
            self._window = _Window(self.weight, self.mask)
            self._window.gradient.copy_(self.shard.part(state["window"]["gradient"]))
            self._window.norm.copy_(self._part(state["window"]["norm"]))
            self._window.samples = state["window"]["samples"]


def _ranked(
    layers: Sequence[tuple[MaskedLayer, Sequence[int]]], kept: Mapping[MaskedLayer, Sequence[int]], rule: Rule
) -> dict[MaskedLayer, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Return for sharded single weights what gives this rank's part of the kept and of the grown units."""

    def keeping(layer: MaskedLayer) -> Ranking:
        return Ranking(layer.shard, lambda: layer._local_scores(rule.keep_by(1), ~layer.mask, rule), kept[layer])

    def growing(layer: MaskedLayer, budget: Sequence[int], taken: Tensor | None) -> Ranking:
        counts = [n - m for n, m in zip(budget, kept[layer], strict=True)]
        return Ranking(
            layer.shard, lambda: layer._local_scores(rule.grow, layer.mask if taken is None else taken, rule), counts
        )

    if not rule.regrow:  # both at once, in as few collectives
        chosen = top_k([keeping(x) for x, _ in layers] + [growing(x, k, None) for x, k in layers])
        return {x: (chosen[i], chosen[i + len(layers)]) for i, (x, _) in enumerate(layers)}
    stay = top_k([keeping(x) for x, _ in layers])
    grow = top_k([growing(x, k, taken()) for (x, k), taken in zip(layers, stay, strict=True)])
    return {x: pair for (x, _), pair in zip(layers, zip(stay, grow, strict=True), strict=True)}
