"""`DGMCallback` and `EnergyMonitor` in LightningCLI: every setting from YAML and from the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import get_args

import lightning.pytorch as pl
import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from helpers.expert_models import adapter
from lightning_estdgm import DGMConfig, EnergyMonitor, EstDgm, Footprint, Phase
from lightning_estdgm._flat_settings import PLACES
from lightning_estdgm.config import Selection, StepSize, Units
from lightning_estdgm.method import Budget, Evidence, Scored, StagedDrop, WeightAndGradient
from lightning_estdgm.method._backward_set import BackwardSet
from lightning_estdgm.method._distributions import DISTRIBUTIONS, DistributionName
from lightning_estdgm.method._patterns import FanIn
from lightning_estdgm.method._redistribution import REDISTRIBUTIONS, RedistributionName
from lightning_estdgm.method._schedules import AlternatingDensity, ConstantDensity
from lightning_estdgm.method._scores import SCORES, ScoreName
from lightning_estdgm.method._update_rule import UpdateRule
from lightning_estdgm.presets import rigl


def smallest(evidence: Evidence) -> Tensor:
    """A score of a user's own, which YAML names by its path."""
    return -evidence.weight


def falling(progress: float, density: float) -> float:
    return 0.3 * (1 - progress)


def halves(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    return [0.5] * len(shapes)


def kept(layers: Sequence[Scored], k: int, drop_fraction: float, regrow: bool) -> list[Budget]:
    raise NotImplementedError


@dataclass(frozen=True)
class Cycles(ConstantDensity):
    """A schedule of a user's own, with settings that `EstDgm` has too, and other defaults."""

    cycles: int = 4
    freeze: float = 0.5


CASES = {
    "units: {size: 16}": DGMConfig(units=Units(size=16)),
    "units: {distribution: uniform}\nstep_size: {exponent: 0.5, scale_initial_weights: false}": DGMConfig(
        units=Units(distribution="uniform"), step_size=StepSize(0.5, False)
    ),
    "selection: {exclude: ['*.attn.*']}\ninactive: frozen\nbackend: dense\nseed: 3\nmethod: mine": DGMConfig(
        selection=Selection([], ["*.attn.*"]), inactive="frozen", backend="dense", seed=3, method="mine"
    ),
    "selection: {experts: ['*.w1']}": DGMConfig(selection=Selection(experts=["*.w1"])),
    "selection: {experts: ['*.w3', {module: helpers.expert_models.BmmExperts, layouts: {w1: eio, w2: eio}, "
    "forward: helpers.expert_models.bmm_forward}]}": DGMConfig(selection=Selection(experts=["*.w3", adapter("bmm")])),
    "inactive: {density: 0.5, shadow_decay: 0.1}": DGMConfig(inactive=BackwardSet(0.5, 0.0, 0.1)),
    "update_rule: {keep: magnitude, grow: random, gamma: 2, drop_fraction: 0.1, regrow: true}": DGMConfig(
        update_rule=UpdateRule("magnitude", "random", 2.0, 0.1, True)
    ),
    "update_rule: {regrow: true, pattern: {class_path: lightning_estdgm.method.FanIn}}": DGMConfig(
        update_rule=UpdateRule(regrow=True, pattern=FanIn())
    ),
    "schedule: {exploration: {start: 0.7, end: 0.6, length: 10}, consolidation: {start: 0.3, end: 0.2, length: 30}, "
    "refinement: {start: 0.1, end: 0.1, length: 60}, update_every: 5, cycles: 2, warmup: 8}": DGMConfig(
        EstDgm(Phase(0.7, 0.6, 10), Phase(0.3, 0.2, 30), Phase(0.1, 0.1, 60), update_every=5, cycles=2, warmup=8)
    ),
    "schedule: {class_path: lightning_estdgm.method.ConstantDensity, init_args: {density: 0.2}}": DGMConfig(
        ConstantDensity(0.2)
    ),
    "schedule: {class_path: lightning_estdgm.method.AlternatingDensity, init_args: {density: 0.2}}": DGMConfig(
        AlternatingDensity(0.2)
    ),
    "schedule: {class_path: test_dgm_cli.Cycles, init_args: {density: 0.2}}": DGMConfig(Cycles(0.2)),
    "update_rule: {keep: test_dgm_cli.smallest, drop_fraction: test_dgm_cli.falling}": DGMConfig(
        update_rule=UpdateRule(keep=smallest, drop_fraction=falling)
    ),
    "update_rule: {grow: {class_path: lightning_estdgm.method.WeightAndGradient, init_args: {scale: 2}}}": DGMConfig(
        update_rule=UpdateRule(grow=WeightAndGradient(2.0))
    ),
    "update_rule: {drop_fraction: {class_path: lightning_estdgm.method.StagedDrop, init_args: {shares: [0.3]}}}": (
        DGMConfig(update_rule=UpdateRule(drop_fraction=StagedDrop((0.3,))))
    ),
    "units: {size: 16, distribution: test_dgm_cli.halves}\nupdate_rule: {redistribute: test_dgm_cli.kept}": DGMConfig(
        units=Units(16, halves), update_rule=UpdateRule(redistribute=kept)
    ),
    "units: {size: 16}\nupdate_rule: {redistribute: growth, pattern: null}": DGMConfig(
        units=Units(16), update_rule=UpdateRule(redistribute="growth")
    ),
}


def parsed(class_path: str, settings: dict[str, object], *given: str) -> pl.Callback:
    """A callback as LightningCLI makes it from YAML: by jsonargparse, from a class path and its arguments."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.Callback, "callback")
    value = yaml.safe_dump({"class_path": class_path, "init_args": settings}, default_flow_style=True, width=10_000)
    return parser.instantiate(parser.parse_args([f"--callback={value.strip()}", *given])).callback


@pytest.mark.parametrize("text", CASES, ids=lambda text: text[:40])
def test_every_part_of_the_settings_is_taken_from_yaml(text: str) -> None:
    config, expected = parsed("lightning_estdgm.DGMCallback", {"config": yaml.safe_load(text)}).config, CASES[text]
    # sequences come as lists
    asked = expected.selection
    selection = Selection(list(asked.include), list(asked.exclude), list(asked.experts))
    assert config == expected.merged(selection=selection)
    assert repr(config.schedule) == repr(expected.schedule), "whole numbers stay whole"


@pytest.mark.filterwarnings("default::UserWarning")  # raised as an error, it would make jsonargparse try another type
@pytest.mark.parametrize("text", CASES, ids=lambda text: text[:40])
def test_settings_that_are_printed_are_the_same_when_read_again(text: str) -> None:
    """As by ``--print_config``, and in the file that LightningCLI saves."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.Callback, "callback")
    callback = {"class_path": "lightning_estdgm.DGMCallback", "init_args": {"config": yaml.safe_load(text)}}
    first = parser.parse_object({"callback": callback})
    assert "Unable" not in parser.dump(first)
    again = parser.parse_string(parser.dump(first))
    assert parser.dump(again) == parser.dump(first)
    assert parser.instantiate(again).callback.config == parser.instantiate(first).callback.config


def test_every_name_of_a_rule_is_a_type_of_its_own() -> None:
    assert set(get_args(ScoreName)) == SCORES.keys()
    assert set(get_args(RedistributionName)) == REDISTRIBUTIONS.keys()
    assert set(get_args(DistributionName)) == DISTRIBUTIONS.keys()


OVERRIDES = {
    "units.size=16": 16,
    "seed=4": 4,
    "step_size.exponent=0.5": 0.5,
    "step_size.scale_initial_weights=false": False,
    "step_size.scale_weight_decay=false": False,
    "selection.exclude=[head, '*.attn']": ["head", "*.attn"],
    "selection.experts+=*.w1": ["*.w1"],
    "inactive=frozen": "frozen",
    "inactive.density=0.5": 0.5,
    "backend=reference": "reference",
    "method=mine": "mine",
    "schedule.update_every=100": 100,
    "schedule.warmup=8": 8,
    "schedule.warmup=0.25": 0.25,
    "schedule.refinement.end=0.05": 0.05,
    "update_rule.keep=test_dgm_cli.smallest": smallest,
    "update_rule.grow=lightning_estdgm.method.WeightAndGradient": WeightAndGradient(),
    "update_rule.drop_fraction=0.1": 0.1,
}


@pytest.mark.parametrize("given", OVERRIDES)
def test_a_setting_is_taken_from_the_command_line(given: str) -> None:
    config = parsed("lightning_estdgm.DGMCallback", {"config": {"method": "x"}}, f"--callback.config.{given}").config
    taken = attrgetter(given.partition("=")[0].removesuffix("+"))(config)
    assert taken == OVERRIDES[given]
    assert type(taken) is type(OVERRIDES[given]), "whole numbers stay whole"


def test_a_presets_settings_are_taken_from_the_command_line_on_top_of_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.Callback, "callback")
    preset = {"init_args": {"name": "rigl"}, "dict_kwargs": {"units": {"distribution": "uniform"}, "seed": 3}}
    value = yaml.safe_dump(
        {"class_path": "lightning_estdgm.DGMCallback.from_preset", **preset}, default_flow_style=True, width=10_000
    )
    given = ("density=0.2", "dict_kwargs.update_every=5", "dict_kwargs.units.size=16", "dict_kwargs.seed=4")
    made = parser.parse_args([f"--callback={value.strip()}", *[f"--callback.{x}" for x in given]])
    expected = rigl(0.2, update_every=5).merged(units=Units(16, "uniform"), seed=4)
    assert parser.instantiate(made).callback.config == expected
    assert parser.instantiate(parser.parse_string(parser.dump(made))).callback.config == expected


