"""The state of a `DGMController`: a resumed run equals one that was never stopped."""

import warnings

import pytest
import torch

from helpers.controller_runs import BLOCKS, SCHEDULE, STEPS, WEIGHTS, adamw, batch, loss_of, run, saved, sgd
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._controller import DGMController


def resumed(mlp, config, stop, tamper=lambda state: None, load_late=False):
    """Train to `stop`, save all, and go on in new objects."""
    model = mlp(32, 256, 128, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        run(model, optimizer, dgm, last=stop)
        state = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "dgm": dgm.state_dict()})
    tamper(state["dgm"])
    model = mlp(32, 256, 128, 4, seed=99)
    optimizer = adamw(model)
    with DGMController(
        model, optimizer, config, total_steps=STEPS, state=None if load_late else state["dgm"], audit=False
    ) as dgm:
        if load_late:
            dgm.load_state_dict(state["dgm"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run(model, optimizer, dgm, first=stop)
    return model, optimizer, dgm


@pytest.fixture(scope="module")
def straight():
    """Return the results of uninterrupted runs, each run once."""
    results = {}

    def of(mlp, config):
        if config not in results:
            model = mlp(32, 256, 128, 4)
            optimizer = adamw(model)
            with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
                run(model, optimizer, dgm)
            results[config] = model, optimizer, dgm
        return results[config]

    return of


def plain_types(state):
    """Spell out a state so that two compare."""
    if isinstance(state, torch.Tensor):
        return (str(state.dtype), state.tolist())
    if isinstance(state, dict):
        return {key: plain_types(value) for key, value in state.items()}
    return [plain_types(value) for value in state] if isinstance(state, (list, tuple)) else state


def same(one, other):
    return [plain_types(x.state_dict()) for x in one] == [plain_types(x.state_dict()) for x in other]


CONFIGS = {
    "weights": WEIGHTS,
    "blocks": BLOCKS,
    "frozen": DGMConfig(SCHEDULE, units=Units(size=16), backend="cpu", inactive="frozen"),
}


@pytest.mark.parametrize("stop", [1, 5, 6, 8, 39])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_resumed_equals_straight_to_the_last_bit(mlp, straight, config, stop):
    assert same(resumed(mlp, config, stop), straight(mlp, config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_step_5_lies_inside_a_window(mlp, straight, config):
    assert [SCHEDULE.resolve(STEPS)(step).observe for step in (3, 4, 5)] == [False, True, True]
    assert SCHEDULE.resolve(STEPS)(6).update

    def forget_window(state):
        assert all(layer["window"]["samples"] == 1 for layer in state["layers"].values())
        for layer in state["layers"].values():
            layer["window"] = None

    def forget_explored(state):
        for layer in state["layers"].values():
            layer["explored"] = layer["mask"]

    def forget_count(state):
        state["steps"] += 1

    for forget in (forget_window, forget_count):
        assert not same(resumed(mlp, config, 5, forget), straight(mlp, config))
    assert not same(resumed(mlp, config, 12, forget_explored), straight(mlp, config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_state_may_be_loaded_after_construction(mlp, straight, config):
    assert same(resumed(mlp, config, 7, load_late=True), straight(mlp, config))


@pytest.mark.parametrize("name", ["blocks", "frozen"])
def test_a_state_from_inside_a_window_may_be_loaded_after_construction(mlp, straight, name):
    assert same(resumed(mlp, CONFIGS[name], 5, load_late=True), straight(mlp, CONFIGS[name]))


def test_a_waiting_update_is_resumed(mlp):
    def go(stop):
        model = mlp(32, 64, 4)
        optimizer = sgd(model)
        state = None
        for first, last in ((0, stop), (stop, 12)):
            with (
                warnings.catch_warnings(),
                DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, state=state, audit=False) as dgm,
            ):
                warnings.simplefilter("ignore")
                for step in range(first, last):
                    optimizer.zero_grad()
                    loss_of(model, batch(step, 32)).backward()
                    if step in (4, 5, 6):
                        model[0].weight.grad.fill_(float("nan"))
                    dgm.mask_gradients()
                    if step in (4, 5, 6):
                        model[0].weight.grad.zero_()
                    optimizer.step()
                    dgm.advance()
                state = saved(dgm.state_dict())
        return model, dgm

    assert same(go(7), go(12))
    assert go(7)[1].updates == 3


@pytest.mark.parametrize("stop", [0, 1, 5, 8])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_steps_that_a_load_takes_back_leave_nothing(mlp, config, stop):
    """As of a tuner in mid-run: at step 5 in an open window, at 8 with young units; a layer trains in them alone."""

    def go(searches):
        model = mlp(32, 256, 128, 4)
        torch.manual_seed(0)
        model[0].side = torch.nn.Linear(32, 32)  # not in the forward
        optimizer = adamw(model)
        with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
            run(model, optimizer, dgm, last=stop)
            owners = {"model": model, "dgm": dgm, "optimizer": optimizer}
            state = saved({name: owner.state_dict() for name, owner in owners.items()})
            for step in range(3 * searches):
                optimizer.zero_grad()
                (loss_of(model, batch(100 + step, 32)) + model[0].side(batch(step, 32)).square().mean()).backward()
                optimizer.step()
            for name in owners if searches else ():
                owners[name].load_state_dict(state[name])
            run(model, optimizer, dgm, first=stop, last=25)
        return model, optimizer, dgm

    assert same(go(True), go(False))
