"""`Dispatch`: the backend of each masked layer, chosen after the first step and applied whenever masks change.

It turns layers into the cases that `sparse.autotune` measures and chooses for, and swaps their forwards (`modules`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from lightning_estdgm.config import DGMConfig
from lightning_estdgm.engine._expert_modules import expert_case, together
from lightning_estdgm.engine._initialisation import unit_note
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.engine._unit_choice import choose_units, times_units
from lightning_estdgm.modules._adapter_check import adapter_checks
from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.modules._forward_probe import ForwardProbe, Image, is_channels_last
from lightning_estdgm.modules._forward_watch import probe_forward
from lightning_estdgm.modules._kinds import conv_geometry
from lightning_estdgm.modules._swap import restore_dense_, sparsify_
from lightning_estdgm.sparse._buckets import search_order
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.autotune._cases import Case, ConvCase
from lightning_estdgm.sparse.autotune._choice import BackendSelector
from lightning_estdgm.sparse.autotune._timing_cache import TimingCache
from lightning_estdgm.sparse.backends._protocol import Backend, backends, conv_refusal, get_backend

_T = TypeVar("_T")

_NOMINAL_TOKENS, _NOMINAL_BATCH = 2048, 32  # for choosing a backend where no forward could be seen


class Dispatch:
    """Backends of the masked layers.

    It probes the first step, chooses a backend for all densities, and swaps the layers' forwards. It sets `backend`,
    `final_backend` and `why` of each weight.

    Args:
        config: settings; `backend` and `units` are used.
        candidates: all linear and convolution layers of the model.
        weights: masked weights of the model; others may come in later.
        can_mask: weights that are or can be masked.
        group: process group of the ranks that take over the first rank's choice; ``None``: no other rank is asked.
        say: called before layers are timed, with what will be timed and about how long that takes; ``None``: nothing is
            said.

    Attributes:
        timed: what each choice has timed here and how long it took, in words; nothing of those that timed nothing.
        probing: whether the current step records the shapes of the layers' inputs.
        positions: number of positions that each layer's weight is applied to in a forward, by the layer's name; empty
            until probed.
        step_positions: the same in all forwards of a batch, for FLOPs; of the last one where several are accumulated.

    Raises:
        ValueError: if a forced backend cannot compute a weight.

    """

    def __init__(
        self,
        config: DGMConfig,
        candidates: Sequence[Candidate],
        weights: Sequence[MaskedWeight],
        can_mask: Sequence[MaskedWeight],
        group: dist.ProcessGroup | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._config = config
        self._candidates = candidates
        self._weights = weights
        self._group = group
        self._say = say
        self.timed: list[str] = []
        self._selector = BackendSelector(None if config.backend == "auto" else config.backend, kept=TimingCache())
        self._unfit: set[str] = set()
        self.check_forced(can_mask)
        self.probing = True
        self.positions: dict[str, int] = {}
        self.step_positions: dict[str, int] = {}
        self._dtypes: dict[str, torch.dtype] = {}  # dtype that each layer computes in, as probed
        self._images: dict[str, Image] = {}  # input of each convolution, as probed
        self._forms: dict[str, str] = {}  # how each stack of experts is computed by its module itself
        self._checks = adapter_checks(candidates)
        self._probes = {candidate.name: ForwardProbe(candidate) for candidate in candidates}
        self._handles: list[Any] = []

    # ------------------------------------------------------------------ probing the first step

    def hook_up(self) -> None:
        """Watch the layers' forwards if the first step is still to come."""
        if self.probing:
            for module, check in self._checks:
                self._handles.append(probe_forward(module, check))
            for candidate in self._candidates:
                self._handles.append(probe_forward(candidate.module, self._probes[candidate.name]))

    def begin_batch(self) -> None:
        """Count forwards anew: those before were of a batch that is accumulated, or whose step was skipped."""
        if self.probing:
            for probe in self._probes.values():
                probe.all_positions = 0

    def read_probes(self, used_by_themselves: Mapping[str, int]) -> None:
        """Take over the shapes and dtypes that the first step's forwards showed.

        Args:
            used_by_themselves: positions of weights that are used without their layers' forwards, by name.

        """
        self.probing = False
        self.positions, all_forwards = dict(used_by_themselves), dict(used_by_themselves)
        self._remove_hooks()
        for name, probe in self._probes.items():
            if probe.dtype is None:  # MultiheadAttention computes its out_proj without a call of it
                probe = self._probes.get(name.rpartition(".")[0], probe)
            if probe.dtype is not None:
                self.positions[name], self._dtypes[name] = probe.positions, probe.dtype
                all_forwards[name] = max(probe.positions, probe.all_positions)
            if probe.image is not None:
                self._images[name] = probe.image
        self._forms = {c.name: c.kind.dense_form(c.module) for c in self._candidates if c.kind.experts}
        for _, check in self._checks:
            check.warn_if_not_made()
            for name, rows in check.rows.items():
                all_forwards[name] = rows * all_forwards.get(name, 1) // self.positions.get(name, 1)
            self.positions |= check.rows
            self._forms |= check.forms
        seen = self.positions, all_forwards, self._dtypes, self._images, self._forms
        found = self._from_first_rank(seen)
        self.positions, self.step_positions, self._dtypes, self._images, self._forms = found

    # ------------------------------------------------------------------ choosing

    def choose_units(self, weights: Sequence[MaskedWeight], densities: Sequence[float]) -> None:
        """Choose the mask units of layers that are about to be masked, if the settings leave it to a timing.

        Args:
            weights: weights of layers.
            densities: density of each at the end of the run.

        Raises:
            RuntimeError: on the other ranks, if the first one, which alone measures, raised.

        """
        aim = self._config.units.size
        if not times_units(self._config) or not isinstance(aim, str):
            return
        at_the_end = zip(weights, densities, strict=True)
        asked = [(weight, self._case(weight, density)) for weight, density in at_the_end if self._is_timed(weight)]
        found, words = self._on_first_rank(lambda: choose_units(asked, self._selector, aim, self._say))
        self.timed += [words] * bool(words)
        for weight, _ in asked:
            if weight.name in found:
                weight.use_unit(found[weight.name], unit_note(weight.candidate, ""))

    def choose_all(self, densities: Sequence[Sequence[float]]) -> None:
        """Choose the backend of each layer at every density of the schedule, for the whole run.

        All are chosen at once, so that a resumed run makes no choice of its own. The final density comes first: it is
        the one that users are shown, and its measurements often answer for the others. Only the first rank measures.

        Args:
            densities: densities of the layers: first for the final density of the whole, then for the schedule's.

        Raises:
            RuntimeError: on the other ranks, if the first one raised.

        """
        final, *others = densities
        asked: list[tuple[MaskedWeight, float]] = []
        for index, weight in enumerate(self._weights):
            if self._has_choice(weight):
                between = [then[index] for then in others]
                # The update rule may have moved a layer from the schedule's density.
                asked += [(weight, density) for density in (final[index], *search_order([*between, weight.density]))]
        self._measure_for_all(asked)
        self._choose_for_all(final)

    def apply(self) -> None:
        """Switch every layer to the backend chosen for its current density, on its current mask."""
        asked = [(weight, weight.density) for weight in self._weights if self._has_choice(weight)]
        if not all(self._selector.answers(self._case(*question)) for question in asked):
            self._measure_for_all(asked)
        chosen = {weight: self._choose(weight, density) for weight, density in asked}
        for weight, (backend, _) in self._settled(chosen).items():
            self._use(weight, backend)

    def begin(self, weight: MaskedWeight) -> None:
        """Switch a layer with its first mask to the forced backend, or to dense until the first choice."""
        self._use(weight, self._forced(weight))

    def resume(self, weight: MaskedWeight) -> None:
        """Switch a layer to its checkpoint's backend, or to dense until the next choice if that cannot run here."""
        product = weight.placement.product
        if product or weight.final_backend not in ("dense", "?", *backends()):  # stored in another way there
            weight.final_backend = product or "dense"
        if self._config.backend != "auto":
            self.begin(weight)
            return
        backend = backends().get(weight.backend)
        self._use(weight, "dense" if backend is None or _refusal(backend, weight) else backend.name)

    def close(self) -> None:
        """Remove the hooks and restore the layers' own forwards."""
        self._remove_hooks()
        for weight in self._weights:
            restore_dense_(weight.candidate)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the probed shapes and the choices, in plain types."""
        return {
            "positions": dict(self.positions),
            "step_positions": dict(self.step_positions),
            "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in self._dtypes.items()},
            "images": {name: asdict(image) for name, image in self._images.items()},
            "expert_forms": dict(self._forms),
            "selector": self._selector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, probing: bool) -> None:
        """Load a state; `resume` then switches each layer to its backend.

        Args:
            state: mapping with the entries of `state_dict`, and maybe others.
            probing: whether the first step is still to come.

        """
        self.positions = dict(state["positions"])
        self.step_positions = dict(state.get("step_positions", self.positions))  # newer than the rest
        self._dtypes = {name: getattr(torch, dtype) for name, dtype in state["dtypes"].items()}
        self._images = {name: Image(**image) for name, image in state.get("images", {}).items()}  # newer than the rest
        self._forms = dict(state.get("expert_forms", {}))
        self._selector.load_state_dict(state["selector"])
        self.probing = probing
        self.begin_batch()  # of what ran since the state was saved, no step is to be counted
        if not probing:
            self._remove_hooks()

    # ------------------------------------------------------------------ layers that have a choice

    def _is_forced(self, weight: MaskedWeight) -> bool:
        """Whether a forced backend applies to this layer."""
        return self._config.backend != "auto" and weight.has_operator and weight.name not in self._unfit

    def _has_choice(self, weight: MaskedWeight) -> bool:
        timed = weight.has_operator and self._is_timed(weight)
        return self._is_forced(weight) or (timed and self._config.backend == "auto")

    def _is_timed(self, weight: MaskedWeight) -> bool:
        """Whether a layer can be timed: not a stack of experts whose module computes it in an unknown way."""
        return not weight.candidate.kind.experts or bool(self._forms.get(weight.name))

    def _forced(self, weight: MaskedWeight) -> str:
        return self._config.backend if self._is_forced(weight) else "dense"

    def check_forced(self, weights: Sequence[MaskedWeight]) -> None:
        """Raise ValueError if a forced backend cannot compute a weight."""
        if self._config.backend in ("auto", "dense"):
            return
        backend = get_backend(self._config.backend)
        for weight in weights:
            if self._is_forced(weight) and (reason := _refusal(backend, weight)):
                no_block = weight.block_size == 1 and isinstance(self._config.units.size, str)
                if weight.candidate.seems_head or no_block:  # what nobody asked for does not end a run
                    self._unfit.add(weight.name)
                    continue
                raise ValueError(
                    f"backend={backend.name!r} was asked for but cannot compute layer {weight.name!r}: {reason}. "
                    'Exclude the layer, or use backend="auto"'
                )

    # ------------------------------------------------------------------ cases for the selector

    def _measure_for_all(self, asked: Iterable[tuple[MaskedWeight, float]]) -> None:
        """Have the selector know its answers, on all ranks those of the first: it alone measures, and says so."""
        cases = [self._case(weight, density) for weight, density in asked]
        state = self._on_first_rank(lambda: self._measure(cases))
        if self._group is not None:
            self._selector.load_state_dict(state)

    def _on_first_rank(self, measure: Callable[[], _T]) -> _T:
        """Return the result of what measures, on all ranks that of the first.

        Raises:
            RuntimeError: on the other ranks, if the first one raised.

        """
        if self._group is None:
            return measure()
        found, failed = None, None
        if dist.get_rank(self._group) == 0:
            try:
                found = measure()
            except Exception as error:
                failed = error  # the other ranks wait for what comes of it
        found, reason = self._from_first_rank((found, repr(failed) if failed else ""))
        if failed:
            raise failed
        if reason:
            raise RuntimeError(f"the first rank, which chooses the backends of all, failed to: {reason}")
        return found

    def _measure(self, cases: Sequence[Case | ConvCase]) -> dict[str, Any]:
        """Time what the selector does not know of some cases; return its state."""
        if self._say is not None and (plan := self._selector.plan(cases)):
            self._say(plan)
        for case in cases:
            self._selector.choose(case)
        if report := self._selector.report():
            self.timed.append(report)
        return self._selector.state_dict()

    def _choose_for_all(self, final: Sequence[float]) -> None:
        """Set what users are shown of each layer: its backend at the final density, and why."""
        at_the_end = {}
        for weight, density in zip(self._weights, final, strict=True):
            if self._has_choice(weight):
                at_the_end[weight] = self._choose(weight, density)
                continue
            weight.final_backend = weight.placement.product or "dense"
            if weight.candidate.kind.experts and weight.has_operator and weight.block_size != 1:
                weight.why = "what its module runs by itself is not timed: only backend= makes it sparse"
        for weight, (backend, why) in self._settled(at_the_end).items():
            weight.final_backend, weight.why = backend, why

    def _settled(self, chosen: Mapping[MaskedWeight, tuple[str, str]]) -> Mapping[MaskedWeight, tuple[str, str]]:
        """Return backends and reasons, with those of experts that share a forward settled together unless forced."""
        return together(chosen, self._candidates) if self._config.backend == "auto" else chosen

    def _choose(self, weight: MaskedWeight, density: float) -> tuple[str, str]:
        choice = self._selector.choose(self._case(weight, density))
        return choice.backend, choice.why

    def _case(self, weight: MaskedWeight, density: float) -> Case | ConvCase:
        """Return the case of a layer as probed in the first step, at a density."""
        out, inner = weight.shape[:2]
        frozen = weight.inactive.act_in_forward
        dtype = self._dtypes.get(weight.name, weight.parameter.dtype)
        if not weight.candidate.is_convolution:
            tokens = self.positions.get(weight.name, _NOMINAL_TOKENS)
            transposed = weight.candidate.kind.transposed
            if weight.candidate.kind.experts:
                form = self._forms.get(weight.name) or "grouped"  # a forced backend is not compared with it
                return expert_case(weight, tokens, density, dtype, form)
            return Case(tokens, out, inner, weight.block_size, density, dtype, weight.device, frozen, transposed)
        geometry = _geometry(weight)
        image = self._images.get(weight.name) or self._nominal_image(weight, geometry)
        return ConvCase(
            image.batch,
            image.height,
            image.width,
            out,
            inner,
            geometry,
            weight.block_size,
            density,
            dtype,
            weight.device,
            frozen,
            image.channels_last,
        )

    def _nominal_image(self, weight: MaskedWeight, geometry: ConvGeometry) -> Image:
        """Return an input whose output has 196 pixels, in channels-last memory if any convolution's weight is."""
        size = (14, 14) if len(weight.shape) == 4 else (1, 196)
        walk = zip(size, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, strict=True)
        height, width = (max(1, (n - 1) * s + d * (k - 1) + 1 - 2 * p) for n, k, s, p, d in walk)
        return Image(_NOMINAL_BATCH, height, width, any(is_channels_last(x.parameter) for x in self._weights))

    # ------------------------------------------------------------------ helpers

    def _use(self, weight: MaskedWeight, backend: str) -> None:
        weight.backend = weight.placement.product or backend
        if weight.has_operator and (weight.block_size != 1 or backend != "dense"):
            sparsify_(
                weight.candidate,
                weight.mask.to(weight.device),
                weight.block_size,
                backend,
                weight.inactive.act_in_forward,
            )

    def _from_first_rank(self, value: Any) -> Any:
        """Return the first rank's `value`, where it depends on a machine's speed or a rank's batch."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self._group, 0), group=self._group)
        return box[0]

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _refusal(backend: Backend, weight: MaskedWeight) -> str | None:
    """Return the reason why a backend cannot compute a layer with its current mask, or None."""
    topology = BlockTopology.from_mask(weight.mask.flatten(1), weight.block_size)
    if not weight.candidate.is_convolution:
        return backend.unsupported(weight.device, weight.parameter.dtype, topology)
    return conv_refusal(backend.name, weight.device, weight.parameter.dtype, topology, _geometry(weight))


def _geometry(weight: MaskedWeight) -> ConvGeometry:
    """Return the geometry of a convolution that has an operator."""
    module: Any = weight.candidate.module
    geometry = conv_geometry(module)
    assert geometry is not None  # or the layer has no operator
    return geometry
