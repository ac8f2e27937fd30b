"""Decisions for the layers of a model, and the reasons given for them."""

import dataclasses

import pytest

from helpers.controller_runs import IMAGES, STEPS, adamw, fit_images, run
from lightning_estdgm.config import Units
from lightning_estdgm.engine.controller import DGMController


def test_defaults_choose_something_that_works(mlp):
    model = mlp(64, 256, 256, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, total_steps=STEPS) as dgm:
        run(model, optimizer, dgm, width=64)
        assert dgm.density == pytest.approx(0.1, abs=32 * 32 / (64 * 256 + 256 * 256))
        decisions = {d.name: d for d in dgm.decisions()}
    assert [(d.masked, d.block_size, d.why) for d in decisions.values()][-1] == (False, 0, "output head")
    assert decisions["2"].block_size == 32
    assert decisions["0"].block_size == 1
    assert "fewer than 8 blocks of 16" in decisions["0"].why
    assert all(d.final_backend != "?" for d in decisions.values())


def test_layers_that_stay_dense_say_why():
    *_, (_, dgm) = fit_images(dataclasses.replace(IMAGES, backend="reference", units=Units()), steps=1)
    said = {d.name: (d.backend, d.why) for d in dgm.decisions()}
    assert said["grouped"] == ("dense", "grouped convolution: no sparse operator")
    assert said["down"] == ("dense", "fewer than 8 blocks of 16 a side")
    assert said["depthwise"] == ("dense", "excluded")
