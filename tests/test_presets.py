"""Presets: published methods as settings, by name."""

import pickle
import re

import pytest

from lightning_estdgm import DGMCallback, presets
from lightning_estdgm.config import DGMConfig
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.method._update_rule import UpdateRule
from lightning_estdgm.presets import PRESETS, preset


def test_est_dgm_is_the_default():
    assert preset("est-dgm", 0.1) == DGMConfig()
    assert preset("est-dgm", 0.3).schedule.resolve(100).densities[-1] == 0.3


def test_low_density_est_dgm_changes_phases_and_drop_fraction_only():
    low = preset("est-dgm", 0.2, phases="low-density", update_every=5, update_rule={"gamma": 0.5})
    assert low == DGMConfig(
        EstDgm.low_density(0.2, update_every=5), update_rule=UpdateRule(drop_fraction=0.1, gamma=0.5)
    )


def test_sparse_to_denser_est_dgm_grows_at_random():
    denser = preset("est-dgm", 0.2, phases="sparse-to-denser", update_every=5)
    assert denser == DGMConfig(
        EstDgm.sparse_to_denser(0.2, update_every=5), update_rule=UpdateRule(grow="random", regrow=True)
    )
    with pytest.raises(ValueError, match="phases must be 'cycle', 'low-density' or 'sparse-to-denser', got 'lean'"):
        preset("est-dgm", 0.2, phases="lean")


def test_published_methods_keep_blocks_by_their_own_score():
    assert {preset(name, 0.5, units={"size": 16}).update_rule.keep for name in ("rigl", "set", "gmp", "granet")} == {
        "magnitude"
    }


def test_a_name_calls_the_methods_function_and_merges_the_other_settings():
    named = preset("rigl", 0.2, update_every=5, seed=3, update_rule={"gamma": 0.5})
    assert named == presets.rigl(0.2, update_every=5).merged(seed=3, update_rule={"gamma": 0.5})
    assert named != presets.rigl(0.2).merged(seed=3, update_rule={"gamma": 0.5})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_print_compare_and_pickle(name):
    config = preset(name, 0.5)
    assert config == preset(name, 0.5)
    assert pickle.loads(pickle.dumps(config)) == config
    schedule = config.schedule.resolve(200)
    assert schedule(199).density == 0.5
    callback = DGMCallback.from_preset(
        name, 0.5, step_size={"exponent": 0.5}, selection={"exclude": ("0",)}, total_steps=7
    )
    assert callback.config == config.merged(step_size={"exponent": 0.5}, selection={"exclude": ("0",)})
    assert callback.total_steps == 7
    assert callback.run_summary()["name"] == (config.method or "EST-DGM")
    published = name != "est-dgm"
    assert (config.step_size.exponent, config.step_size.scale_initial_weights, config.units.size) == (
        (0.0, False, 1) if published else (1.0, True, "auto")
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: preset("RigL", 0.1), ValueError, "expected a method out of ['ac/dc', 'est-dgm'"),
        (lambda: preset("rigl", 0.1, zeta=0.3), TypeError, "'rigl' takes ['alpha', 'stop', 'update_every'] and"),
        (lambda: preset("rigl", 0.1, block_size=16), TypeError, "got ['block_size']: block_size is units.size now"),
        (lambda: preset("rigl", 0.0), ValueError, "density must lie in (0, 1], got 0.0"),
        (lambda: preset("n:m", 0.3), ValueError, "whole number of 4ths, got 0.3"),
        (lambda: preset("n:m", 0.5, m=1), ValueError, "whole number of 1ths, got 0.5"),
        (lambda: preset("top-kast", 0.3, backward_density=0.2), ValueError, "at least density, got 0.2 and 0.3"),
        (lambda: preset("srigl", 0.1, update_rule={"regrow": False}), ValueError, "needs regrow=True"),
        (lambda: preset("granet", 0.1, units={"size": "auto"}), ValueError, "units of one size in all layers"),
        (lambda: preset("top-kast", 0.1, inactive="frozen"), ValueError, "leave one out"),
        (
            lambda: DGMCallback.from_preset("top-kast", compress_gradients=True),
            ValueError,
            "compress_gradients sends the gradients of active units only",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