LENGTHS = {"exploration": 10, "consolidation": 20, "refinement": 30}


def test_several_settings_on_top_of_yaml() -> None:
    given = [f"--callback.init_args.config.{x}" for x in ("seed=4", "step_size.exponent=0.5")]
    steps = [f"--callback.config.schedule.{phase}.length={n}" for phase, n in LENGTHS.items()]
    callback = parsed(
        "lightning_estdgm.DGMCallback", {"config": {"units": {"size": 16}}}, *given, *steps, "--callback.total_steps=60"
    )
    config = callback.config
    assert (config.units.size, config.seed, config.step_size.exponent) == (16, 4, 0.5)
    assert {phase: getattr(config.schedule, phase).length for phase in LENGTHS} == LENGTHS
    assert all(type(getattr(config.schedule, phase).length) is int for phase in LENGTHS)
    assert callback.total_steps == 60


WRONG = {
    "units.size=17": r"units\.size must be 'auto', 'finest', 'fastest' or one of .*, got 17",
    "units.size=16.0": r"units\.size",
    "units.distribution=erdos": r"units\.distribution must be one of .* got 'erdos'",
    "units.block=16": r"units\.block",
    "seed=1.5": 'key "seed"',
    "seed=true": 'key "seed"',
    "inactive=gone": 'key "inactive"',
    "inactive.density=2": r"inactive\.density must lie in \(0, 1\], got 2",
    "inactive.shadow_decay=-1": r"inactive\.shadow_decay must be a finite number of at least 0, got -1",
    "backend=cuda": "unknown backend 'cuda', expected one of",
    "step_size.exponent=-1": r"step_size\.exponent must be .*, got -1",
    "schedule.cycles=2.0": 'key "cycles"',
    "schedule.exploration.start=2": r"density must lie in \(0, 1\], got start=2",
    "schedule.exploration.length=10": r"phase lengths must be all shares \(float\) or all steps \(int\), got \[10, ",
    "update_rule.keep=test_dgm_cli.none": r"update_rule\.keep must be one of .* got 'test_dgm_cli.none'",
    "update_rule.pattern=lightning_estdgm.method.FanIn": r"update_rule\.pattern=.* needs regrow=True",
    "update_rule.redistribute=growth": r"update_rule\.redistribute='growth' needs units of one size",
    "selection.exclude=head": r"selection\.exclude",
    "steps=3": "'steps' is not accepted",
}


