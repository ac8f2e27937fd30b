"""The never-slower rule: a layer uses a sparse backend only where it was measured faster than dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lightning_estdgm.sparse._buckets import BUCKETS, bucket_of
from lightning_estdgm.sparse.autotune._cases import (
    DENSE,
    Case,
    ConvCase,
    is_layer,
    layer_key,
    layer_of,
    measure_case,
    refusals,
)
from lightning_estdgm.sparse.autotune._timing_cache import TimingCache
from lightning_estdgm.sparse.backends._protocol import backends, get_backend

MARGIN = 0.05
"""By what share of the dense time a sparse backend must be faster: noise must not choose it."""


@dataclass(frozen=True)
class Choice:
    """Choice of what computes one layer, and its reason.

    Args:
        backend: Name of a backend, or ``"dense"`` for the layer's own forward.
        dense_s: Measured seconds of dense forward and backward, None where this choice needed no measurement.
        sparse_s: The same for the fastest sparse backend.
        why: One short sentence for people.
    """

    backend: str
    dense_s: float | None
    sparse_s: float | None
    why: str


def choice_of(seconds: Mapping[str, float], when: str = "") -> Choice:
    """Return the choice by the rule: the fastest sparse backend, if it takes at least 5 % less time than dense.

    Args:
        seconds: Time of forward and backward, for ``"dense"`` and at least one backend.
        when: Date of a timing that was kept, ISO 8601; empty for one made now.
    """
    dense_s = seconds[DENSE]
    best = min((name for name in seconds if name != DENSE), key=lambda name: seconds[name])
    sparse_s = seconds[best]
    spent = f"({sparse_s * 1e3:.3g} against {dense_s * 1e3:.3g} ms)"
    if when:
        spent += f", measured on {when.partition('T')[0]}"
    if sparse_s <= (1.0 - MARGIN) * dense_s:
        return Choice(best, dense_s, sparse_s, f"sparse {dense_s / sparse_s:.1f}x faster {spent}")
    if sparse_s < dense_s:
        return Choice(DENSE, dense_s, sparse_s, f"dense: sparse is less than {MARGIN:.0%} faster {spent}")
    return Choice(DENSE, dense_s, sparse_s, f"dense faster: sparse takes {sparse_s / dense_s:.1f}x the time {spent}")


class BackendSelector:
    """Chooses dense or a sparse backend per layer shape and density, by measuring once and remembering.

    Densities are rounded up by `bucket_of`. What was measured also answers other densities of the same
    layer: where sparse won, it wins at any lower density; where dense won, it wins at any higher one.

    Args:
        forced: None to measure; ``"dense"`` or a backend's name to use that everywhere. A forced backend that
            does not support a layer raises, and is never replaced.
        measure: Timer of a case: seconds of each named implementation.
        kept: Timings of earlier runs on this machine, to use and to add to; None: neither.

    Raises:
        ValueError: ``forced`` is no known name.

    Example:
        >>> import torch
        >>> case = Case(64, 32, 32, block_size=16, density=0.5, dtype=torch.float32, device=torch.device("cpu"))
        >>> BackendSelector(forced="dense").choose(case).backend
        'dense'
    """

    def __init__(
        self,
        forced: str | None = None,
        *,
        measure: Callable[[Case | ConvCase, Sequence[str]], Mapping[str, float]] = measure_case,
        kept: TimingCache | None = None,
    ) -> None:
        if forced is not None and forced != DENSE and forced not in backends():
            known = ", ".join((DENSE, *backends()))
            raise ValueError(f"unknown backend {forced!r}, expected one of: {known}")
        self._forced = forced
        self._measure = measure
        self._kept = kept
        self._layers: dict[str, dict[str, Any]] = {}  # key -> layer
        self._choices: dict[str, dict[int, Choice]] = {}  # key -> bucket -> choice

    def choose(self, case: Case | ConvCase) -> Choice:
        """The choice for one layer at one density; measured if nothing measured before answers it.

        Raises:
            ValueError: A forced (or restored) backend does not run this layer.
        """
        bucket = bucket_of(case.density)
        case = replace(case, density=bucket / BUCKETS)
        if self._forced is not None:
            return self._forced_choice(case)
        if case.block_size == 1:
            return Choice(DENSE, None, None, "single-weight masks have no sparse operator")
        layer = layer_of(case)
        key = layer_key(layer)
        if key not in self._choices:
            self._layers[key], self._choices[key] = layer, self._measured_earlier(case)
        known = self._choices[key]
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
                {**self._layers[key], "bucket": bucket, **asdict(choice)}
                for key, known in self._choices.items()
                for bucket, choice in known.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`: what was chosen is chosen again, without measuring.

        Raises:
            ValueError: ``state`` is not what :meth:`state_dict` returns.
        """
        layers: dict[str, dict[str, Any]] = {}
        choices: dict[str, dict[int, Choice]] = {}
        try:
            for row in state["choices"]:
                chosen = {name: row[name] for name in _CHOICE}
                layer = {name: value for name, value in row.items() if name not in (*_CHOICE, "bucket")}
                if not is_layer(layer):
                    raise KeyError("the layer's fields")
                key = layer_key(layer)
                layers[key] = layer
                choices.setdefault(key, {})[row["bucket"]] = Choice(**chosen)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"expected a state from BackendSelector.state_dict(), got {state!r:.200}") from error
        self._layers, self._choices = layers, choices

    def _forced_choice(self, case: Case | ConvCase) -> Choice:
        assert self._forced is not None
        if self._forced != DENSE and (reason := case.refusal(self._forced)) is not None:
            raise ValueError(
                f"backend {self._forced!r} was forced, but cannot run this layer: it {reason}; exclude the layer, "
                'or use backend="auto"'
            )
        return Choice(self._forced, None, None, "forced")

    def _measured_earlier(self, case: Case | ConvCase) -> dict[int, Choice]:
        """Choices for a layer by what is kept of it, at any density; of the same backends that would be tried now."""
        if self._kept is None:
            return {}
        names = {DENSE, *_able(refusals(case))}
        return {
            round(row.density * BUCKETS): choice_of(row.seconds, row.when)
            for row in self._kept.of(case)
            if row.seconds.keys() == names
        }

    def _measured(self, case: Case | ConvCase) -> Choice:
        reasons_against = refusals(case)
        names = _able(reasons_against)
        if not names:
            reasons = "; ".join(f"{name} {reason}" for name, reason in reasons_against.items())
            return Choice(DENSE, None, None, f"no sparse backend: {reasons}")
        seconds = self._measure(case, [DENSE, *names])
        if self._kept is not None:
            self._kept.add(case, seconds)
        return choice_of(seconds)


_CHOICE = tuple(field.name for field in fields(Choice))


def _able(reasons_against: Mapping[str, str | None]) -> list[str]:
    return [name for name, reason in reasons_against.items() if reason is None]


def _inferred(known: Mapping[int, Choice], bucket: int) -> Choice | None:
    """Return the choice that measurements of the layer at other densities imply at this one, or None."""
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
