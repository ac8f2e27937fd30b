"""`DGMConfig`: what it refuses, what `merged` changes, and what can be done with it."""

import pickle
import re

import pytest

from helpers.controller_runs import WEIGHTS
from lightning_estdgm.config import DGMConfig


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"schedule": 0.1}, TypeError, "schedule must have resolve() and to_dict(), such as EstDgm(), got 0.1"),
        ({"units": {"size": 8}}, ValueError, "units.size must be 'auto', 1 or one of (16, 32, 64, 128), got 8"),
        ({"units": {"size": "big"}}, ValueError, "units.size must be 'auto', 1 or one of (16, 32, 64, 128), got 'big'"),
        (
            {"units": {"distribution": "even"}},
            ValueError,
            "distribution must be one of ['erk', 'uniform'] or a function, got 'even'",
        ),
        ({"units": {"size": 16.0}}, ValueError, "units.size must be 'auto', 1 or one of (16, 32, 64, 128), got 16.0"),
        ({"units": {"size": True}}, ValueError, "units.size must be 'auto', 1 or one of (16, 32, 64, 128), got True"),
        ({"update_rule": {"gamma": -0.1}}, ValueError, "gamma must be a finite number of at least 0, got -0.1"),
        ({"update_rule": {"gamma": float("nan")}}, ValueError, "gamma must be a finite number of at least 0, got nan"),
        (
            {"step_size": {"exponent": -1.0}},
            ValueError,
            "step_size.exponent must be a finite number of at least 0, got -1.0",
        ),
        ({"seed": "x"}, TypeError, "seed must be an int, got 'x'"),
        ({"selection": {"include": 5}}, TypeError, "include must be a sequence of selectors, got 5"),
        ({"update_rule": {"drop_fraction": 1.0}}, ValueError, "drop_fraction must lie in [0, 1), got 1.0"),
        ({"update_rule": {"drop_fraction": -0.1}}, ValueError, "drop_fraction must lie in [0, 1), got -0.1"),
        ({"inactive": "gone"}, ValueError, "inactive must be 'zero', 'frozen' or a BackwardSet, got 'gone'"),
        ({"selection": {"include": "head"}}, TypeError, "include must be a sequence of selectors, got 'head'"),
        ({"selection": {"exclude": "0"}}, TypeError, "exclude must be a sequence of selectors, got '0'"),
        ({"backend": "abacus"}, ValueError, "unknown backend 'abacus', expected one of: cpu, native, reference"),
    ],
)
def test_bad_settings_are_refused_with_what_was_got(settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        DGMConfig().merged(**settings)


def test_the_default_settings_are_valid_comparable_and_picklable():
    assert pickle.loads(pickle.dumps(DGMConfig())) == DGMConfig() != WEIGHTS