@pytest.mark.parametrize("given", WRONG)
def test_a_wrong_setting_is_named(given: str) -> None:
    with pytest.raises((ArgumentError, ValueError), match=WRONG[given]):
        parsed("lightning_estdgm.DGMCallback", {"config": {}}, f"--callback.config.{given}")


@pytest.mark.parametrize("name", PLACES)
def test_a_flat_name_is_refused_with_its_place(name: str) -> None:
    """In a file, on the command line, and among settings that are right."""
    place = PLACES[name].replace(".", r"\.")
    for config, given in (({name: 16}, ()), ({"seed": 4, name: 16}, ()), ({}, [f"--callback.config.{name}=16"])):
        with pytest.raises(ArgumentError, match=f"'{name}' is not accepted[^$]*{name} is {place} now"):
            parsed("lightning_estdgm.DGMCallback", {"config": config}, *given)


def test_a_part_that_does_not_exist_is_named() -> None:
    with pytest.raises(ArgumentError, match="block"):
        parsed("lightning_estdgm.DGMCallback", {"config": {"units": {"block": 16}}})


FOOTPRINT = {"class_path": "lightning_estdgm.Footprint", "init_args": {"price_per_kwh": 0.3}}
MONITOR = {
    "sources": ["cpu-estimate"],
    "interval_s": 0.5,
    "per": {"sample": "builtins.len"},
    "idle_s": 2,
    "footprint": {"grams_co2_per_kwh": 300, "price_per_kwh": 0.3, "pue": 1.1, "currency": "EUR"},
}


