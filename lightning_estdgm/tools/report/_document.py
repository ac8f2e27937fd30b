"""A comparison in words and tables, before any markup: what HTML and Markdown both show."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lightning_estdgm.tools.report._answer_tables import budget_table, target_table
from lightning_estdgm.tools.report._comparison import Comparison
from lightning_estdgm.tools.report._headlines import headlines_of
from lightning_estdgm.tools.report._parts import Headline, ReportTable
from lightning_estdgm.tools.report._provenance_tables import method_table, runs_table, sensor_table, settings_table
from lightning_estdgm.tools.report._result_tables import derived_table, phase_table, whole_table
from lightning_estdgm.tools.report._words import Units


@dataclass(frozen=True)
class Document:
    """A whole report but for its plots.

    Attributes:
        title: Title of the page.
        label: Origin of the joules.
        headlines: Findings in sentences.
        warnings: Sentences on what makes the comparison unfair or weak.
        answers: Tables that the headlines rest on.
        results: Tables of what else was found.
        provenance: Tables of what ran, and how it was measured.
        notes: Sentences on how the numbers were formed.
    """

    title: str
    label: str
    headlines: tuple[Headline, ...]
    warnings: tuple[str, ...]
    answers: tuple[ReportTable, ...]
    results: tuple[ReportTable, ...]
    provenance: tuple[ReportTable, ...]
    notes: tuple[str, ...]


def document(comparison: Comparison) -> Document:
    """Put a comparison into words."""
    units = comparison.units

    def tables(*makers: Callable[[Comparison, Units], ReportTable | None]) -> tuple[ReportTable, ...]:
        return tuple(table for make in makers if (table := make(comparison, units)) is not None)

    models = {str(run.run["model"].get("class")) for runs in comparison.members.values() for run in runs}
    return Document(
        title=f"Energy of training {', '.join(sorted(models))}",
        label=_kinds_text(comparison),
        headlines=tuple(headlines_of(comparison, units)),
        warnings=comparison.warnings,
        answers=tables(target_table, budget_table),
        results=tables(whole_table, phase_table, derived_table),
        provenance=tables(runs_table, method_table, settings_table, sensor_table),
        notes=tuple(_notes(comparison)),
    )


def _kinds_text(comparison: Comparison) -> str:
    kinds = {arm.kind for arm in comparison.arms}
    if kinds == {"measured"}:
        return "measured"
    if kinds == {"unknown"}:
        return "no joules: no energy source"
    if kinds == {"estimated"}:
        return "ESTIMATED, not measured"
    return "; ".join(f"{arm.name}: {arm.kind}" for arm in comparison.arms)


def _notes(comparison: Comparison) -> Iterable[str]:
    yield (
        "Joules are gross, over the devices named under “How it was measured”, from the start of fit to its end. "
        "Sensors on board are not a meter at the plug: power supplies, fans, discs and network are not in it."
    )
    if any("estimated" in arm.kind for arm in comparison.arms):
        yield (
            "Estimated joules were not measured. They are busy time times an assumed power, so between runs on one "
            "machine their ratio is the ratio of busy times, and no more."
        )
    if comparison.target:
        yield (
            f"The target is {comparison.target} ({comparison.target.rule}). A run reaches it at the first logged value "
            "that meets it. Joules and seconds at that step are read from the log, linearly between two entries and "
            "never beyond them; the validation that gave the value is not in them, earlier ones are."
        )
    else:
        yield f"There is no target: {comparison.no_target}. Without one no saving can be stated."
    if any(len(arm.runs) > 1 for arm in comparison.arms):
        yield (
            "± is the sample standard deviation over the runs of an arm. Savings and speed-ups are formed per pair of "
            "equal seeds where both arms have the same seeds, else once from the means, without a deviation."
        )
