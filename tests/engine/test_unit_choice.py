"""Mask units that are chosen by timing: once the first step has shown the layers' inputs, and kept from then on."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_estdgm import DGMConfig, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._masks import keep_active_, mask_shape
from lightning_estdgm.method._update_rule import UpdateRule
from lightning_estdgm.sparse.autotune import _choice as choices
from lightning_estdgm.sparse.autotune._timing import Timing

TOKENS = 32


@pytest.fixture
def seconds(monkeypatch):
    """Seconds of a sparse step by unit, where dense takes 1; the cases that were timed."""
    table = {1: 0.9, (4, 1): 0.2, 4: 0.2, 16: 0.2}
    timed = []

    def measure(case, names):
        timed.append(case)
        return Timing.of({name: 1.0 if name == "dense" else table[case.block_size] for name in names})

    signature = choices.BackendSelector.__init__
    monkeypatch.setitem(signature.__kwdefaults__, "measure", measure)
    monkeypatch.setattr("lightning_estdgm.engine._dispatch.TimingCache", lambda: None)
    return table, timed


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64), nn.Linear(64, 8)
    )


def run(net, config=None, *, steps=2, state=None):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    controller = DGMController(net, optimizer, config or DGMConfig(), total_steps=40, state=state)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(TOKENS, 32)).square().mean().backward()
        controller.mask_gradients()
        optimizer.step()
        controller.advance()
    return controller


def units(controller):
    return {d.name: d.block_size for d in controller.decisions() if d.masked}


def test_units_are_timed_at_the_layers_shapes_and_the_cheapest_to_a_loss_is_taken(seconds):
    _, timed = seconds
    with run(model()) as controller:
        assert units(controller) == {"0": (4, 1), "2": (4, 1), "4": (4, 1)}
        shapes = {name: tuple(mask.shape) for name, mask in controller.masks().items()}
        assert shapes == {"0": (16, 32), "2": (8, 64), "4": (16, 32)}
        assert {case.tokens for case in timed} == {TOKENS}
        assert any("Units by least time to a loss" in text and "4 x 1" in text for text in controller.timed)


WITHOUT_A_COMPILER = """
import warnings
import torch
from lightning_estdgm import DGMConfig, DGMController, Units

def warned(**settings):
    net = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Linear(256, 256), torch.nn.Linear(256, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    config = DGMConfig(**settings)
    with warnings.catch_warnings(record=True) as seen, DGMController(net, optimizer, config, total_steps=40) as dgm:
        warnings.simplefilter("always")
        net(torch.randn(64, 32)).square().mean().backward()
        dgm.mask_gradients()
        optimizer.step()
        dgm.advance()
    return [str(warning.message) for warning in seen if "mask unit" in str(warning.message)]

(said,) = warned()
assert "no mask unit finer than 16 x 16" in said and "1.71 times the steps" in said and "Units(size=1)" in said, said
assert warned(units=Units(size=16)) == []  # as the user asks
"""


def test_where_blocks_alone_are_computed_a_run_says_what_they_cost(tmp_path):
    """As on GPUs; here on a machine without a compiler, where the pure backend is left."""
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", WITHOUT_A_COMPILER], env=environment, check=True, timeout=300)


def test_layers_of_one_shape_are_timed_once(seconds):
    _, timed = seconds
    with run(model()):
        singles = [(case.out_features, case.in_features) for case in timed if case.block_size == 1]
        assert sorted(singles) == [(32, 64), (64, 32)]  # "0" and "4" are of one shape


@pytest.mark.parametrize(("size", "unit"), [("finest", 1), ("fastest", (4, 1)), ("auto", (4, 1)), (4, 4)])
def test_what_is_asked_for_is_taken(seconds, size, unit):
    with run(model(), DGMConfig(units=Units(size=size))) as controller:
        assert set(units(controller).values()) == {unit}


def test_single_weights_are_taken_where_nothing_is_faster_than_dense(seconds):
    table, _ = seconds
    table.update(dict.fromkeys(table, 2.0))
    with run(model()) as controller:
        assert set(units(controller).values()) == {1}
        assert {d.final_backend for d in controller.decisions()} == {"dense"}


def test_a_resumed_run_keeps_its_units_whatever_is_fast_there(seconds):
    table, timed = seconds
    with run(net := model()) as controller:
        state = controller.state_dict()
        masks = controller.masks()
    table.update({1: 0.01})
    timed.clear()
    with run(net, state=state, steps=0) as resumed:
        assert units(resumed) == {"0": (4, 1), "2": (4, 1), "4": (4, 1)}
        assert all(torch.equal(mask, masks[name]) for name, mask in resumed.masks().items())
        assert not timed


@pytest.mark.parametrize("unit", [1, (4, 1), 4, 16])
def test_weights_with_the_zeros_of_an_earlier_mask_keep_its_units(seconds, unit):
    net = model()
    with torch.no_grad():
        for index in (0, 2, 4):
            weight = net[index].weight
            mask = torch.rand(mask_shape(weight.shape, unit)) < 0.3
            mask[0, 0], mask[-1, -1] = True, False
            keep_active_(weight, mask, unit)
    with run(net) as controller:
        assert set(units(controller).values()) == {unit}
        assert controller.decisions()[0].why.startswith("units of" if unit != 1 else "")


@pytest.mark.parametrize(
    "config",
    [DGMConfig(backend="native"), DGMConfig(backend="dense")],
    ids=lambda config: config.backend,
)
def test_nothing_is_timed_with_a_forced_backend(seconds, config):
    _, timed = seconds
    with run(model(), config):
        assert not timed


def test_redistribution_asks_for_one_unit():
    for size in ("auto", "finest", "fastest"):
        with pytest.raises(ValueError, match=f"got units.size='{size}'"):
            DGMConfig(units=Units(size=size), update_rule=UpdateRule(redistribute="global"))


def test_a_size_that_is_none_says_which_there_are():
    with pytest.raises(ValueError, match="'auto', 'finest', 'fastest' or one of"):
        Units(size="coarse")
