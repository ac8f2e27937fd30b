"""Update rules: the scores and the drop fraction that a mask update goes by."""

import math
import re

import pytest

from helpers.published_runs import EVERY, trained
from lightning_estdgm.presets import preset


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda e: e.weight[0], "one number a unit, of shape (24, 12), got (12,)"),
        (lambda e: e.weight * math.nan, "must not be NaN"),
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
