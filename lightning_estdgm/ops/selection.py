"""The never-slower rule: a layer uses a sparse backend only where it was measured faster than dense."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_estdgm.ops import backends, get_backend, masked_linear
from lightning_estdgm.topology import BlockTopology

__all__ = ["BUCKETS", "DENSE", "BackendSelector", "Case", "Choice", "bucket_of", "measure_case", "refusals"]

DENSE = "dense"
"""The layer's own dense forward, with the mask applied to its weight."""

BUCKETS = 32
"""Densities up to 1/4 are decided in steps of 1/32, up to 1/2 of 2/32 and above of 4/32: see `bucket_of`."""

MARGIN = 0.05
"""By what share of the dense time a sparse backend must be faster: noise must not choose it."""

AGREEMENT = 0.1
"""A timing counts once its two fastest turns are this close to each other, or after `MOST_ROUNDS` turns."""

MOST_ROUNDS = 12

_ORACLE = "reference"  # dense work plus masking: never faster, so never a candidate
_FIELDS = ("tokens", "out_features", "in_features", "block_size", "dtype", "device", "frozen", "transposed")


@dataclass(frozen=True)
class Choice:
    """What one layer runs on, and why.

    Args:
        backend: ``"dense"`` (the layer's own forward) or a backend's name.
        dense_s: measured seconds of dense forward and backward, None where this choice needed no measurement.
        sparse_s: the same for the fastest sparse backend.
        why: one short sentence for people.
    """

    backend: str
    dense_s: float | None
    sparse_s: float | None
    why: str


@dataclass(frozen=True)
class Case:
    """One shape to decide: the layer, its input and the density.

    Args:
        tokens: rows of the flattened input.
        out_features: rows of the weight.
        in_features: columns of the weight.
        block_size: side of a mask block, in weights.
        density: active share of the blocks, in (0, 1].
        dtype: what the products run in (under autocast, autocast's dtype).
        device: where.
        frozen: dense forward and dX, sparse dW only.
        transposed: the weight is stored ``(in, out)``, as in Hugging Face's ``Conv1D``.
    """

    tokens: int
    out_features: int
    in_features: int
    block_size: int
    density: float
    dtype: torch.dtype
    device: torch.device
    frozen: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        for name in ("out_features", "in_features"):
            value = getattr(self, name)
            if value < 1 or value % self.block_size:
                raise ValueError(f"{name} must be a positive multiple of block size {self.block_size}, got {value}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be in (0, 1], got {self.density}")

    def topology(self) -> BlockTopology:
        """A random topology of this shape and density, always the same one."""
        rows, cols = self.out_features // self.block_size, self.in_features // self.block_size
        generator = torch.Generator().manual_seed(0)
        active = max(1, round(self.density * rows * cols))
        mask = torch.zeros(rows * cols, dtype=torch.bool, device="cpu")
        mask[torch.randperm(rows * cols, generator=generator, device="cpu")[:active]] = True
        return BlockTopology.from_mask(mask.view(rows, cols).to(self.device), self.block_size)


def refusals(case: Case) -> dict[str, str | None]:
    """Return for each backend that could be faster than dense why it cannot run `case`, or None where it can."""
    topology = case.topology()
    return {
        name: backend.unsupported(case.device, case.dtype, topology)
        for name, backend in backends().items()
        if name != _ORACLE
    }


