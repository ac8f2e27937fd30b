"""`DGMCallback` and `EnergyMonitor` in LightningCLI: every setting from YAML and from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lightning_estdgm import DGMConfig, EnergyMonitor, EstDgm, Phase
from lightning_estdgm.config import Selection, StepSize, Units
from lightning_estdgm.method._backward_set import BackwardSet
from lightning_estdgm.method._patterns import FanIn
from lightning_estdgm.method._schedules import ConstantDensity
from lightning_estdgm.method._update_rule import UpdateRule

CASES = {
    "units: {size: 16}": DGMConfig(units=Units(size=16)),
    "units: {distribution: uniform}\nstep_size: {exponent: 0.5, scale_initial_weights: false}": DGMConfig(
        units=Units(distribution="uniform"), step_size=StepSize(0.5, False)
    ),
    "selection: {exclude: ['*.attn.*']}\ninactive: frozen\nbackend: dense\nseed: 3\nmethod: mine": DGMConfig(
        selection=Selection([], ["*.attn.*"]), inactive="frozen", backend="dense", seed=3, method="mine"
    ),
    "selection: {experts: ['*.w1']}": DGMConfig(selection=Selection(experts=["*.w1"])),
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


def test_a_setting_is_taken_from_the_command_line() -> None:
    given = [f"--callback.init_args.config.{x}" for x in ("seed=4", "step_size.exponent=0.5")]
    config = parsed("lightning_estdgm.DGMCallback", {"config": {"units": {"size": 16}}}, *given).config
    assert (config.units.size, config.seed, config.step_size.exponent) == (16, 4, 0.5)


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ArgumentError, match="block"):
        parsed("lightning_estdgm.DGMCallback", {"config": {"units": {"block": 16}}})


def test_the_monitor_is_set_up_from_yaml() -> None:
    footprint = {"class_path": "lightning_estdgm.Footprint", "init_args": {"price_per_kwh": 0.3}}
    settings = {"sources": ["cpu-estimate"], "interval_s": 0.5, "footprint": footprint}
    assert isinstance(parsed("lightning_estdgm.EnergyMonitor", settings), EnergyMonitor)


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
        {"class_path": "lightning_estdgm.DGMCallback", "init_args": {"config": config}},
        {"class_path": "lightning_estdgm.EnergyMonitor"},
    ]
    settings = {"trainer": {"accelerator": "cpu", "max_steps": 40, "logger": False, "callbacks": callbacks}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*given: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "program.py", "fit", "--config", "run.yaml", *given]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    printed = run("--print_config")
    assert printed.returncode == 0, printed.stderr
    shown = yaml.safe_load(printed.stdout)["trainer"]["callbacks"][0]["init_args"]["config"]
    assert shown["units"] == {"size": 1, "distribution": "erk"}
    fitted = run()
    assert fitted.returncode == 0, fitted.stderr[-3000:]
    assert "64 of 64 weights in linear and convolution layers are masked" in fitted.stdout
