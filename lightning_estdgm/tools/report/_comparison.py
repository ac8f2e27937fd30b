"""All that a report says of finished runs, as numbers: pure functions of what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_estdgm.tools.report._added_fits import added_fits_of
from lightning_estdgm.tools.report._arms import check_runs, group, short_names
from lightning_estdgm.tools.report._contrast import Contrast, contrast_arms
from lightning_estdgm.tools.report._fairness import settings_of, warnings_of
from lightning_estdgm.tools.report._finished_run import FinishedRun
from lightning_estdgm.tools.report._overlap import overlaps_of
from lightning_estdgm.tools.report._results import Arm, coarse_warnings, result_of, shared_kind
from lightning_estdgm.tools.report._target import Mode, Target, choose_target
from lightning_estdgm.tools.report._words import Units


@dataclass(frozen=True)
class Comparison:
    """All that a report says.

    Attributes:
        baseline: Name of the arm that the others are compared with.
        arms: Results of the arms, the baseline first.
        members: Runs of each arm, in the same order.
        target: Value to be reached; None where no metric was named and none could be guessed.
        no_target: Reason why there is no target; empty if there is one.
        budget_steps: Steps that all runs came to; None where a run logged no joules.
        contrasts: Contrast of each arm but the baseline.
        warnings: Sentences on what makes the comparison unfair or weak.
        settings: Values of each setting by arm; several values of one arm are all there.
        differing: Names of the settings that are not the same in all runs.
    """

    baseline: str
    arms: tuple[Arm, ...]
    members: Mapping[str, tuple[FinishedRun, ...]]
    target: Target | None
    no_target: str
    budget_steps: int | None
    contrasts: tuple[Contrast, ...]
    warnings: tuple[str, ...]
    settings: Mapping[str, Mapping[str, tuple[str, ...]]]
    differing: frozenset[str]

    @property
    def columns(self) -> tuple[str, ...]:
        """Heads of a table with a column for each arm."""
        return ("", *(arm.name for arm in self.arms))

    @property
    def units(self) -> Units:
        """Units that fit the largest of the runs."""
        runs = [run for arm in self.arms for run in arm.runs]
        return Units.of(max(run.joules or 0.0 for run in runs), max(run.seconds for run in runs))


def compare(
    runs: Sequence[FinishedRun], metric: str | None = None, target: float | None = None, mode: Mode | None = None
) -> Comparison:
    """Compare runs of one model, grouped into arms.

    Runs with one label are one arm; runs without are grouped by method and configuration. The baseline is the arm
    that uses no method, if there is exactly one, else the first.

    Args:
        runs: Runs, at least one.
        metric: Tag of the metric that has to reach a target; None takes the one that is named like a validation loss.
        target: Value to be reached; None takes the worst of the baseline runs' best values, so that each of them
            reaches it.
        mode: Direction in which the metric gets better; None tells it by the metric's name.

    Raises:
        ValueError: There is no run, or one run twice, or there are runs of different models; not all runs have the
            metric; its name does not tell the mode.
    """
    check_runs(runs)
    names = short_names(runs)
    arms = group(runs)
    plain = [name for name, members in arms.items() if all(run.method is None for run in members)]
    baseline = plain[0] if len(plain) == 1 else next(iter(arms))
    arms = {baseline: arms[baseline], **arms}
    goal, no_target = choose_target(runs, arms[baseline], metric, target, mode)
    ends = [run.joules.steps[-1] for run in runs if len(run.joules.steps)]
    budget = int(min(ends)) if len(ends) == len(runs) else None
    results = tuple(
        Arm(name, shared_kind(members), tuple(result_of(run, names[run.path], goal, budget) for run in members))
        for name, members in arms.items()
    )
    settings = settings_of(arms)
    differing = frozenset(
        name for name, by_arm in settings.items() if len({value for values in by_arm.values() for value in values}) > 1
    )
    overlaps = overlaps_of(runs)
    by_run = {run.path: [overlap.sentence(names) for overlap in overlaps if run.path in overlap.runs] for run in runs}
    added = {each.run: each.sentence(names) for each in added_fits_of(runs)}
    return Comparison(
        baseline=baseline,
        arms=results,
        members={name: tuple(members) for name, members in arms.items()},
        target=goal,
        no_target=no_target,
        budget_steps=budget,
        contrasts=tuple(
            contrast_arms(results[0], arm, arms, goal, no_target, budget, by_run, added) for arm in results[1:]
        ),
        warnings=(
            *added.values(),
            *warnings_of(arms, names, settings, differing, overlaps),
            *coarse_warnings(results, goal),
        ),
        settings=settings,
        differing=differing,
    )
