"""Units that lie by age: what an optimizer is shown in place of a packed weight, and what becomes of it."""

import pytest
import torch

from helpers.controller_runs import STEPS, adamw, constant, fit, run, saved
from helpers.exact import differences
from helpers.storages import check_equal, config, double, trained
from lightning_estdgm.engine import _unit_views
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.modules._packed_forward import PackedForward


class OutOfPlace(torch.optim.Optimizer):
    """Adam whose state is made of new tensors in each step, and its count a number."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                state["count"] = state.get("count", 0) + 1
                for name, beta, value in (("mean", 0.9, weight.grad), ("square", 0.99, weight.grad**2)):
                    state[name] = beta * state.get(name, torch.zeros_like(weight)) + (1 - beta) * value
                mean, square = (state[n] / (1 - b ** state["count"]) for n, b in (("mean", 0.9), ("square", 0.99)))
                weight.sub_(group["lr"] * mean / (square.sqrt() + 1e-8))


def out_of_place(model):
    return OutOfPlace(model.parameters())


def nadam(model):
    return torch.optim.NAdam(model.parameters(), 1e-2)


def foreach(model):
    return torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)


def brief(model):
    """Units are young for a few steps: some until after an update, some until before the next."""
    return torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.3, 0.3))


@pytest.fixture(params=[1, 1 << 20], ids=["views", "copies"])
def few(request, monkeypatch):
    """From how many elements on a cohort is a view; of these small layers all, or none."""
    monkeypatch.setattr(_unit_views, "_FEW", request.param)
    return request.param


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("make", [adamw, foreach, nadam, brief, out_of_place], ids=lambda make: make.__name__)
def test_young_units_step_as_those_of_whole_weights_do(mlp, make):
    check_equal(*(trained(double(mlp(32, 256, 128, 4)), make, config(4, s)) for s in ("dense", "packed")))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("unit", [1, 16])
def test_where_all_units_are_young_the_count_of_the_weight_goes_on(mlp, unit):
    check_equal(*(trained(double(mlp(32, 256, 128, 4)), adamw, config(unit, s)) for s in ("dense", "packed")))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("make", [adamw, brief], ids=lambda make: make.__name__)
def test_a_resumed_run_is_exact_at_any_age(mlp, make):
    model = double(mlp(32, 256, 128, 4))
    optimizer, states, settled = make(model), {}, 0
    with DGMController(model, optimizer, config(4), total_steps=STEPS) as dgm:
        for step, _ in fit(model, optimizer, dgm):
            young = [weight.young for weight in dgm.masked_weights]
            # Units that are young no more, and lie where they were until the next update.
            has_settled = any(cohort.age >= each.lifetime for each in young for cohort in each.cohorts)
            if step % 9 == 5 or (has_settled and settled < 2):
                settled += has_settled
                states[step] = saved([dgm.state_dict(), model.state_dict(), optimizer.state_dict()])
    assert (settled > 0) == (make is brief)
    for step, (state, weights, moments) in states.items():
        again = double(mlp(32, 256, 128, 4, seed=5))
        optimizer2 = make(again)
        with DGMController(again, optimizer2, config(4), total_steps=STEPS) as dgm:
            dgm.load_state_dict(state)
            again.load_state_dict(weights)
            optimizer2.load_state_dict(moments)
            run(again, optimizer2, dgm, first=step + 1)
        assert differences(model.state_dict(), again.state_dict()) == []
        assert differences(optimizer.state_dict()["state"], optimizer2.state_dict()["state"]) == []


def test_what_the_optimizer_steps_is_the_memory_of_the_weights(mlp, monkeypatch):
    monkeypatch.setattr(_unit_views, "_FEW", 1)
    model = mlp(32, 256, 128, 4)
    optimizer, stepped = adamw(model), []

    def note(optimizer, args, kwargs):
        stepped.append([p.untyped_storage().data_ptr() for g in optimizer.param_groups for p in g["params"]])

    settings = config(4, schedule=constant(0.2))
    with DGMController(model, optimizer, settings, total_steps=STEPS) as dgm:
        handle = optimizer.register_step_post_hook(note)
        optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
        run(model, optimizer, dgm, last=9)
        layers = [module for module in model.modules() if isinstance(module, PackedForward)]
        held = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(stepped[0]) == len(list(model.parameters()))
        assert len(stepped[-1]) >= len(stepped[0]) + len(layers)
        assert set(stepped[-1]) <= held
        assert set(optimizer.state) == set(model.parameters())
        assert [id(p) for g in optimizer.param_groups for p in g["params"]] == list(map(id, model.parameters()))
