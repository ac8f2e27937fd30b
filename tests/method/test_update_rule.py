"""Update rules: the scores and the drop fraction that a mask update goes by."""

import math
import re

import pytest
import torch

from helpers.published_runs import EVERY, trained
from lightning_estdgm.method._patterns import NofM
from lightning_estdgm.method._redistribution import REDISTRIBUTIONS
from lightning_estdgm.method._scores import Evidence
from lightning_estdgm.method._update_rule import UpdateRule
from lightning_estdgm.presets import preset


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda e: e.weight[0], "one number a unit, of shape (24, 12), got (12,)"),
        (lambda e: e.weight * math.nan, "units: return a number for each, -inf for one that is to be chosen last"),
    ],
)
def test_bad_scores_are_refused(mlp, score, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(mlp, preset("rigl", 0.2, update_every=EVERY, update_rule={"grow": score}), 8)


def test_a_drop_fraction_outside_its_range_is_refused(mlp):
    with pytest.raises(ValueError, match="must return a share in"):
        trained(
            mlp,
            preset("rigl", 0.2, update_every=EVERY, update_rule={"drop_fraction": lambda progress, density: 1.0}),
            8,
        )


# ------------------------------------------------------------------ the rule by itself


def test_automatic_keeping_goes_by_the_size_of_units():
    rule = UpdateRule()
    assert [rule.keep_by(size) for size in (1, 16)] == ["magnitude", "weight_and_gradient"]
    assert [UpdateRule(keep="gradient").keep_by(size) for size in (1, 16)] == ["gradient", "gradient"]


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, [True, True]),
        ({"grow": "random"}, [False, True]),
        ({"grow": "random", "keep": "magnitude"}, [False, False]),
        ({"grow": "magnitude", "keep": lambda evidence: evidence.weight}, [True, True]),
    ],
)
def test_gradients_are_needed_unless_both_scores_do_without(settings, needed):
    assert [UpdateRule(**settings).needs_gradients(size) for size in (1, 16)] == needed


def test_the_drop_fraction_falls_by_half_a_cosine_or_as_a_function_says():
    rule = UpdateRule(drop_fraction=0.4)
    assert [rule.drop_share(x, 0.1) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.2, 0.0])
    given = UpdateRule(drop_fraction=lambda progress, density: progress * density)
    assert given.drop_share(0.5, 0.1) == pytest.approx(0.05)
    for share in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=re.escape(f"drop_fraction must return a share in [0, 1), got {share!r}")):
            UpdateRule(drop_fraction=lambda progress, density, share=share: share).drop_share(0.5, 0.1)


def test_patterns_and_redistributions_move_budgets():
    assert not UpdateRule().moves_budgets
    assert UpdateRule(pattern=NofM(4), regrow=True).moves_budgets
    assert UpdateRule(redistribute="growth").moves_budgets


def test_a_redistribution_is_known_by_name_or_given():
    def mine(parts, total, drop_fraction, regrow):
        raise NotImplementedError

    assert UpdateRule().redistribution is None
    assert UpdateRule(redistribute="global").redistribution is REDISTRIBUTIONS["global"]
    assert UpdateRule(redistribute=mine).redistribution is mine


@pytest.mark.parametrize(
    ("settings", "block_size", "named"),
    [
        ({"grow": "random"}, 16, "grow='random'"),
        ({"keep": "weight_and_gradient"}, 1, "keep='weight_and_gradient'"),
        ({"redistribute": "global"}, 16, "redistribute='global'"),
        ({"pattern": NofM(4), "regrow": True}, 1, "pattern=NofM("),
        ({"grow": lambda evidence: evidence.weight}, 16, "grow=<function"),
    ],
)
def test_sharded_weights_are_updated_by_what_ranks_can_tell(settings, block_size, named):
    for size in (1, 16):
        UpdateRule().check_sharded("0", size)
    with pytest.raises(ValueError, match=rf"layer '0' is sharded over ranks, .*got {re.escape(named)}.*: use DDP"):
        UpdateRule(**settings).check_sharded("0", block_size)


def test_scores_are_those_of_a_name_or_of_a_function():
    weight = torch.tensor([[1.0, 2.0]])
    evidence = Evidence(weight > 1, weight, 3 * weight, 5 * weight, 1.0, torch.Generator())
    rule = UpdateRule()
    assert torch.equal(rule.score("magnitude", evidence), weight)
    assert torch.equal(rule.score(lambda e: -e.weight, evidence), -weight)
