"""Findings of a report in sentences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from lightning_estdgm.tools._stats import DASH
from lightning_estdgm.tools.report._cells import as_fast_text, joules_text, seconds_text, share_text
from lightning_estdgm.tools.report._comparison import Comparison
from lightning_estdgm.tools.report._contrast import Contrast
from lightning_estdgm.tools.report._parts import Headline
from lightning_estdgm.tools.report._results import Arm
from lightning_estdgm.tools.report._words import Units


def headlines_of(comparison: Comparison, units: Units) -> Iterable[Headline]:
    """A headline for each arm but the baseline; for the baseline alone, one on what it used."""
    base = comparison.arms[0]
    if not comparison.contrasts:
        used = joules_text([run.joules for run in base.runs], units.energy, base.kind)
        text = f"{base.name} used {used} in {seconds_text([run.seconds for run in base.runs], units.time)}."
        if used == DASH:
            text = (
                f"{base.name} took {seconds_text([run.seconds for run in base.runs], units.time)}; no joules are known."
            )
        yield Headline("single", text, (f"{_plural(len(base.runs), 'run')}; nothing to compare with.",))
    for arm, contrast in zip(comparison.arms[1:], comparison.contrasts, strict=True):
        yield _headline(comparison, base, arm, contrast, units)


def _headline(comparison: Comparison, base: Arm, arm: Arm, contrast: Contrast, units: Units) -> Headline:
    saving = contrast.at_target
    if saving is None or saving.share["mean"] is None:
        return Headline("not comparable", f"Not comparable: {arm.name} and {base.name}.", contrast.reasons)
    mean, std = saving.share["mean"], saving.share["std"]
    energy = "energy" if arm.kind == "measured" else f"energy ({arm.kind})"
    much = f"{share_text(saving.share)} {'less' if mean >= 0 else 'more'} {energy} than"
    tone: Literal["saved", "cost more", "no difference"] = "saved" if mean > 0 else "cost more"
    if round(mean, 3) == 0:
        tone, much = "no difference", f"as much {energy} as"
    text = f"{arm.name} reached {comparison.target} with {much} {base.name}."
    reached = {each.name: [run.reached for run in each.runs if run.reached] for each in (arm, base)}
    joules, seconds = (
        [joules_text([p.joules for p in reached[each.name]], units.energy, each.kind) for each in (arm, base)],
        [seconds_text([p.seconds for p in reached[each.name]], units.time) for each in (arm, base)],
    )
    single = len(arm.runs) == 1 or len(base.runs) == 1
    counts = f"{_plural(len(arm.runs), 'run')} of {arm.name}, {len(base.runs)} of {base.name}"
    details = [
        f"{joules[0]} against {joules[1]}; {seconds[0]} against {seconds[1]}, {as_fast_text(saving)}.",
        f"{counts}; {'a single run has no spread' if single else '± is the standard deviation over the runs'}.",
    ]
    if std is not None and abs(mean) < std:
        tone = "no difference"
        details.append("The difference is smaller than its spread over the runs: it may be chance.")
    return Headline(tone, text, tuple(details))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