@pytest.mark.parametrize("settings", [MONITOR, MONITOR | {"footprint": FOOTPRINT}], ids=["plain", "class path"])
def test_the_monitor_is_set_up_from_yaml(settings: dict[str, object]) -> None:
    monitor = parsed("lightning_estdgm.EnergyMonitor", settings)
    assert isinstance(monitor, EnergyMonitor)
    assert (monitor._sources, monitor._interval_s, monitor._idle_s) == (["cpu-estimate"], 0.5, 2.0)
    assert monitor._per == {"sample": len}
    assert monitor._footprint is not None
    assert monitor._footprint.price_per_kwh == 0.3


def test_the_monitor_is_set_up_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    given = ("interval_s=2", "idle_s=1", "footprint.price_per_kwh=0.3", f"prometheus={tmp_path / 'x.prom'}")
    monitor = parsed(
        "lightning_estdgm.EnergyMonitor", {"sources": ["cpu-estimate"]}, *[f"--callback.{x}" for x in given]
    )
    assert isinstance(monitor, EnergyMonitor)
    assert (monitor._sources, monitor._interval_s, monitor._idle_s) == (["cpu-estimate"], 2.0, 1.0)
    assert monitor._footprint == Footprint(price_per_kwh=0.3)
    assert monitor._prometheus == tmp_path / "x.prom"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("interval_s=0", "interval_s must be > 0 seconds, got 0"),
        ("sources=[sun]", "unknown energy source 'sun'"),
        ("sources=rapl", r"a list of names and energy sources, got 'rapl': write \['rapl'\]"),
        ("footprint.pue=1", "expected grams_co2_per_kwh or price_per_kwh, got neither"),
        ("idle=3", "'idle' is not accepted"),
    ],
)
def test_a_wrong_setting_of_the_monitor_is_named(given: str, message: str) -> None:
    with pytest.raises((ArgumentError, ValueError), match=message):
        parsed("lightning_estdgm.EnergyMonitor", {"sources": ["cpu-estimate"]}, f"--callback.{given}")


PROGRAM = """
import warnings
warnings.simplefilter("ignore")
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
LightningCLI(BoringModel, BoringDataModule)
"""


SCHEDULE = {"class_path": "lightning_estdgm.method.ConstantDensity", "init_args": {"density": 0.5, "update_every": 4}}


def test_a_user_fits_from_yaml_and_prints_the_settings(tmp_path: Path) -> None:
    config = {"units": {"size": 1}, "selection": {"include": ["layer"]}, "schedule": SCHEDULE}
    callbacks = [
        {"class_path": "lightning_estdgm.EnergyMonitor"},
        {"class_path": "lightning_estdgm.DGMCallback", "init_args": {"config": config}},
    ]
    settings = {"trainer": {"accelerator": "cpu", "max_steps": 40, "logger": False, "callbacks": callbacks}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*given: str, settings: str = "run.yaml") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "program.py", "fit", "--config", settings, *given]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    # Settings on the command line are those of the last callback.
    override = ("--trainer.callbacks.config.inactive=frozen", "--trainer.callbacks.config.seed=4")
    printed = run(*override, "--print_config")
    assert printed.returncode == 0, printed.stderr
    shown = yaml.safe_load(printed.stdout)["trainer"]["callbacks"][1]["init_args"]["config"]
    assert shown["units"] == {"size": 1, "distribution": "erk"}
    assert (shown["inactive"], shown["seed"]) == ("frozen", 4)
    (tmp_path / "all.yaml").write_text(printed.stdout)
    again = run("--print_config", settings="all.yaml")
    assert again.stdout == printed.stdout, again.stderr
    fitted = run(settings="all.yaml")
    assert fitted.returncode == 0, fitted.stderr[-3000:]
    assert "64 of 64 weights in linear and convolution layers are masked" in fitted.stdout
    refused = run("--trainer.callbacks.config.units.size=17")
    assert refused.returncode != 0
    sizes = "(1, (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), 4, 8, 16, 32, 64, 128)"
    assert f"'fastest' or one of {sizes}, got 17" in refused.stderr
