"""EST-DGM's schedule, for any valid settings and runs: pure functions of the step, and what they refuse."""

import itertools
import pickle
import re

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from lightning_estdgm.method._schedules import WARMUP, EstDgm, Phase, Schedule, ScheduleConfig

PHASES = ("exploration", "consolidation", "refinement")
density = st.floats(0.01, 1.0)


@st.composite
def runs(draw):
    """Any valid settings, laid over any run that is long enough for them."""
    ranges = [sorted(draw(st.tuples(density, density)), reverse=True) for _ in PHASES]
    weights = draw(st.tuples(*[st.integers(1, 9)] * 3))
    in_steps = draw(st.booleans())
    cycles = draw(st.integers(1, 4))
    warmup = draw(st.integers(0, 30) | (st.just(0) if in_steps else st.floats(0.0, 0.5)))
    every = draw(st.none() | st.integers(1, 40))
    observe = draw(st.none() | st.integers(1, every or 40))
    if in_steps:
        lengths = [weight * draw(st.integers(1, 8)) for weight in weights]
        total = warmup + cycles * sum(lengths)
    else:
        lengths = [weight / sum(weights) for weight in weights]
        total = draw(st.integers(1, 300))
    config = EstDgm(
        *(Phase(start, end, length) for (start, end), length in zip(ranges, lengths, strict=True)),
        cycles=cycles,
        peak_decay=draw(st.floats(0.1, 1.0)),
        warmup=warmup,
        update_every=every,
        observe_steps=observe,
        freeze=draw(st.floats(0.0, 0.99)),
    )
    try:
        schedule = config.resolve(total)
    except ValueError as error:
        if "too short" not in str(error):
            raise
        reject()
    return config, schedule


def plans(schedule: Schedule):
    return [schedule(step) for step in range(schedule.total_steps)]


@given(runs())
def test_segments_cover_the_run_in_order_without_gaps(run):
    config, schedule = run
    segments = schedule.segments
    assert segments[0].first == 0
    assert segments[-1].last == schedule.total_steps
    assert all(a.last == b.first for a, b in itertools.pairwise(segments))
    assert all(s.first < s.last for s in segments)
    cycled = [s for s in segments if s.phase != WARMUP]
    assert [(s.phase, s.cycle) for s in cycled] == [(p, c) for c in range(config.cycles) for p in PHASES]
    assert len(segments) - len(cycled) <= 1
    assert segments[-1].phase == "refinement"
    for segment in segments:
        held = {(schedule(step).phase, schedule(step).cycle) for step in range(segment.first, segment.last)}
        assert held == {(segment.phase, segment.cycle)}


@given(runs())
def test_density_never_rises_inside_a_phase_and_stays_in_its_range(run):
    config, schedule = run
    for segment in schedule.segments:
        held = [schedule(step).density for step in range(segment.first, segment.last)]
        assert all(a >= b for a, b in itertools.pairwise(held))
        if segment.phase == WARMUP:
            assert set(held) == {1.0}
        else:
            phase = getattr(config, segment.phase)
            lowest = min(phase.end, config.consolidation.start) if segment.phase == "exploration" else phase.end
            assert lowest <= held[-1] <= held[0] <= phase.start


@given(runs())
def test_the_run_ends_at_the_final_density_exactly(run):
    config, schedule = run
    assert schedule(schedule.total_steps - 1).density == config.refinement.end
    assert schedule(10 * schedule.total_steps) == schedule(schedule.total_steps - 1)


@given(runs())
def test_the_first_density_is_known_without_a_length(run):
    config, schedule = run
    if not 0.0 < config.warmup < 1.0:  # a share may be less than half a step
        assert config.first_density == schedule(0).density


@given(runs())
def test_the_last_mask_is_frozen(run):
    config, schedule = run
    last = schedule.segments[-1]
    frozen = round(config.freeze * (last.last - last.first))
    stretch = range(last.last - frozen + 1, last.last)
    assert not any(schedule(step).update or schedule(step).observe for step in stretch)
    if frozen:
        assert {schedule(step).density for step in stretch} <= {schedule(schedule.total_steps - 1).density}


