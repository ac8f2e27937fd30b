"""The state of the method and its steps: masks, observation windows, updates. Needs no Lightning.

A plain loop adds two calls::

    with DGMController(model, optimizer, total_steps=1000) as dgm:
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            dgm.mask_gradients()   # once the whole gradient is there, before clipping
            optimizer.step()       # hooks of the controller scale the step and re-mask the weights
            dgm.advance()          # next phase, mask update when due
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from lightning_estdgm.config import DGMConfig
from lightning_estdgm.distributed.collectives import agree, local_tensor
from lightning_estdgm.distributed.mask_check import check_same_on_all_ranks, mask_digest
from lightning_estdgm.engine.dispatch import BackendChoice
from lightning_estdgm.engine.masked_weight import MaskedLayer
from lightning_estdgm.method import distributions as densities
from lightning_estdgm.method.masks import active_units, initial_mask
from lightning_estdgm.method.patterns import draw
from lightning_estdgm.method.schedules import Schedule
from lightning_estdgm.modules.candidates import Candidate, clean_name, find_candidates
from lightning_estdgm.modules.mask_unit import unit_of
from lightning_estdgm.modules.swap import set_observing

__all__ = ["DGMController", "LayerDecision"]

_STATE_VERSION = 1


@dataclass(frozen=True)
class LayerDecision:
    """What was decided for one layer.

    Attributes:
        name: the layer's name in the model.
        shape: of its weight, as stored.
        masked: whether its weight is masked.
        block_size: side of a mask unit (1: single weights); 0 where not masked.
        density: active share of its weights now; 1 where not masked.
        backend: what computes it now: ``"dense"`` or a sparse backend's name.
        final_density: its density at the end of the run.
        final_backend: what will compute it then; ``"?"`` until measured.
        why: the reasons, in words.

    """

    name: str
    shape: tuple[int, ...]
    masked: bool
    block_size: int
    density: float
    backend: str
    final_density: float
    final_backend: str
    why: str


class DGMController:
    """Dynamic gradient masking of one model through one run.

    It masks the weights of linear and convolution layers, observes gradients before each mask update, and keeps
    weights, gradients and optimizer state in line with the masks through hooks on the optimizers' steps. Close it, or
    use it as a context manager, to take the hooks and the swapped forwards away; weights stay as they are.

    Args:
        model: its maskable layers are found once, here.
        optimizers: one or several, already made; they may be wrapped by anything that keeps torch's step hooks.
        config: see `DGMConfig`.
        total_steps: optimizer steps of the run.
        state: what `state_dict` returned; masks and counters go on from there, and no weight is touched.
        draw_masks: whether to draw masks now, where there is no `state`. Without, all is dense until `recover` or
            `load_state_dict`, which a run needs whose weights are those of a checkpoint.
        group: process group whose ranks train this model together, all with a controller of their own: masks are
            compared after each update, and backends are chosen by its first rank. ``None``: no other rank is asked.

    Raises:
        ValueError: if there is nothing to mask, a forced block size or backend does not fit a layer, or `state` belongs
            to another model or schedule.
        MasksDifferError: on every rank of `group`, if they do not hold the same masks.

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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config or DGMConfig()
        self._group = group
        self.schedule: Schedule = self.config.schedule.resolve(total_steps)
        self._rule = self.config.rule
        self.steps = 0
        self.position = 0
        self.updates = 0
        self.churn = 0.0
        self.flops = {"analytic": 0.0, "executed": 0.0, "dense": 0.0}
        self._optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self._held = {id(o): [p for group in o.param_groups for p in group["params"]] for o in self._optimizers}
        held = {key: {id(p) for p in parameters} for key, parameters in self._held.items()}
        everything_held = set().union(*held.values())
        self._candidates = find_candidates(model, self.config.include, self.config.exclude, everything_held)
        self._layers = [self._new_layer(c, state) for c in self._candidates if c.masked]
        self._owned = {key: [x for x in self._layers if id(x.parameter) in ids] for key, ids in held.items()}
        self._backends = BackendChoice(self.config, self._candidates, self._layers, group)
        self._check_rule()
        self._idle = False  # the optimizer step under way is none of training
        self._unevenly_held: dict[int, bool] = {}  # per optimizer: some rank holds no part of any parameter
        self._stepped = False
        self.recovered = ""
        self._waiting = False  # a mask update is due but nothing could be observed yet
        self._warned_nonfinite = False
        self._handles: list[Any] = []
        try:
            if state is not None:
                self.load_state_dict(state)
            elif draw_masks:
                drawn = zip(self._layers, self._draw_masks(), strict=True)
                before = [layer.name for layer, n in drawn if 0 < n <= layer.active < layer.units]
                self.recovered = self._told(
                    (before, "hold zeros as an earlier mask leaves them: what is not zero stays active, unscaled")
                )
            self._hook_up()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ what a training loop calls

    @property
    def observing(self) -> bool:
        """Whether the gradients of the step under way are observed whole."""
        if self.position >= self.schedule.total_steps or not self._needs_gradients:
            return False
        return self._waiting or self.schedule(self.position).observe

    def mask_gradients(self, optimizer: Optimizer | None = None, grad_scale: float = 1.0) -> None:
        """Take inactive units out of the gradients; in an observation window, record the whole gradients first.

        Call it after the last backward of a step and before clipping; several calls in one step are fine, the first is
        the one observed.

        Args:
            optimizer: only the weights that it holds; ``None``: all.
            grad_scale: factor that the gradients still carry (a GradScaler's, before unscaling).

        """
        layers = self._layers if optimizer is None else self._owned[id(optimizer)]
        self._mask_gradients(layers, 1.0 / grad_scale)

    def advance(self, position: int | None = None) -> bool:
        """Go on to the next step, if an optimizer step has happened: next phase, mask update when due.

        Args:
            position: where in the schedule the run is now; ``None``: the number of steps done. For runs limited by
                time rather than steps.

        Returns:
            Whether the masks have changed.

        Raises:
            ValueError: if `position` goes backwards.

        """
        for layer in self._layers:
            layer.begin_step()
        if not self._stepped:
            return False
        before, after = self.position, self.steps + 1 if position is None else position
        if after < before:
            raise ValueError(f"the schedule's position must not go backwards: was {before}, got {after}")
        self._stepped = False
        is_first = self._backends.probing
        if is_first:
            self._backends.read_probes()
        self._count_flops()
        self.steps += 1
        self.position = after
        crossed = range(before + 1, min(self.position, self.schedule.total_steps - 1) + 1)
        due = self._waiting or any(self.schedule(p).update for p in crossed)
        blind = self._needs_gradients and not any(layer.observed for layer in self._layers)
        self._waiting = due and blind
        if self._waiting:
            self._refuse_nan_weights()
        updated = due and not self._waiting
        if updated:
            self._update()
        if is_first or (updated and self._rule.moves_budgets):
            all_densities = (self._final_density(), *self.schedule.densities)
            self._backends.settle([self._budget_densities(density) for density in all_densities])
        if updated or is_first:
            self._backends.switch()
        self._observe_or_not()
        return updated

    def close(self) -> None:
        """Remove every hook and swapped forward. Weights keep their values; masks stay readable. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._backends.close()
        for layer in self._layers:
            layer.forget_snapshot()

    def __enter__(self) -> DGMController:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ------------------------------------------------------------------ what it knows

    @property
    def probing(self) -> bool:
        """Whether the step under way shows what the layers compute; a compiled model has to run eagerly to show it."""
        return self._backends.probing

    @property
    def phase(self) -> str:
        """Name of the phase of the step under way."""
        return self.schedule(self.position).phase

    @property
    def density(self) -> float:
        """Active share of the masked weights."""
        return sum(x.active * x.unit_size for x in self._layers) / sum(x.units * x.unit_size for x in self._layers)

    @property
    def explored(self) -> float:
        """Share of the masked weights that have been active at any time (ITOP's Rs)."""
        seen = sum(x.explored_units * x.unit_size for x in self._layers)
        return seen / sum(x.units * x.unit_size for x in self._layers)

    @property
    def flops_ratio(self) -> float:
        """Training FLOPs so far that the masks ask for, over dense ones; of linear and convolution layers only."""
        return self.flops["analytic"] / self.flops["dense"] if self.flops["dense"] else 1.0

    @property
    def flops_executed_ratio(self) -> float:
        """As `flops_ratio`, but counting layers that run dense with a mask as dense: what was really computed."""
        return self.flops["executed"] / self.flops["dense"] if self.flops["dense"] else 1.0

    @property
    def masked_weights(self) -> tuple[MaskedLayer, ...]:
        """The masked weights, for a communication hook such as `distributed.comm_hook.ActiveUnits`."""
        return tuple(self._layers)

    def masks(self) -> dict[str, Tensor]:
        """Return a copy of each masked layer's whole mask over units, oriented ``(out, in, ...)``, on the CPU.

        Where weights are sharded (FSDP), call it on every rank: masks of single weights are gathered.
        """
        return {layer.name: layer.whole_mask() for layer in self._layers}

    def layer_densities(self) -> dict[str, float]:
        """Return each masked layer's density."""
        return {layer.name: layer.density for layer in self._layers}

    def decisions(self) -> tuple[LayerDecision, ...]:
        """Return what was decided for every linear and convolution layer of the model."""
        names = (layer.name for layer in self._layers)
        final = dict(zip(names, self._budget_densities(self._final_density()), strict=True))
        by_name = {layer.name: layer for layer in self._layers}
        decisions = []
        for candidate in self._candidates:
            shape = candidate.stored_shape
            layer = by_name.get(candidate.name)
            if layer is None:
                decisions.append(
                    LayerDecision(candidate.name, shape, False, 0, 1.0, "dense", 1.0, "dense", candidate.why)
                )
                continue
            decisions.append(
                LayerDecision(
                    name=layer.name,
                    shape=shape,
                    masked=True,
                    block_size=layer.block_size,
                    density=layer.density,
                    backend=layer.backend,
                    final_density=final[layer.name],
                    final_backend=layer.final_backend,
                    why="; ".join(filter(None, (candidate.why, layer.note, layer.why))),
                )
            )
        return tuple(decisions)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, in plain types and tensors (loads with ``weights_only=True``).

        Where weights are sharded (FSDP), call it on every rank and save what rank 0 gets: it is whole, and may be
        loaded on any number of ranks. Layers are gathered one after the other; the sums of an observation window under
        way go to rank 0 only, so a checkpoint is smallest between windows.
        """
        return {
            "version": _STATE_VERSION,
            "total_steps": self.schedule.total_steps,
            "schedule": self.config.schedule.to_dict(),
            "steps": self.steps,
            "position": self.position,
            "updates": self.updates,
            "churn": self.churn,
            "waiting": self._waiting,
            "stepped": self._stepped,
            "flops": dict(self.flops),
            **self._backends.state_dict(),
            "layers": {layer.name: layer.state_dict() for layer in self._layers},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: masks, windows and counters. Weights and optimizers are restored by their owners.

        Raises:
            ValueError: if `state` belongs to another model, schedule, run length or version; nothing is changed then.

        """
        self._check_state(state)
        for name in ("steps", "position", "updates", "churn"):
            setattr(self, name, state[name])
        self._waiting, self._stepped = state["waiting"], state["stepped"]
        self.flops = dict(state["flops"])
        self._backends.load_state_dict(state, probing=self.steps == 0)
        for layer in self._layers:
            layer.load_state_dict(state["layers"][layer.name])
            self._backends.resume(layer)
        self._observe_or_not()
        self._check_ranks("where the run was resumed")

    def recover(self, steps: int, position: int) -> None:
        """Go on in the middle of a run whose state is lost: take the masks from the weights.

        A layer keeps its largest units, as many as the schedule gives it at `position`. Where the weights were masked
        by that schedule these are the ones that are not zero. Where there are fewer of those, the rest is drawn; where
        there are more, the smallest are given up: their weights and optimizer state become zero (with "frozen", weights
        stay). Observation window, explored share and FLOPs start anew. `recovered` tells what was found.

        Args:
            steps: optimizer steps done.
            position: where in the schedule the run is.

        """
        self.steps, self.position = steps, position
        held = self._draw_masks(largest=True)
        with torch.no_grad():
            for layer in self._layers:
                for optimizer in self._optimizers:
                    layer.clear_optimizer_state_(_state_holder(optimizer), ~layer.mask)
        exact = [x.name for x, n in zip(self._layers, held, strict=True) if n == x.active]
        fewer = [x.name for x, n in zip(self._layers, held, strict=True) if n < x.active]
        more = [x.name for x, n in zip(self._layers, held, strict=True) if n > x.active]
        verb = "kept as it is, without updates" if self.config.inactive == "frozen" else "set to zero"
        self.recovered = self._told(
            (exact, "hold as many zeros as the schedule leaves: their masks are what they were"),
            (fewer, "hold more zeros than the schedule leaves: some of these units are active again, drawn at random"),
            (more, f"hold fewer zeros than the schedule leaves: the largest units stay active, the rest is {verb}"),
        )

    def mask_copy_(self, copy: nn.Module) -> None:
        """Zero the inactive weights of a copy of the model, such as an average of its weights over time.

        An average of weights under changing masks holds weights that are inactive now. Call it after each mask update:
        then the average is zero where the model is. With "frozen" there is nothing to zero.

        Args:
            copy: has layers of the same names and shapes, on any device; of an `AveragedModel`, its ``module``.

        Raises:
            ValueError: if it has not.

        """
        if self.config.inactive == "frozen":
            return
        modules = {clean_name(name): module for name, module in copy.named_modules()}
        weights = []
        for layer in self._layers:
            weight = getattr(modules.get(layer.name), layer.candidate.kind.weight_name, None)
            if not isinstance(weight, Tensor) or not layer.shard.holds(weight):
                found = "no such layer" if weight is None else f"a weight of shape {tuple(weight.shape)}"
                raise ValueError(
                    f"expected a copy of the model, with a layer {layer.name!r} of shape "
                    f"{layer.candidate.stored_shape}, got {found} in {type(copy).__name__}"
                )
            weights.append(weight)
        with torch.no_grad():
            for layer, weight in zip(self._layers, weights, strict=True):
                layer.fill_inactive_(layer.shard.local(weight))

    def _told(self, *cases: tuple[list[str], str]) -> str:
        return "; ".join(
            f"{len(names)} of {len(self._layers)} masked layers ({', '.join(names[:3])}{', ...' * (len(names) > 3)}) "
            f"{what}"
            for names, what in cases
            if names
        )

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"expected a state of version {_STATE_VERSION}, got {state.get('version')!r}")
        for name, mine in (
            ("total_steps", self.schedule.total_steps),
            ("schedule", self.config.schedule.to_dict()),
        ):
            if state[name] != mine:
                raise ValueError(
                    f"the checkpoint was made with another schedule: its {name} is {state[name]}, this run's is {mine}"
                )
        theirs = {name: (tuple(x["shape"]), x["block_size"]) for name, x in state["layers"].items()}
        ours = {layer.name: (layer.shape, layer.block_size) for layer in self._layers}
        if theirs != ours:
            differing = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
            first = differing[0]
            raise ValueError(
                "the checkpoint was made with another model or other masked layers: they differ in "
                f"{differing}; {first!r} is {theirs.get(first)} there and {ours.get(first)} here (shape, block size)"
            )

    # ------------------------------------------------------------------ set-up

    def _new_layer(self, candidate: Candidate, state: Mapping[str, Any] | None) -> MaskedLayer:
        block_size, note = unit_of(candidate, self.config.block_size)
        saved = state["layers"].get(candidate.name) if self.config.block_size == "auto" and state else None
        if saved and tuple(saved["shape"]) == candidate.shape and saved["block_size"] != block_size:
            # "auto" may have had other rules, as when convolutions had no operator.
            block_size, note = saved["block_size"], f"units of {saved['block_size']} as in the checkpoint"
        if candidate.parts > 1:
            note = "; ".join(filter(None, (f"{candidate.parts} fused matrices, each with its own budget", note)))
        return MaskedLayer(candidate, block_size, note, self.config.reserve)

    @torch.no_grad()
    def _draw_masks(self, *, largest: bool = False) -> list[int]:
        """Draw the masks of the present position, scale initial weights; see `masks.initial_mask`.

        Returns:
            How many units of each layer held weights before.

        """
        generator = torch.Generator().manual_seed(self.config.seed)
        reserve = self.config.reserve is not None
        held = []
        for layer, budget in zip(self._layers, self._budget(self.schedule(self.position).density), strict=True):
            norms = layer.whole_norms()
            parts = zip(norms.chunk(len(budget)), budget, strict=True)
            layer.set_mask(torch.cat([self._initial(layer, x, k, generator, largest or reserve) for x, k in parts]))
            held.append(active_units(norms > 0))
            if layer.held_back is not None:
                layer.held_back.take_all(layer.weight, layer.mask)
            if self.config.inactive == "zero":
                layer.fill_inactive_(layer.weight)
                # Where an earlier mask has left its zeros, the weights were scaled by that one.
                if self.config.scale_init and not largest and held[-1] > layer.active:
                    layer.weight.mul_(layer.density**-0.5)
            self._backends.begin(layer)
        self._observe_or_not()
        self._check_ranks(f"where masks were drawn, at step {self.steps}")
        return held

    @cached_property
    def _needs_gradients(self) -> bool:
        return any(self._rule.needs_gradients(layer.block_size) for layer in self._layers)

    def _check_rule(self) -> None:
        """Raise if a layer cannot be updated by the rule."""
        for layer in (layer for layer in self._layers if layer.shard.groups):
            if self.config.reserve is not None:
                raise ValueError(f"layer {layer.name!r} is sharded over ranks, where reserve is not to be had: use DDP")
            if self.schedule.densities[1:]:
                self._rule.check_sharded(layer.name, layer.block_size)
        sizes = {layer.unit_size: layer.name for layer in self._layers}
        if self._rule.redistribute is not None and len(sizes) > 1:
            raise ValueError(
                f"redistribute needs units of one size in all layers, got (weights in a unit: layer) {sizes}"
            )

    def _initial(self, layer: MaskedLayer, norms: Tensor, k: int, generator: torch.Generator, largest: bool) -> Tensor:
        if self.config.pattern is None:
            return initial_mask(norms, k, generator, largest=largest)
        noise = torch.rand(norms.shape, generator=generator)
        with layer.naming_errors():
            return draw(self.config.pattern, torch.where(norms > 0, norms if largest else noise, noise - 1.0), k)

    def _hook_up(self) -> None:
        for optimizer in self._optimizers:
            if self._owned[id(optimizer)]:
                self._handles.append(optimizer.register_step_pre_hook(self._before_step))
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._backends.hook_up()

    # ------------------------------------------------------------------ around the optimizer's step

    @torch.no_grad()
    def _mask_gradients(self, layers: Sequence[MaskedLayer], scale: float = 1.0, *, if_touched: bool = False) -> None:
        if self.observing and not MaskedLayer.observe(layers, scale):
            self._warn_nonfinite()
        MaskedLayer.mask_gradients_(layers, if_touched=if_touched)

    def _step_scale(self, layer: MaskedLayer) -> float:
        return 1.0 if self.config.inactive == "frozen" else layer.density**-self.config.step_exponent

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._idle = closure is None and self._is_idle(optimizer)
        if self._idle:
            return None
        layers, zeroing = self._owned[id(optimizer)], self.config.inactive == "zero"
        if closure is None:  # the gradients are there: mask them if the loop did not, or changed them since
            self._mask_gradients(layers, if_touched=True)
        if self.config.reserve is not None:  # the copy to scale from is taken once the weights are whole
            return self._make_whole(optimizer, closure, args, kwargs)
        for layer in layers:
            if not layer.is_dense and (not zeroing or self._step_scale(layer) != 1.0):
                layer.snapshot_weight(active_only=zeroing)
            else:
                layer.forget_snapshot()
        return None

    def _make_whole(self, optimizer: Optimizer, closure: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Put held-back weights in for the step that comes: after its closure, whose forward is without them."""
        layers = self._owned[id(optimizer)]

        def put_in() -> None:
            scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales by itself
            for layer in layers:
                layer.put_in_held_back_(1.0 if scale is None else scale)
                if self._step_scale(layer) != 1.0:
                    layer.snapshot_weight(active_only=False)

        if closure is None:
            put_in()
            return None

        def wrapped() -> Any:
            with torch.no_grad():
                for layer in layers:  # of a second call of the closure
                    layer.take_out_held_back_()
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                put_in()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._idle or not self._has_gradients(optimizer) or _skipped_by_scaler(optimizer):
            for layer in self._owned[id(optimizer)]:
                layer.take_out_held_back_()
            return
        self._stepped = True
        for layer in self._owned[id(optimizer)]:
            layer.forget_masked_gradient()
            if layer.gradient is None:
                continue
            layer.scale_step_(self._step_scale(layer))
            layer.take_out_held_back_()
            if self.config.inactive == "zero":
                layer.fill_inactive_(layer.weight)
            else:
                layer.undo_inactive_()

    def _is_idle(self, optimizer: Optimizer) -> bool:
        """Whether a step is none of training: torch's distributed checkpoints take one to make an optimizer's state.

        It has a learning rate and gradients of 0, and may come between a checkpoint's weights and its masks, when those
        of before would wipe out weights. The ranks agree, as a real step may be all zeros to one of them.
        """
        rates = [group.get("lr") for group in optimizer.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            return False  # not torch's own zero, and a look at it would wait for the device
        if any(rate is None or float(rate) != 0.0 for rate in rates):
            return False
        gradients = [p.grad for p in self._held[id(optimizer)] if p.grad is not None]
        moving = any(bool(torch.count_nonzero(local_tensor(gradient))) for gradient in gradients)
        return not agree([layer.shard for layer in self._owned[id(optimizer)]], moving)

    def _has_gradients(self, optimizer: Optimizer) -> bool:
        """Whether a step has anything to step by.

        A rank of sharded weights may hold nothing of the masked ones: there every parameter counts, and where a rank
        holds nothing at all, the ranks agree.
        """
        layers, parameters = self._owned[id(optimizer)], self._held[id(optimizer)]
        if not any(layer.shard.groups for layer in layers):
            return any(layer.gradient is not None for layer in layers)
        here = any(parameter.grad is not None for parameter in parameters)
        shards = [layer.shard for layer in layers]
        if id(optimizer) not in self._unevenly_held:
            nothing_here = all(parameter.numel() == 0 for parameter in parameters)
            self._unevenly_held[id(optimizer)] = agree(shards, nothing_here)
        return agree(shards, here) if self._unevenly_held[id(optimizer)] else here

    # ------------------------------------------------------------------ observation and update

    def _refuse_nan_weights(self) -> None:
        """Stop a run whose window saw no finite gradient because its weights are NaN: it will never see one."""
        for layer in self._layers:
            if agree([layer.shard], bool(layer.weight.isnan().any())):
                raise ValueError(
                    f"the run has diverged: layer {layer.name!r} holds NaN weights, and at the mask update that is due "
                    "no gradient had been finite"
                )

    def _warn_nonfinite(self) -> None:
        if not self._warned_nonfinite:
            self._warned_nonfinite = True
            warnings.warn(
                f"step {self.steps}: a gradient was NaN or infinite; the observation window leaves such steps out "
                "(said once)",
                RuntimeWarning,
                stacklevel=3,
            )

    @torch.no_grad()
    def _update(self) -> None:
        density = self.schedule(self.position).density
        drop_fraction = self.config.drop_share(self.schedule.drop_progress(self.position), density)
        if self.config.reserve is not None:
            drop_fraction = 0.0
            for layer in self._layers:
                if layer.held_back is not None:
                    layer.held_back.put_in_(layer.weight)
        grown = 0
        for layer, changed, grown_units in MaskedLayer.redecide(
            self._layers, self._budget(density), drop_fraction, self._rule, self.updates
        ):
            grown += grown_units * layer.unit_size
            if layer.held_back is not None:
                layer.held_back.take_all(layer.weight, layer.mask)
            if self.config.inactive == "zero":
                layer.fill_inactive_(layer.weight)
            MaskedLayer.mask_gradients_([layer])
            for optimizer in self._optimizers if layer.held_back is None else ():
                layer.clear_optimizer_state_(_state_holder(optimizer), changed)
        self.updates += 1
        self.churn = grown / sum(layer.active * layer.unit_size for layer in self._layers)
        self._check_ranks(f"after mask update {self.updates}")

    def _check_ranks(self, when: str) -> None:
        """Raise on every rank if any of them has come to other masks."""
        if self._group is None:
            return
        words = {"the number of steps": self.steps, "the schedule's position": self.position}
        whole = [layer for layer in self._layers if not layer.mask_is_local]
        words |= {f"the mask of layer {layer.name!r}": mask_digest(layer.mask) for layer in whole}
        check_same_on_all_ranks(words, self._layers[0].device, when, self._group)

    def _budget(self, density: float) -> list[list[int]]:
        """Return the active units of each part of each layer for a density of the whole."""
        distribution = self.config.distribution
        function = distribution if callable(distribution) else densities.DISTRIBUTIONS[distribution]
        owners = [layer for layer in self._layers for _ in range(layer.candidate.parts)]
        shapes = [layer.candidate.part_shape for layer in owners]
        shares = list(function(shapes, density))
        if len(shares) != len(shapes) or not all(0.0 < share <= 1.0 + 1e-9 for share in shares):
            raise ValueError(
                f"distribution must return {len(shapes)} densities in (0, 1], one for each layer, got {shares} "
                f"from {distribution!r}"
            )
        weights = [math.prod(shape) for shape in shapes]
        mean = sum(share * n for share, n in zip(shares, weights, strict=True)) / sum(weights)
        if not math.isclose(mean, density, rel_tol=0.01):
            raise ValueError(
                f"distribution must keep to the density {density:g} of the whole, got {mean:g} from {distribution!r}"
            )
        counts = [layer.units // layer.candidate.parts for layer in owners]
        units = iter(densities.allocate(counts, [layer.unit_size for layer in owners], shares, density))
        return [[next(units) for _ in range(layer.candidate.parts)] for layer in self._layers]

    def _budget_densities(self, density: float) -> list[float]:
        """Return each layer's density for a density of the whole."""
        return [sum(k) / layer.units for layer, k in zip(self._layers, self._budget(density), strict=True)]

    def _final_density(self) -> float:
        return self.schedule(self.schedule.total_steps - 1).density

    def _observe_or_not(self) -> None:
        for layer in self._layers:
            set_observing(layer.candidate, self.observing or layer.held_back is not None)

    def _count_flops(self) -> None:
        """Add one step's FLOPs: three products a layer, each by the share of weights that takes part."""
        by_name = {layer.name: layer for layer in self._layers}
        for candidate in self._candidates:
            positions = self._backends.positions.get(candidate.name, 1)
            product = 2.0 * math.prod(candidate.shape) * positions
            analytic = executed = 3.0
            layer = by_name.get(candidate.name)
            if layer is not None:
                through = 1.0 if self.config.inactive == "frozen" else layer.density
                analytic = 2.0 * through + (1.0 if self.observing else layer.learning_density)
                executed = analytic if layer.backend not in ("dense", "reference") else 3.0
            self.flops["analytic"] += product * analytic
            self.flops["executed"] += product * executed
            self.flops["dense"] += product * 3.0


def _state_holder(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer whose `state` counts: a ZeroRedundancyOptimizer's own is empty, its inner one's is not."""
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def _skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer, which a GradScaler always calls, skipped this step for infinite gradients."""
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and bool(found_inf.item())
