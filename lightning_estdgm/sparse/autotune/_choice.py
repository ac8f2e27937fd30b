"""The never-slower rule: a layer uses a sparse backend only where it was measured faster than dense."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from lightning_estdgm.sparse._buckets import BUCKETS, bucket_of
from lightning_estdgm.sparse.autotune._cases import (
    DENSE,
    Case,
    ConvCase,
    bucketed,
    count_of,
    is_layer,
    layer_key,
    layer_of,
    measured_case,
    refusals,
)
from lightning_estdgm.sparse.autotune._report import TimingReport, plan_words
from lightning_estdgm.sparse.autotune._timing import CALM, MARGIN, Timing, load_per_core, measure_case
from lightning_estdgm.sparse.autotune._timing_cache import TimingCache
from lightning_estdgm.sparse.backends._protocol import backends, get_backend


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


def choice_of(found: Timing | Mapping[str, float], when: str = "") -> Choice:
    """Return the choice by the rule: the fastest sparse backend, if it takes at least 5 % less time than dense.

    What the turns leave in doubt goes to the one that is named first: dense before sparse, and sparse backends by name.
    So noise does not choose, and another run on the same machine chooses the same.

    Args:
        found: Turns of forward and backward, for ``"dense"`` first and at least one backend; or the seconds of each.
        when: Date of a timing that was kept, ISO 8601; empty for one made now.
    """
    timing = Timing.of(found)
    timing = replace(timing, turns={DENSE: timing.turns[DENSE], **timing.turns})  # what others are compared with
    seconds = timing.seconds
    best = fastest = timing.others[0]
    winners = [name for name in timing.turns if name != DENSE and timing.wins(name)]
    for name in winners:
        if name == winners[0] or timing.wins(name, best):
            best = name
    dense_s, sparse_s = seconds[DENSE], seconds[best]
    spent = f"({sparse_s * 1e3:.3g} against {dense_s * 1e3:.3g} ms)"
    if when:
        spent += f", measured on {when.partition('T')[0]}" + " while the machine was busy" * timing.busy
    if winners:
        return Choice(best, dense_s, sparse_s, f"sparse {dense_s / sparse_s:.1f}x faster {spent}")
    low, high = timing.middle(fastest)
    if low <= 1.0 - MARGIN:
        between = f"sparse takes {low:.2f} to {high:.2f}x the time"
        return Choice(DENSE, dense_s, sparse_s, f"dense: the rounds disagree, {between} {spent}")
    if sparse_s < dense_s:
        return Choice(DENSE, dense_s, sparse_s, f"dense: sparse is less than {MARGIN:.0%} faster {spent}")
    return Choice(DENSE, dense_s, sparse_s, f"dense faster: sparse takes {sparse_s / dense_s:.1f}x the time {spent}")


class BackendSelector:
    """Chooses dense or a sparse backend per layer shape and density, by measuring once and remembering.

    Densities are rounded up by `bucket_of`, numbers of tokens or images to the nearest power of two by `count_bucket`.
    What was measured also answers other densities of the same layer: where sparse won, it wins at any lower density;
    where dense won, it wins at any higher one.

    Args:
        forced: None to measure; ``"dense"`` or a backend's name to use that everywhere. A forced backend that
            does not support a layer raises, and is never replaced.
        measure: Timer of a case: turns, or just seconds, of each named implementation.
        kept: Timings of earlier runs on this machine, to use and to add to; None: neither.
        load: Load average for each core now. What was measured on a busy machine is measured again on a calm one.

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
        measure: Callable[[Case | ConvCase, Sequence[str]], Timing | Mapping[str, float]] = measure_case,
        kept: TimingCache | None = None,
        load: Callable[[], float | None] = load_per_core,
    ) -> None:
        if forced is not None and forced != DENSE and forced not in backends():
            known = ", ".join((DENSE, *backends()))
            raise ValueError(f"unknown backend {forced!r}, expected one of: {known}")
        self._forced = forced
        self._measure = measure
        self._kept = kept
        self._load = load
        self._report = TimingReport()
        self._layers: dict[str, dict[str, Any]] = {}  # key -> layer
        self._choices: dict[str, dict[int, Choice]] = {}  # key -> bucket -> choice

    def choose(self, case: Case | ConvCase) -> Choice:
        """The choice for one layer at one density; measured if nothing measured before answers it.

        Raises:
            ValueError: A forced (or restored) backend does not run this layer.
        """
        if self._forced is not None:
            return _remarked(self._forced_choice(measured_case(case)))
        asked, case = case, measured_case(case)
        known, bucket = self._known(case), bucket_of(case.density)
        if bucket not in known:
            known[bucket] = _inferred(known, bucket) or self._measured(case)
        choice = known[bucket]
        (count, _), (timed, noun) = count_of(asked), count_of(case)
        if choice.dense_s is not None and count != timed:
            choice = replace(choice, why=f"{choice.why}, timed with {timed} {noun} for {count}")
        return _remarked(choice)

    def timed(self, case: Case | ConvCase) -> Choice:
        """The choice for one layer at one density, with the seconds of dense and sparse; measured if none are known.

        Raises:
            ValueError: No sparse backend runs this layer.
        """
        case = measured_case(case)
        known, bucket = self._known(case), bucket_of(case.density)
        if bucket not in known or known[bucket].dense_s is None:
            known[bucket] = self._measured(case)
        if known[bucket].dense_s is None:
            raise ValueError(known[bucket].why)
        return known[bucket]

    def answers(self, case: Case | ConvCase) -> bool:
        """Whether `choose` knows its answer by what was chosen so far: no measurement, and nothing read from disk."""
        case = measured_case(case)
        known, bucket = self._choices.get(layer_key(layer_of(case)), {}), bucket_of(case.density)
        return self._forced is not None or bucket in known or bool(_inferred(known, bucket))

    def plan(self, cases: Iterable[Case | ConvCase]) -> str:
        """Return in words what `choose` is going to measure for these cases, and about how long; empty if nothing."""
        pending: dict[tuple[str, int], tuple[Case | ConvCase, int]] = {}
        for case in map(measured_case, cases):
            bucket = bucket_of(case.density)
            key = layer_key(layer_of(case)), bucket
            if key in pending or self.answers(case) or bucket in (known := self._known(case)):
                continue
            if not _inferred(known, bucket) and (names := _able(refusals(case))):
                pending[key] = case, 1 + len(names)
        return plan_words(list(pending.values())) if pending else ""

    def report(self) -> str:
        """Return in words what was measured since the last report, and how long it took; empty if nothing."""
        report, self._report = self._report, TimingReport()
        return report.words()

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
                layer = bucketed({name: value for name, value in row.items() if name not in (*_CHOICE, "bucket")})
                if not is_layer(layer):
                    raise KeyError("the layer's fields")
                key = layer_key(layer)
                layers[key] = layer
                choices.setdefault(key, {}).setdefault(row["bucket"], Choice(**chosen))
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

    def _known(self, case: Case | ConvCase) -> dict[int, Choice]:
        """Choices for a layer by bucket of density: so far, and before any those by what is kept of it."""
        layer = layer_of(case)
        key = layer_key(layer)
        if key not in self._choices:
            self._layers[key], self._choices[key] = layer, self._measured_earlier(case)
        return self._choices[key]

    def _measured_earlier(self, case: Case | ConvCase) -> dict[int, Choice]:
        """Choices for a layer by what is kept of it, at any density; of the same backends that would be tried now."""
        if self._kept is None:
            return {}
        names, load = {DENSE, *_able(refusals(case))}, self._load()
        calm = load is not None and load < CALM
        return {
            round(row.density * BUCKETS): choice_of(row.timing, row.when)
            for row in self._kept.of(case)
            if row.timing.turns.keys() == names and not (row.timing.busy and calm)
        }

    def _measured(self, case: Case | ConvCase) -> Choice:
        reasons_against = refusals(case)
        names = _able(reasons_against)
        if not names:
            reasons = "; ".join(f"{name} {reason}" for name, reason in reasons_against.items())
            return Choice(DENSE, None, None, f"no sparse backend: {reasons}")
        start = time.perf_counter()
        timing = Timing.of(self._measure(case, [DENSE, *names]))
        self._report.timings.append(timing)
        self._report.seconds += time.perf_counter() - start
        if self._kept is not None:
            self._kept.add(case, timing)
        return choice_of(timing)


_CHOICE = tuple(field.name for field in fields(Choice))


def _remarked(choice: Choice) -> Choice:
    """The choice with what its backend has to say of itself.

    Raises:
        ValueError: A restored choice names a backend that is not installed here.
    """
    remark = None if choice.backend == DENSE else getattr(get_backend(choice.backend), "remark", None)
    return choice if remark is None else replace(choice, why=f"{choice.why}; {remark}")


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