def measure_case(case: Case, names: Sequence[str], *, rounds: int = 3) -> dict[str, float]:
    """Seconds of one forward and backward, per name: the fastest of several rounds, after one to warm up.

    There are at least ``rounds``, and on a busy machine more, until the two fastest of every name agree.

    Dense is ``F.linear`` with a masked weight, everything else :func:`masked_linear`; both with gradients of
    input, weight and bias, on random data of the case's shape and dtype, autocast off. The names take turns:
    a slow moment of the machine hits all of them. Neither the global random state nor any ``.grad`` is
    touched, and ambient ``no_grad``, ``inference_mode`` and autocast do not matter.

    Args:
        case: what to measure.
        names: backends, ``"dense"`` included where wanted.
        rounds: timed repetitions at least, 1 to ``MOST_ROUNDS``.
    """
    device, dtype = case.device, case.dtype
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
            return values.to(device, dtype)

        topology = case.topology()
        weight = random(case.out_features, case.in_features)
        weight *= topology.mask().repeat_interleave(case.block_size, 0).repeat_interleave(case.block_size, 1)
        weight = weight.t().contiguous() if case.transposed else weight
        leaves = [
            t.requires_grad_() for t in (random(case.tokens, case.in_features), weight, random(case.out_features))
        ]
        dy = random(case.tokens, case.out_features)

        def once(name: str) -> float:
            x, stored, bias = leaves
            _synchronize(device)
            start = time.perf_counter()
            matrix = stored.t() if case.transposed else stored
            if name == DENSE:
                y = F.linear(x, matrix, bias)
            else:
                y = masked_linear(x, matrix, bias, topology, backend=name, frozen=case.frozen)
            torch.autograd.grad(y, leaves, dy)
            _synchronize(device)
            return time.perf_counter() - start

        for name in names:
            once(name)
        turns: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(MOST_ROUNDS):
            if turn >= rounds and all(_settled(seconds) for seconds in turns.values()):
                break
            for name in names:
                turns[name].append(once(name))
    return {name: min(seconds) for name, seconds in turns.items()}


