"""Backends of the layers of a run: forced ones, and the choice between them."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from helpers.controller_runs import (
    BLOCKS,
    IMAGES,
    IN_BLOCKS,
    SCHEDULE,
    STEPS,
    Residual,
    adamw,
    fit,
    fit_images,
    full_masks,
    refuse,
    run,
    saved,
    sgd,
)
from lightning_estdgm.config import DGMConfig, Selection, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._schedules import EstDgm, Phase
from lightning_estdgm.sparse._buckets import bucket_of
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse.autotune._choice import BackendSelector

# ------------------------------------------------------------------ forced backends


def test_a_forced_backend_that_cannot_run_is_refused(mlp):
    message = "backend='cpu' was asked for but cannot compute layer '0': needs blocks of at least 8"
    refuse(mlp(32, 64, 4), message, DGMConfig(SCHEDULE, units=Units(size=1), backend="cpu"))


def test_a_forced_backend_is_used_from_the_first_step_on(mlp):
    model = mlp(32, 64, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS, audit=False) as dgm:
        for _ in fit(model, optimizer, dgm):
            assert [d.backend for d in dgm.decisions()] == ["cpu", "cpu", "dense"]
        assert [d.why for d in dgm.decisions()] == ["forced", "forced", "output head"]


@pytest.mark.parametrize("inactive", ["zero", "frozen"])
@pytest.mark.parametrize("size", [1, (2, 1), (4, 1), (8, 1), (16, 1), 4, 8], ids=str)
def test_a_net_of_fine_units_trains_as_with_dense_products(mlp, size, inactive):
    trained = []
    start = mlp(32, 64, 48, 4)
    for backend in ("dense", "native"):
        model = copy.deepcopy(start)
        config = DGMConfig(SCHEDULE, units=Units(size=size), backend=backend, inactive=inactive)
        optimizer = sgd(model)
        with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
            run(model, optimizer, dgm)
            assert [(d.backend, d.block_size) for d in dgm.decisions() if d.masked] == 2 * [(backend, size)]
            budgets = {name: mask.sum() for name, mask in full_masks(dgm).items()}
        if inactive == "zero":
            for name, mask in full_masks(dgm).items():
                assert not model.get_submodule(name).weight[~mask].any()
        trained.append((model.state_dict(), budgets))
    (dense, budgets), (sparse, others) = trained
    assert budgets == others
    for name, weight in sparse.items():
        torch.testing.assert_close(weight, dense[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inactive", ["zero", "frozen"])
@pytest.mark.parametrize("size", [1, (2, 1), (4, 1), (8, 1), (16, 1), 4, 8], ids=str)
def test_a_convolutional_net_of_fine_units_trains_as_with_dense_products(size, inactive):
    trained = []
    images = torch.randn(12, 16, 9, 7, generator=torch.Generator().manual_seed(0))
    for backend in ("dense", "native"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 16, (3, 2), stride=2),
            nn.Flatten(2),
            nn.Conv1d(16, 16, 5, padding="same"),
            nn.Flatten(),
            nn.Linear(16 * 12, 4),
        )
        config = DGMConfig(SCHEDULE, units=Units(size=size), backend=backend, inactive=inactive)
        optimizer = sgd(model)
        with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
            for _ in range(STEPS):
                optimizer.zero_grad()
                model(images).square().mean().backward()
                dgm.mask_gradients()
                optimizer.step()
                dgm.advance()
            assert [(d.backend, d.block_size) for d in dgm.decisions() if d.masked] == 3 * [(backend, size)]
            masks = full_masks(dgm)
        assert not all(mask.all() for mask in masks.values())
        if inactive == "zero":
            assert not any(model.get_submodule(name).weight[~mask].any() for name, mask in masks.items())
        trained.append((model.state_dict(), {name: mask.sum() for name, mask in masks.items()}))
    (dense, budgets), (sparse, others) = trained
    assert budgets == others
    for name, weight in sparse.items():
        torch.testing.assert_close(weight, dense[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inactive", ["zero", "frozen"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "native"])
def test_a_convolutional_net_trains_as_with_dense_products(backend, channels_last, inactive):
    config = dataclasses.replace(IMAGES, inactive=inactive)
    *_, (theirs, _) = fit_images(dataclasses.replace(config, backend="dense"), channels_last)
    for ours, dgm in fit_images(dataclasses.replace(config, backend=backend), channels_last):
        assert {d.name: d.backend for d in dgm.decisions()} == {
            d.name: backend if d.name in IN_BLOCKS else "dense" for d in dgm.decisions()
        }
        outside = {name: getattr(ours, name).weight[~mask] for name, mask in full_masks(dgm).items()}
        if inactive == "zero":
            assert not any(torch.count_nonzero(weights) for weights in outside.values())
        assert ours.down.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------ the choice between backends


class Asked:
    """Finds every sparse backend twice as fast as dense, and remembers what it was asked."""

    def __init__(self):
        self.cases = []

    def __call__(self, case, names):
        self.cases.append(case)
        return {name: 2.0 if name == "dense" else 1.0 for name in names}


def measured(monkeypatch):
    asked = Asked()
    monkeypatch.setitem(BackendSelector.__init__.__kwdefaults__, "measure", asked)
    return asked


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_a_backend_is_chosen_for_what_a_convolution_is_given(monkeypatch, channels_last):
    asked = measured(monkeypatch)
    *_, (_, dgm) = fit_images(dataclasses.replace(IMAGES, inactive="frozen"), channels_last, steps=1)
    assert {d.backend for d in dgm.decisions() if d.name in IN_BLOCKS} == {"cpu"}
    given = {c.geometry: (c.batch, c.height, c.width, c.out_channels, c.in_channels) for c in asked.cases}
    assert given == {
        ConvGeometry((3, 3), (2, 2), (1, 1)): (8, 8, 8, 48, 32),
        ConvGeometry((1, 1), (2, 2)): (8, 8, 8, 48, 32),
        ConvGeometry((3, 3), (1, 1), (2, 2), (2, 2)): (8, 4, 4, 48, 48),
        ConvGeometry((1, 1)): (8, 4, 4, 64, 48),
        ConvGeometry((1, 3), (1, 1), (0, 1)): (8, 1, 16, 32, 64),
    }
    two_dimensional = [c for c in asked.cases if c.height > 1]
    assert {(c.channels_last, c.frozen, c.block_size) for c in two_dimensional} == {(channels_last, True, 16)}


def test_a_resumed_run_knows_what_its_convolutions_are_given(monkeypatch):
    asked = measured(monkeypatch)
    *_, (model, dgm) = fit_images(IMAGES, steps=1)
    state = dgm.state_dict()
    seen = {(c.batch, c.height, c.width) for c in asked.cases}
    state["selector"] = {"choices": []}
    asked.cases.clear()
    copied = Residual()
    copied.load_state_dict(model.state_dict())
    with DGMController(copied, sgd(copied), IMAGES, total_steps=STEPS, state=saved(state), audit=False) as resumed:
        resumed._dispatch.apply()
    assert {(c.batch, c.height, c.width) for c in asked.cases} == seen
    # A state from before there were such operators: choices are for an image of no particular size.
    del state["images"]
    asked.cases.clear()
    with DGMController(copied, sgd(copied), IMAGES, total_steps=STEPS, state=saved(state), audit=False) as resumed:
        resumed._dispatch.apply()
        assert {c.geometry.output_size(c.height, c.width) for c in asked.cases} == {(14, 14), (1, 196)}


def test_what_an_earlier_run_has_measured_is_used_and_said(monkeypatch, tmp_path):
    monkeypatch.setenv("ESTDGM_CHOICES", str(tmp_path))
    asked = measured(monkeypatch)
    config = dataclasses.replace(IMAGES, selection=Selection(exclude=("stem", "depthwise", "grouped")))
    *_, (_, first) = fit_images(config, steps=1)
    assert len(asked.cases) > 4
    asked.cases.clear()
    *_, (_, second) = fit_images(config, steps=1)
    assert asked.cases == []
    assert [d.backend for d in second.decisions()] == [d.backend for d in first.decisions()]
    assert any("measured on 20" in d.why for d in second.decisions())
    assert not any("measured on 20" in d.why for d in first.decisions())


class Experts(nn.Module):
    """Experts in a ModuleList, each with as many tokens as the route sends to it."""

    def __init__(self, n, width=64):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(n))
        self.out = nn.Linear(width, 4)

    def forward(self, x, route):
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            at = (route == index).nonzero()[:, 0]
            y = y.index_add(0, at, expert(x[at]))
        return self.out(y)


def first_step_of_experts(n, tokens, seed, schedule=SCHEDULE, **settings):
    torch.manual_seed(seed)
    model = Experts(n)
    optimizer = sgd(model)
    with DGMController(model, optimizer, DGMConfig(schedule, **settings), total_steps=STEPS) as dgm:
        model(torch.randn(tokens, 64), torch.randint(0, n, (tokens,))).square().mean().backward()
        dgm.mask_gradients()
        optimizer.step()
        dgm.advance()
        return dgm.decisions()


def test_experts_of_as_many_token_counts_are_measured_once(monkeypatch, tmp_path):
    """Tokens scatter over the experts, others with each seed: as one expert with its share of them."""
    monkeypatch.setenv("ESTDGM_CHOICES", str(tmp_path))
    asked = measured(monkeypatch)
    decisions = first_step_of_experts(16, 16 * 256, seed=0, units=Units(size=16))
    assert {d.backend for d in decisions if d.masked} == {"cpu"}
    assert {case.tokens for case in asked.cases} == {256}
    once = len(asked.cases)
    asked.cases.clear()
    first_step_of_experts(16, 16 * 256, seed=1, units=Units(size=16))
    assert asked.cases == []
    monkeypatch.setenv("ESTDGM_CHOICES", "off")
    first_step_of_experts(1, 256, seed=0, units=Units(size=16))
    assert len(asked.cases) == once


@pytest.mark.parametrize("pays_below", [0.02, 0.3, 0.45, 2.0])
def test_the_densities_of_a_schedule_are_searched_and_not_all_measured(monkeypatch, pays_below):
    asked = []

    def measure(case, names):
        asked.append(case.density)
        return {name: 1.0 if name == "dense" else case.density / pays_below for name in names}

    monkeypatch.setitem(BackendSelector.__init__.__kwdefaults__, "measure", measure)
    phases = Phase(1.0, 0.6, 0.3), Phase(0.6, 0.3, 0.3), Phase(0.3, 0.1, 0.4)
    schedule = EstDgm(*phases, update_every=1, observe_steps=1)
    assert len(set(map(bucket_of, schedule.resolve(STEPS).densities))) > 12
    first_step_of_experts(1, 64, seed=0, schedule=schedule, units=Units(size=16))
    assert asked[0] == min(asked)  # the final density, which users are shown
    assert 1 <= len(asked) <= 6
    assert len(asked) == len(set(asked))
