"""`DGMController` in a plain PyTorch loop: what a loop gets, and what it leaves behind. No Lightning anywhere."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from helpers.controller_runs import (
    BLOCKS,
    SCHEDULE,
    STEPS,
    WEIGHTS,
    adamw,
    batch,
    equal,
    fit,
    full_masks,
    loss_of,
    refuse,
    run,
    sgd,
    traces,
)
from lightning_estdgm.config import DGMConfig, Selection, Units
from lightning_estdgm.engine import _masked_model
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._schedules import EstDgm, Phase, SteppedSchedule

# ------------------------------------------------------------------ what it promises in a plain loop


@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
@pytest.mark.parametrize("make", [adamw, sgd])
def test_the_loop_ends_at_the_final_density_with_exact_zeros_elsewhere(mlp, config, make):
    model = mlp(32, 128, 64, 4)
    optimizer = make(model)
    updates = 0
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        for step, updated in fit(model, optimizer, dgm):
            updates += updated
            assert updated == (dgm.schedule(step + 1).update and step + 1 < STEPS)
            for name, mask in full_masks(dgm).items():
                layer = model.get_submodule(name)
                assert torch.count_nonzero(layer.weight[~mask]) == 0
                assert torch.count_nonzero(layer.weight.grad[~mask]) == 0
                assert torch.count_nonzero(layer.weight[mask]) > 0
        assert dgm.steps == dgm.position == STEPS
        assert (dgm.updates, dgm.phase) == (updates, "refinement")
        total = 128 * 32 + 64 * 128
        unit = config.units.size**2
        assert abs(dgm.density * total - 0.10 * total) < unit
        assert sum(int(mask.sum()) for mask in dgm.masks().values()) * unit == dgm.density * total
        assert set(dgm.masks()) == {"0", "2"}
    assert updates >= 8


def test_a_step_costs_no_more_in_a_long_schedule(mlp, monkeypatch):
    """Every budget and plan that is worked out counts, also where a step goes past much of the schedule."""
    calls = []
    plan, budgets = SteppedSchedule.__call__, _masked_model.unit_budgets
    monkeypatch.setattr(SteppedSchedule, "__call__", lambda self, step: calls.append("plan") or plan(self, step))
    monkeypatch.setattr(_masked_model, "unit_budgets", lambda *args: calls.append("budgets") or budgets(*args))

    def counted(total):
        calls.clear()
        model = mlp(32, 128, 64, 4)
        model[2].requires_grad_(False)
        optimizer = adamw(model)
        config = DGMConfig(EstDgm(update_every=5), backend="dense", units=Units(size=1))
        with DGMController(model, optimizer, config, total_steps=total) as dgm:
            for step in range(10):
                optimizer.zero_grad()
                loss_of(model, batch(step, 32)).backward()
                dgm.mask_gradients()
                optimizer.step()
                dgm.advance((step + 1) * total // 10)
                if step == 0:
                    model[2].requires_grad_(True)
                    assert dgm.late_layers() == []  # an update that is left takes it in
        return {name: calls.count(name) for name in ("plan", "budgets")}

    short, long = counted(1000), counted(200_000)
    assert long["plan"] <= short["plan"] + 20
    assert long["budgets"] < 2 * 1000 + short["budgets"]  # of 40,000


def test_densities_follow_the_schedule_at_every_step(mlp):
    model = mlp(32, 128, 64, 4)
    optimizer = adamw(model)
    total = 128 * 32 + 64 * 128
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        for step, _ in fit(model, optimizer, dgm):
            plan = dgm.schedule(min(step + 1, STEPS - 1))
            assert dgm.density == round(plan.density * total) / total
            assert dgm.phase == plan.phase
            assert dgm.observing == (plan.observe and step + 1 < STEPS)


def test_a_dense_warm_up_changes_nothing_until_it_ends(mlp):
    config = DGMConfig(EstDgm(warmup=10, update_every=4, observe_steps=2), units=Units(size=1))
    model, plain = mlp(32, 64, 4), mlp(32, 64, 4)
    optimizer, theirs = adamw(model), adamw(plain)
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        assert (dgm.density, dgm.phase) == (1.0, "warmup")
        for step, _ in fit(model, optimizer, dgm, last=10):
            theirs.zero_grad()
            loss_of(plain, batch(step, 32)).backward()
            theirs.step()
            if step < 9:
                assert equal(model, plain)
        assert dgm.phase == "exploration"
        assert dgm.density == round(0.7 * 2048) / 2048
        # Weights went, with no scaling of those that stay.
        mask = dgm.masks()["0"]
        assert torch.equal(model[0].weight, plain[0].weight * mask)


def test_training_with_masks_learns(mlp):
    model = mlp(32, 128, 64, 4)
    optimizer = adamw(model)
    before = sum(loss_of(model, batch(s, 32)).item() for s in range(5000, 5010))
    with DGMController(model, optimizer, WEIGHTS, total_steps=200, audit=False) as dgm:
        run(model, optimizer, dgm, last=200)
    assert sum(loss_of(model, batch(s, 32)).item() for s in range(5000, 5010)) < 0.7 * before


def test_masks_are_copies(mlp):
    model = mlp(32, 64, 4)
    with DGMController(model, adamw(model), WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        dgm.masks()["0"].fill_(False)
        assert dgm.masks()["0"].any()


# ------------------------------------------------------------------ leaving nothing behind


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
def test_close_takes_every_hook_and_class_away(mlp, config, steps):
    model = mlp(32, 128, 64, 4)
    optimizer = adamw(model)
    before = traces(model, optimizer)
    # By gradients, the first layer's inactive blocks are dead.
    config = config.merged(update_rule={"keep": "magnitude"})
    dgm = DGMController(model, optimizer, config, total_steps=STEPS, audit=False)
    assert traces(model, optimizer) != before
    run(model, optimizer, dgm, last=steps)
    weights = copy.deepcopy(model.state_dict())
    dgm.close()
    assert traces(model, optimizer) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    masks = dgm.masks()
    dgm.close()
    assert all(torch.equal(masks[name], mask) for name, mask in dgm.masks().items())
    # The optimizer is its own again: inactive weights move.
    loss_of(model, batch(0, 32)).backward()
    optimizer.step()
    assert torch.count_nonzero(model[0].weight[~full_masks(dgm)["0"]]) > 0


def test_an_exception_leaves_nothing_behind(mlp):
    model = mlp(32, 128, 64, 4)
    optimizer = adamw(model)
    before = traces(model, optimizer)

    def interrupted():
        with DGMController(model, optimizer, BLOCKS, total_steps=STEPS, audit=False) as dgm:
            run(model, optimizer, dgm, last=5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert traces(model, optimizer) == before


@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
def test_state_dict_keys_are_the_dense_models(mlp, config):
    model = mlp(32, 128, 64, 4)
    with DGMController(model, adamw(model), config, total_steps=STEPS, audit=False):
        twin = mlp(32, 128, 64, 4, seed=1)
        twin.load_state_dict(model.state_dict(), strict=True)
        assert list(model.state_dict()) == list(twin.state_dict())
        x = batch(0, 32)
        torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
def test_a_model_under_way_can_be_copied_and_pickled(mlp, config, duplicate):
    model = mlp(32, 64, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        early = duplicate(model)  # before the first step the model still holds the probes' hooks
        assert list(early.state_dict()) == list(model.state_dict())
        run(model, optimizer, dgm, last=8)
        twin = duplicate(model)
        x = batch(0, 32)
        expected = model(x)
        run(model, optimizer, dgm, first=8, last=16)
    torch.testing.assert_close(twin(x), expected)
    assert list(twin.state_dict()) == list(model.state_dict())


# Dynamo and the inductor warn about themselves under some versions of Python and torch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
def test_a_compiled_model_trains_as_the_plain_one(mlp, config):
    torch._dynamo.reset()
    plain, inner = mlp(32, 64, 64, 4), mlp(32, 64, 64, 4)
    compiled = torch.compile(inner, backend="aot_eager")
    one, two = sgd(plain), sgd(compiled)
    with (
        DGMController(plain, one, config, total_steps=STEPS, audit=False) as dgm,
        DGMController(compiled, two, config, total_steps=STEPS, audit=False) as other,
    ):
        run(plain, one, dgm, last=16)
        run(compiled, two, other, last=16)
        assert dgm.updates == other.updates >= 3
        for name, mask in dgm.masks().items():
            assert torch.equal(mask, other.masks()[name])
    for a, b in zip(plain.parameters(), inner.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert list(other.masks()) == ["0", "2"]


# ------------------------------------------------------------------ position in the schedule


def test_a_run_limited_by_time_moves_through_the_schedule_by_position(mlp):
    model = mlp(32, 64, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=1000, audit=False) as dgm:
        updates = 0
        for step in range(60):
            optimizer.zero_grad()
            loss_of(model, batch(step, 32)).backward()
            optimizer.step()
            updates += dgm.advance(position=min(1000, step * 20))
        assert (dgm.steps, dgm.position, dgm.phase) == (60, 1000, "refinement")
        assert updates > 10
        assert dgm.density == pytest.approx(0.10, abs=1e-4)


def test_a_position_does_not_go_backwards(mlp):
    model = mlp(32, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        run(model, optimizer, dgm, last=5)
        loss_of(model, batch(0, 32)).backward()
        optimizer.step()
        with pytest.raises(ValueError, match="position must not go backwards: was 5, got 3"):
            dgm.advance(position=3)


# ------------------------------------------------------------------ what it refuses


def test_a_model_has_one_controller_at_a_time(mlp):
    model = mlp(32, 64, 64, 4)
    with (
        DGMController(model, sgd(model), BLOCKS, total_steps=STEPS, audit=False),
        pytest.raises(ValueError, match="under another DGMController already: close that one first"),
    ):
        DGMController(model, sgd(model), BLOCKS, total_steps=STEPS, audit=False)


def test_no_layer_to_mask_is_refused():
    refuse(nn.Sequential(nn.Linear(8, 4)), "the model has no layer to mask")


def test_a_selector_that_matches_nothing_is_refused(mlp):
    refuse(
        mlp(8, 8, 4),
        re.escape("exclude='body.*' matches none of"),
        DGMConfig(SCHEDULE, selection=Selection(exclude=["body.*"])),
    )


def test_a_weight_in_no_optimizer_stays_dense(mlp):
    model = mlp(32, 64, 64, 4)
    with DGMController(model, sgd(model[2]), WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        first = dgm.decisions()[0]
        assert (first.masked, first.why) == (False, "no optimizer holds its weight")
        assert list(dgm.masks()) == ["2"]
    refuse(model, "the model has no layer to mask", WEIGHTS, sgd(model[4]))


def test_a_run_too_short_or_not_covered_is_refused(mlp):
    refuse(mlp(32, 64, 4), "a run of 2 steps is too short", total_steps=2)
    steps = EstDgm(Phase(0.7, 0.6, 15), Phase(0.3, 0.2, 35), Phase(0.15, 0.1, 50))
    refuse(
        mlp(32, 64, 4),
        "phases must cover the run: .*make 100 steps, but the run has 90",
        DGMConfig(steps),
        total_steps=90,
    )