@given(runs())
def test_observation_ends_exactly_at_an_update_and_is_no_longer_than_asked(run):
    config, schedule = run
    every = config.update_every or max(1, min(200, schedule.total_steps // 25))
    longest = config.observe_steps or max(1, min(8, every // 5))
    observed = 0
    for step, plan in enumerate(plans(schedule)):
        if plan.update:
            assert observed >= 1, f"the update at {step} has nothing to go by"
            observed = 0
        assert plan.observe or not observed, f"the window before {step} ends without an update"
        observed += plan.observe
        assert observed <= longest
    assert not observed


@given(runs())
def test_density_changes_only_with_an_update(run):
    _, schedule = run
    held = plans(schedule)
    assert not held[0].update
    assert all(b.update for a, b in itertools.pairwise(held) if a.density != b.density)


@given(runs())
def test_updates_are_about_update_every_apart(run):
    config, schedule = run
    every = config.update_every or max(1, min(200, schedule.total_steps // 25))
    for segment in schedule.segments:
        steps = [step for step in range(segment.first, segment.last) if schedule(step).update]
        # A whole number of gaps has to fill a phase, or its unfrozen part: each gap is at most 1.5 times what was
        # asked and, where at least one gap fits, at least 2/3 of it. Rounding to steps takes or adds one.
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert all(gap <= 1.5 * every + 1 for gap in gaps)
        if steps and steps[-1] - segment.first >= every:
            assert all(gap >= every / 1.5 - 1 for gap in gaps)


@given(runs())
def test_a_schedule_is_deterministic_and_its_settings_survive_pickling(run):
    config, schedule = run
    again = pickle.loads(pickle.dumps(config)).resolve(schedule.total_steps)
    assert plans(again) == plans(schedule)
    assert again == schedule
    assert isinstance(config, ScheduleConfig)
    assert isinstance(schedule, Schedule)


@given(runs())
def test_drop_progress_goes_from_zero_to_one_at_the_last_update(run):
    _, schedule = run
    progress = [schedule.drop_progress(step) for step in range(schedule.total_steps)]
    updates = [step for step, plan in enumerate(plans(schedule)) if plan.update]
    assert all(0.0 <= a <= b <= 1.0 for a, b in itertools.pairwise(progress))
    if updates:
        assert progress[0] == 0.0
        assert progress[updates[-1]] == 1.0
        assert all(progress[step] < 1.0 for step in range(updates[-1]))


@given(peak_decay=st.floats(0.3, 0.95), cycles=st.integers(2, 5))
def test_later_cycles_explore_less_but_never_below_consolidation(peak_decay, cycles):
    config = EstDgm(cycles=cycles, peak_decay=peak_decay)
    schedule = config.resolve(600 * cycles)
    peaks = [schedule(s.first).density for s in schedule.segments if s.phase == "exploration"]
    assert peaks[0] == 0.70
    assert peaks == [max(0.70 * peak_decay**c, 0.30) for c in range(cycles)]
    assert all(a > b or a == b == 0.30 for a, b in itertools.pairwise(peaks))
    others = [[schedule(s.first).density for s in schedule.segments if s.phase == p] for p in PHASES[1:]]
    assert [set(x) for x in others] == [{0.30}, {0.15}]


@given(parts=st.tuples(*[st.integers(1, 60)] * 3), cycles=st.integers(1, 3), warmup=st.integers(0, 40))
def test_lengths_in_steps_and_in_shares_mean_the_same(parts, cycles, warmup):
    ranges = ((0.7, 0.6), (0.3, 0.2), (0.15, 0.1))
    by_steps = EstDgm(*(Phase(*r, n) for r, n in zip(ranges, parts, strict=True)), cycles=cycles, warmup=warmup)
    shares = [n / sum(parts) for n in parts]
    by_shares = EstDgm(*(Phase(*r, n) for r, n in zip(ranges, shares, strict=True)), cycles=cycles, warmup=warmup)
    total = warmup + cycles * sum(parts)
    assert plans(by_steps.resolve(total)) == plans(by_shares.resolve(total))


@pytest.mark.parametrize("total", [50, 100, 1000, 1500, 20_000])
def test_the_defaults_train_on_about_a_quarter_of_the_weights(total):
    densities = [plan.density for plan in plans(EstDgm().resolve(total))]
    assert sum(densities) / total == pytest.approx(0.25, abs=0.015)


@given(density=st.floats(0.01, 1.0), cycles=st.integers(1, 3))
def test_low_density_phases_cost_hardly_more_than_a_constant_density(density, cycles):
    schedule = EstDgm.low_density(density, cycles=cycles).resolve(3000)
    held = plans(schedule)
    assert [s.phase for s in schedule.segments] == [*PHASES] * cycles
    assert held[-1].density == density
    assert all(density <= plan.density <= min(1.0, 1.5 * density) + 1e-9 for plan in held)
    assert sum(plan.density for plan in held) / len(held) <= 1.05 * density


@given(density=st.floats(0.01, 1.0), cycles=st.integers(1, 3))
def test_sparse_to_denser_phases_cost_four_fifths_of_a_constant_density(density, cycles):
    schedule = EstDgm.sparse_to_denser(density, cycles=cycles).resolve(3000)
    held = [plan.density for plan in plans(schedule)]
    assert [s.phase for s in schedule.segments] == [*PHASES] * cycles
    assert {round(x / density, 6) for x in held} == {0.5, 1.0}
    assert held[0] < held[-1] == density
    assert sum(held) / len(held) == pytest.approx(0.8 * density, rel=0.01)


@pytest.mark.parametrize("phases", [EstDgm.low_density, EstDgm.sparse_to_denser])
@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_low_density_and_sparse_to_denser_phases_refuse_a_density_that_is_none(phases, density):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        phases(density)


def test_the_defaults_are_the_designs():
    schedule = EstDgm().resolve(10_000)
    assert [(s.phase, s.first, s.last) for s in schedule.segments] == [
        ("exploration", 0, 1500),
        ("consolidation", 1500, 5000),
        ("refinement", 5000, 10_000),
    ]
    held = plans(schedule)
    assert [held[step].density for step in (0, 1499, 1500, 4999, 5000, 9999)] == pytest.approx(
        [0.70, 0.60, 0.30, 0.20, 0.15, 0.10]
    )
    updates = [step for step, plan in enumerate(held) if plan.update]
    assert max(updates) == 8750
    assert all(150 <= b - a <= 250 for a, b in itertools.pairwise(updates))
    assert all(sum(p.observe for p in held[a:b]) == 8 for a, b in itertools.pairwise([0, *updates]))


def test_short_runs_update_and_observe_less():
    schedule = EstDgm().resolve(500)
    updates = [step for step, plan in enumerate(plans(schedule)) if plan.update]
    assert all(15 <= b - a <= 25 for a, b in itertools.pairwise(updates))
    assert sum(plan.observe for plan in plans(schedule)) == 2 * len(updates)


def test_warmup_is_dense_and_comes_first():
    for warmup in (100, 0.1):
        schedule = EstDgm(warmup=warmup).resolve(1000)
        assert {(p.phase, p.density) for p in plans(schedule)[:100]} == {(WARMUP, 1.0)}
        assert (schedule(100).phase, schedule(100).density, schedule(100).update) == ("exploration", 0.7, True)
        assert schedule(99).observe


def test_to_dict_is_plain():
    settings = EstDgm(cycles=2).to_dict()
    assert settings["cycles"] == 2
    assert settings["refinement"] == {"start": 0.15, "end": 0.10, "length": 0.50}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Phase(0.0, 0.0, 0.5), "density must lie in (0, 1], got start=0.0"),
        (lambda: Phase(1.1, 0.5, 0.5), "density must lie in (0, 1], got start=1.1"),
        (lambda: Phase(0.5, -0.1, 0.5), "density must lie in (0, 1], got end=-0.1"),
        (lambda: Phase(float("nan"), 0.1, 0.5), "density must lie in (0, 1], got start=nan"),
        (lambda: Phase(0.2, 0.3, 0.5), "density must not rise inside a phase, got start=0.2 and end=0.3"),
        (lambda: Phase(0.2, 0.1, 0.0), "a phase length given as a share must lie in (0, 1], got 0.0"),
        (lambda: Phase(0.2, 0.1, 1.5), "a phase length given as a share must lie in (0, 1], got 1.5"),
        (lambda: Phase(0.2, 0.1, 0), "a phase length given in steps must be at least 1, got 0"),
        (lambda: EstDgm(exploration=Phase(0.7, 0.6, 0.5)), "phases must cover the run: shares must add up to 1"),
        (lambda: EstDgm(exploration=Phase(0.7, 0.6, 15)), "phase lengths must be all shares (float) or all steps"),
        (lambda: EstDgm(cycles=0), "cycles must be at least 1, got 0"),
        (lambda: EstDgm(peak_decay=0.0), "peak_decay must lie in (0, 1], got 0.0"),
        (lambda: EstDgm(peak_decay=1.2), "peak_decay must lie in (0, 1], got 1.2"),
        (lambda: EstDgm(warmup=-1), "warmup must be at least 0, got -1"),
        (lambda: EstDgm(warmup=1.0), "warmup given as a share must lie in [0, 1), got 1.0"),
        (lambda: EstDgm(update_every=0), "update_every must be at least 1, got 0"),
        (lambda: EstDgm(observe_steps=0), "observe_steps must be at least 1, got 0"),
        (lambda: EstDgm(update_every=4, observe_steps=5), "observe_steps must not exceed update_every, got 5 and 4"),
        (lambda: EstDgm(freeze=1.0), "freeze must lie in [0, 1), got 1.0"),
        (lambda: EstDgm(freeze=-0.1), "freeze must lie in [0, 1), got -0.1"),
        (lambda: EstDgm().resolve(0), "total_steps must be at least 1, got 0"),
        (lambda: EstDgm(warmup=float("nan")), "warmup given as a share must lie in [0, 1), got nan"),
        (lambda: EstDgm().resolve(2), "would have no step: train longer, take fewer cycles or warm-up steps"),
        (lambda: EstDgm(warmup=100).resolve(100), "a run of 100 steps is too short for 1 cycle(s)"),
        (lambda: EstDgm().resolve(100)(-1), "step must not be negative, got -1"),
    ],
)
def test_bad_settings_are_refused_with_what_was_got(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EstDgm(exploration=(0.7, 0.6, 0.15)), "exploration must be a Phase(start, end, length), got (0.7"),
        (lambda: EstDgm(cycles=1.5), "cycles must be an int, got 1.5"),
        (lambda: EstDgm(cycles=True), "cycles must be an int, got True"),
        (lambda: EstDgm(warmup=True), "warmup must be an int, got True"),
        (lambda: EstDgm(update_every=2.5), "update_every must be an int, got 2.5"),
        (lambda: EstDgm(observe_steps=True), "observe_steps must be an int, got True"),
        (lambda: EstDgm().resolve(10.0), "total_steps must be an int, got 10.0"),
    ],
)
def test_settings_of_the_wrong_type_are_refused_with_what_was_got(make, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("length", ["0.5", None, True])
def test_a_length_is_a_number(length):
    with pytest.raises(TypeError, match="length must be a share"):
        Phase(0.2, 0.1, length)


@pytest.mark.parametrize("total", [99, 101, 205])
def test_phases_in_steps_must_cover_the_run(total):
    config = EstDgm(Phase(0.7, 0.6, 15), Phase(0.3, 0.2, 35), Phase(0.15, 0.1, 50))
    config.resolve(100)
    with pytest.raises(
        ValueError,
        match=f"phases must cover the run: .* make 100 steps, but the run has {total}; lengths given as shares",
    ):
        config.resolve(total)
