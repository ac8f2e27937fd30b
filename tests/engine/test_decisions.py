"""Decisions for the layers of a model, and the reasons given for them."""

import dataclasses

import pytest

from helpers.controller_runs import IMAGES, STEPS, adamw, fit_images, run
from helpers.masked_weights import candidates_of, numbered
from lightning_estdgm.config import Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._decisions import LayerDecision, layer_decisions


def test_defaults_choose_something_that_works(mlp):
    model = mlp(64, 256, 256, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, total_steps=STEPS, audit=False) as dgm:
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
    assert said["down"] == ("reference", "fewer than 8 blocks of 16 a side; forced")
    assert said["depthwise"] == ("dense", "excluded")


def test_a_decision_puts_together_what_is_known_of_a_layer():
    weight, head = numbered([[1, 0], [0, 0]], block_size=2), candidates_of((2, 2), (3, 4))[1]
    weight.backend, weight.final_backend = "dense", "cpu"
    weight.note, weight.why = "small blocks", "twice as fast"
    masked, dense = layer_decisions([weight.candidate, head], [weight], [0.125])
    assert masked == LayerDecision("0", (4, 4), True, 2, 0.25, "dense", 0.125, "cpu", "small blocks; twice as fast")
    assert dense == LayerDecision("1", (3, 4), False, 0, 1.0, "dense", 1.0, "dense", "output head")
