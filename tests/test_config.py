"""`DGMConfig`: what it refuses, what `merged` changes, and what can be done with it."""

import dataclasses
import pickle
import re
import typing
from operator import attrgetter

import pytest

from helpers.controller_runs import SCHEDULE, WEIGHTS
from lightning_estdgm._flat_settings import PLACES
from lightning_estdgm.config import DGMConfig, Selection, StepSize, Units
from lightning_estdgm.method._backward_set import BackwardSet
from lightning_estdgm.method._patterns import NofM
from lightning_estdgm.method._schedules import EstDgm, Phase
from lightning_estdgm.method._update_rule import UpdateRule

SIZES = "'auto', 'finest', 'fastest' or one of (1, (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), 4, 8, 16, 32, 64, 128)"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"schedule": 0.1}, TypeError, "schedule must have resolve() and to_dict(), such as EstDgm(), got 0.1"),
        (
            {"units": {"size": 12}},
            ValueError,
            f"{SIZES}, got 12",
        ),
        (
            {"units": {"size": "big"}},
            ValueError,
            f"{SIZES}, got",
        ),
        (
            {"units": {"distribution": "even"}},
            ValueError,
            "units.distribution must be one of ['erk', 'uniform'] or a function, got 'even'",
        ),
        (
            {"units": {"size": 16.0}},
            ValueError,
            f"{SIZES}, got 16.0",
        ),
        (
            {"units": {"size": True}},
            ValueError,
            f"{SIZES}, got True",
        ),
        (
            {"update_rule": {"gamma": -0.1}},
            ValueError,
            "update_rule.gamma must be a finite number of at least 0, got -0.1",
        ),
        (
            {"update_rule": {"gamma": float("nan")}},
            ValueError,
            "update_rule.gamma must be a finite number of at least 0, got nan",
        ),
        (
            {"step_size": {"exponent": -1.0}},
            ValueError,
            "step_size.exponent must be a finite number of at least 0, got -1.0",
        ),
        ({"seed": "x"}, TypeError, "seed must be an int, got 'x'"),
        ({"selection": {"include": 5}}, TypeError, "selection.include must be a sequence of selectors, got 5"),
        ({"update_rule": {"drop_fraction": 1.0}}, ValueError, "update_rule.drop_fraction must lie in [0, 1), got 1.0"),
        (
            {"update_rule": {"drop_fraction": -0.1}},
            ValueError,
            "update_rule.drop_fraction must lie in [0, 1), got -0.1",
        ),
        ({"inactive": "gone"}, ValueError, "inactive must be 'zero', 'frozen' or a BackwardSet, got 'gone'"),
        (
            {"selection": {"include": "head"}},
            TypeError,
            "selection.include must be a sequence of selectors, got 'head'",
        ),
        ({"selection": {"exclude": "0"}}, TypeError, "selection.exclude must be a sequence of selectors, got '0'"),
        ({"backend": "abacus"}, ValueError, "unknown backend 'abacus', expected one of: cpu, native, reference"),
    ],
)
def test_bad_settings_are_refused_with_what_was_got(settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        DGMConfig().merged(**settings)


def test_the_default_settings_are_valid_comparable_and_picklable():
    assert pickle.loads(pickle.dumps(DGMConfig())) == DGMConfig() != WEIGHTS


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"update_rule": {"keep": "largest"}}, ValueError, "update_rule.keep must be one of ['auto', "),
        ({"update_rule": {"grow": "auto"}}, ValueError, "update_rule.grow must be one of ["),
        ({"update_rule": {"pattern": "2:4"}}, TypeError, "update_rule.pattern must be None or a Pattern such as"),
        ({"update_rule": {"pattern": NofM(4)}}, ValueError, "needs regrow=True: each group has to be filled up"),
        ({"update_rule": {"redistribute": "even"}}, ValueError, "update_rule.redistribute must be None, one of ["),
        (
            {"update_rule": {"redistribute": "global"}},
            ValueError,
            "update_rule.redistribute='global' needs units of one size in all layers, got units.size='auto'",
        ),
        ({"selection": {"include": [5]}}, TypeError, "selection.include takes globs over names and predicates, got 5"),
        ({"step_size": {"exponent": float("inf")}}, ValueError, "step_size.exponent must be a finite number of at lea"),
        ({"units": 16}, TypeError, "units must be a Units, got 16"),
        ({"update_rule": None}, TypeError, "update_rule must be a UpdateRule, got None"),
        ({"step_size": 1.0}, TypeError, "step_size must be a StepSize, got 1.0"),
        ({"selection": ("head",)}, TypeError, "selection must be a Selection, got ('head',)"),
        ({"schedule": EstDgm}, TypeError, "schedule must have resolve() and to_dict(), such as EstDgm(), got <class"),
    ],
)
def test_parts_are_refused_with_their_dotted_names(settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        DGMConfig().merged(**settings)


# ------------------------------------------------------------------ merged


def test_merged_changes_only_the_named_fields_of_a_part():
    config = DGMConfig(units=Units(size=16, distribution="uniform"), update_rule=UpdateRule(gamma=0.5, grow="gradient"))
    changed = config.merged(units={"size": 1}, update_rule={"gamma": 2.0}, seed=7)
    assert changed == DGMConfig(
        units=Units(size=1, distribution="uniform"), update_rule=UpdateRule(gamma=2.0, grow="gradient"), seed=7
    )
    assert config.units == Units(size=16, distribution="uniform")
    assert config.merged() == config


def test_merged_takes_a_part_given_whole_as_it_is():
    config = DGMConfig(units=Units(size=16, distribution="uniform"))
    assert config.merged(units=Units(size=1)).units == Units(size=1, distribution="erk")
    assert config.merged(schedule=SCHEDULE).schedule is SCHEDULE


def test_merged_goes_into_any_field_that_is_a_dataclass():
    assert DGMConfig().merged(schedule={"cycles": 2}).schedule == EstDgm(cycles=2)
    config = DGMConfig(inactive=BackwardSet(0.5, shadow_decay=0.1))
    assert config.merged(inactive={"density": 0.7}).inactive == BackwardSet(0.7, shadow_decay=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": 16}, "sizes"),
        ({"units": {"sizes": 16}}, "units takes ['size', 'distribution'], got ['sizes']"),
        ({"step_size": {"exponent": 1.0, "b": 1, "a": 2}}, "got ['a', 'b']"),
        ({"schedule": {"cycle": 2}}, "schedule takes ['exploration', "),
    ],
)
def test_unknown_names_are_refused(settings, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        DGMConfig().merged(**settings)


@pytest.mark.parametrize("name", PLACES)
def test_a_flat_name_is_refused_with_its_place(name):
    for made in (DGMConfig, DGMConfig().merged):
        with pytest.raises(
            TypeError, match=rf"DGMConfig takes \['schedule', .*, got \['{name}'\].*: {name} is"
        ) as caught:
            made(**{name: 16})
        assert f"{name} is {PLACES[name]} now" in str(caught.value)


def test_the_places_of_flat_names_are_settings():
    for place in PLACES.values():
        attrgetter(place)(DGMConfig())


# ------------------------------------------------------------------ what can be done with a config

CONFIGS = {
    "default": DGMConfig(),
    "changed": DGMConfig(SCHEDULE, units=Units(size=16), step_size=StepSize(0.5, False), backend="dense", seed=3),
    "backward set": DGMConfig(inactive=BackwardSet(0.5)),
    "pattern": DGMConfig(update_rule=UpdateRule(pattern=NofM(4), regrow=True)),
    "selection": DGMConfig(selection=Selection(include=("head",), exclude=("stem", "body.*"))),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_compare_hash_pickle_and_print(name):
    config = CONFIGS[name]
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert hash(again) == hash(config)
    assert repr(again) == repr(config)
    assert {again: name} == {config: name}
    assert [other for other, value in CONFIGS.items() if value == config] == [name]


def test_configs_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DGMConfig().seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        DGMConfig().units.size = 1


def test_weights_that_learn_are_all_kept_by_magnitude_unless_said_otherwise():
    config = DGMConfig(inactive=BackwardSet())
    assert config.trains_inactive_weights
    assert config.resolved_update_rule == UpdateRule(keep="magnitude")
    given = config.merged(update_rule={"keep": "weight_and_gradient"})
    assert given.resolved_update_rule.keep == "weight_and_gradient"
    assert not DGMConfig(inactive="frozen").trains_inactive_weights
    assert DGMConfig(inactive="frozen").resolved_update_rule == UpdateRule()


@pytest.mark.parametrize(
    "cls", [DGMConfig, Units, UpdateRule, StepSize, Selection, BackwardSet, EstDgm, Phase], ids=lambda cls: cls.__name__
)
def test_every_annotation_of_the_settings_can_be_resolved(cls: type) -> None:
    """Where one cannot, jsonargparse 4.53 checks none of the fields, and says nothing."""
    hints = typing.get_type_hints(cls)
    assert {field.name for field in dataclasses.fields(cls)} <= hints.keys()


def test_a_unit_of_several_outputs_may_come_as_a_list():
    assert Units(size=[4, 1]) == Units(size=(4, 1))  # as files give it
