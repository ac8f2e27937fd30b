"""What a run says of the layers that it times: before, after, and where the machine was busy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from helpers.models import MLP, NO_VALIDATION_LOADER, callback_for, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase, Units, UpdateRule
from lightning_estdgm.method._redistribution import Budget
from lightning_estdgm.sparse.autotune._choice import BackendSelector
from lightning_estdgm.sparse.autotune._timing import Timing

pytestmark = pytest.mark.filterwarnings(NO_VALIDATION_LOADER)

PLAN = re.compile(
    r"DGMCallback: dense and sparse products are timed on this machine: up to (\d+) cases? "
    r"\(1 shape of layer and input\), about \d+ s"
)
BLOCKS = Units(size=16)
RESULT = re.compile(r"(\d+) cases? timed in \d+\.\d s")


def fit(capsys: pytest.CaptureFixture[str], callback: DGMCallback, *bars: Any, **trainer: Any) -> str:
    """Train a net of two masked layers of one shape; return what was printed, in one line."""
    made = make_trainer(callback, *bars, max_epochs=1, enable_progress_bar=bool(bars), **trainer)
    made.fit(MLP(), MLP.batches(20))
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def measure_as(monkeypatch: pytest.MonkeyPatch, timing: Timing) -> list[Any]:
    """Have every case timed so, on this machine's clock; return the list of the cases to come."""
    asked: list[Any] = []

    def measure(case: Any, names: Any) -> Timing:
        asked.append(case)
        return Timing(
            {name: timing.turns["dense" if name == "dense" else "sparse"] for name in names}, 1.0, timing.load
        )

    monkeypatch.setitem(BackendSelector.__init__.__kwdefaults__, "measure", measure)
    return asked


@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar])
def test_a_run_says_what_it_will_time_and_how_long_it_took(capsys: pytest.CaptureFixture[str], bar: Any) -> None:
    text = fit(capsys, callback_for(units=BLOCKS), *([bar()] if bar else []))
    plan, result = PLAN.search(text), RESULT.search(text)
    assert plan is not None
    assert result is not None
    assert plan.start() < text.index("are masked") < result.start()
    assert 1 <= int(result[1]) <= int(plan[1])
    assert len(PLAN.findall(text)) == len(RESULT.findall(text)) == 1


def test_a_run_that_times_nothing_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not re.search("timed", fit(capsys, callback_for(backend="cpu")))
    monkeypatch.setenv("ESTDGM_CHOICES", str(tmp_path))
    monkeypatch.setitem(BackendSelector.__init__.__kwdefaults__, "load", lambda: 1.0)  # no calm moment to time it again
    assert PLAN.search(fit(capsys, callback_for(units=BLOCKS)))
    second = fit(capsys, callback_for(units=BLOCKS))
    assert not PLAN.search(second)
    assert not RESULT.search(second)
    assert "are masked" in second


def test_a_run_says_which_units_it_times_and_what_decided(capsys: pytest.CaptureFixture[str]) -> None:
    text = fit(capsys, callback_for())
    plan = re.search(r"DGMCallback: mask units: dense and sparse products are timed on this machine", text)
    decided = re.search(r"Units by least time to a loss, dense in as many steps = 1. net.0, net.2: .* \(weight", text)
    assert plan is not None
    assert decided is not None
    assert plan.start() < text.index("are masked") < decided.start()


def test_a_busy_machine_is_said_once_below_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_as(monkeypatch, Timing({"dense": [2.0], "sparse": [1.0]}, load=3.0))
    text = fit(capsys, callback_for())
    assert text.count("The machine was busy meanwhile (this process had 100% of its core, load average ") == 1
    assert text.index("are masked") < text.index("The machine was busy")
    # The control: a calm one.
    measure_as(monkeypatch, Timing({"dense": [2.0], "sparse": [1.0]}, load=0.1))
    assert "busy" not in fit(capsys, callback_for())


def eight_to_the_second(layers: Any, k: int, drop_fraction: float, regrow: bool) -> list[Budget]:
    """Move eight units from the first layer to the second."""
    active = [int(layer.mask.sum()) for layer in layers]
    counts = [active[0] - 8, active[1] + 8]
    return [Budget(min(had, count), count) for had, count in zip(active, counts, strict=True)]


def test_layers_that_move_to_other_densities_are_timed_and_said_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse pays at no density, so one that is lower than all before has to be timed."""
    asked = measure_as(monkeypatch, Timing({"dense": [1.0], "sparse": [2.0]}))
    schedule = EstDgm(*(Phase(0.5, 0.5, share) for share in (0.3, 0.3, 0.4)), update_every=8, observe_steps=2)
    rule = UpdateRule(redistribute=eight_to_the_second)
    text = fit(capsys, DGMCallback(DGMConfig(schedule, Units(size=16), update_rule=rule)))
    densities = [case.density for case in asked]
    assert densities[:2] == [0.5, 0.375]
    assert densities == sorted(densities, reverse=True)
    assert len(PLAN.findall(text)) == len(densities)
    assert text.count("DGMCallback: 1 case timed in 0.0 s.") == len(densities) - 1  # the first is below the table