def _settled(seconds: Sequence[float]) -> bool:
    """Whether the two fastest turns agree: on a busy machine a single fast turn is no evidence yet."""
    fastest = sorted(seconds)[:2]
    return fastest[-1] <= (1.0 + AGREEMENT) * fastest[0]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def bucket_of(density: float) -> int:
    """Round a density up to one that is measured, in units of 1/``BUCKETS``.

    So an annealed density measures a few times, not at every update, and what is measured is never sparser than what
    will run. Buckets widen with the density: there they are a smaller share of it, and a measurement takes longer.
    """
    bucket = max(1, math.ceil(density * BUCKETS - 1e-9))
    width = 1 if bucket <= BUCKETS // 4 else 2 if bucket <= BUCKETS // 2 else 4
    return -(-bucket // width) * width


class BackendSelector:
    """Chooses dense or a sparse backend per layer shape and density, by measuring once and remembering.

    Densities are rounded up by `bucket_of`. What was measured also answers other densities of the same
    layer: where sparse won, it wins at any lower density; where dense won, it wins at any higher one.

    Args:
        forced: None to measure; ``"dense"`` or a backend's name to use that everywhere. A forced backend that
            does not support a layer raises, and is never replaced.
        measure: how long each named implementation takes on a case, in seconds.

    Raises:
        ValueError: ``forced`` is no known name.

    Example:
        >>> selector = BackendSelector(forced="dense")
        >>> selector.choose(tokens=64, out_features=32, in_features=32, block_size=16, density=0.5,
        ...                 dtype=torch.float32, device="cpu").backend
        'dense'
    """

    def __init__(
        self,
        forced: str | None = None,
        *,
        measure: Callable[[Case, Sequence[str]], Mapping[str, float]] = measure_case,
    ) -> None:
        if forced is not None and forced != DENSE and forced not in backends():
            known = ", ".join((DENSE, *backends()))
            raise ValueError(f"unknown backend {forced!r}, expected one of: {known}")
        self._forced = forced
        self._measure = measure
        # layer (all fields but the density) -> bucket -> choice
        self._choices: dict[tuple[Any, ...], dict[int, Choice]] = {}

    def choose(
        self,
        *,
        tokens: int,
        out_features: int,
        in_features: int,
        block_size: int,
        density: float,
        dtype: torch.dtype,
        device: torch.device | str,
        frozen: bool = False,
        transposed: bool = False,
    ) -> Choice:
        """The choice for one layer at one density; measured if nothing measured before answers it.

        Args: as the fields of :class:`Case`.

        Raises:
            ValueError: sizes that do not fit each other, a density outside (0, 1], or a forced (or restored)
                backend that does not run this layer.
        """
        case = Case(
            tokens,
            out_features,
            in_features,
            block_size,
            density,
            dtype,
            torch.device(device),
            frozen,
            transposed,
        )
        # Rounded up, so that what is measured is never sparser than what will run.
        bucket = max(1, math.ceil(density * BUCKETS - 1e-9))
        bucket = bucket_of(density)
        case = replace(case, density=bucket / BUCKETS)
        if self._forced is not None:
            return self._forced_choice(case)
        if block_size == 1:
            return Choice(DENSE, None, None, "single-weight masks have no sparse operator")
        layer = _layer_key(case)
        known = self._choices.setdefault(layer, {})
        if bucket not in known:
            known[bucket] = _inferred(known, bucket) or self._measured(case)
        choice = known[bucket]
        if choice.backend != DENSE:
            get_backend(choice.backend)  # a restored choice may name a backend that is not installed here
        return choice

    def state_dict(self) -> dict[str, Any]:
        """Every choice so far, as plain types: loads with ``torch.load(weights_only=True)``."""
        return {
            "choices": [
                {**dict(zip(_FIELDS, layer, strict=True)), "bucket": bucket, **asdict(choice)}
                for layer, known in self._choices.items()
                for bucket, choice in known.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`: what was chosen is chosen again, without measuring.

        Raises:
            ValueError: ``state`` is not what :meth:`state_dict` returns.
        """
        choices: dict[tuple[Any, ...], dict[int, Choice]] = {}
        try:
            for row in state["choices"]:
                layer = tuple(row[field] for field in _FIELDS)
                choice = Choice(row["backend"], row["dense_s"], row["sparse_s"], row["why"])
                choices.setdefault(layer, {})[row["bucket"]] = choice
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a state from BackendSelector.state_dict(), got {state!r:.200}") from error
        self._choices = choices

    def _forced_choice(self, case: Case) -> Choice:
        assert self._forced is not None
        if self._forced != DENSE:
            reason = get_backend(self._forced).unsupported(case.device, case.dtype, case.topology())
            if reason is not None:
                raise ValueError(f"backend {self._forced!r} was forced, but cannot run this layer: it {reason}")
        return Choice(self._forced, None, None, "forced")

    def _measured(self, case: Case) -> Choice:
        reasons_against = refusals(case)
        names = [name for name, reason in reasons_against.items() if reason is None]
        if not names:
            reasons = "; ".join(f"{name} {reason}" for name, reason in reasons_against.items())
            return Choice(DENSE, None, None, f"no sparse backend: {reasons}")
        times = self._measure(case, [DENSE, *names])
        dense_s = times[DENSE]
        best = min(names, key=lambda name: times[name])
        sparse_s = times[best]
        spent = f"({sparse_s * 1e3:.3g} against {dense_s * 1e3:.3g} ms)"
        if sparse_s <= (1.0 - MARGIN) * dense_s:
            return Choice(best, dense_s, sparse_s, f"sparse {dense_s / sparse_s:.1f}x faster {spent}")
        if sparse_s < dense_s:
            return Choice(DENSE, dense_s, sparse_s, f"dense: sparse is less than {MARGIN:.0%} faster {spent}")
        return Choice(
            DENSE, dense_s, sparse_s, f"dense faster: sparse takes {sparse_s / dense_s:.1f}x the time {spent}"
        )


def _layer_key(case: Case) -> tuple[Any, ...]:
    # The device's type, not its index: a resumed run may sit on another device of the same machine.
    plain = {"dtype": str(case.dtype).removeprefix("torch."), "device": case.device.type}
    return tuple(plain.get(field, getattr(case, field)) for field in _FIELDS)


def _inferred(known: Mapping[int, Choice], bucket: int) -> Choice | None:
    """What the measurements at other densities of one layer already imply at this one, or None."""
    measured = {at: choice for at, choice in known.items() if choice.dense_s is not None}
    sparse_above = [at for at, choice in measured.items() if choice.backend != DENSE and at >= bucket]
    if sparse_above:
        at = min(sparse_above)
        return Choice(measured[at].backend, None, None, f"sparse already faster at density {at / BUCKETS:.3g}")
    dense_below = [at for at, choice in measured.items() if choice.backend == DENSE and at <= bucket]
    if dense_below:
        at = max(dense_below)
        return Choice(DENSE, None, None, f"dense already faster at density {at / BUCKETS:.3g}")
    return None
