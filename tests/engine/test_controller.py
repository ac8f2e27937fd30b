"""The method in a plain PyTorch loop: no Lightning anywhere in this file."""

import copy
import dataclasses
import io
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_estdgm.config import DGMConfig, Selection, StepSize, Units
from lightning_estdgm.engine.controller import DGMController
from lightning_estdgm.method.schedules import EstDgm, Phase
from lightning_estdgm.method.update_rule import UpdateRule
from lightning_estdgm.sparse.autotune.choice import BackendSelector
from lightning_estdgm.sparse.conv_geometry import ConvGeometry

STEPS = 40
SCHEDULE = EstDgm(update_every=4, observe_steps=2)  # updates before steps 3, 6, 10, 13, ...
WEIGHTS = DGMConfig(SCHEDULE, units=Units(size=1))
BLOCKS = DGMConfig(SCHEDULE, units=Units(size=16), backend="cpu")


def constant(density: float) -> EstDgm:
    return EstDgm(*(Phase(density, density, share) for share in (0.15, 0.35, 0.5)), update_every=4, observe_steps=2)


def batch(step: int, width: int) -> torch.Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(1000 + step))


def loss_of(model, x):
    return F.mse_loss(model(x), x[:, :4].sin())


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def fit(model, optimizer, dgm, first=0, last=STEPS, width=32):
    """Do the steps `first` to `last`; yields after each, for what a test wants to see."""
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, batch(step, width)).backward()
        dgm.mask_gradients()
        optimizer.step()
        yield step, dgm.advance()


def run(*args, **kwargs):
    for _ in fit(*args, **kwargs):
        pass


def full_masks(dgm):
    """Weight masks by layer name."""
    sizes = {d.name: d.block_size for d in dgm.decisions() if d.masked}
    expand = {n: m.repeat_interleave(sizes[n], 0).repeat_interleave(sizes[n], 1) for n, m in dgm.masks().items()}
    return {n: dgm.masks()[n] if sizes[n] == 1 else m for n, m in expand.items()}


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ------------------------------------------------------------------ what it promises in a plain loop


@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
@pytest.mark.parametrize("make", [adamw, sgd])
def test_the_loop_ends_at_the_final_density_with_exact_zeros_elsewhere(mlp, config, make):
    model = mlp(32, 128, 64, 4)
    optimizer = make(model)
    updates = 0
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
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


def test_densities_follow_the_schedule_at_every_step(mlp):
    model = mlp(32, 128, 64, 4)
    optimizer = adamw(model)
    total = 128 * 32 + 64 * 128
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        for step, _ in fit(model, optimizer, dgm):
            plan = dgm.schedule(min(step + 1, STEPS - 1))
            assert dgm.density == round(plan.density * total) / total
            assert dgm.phase == plan.phase
            assert dgm.observing == (plan.observe and step + 1 < STEPS)


def test_buffers_exist_only_inside_a_window(mlp):
    model = mlp(32, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        for step, _ in fit(model, optimizer, dgm):
            window = dgm.state_dict()["layers"]["0"]["window"]
            seen = sum(dgm.schedule(s).observe for s in (step - 1, step)) if dgm.schedule(step).observe else 0
            inside = seen and not dgm.schedule(step + 1).update
            assert (window["samples"] if window else 0) == (seen if inside else 0)


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


def test_training_with_masks_learns(mlp):
    model = mlp(32, 128, 64, 4)
    optimizer = adamw(model)
    before = sum(loss_of(model, batch(s, 32)).item() for s in range(5000, 5010))
    with DGMController(model, optimizer, WEIGHTS, total_steps=200) as dgm:
        run(model, optimizer, dgm, last=200)
    assert sum(loss_of(model, batch(s, 32)).item() for s in range(5000, 5010)) < 0.7 * before


# ------------------------------------------------------------------ leaving nothing behind


def traces(model, optimizer):
    """All that the controller could leave behind."""
    return (
        [type(m) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        [len(m._forward_hooks) for m in model.modules()],
        [name for name, _ in model.named_buffers()],
        list(model.state_dict()),
        len(optimizer._optimizer_step_pre_hooks),
        len(optimizer._optimizer_step_post_hooks),
    )


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
def test_close_takes_every_hook_and_class_away(mlp, config, steps):
    model = mlp(32, 128, 64, 4)
    optimizer = adamw(model)
    before = traces(model, optimizer)
    config = config.merged(
        update_rule={"keep": "magnitude"}
    )  # by gradients, the first layer's inactive blocks are dead
    dgm = DGMController(model, optimizer, config, total_steps=STEPS)
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
        with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
            run(model, optimizer, dgm, last=5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert traces(model, optimizer) == before


@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
def test_state_dict_keys_are_the_dense_models(mlp, config):
    model = mlp(32, 128, 64, 4)
    with DGMController(model, adamw(model), config, total_steps=STEPS):
        twin = mlp(32, 128, 64, 4, seed=1)
        twin.load_state_dict(model.state_dict(), strict=True)
        assert list(model.state_dict()) == list(twin.state_dict())
        x = batch(0, 32)
        torch.testing.assert_close(model(x), twin(x))


def test_param_groups_stay_as_the_user_made_them(mlp):
    model = mlp(32, 128, 64, 4)
    groups = [
        {"params": model[0].parameters(), "lr": 0.03},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, 0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=10)

    def settings():
        return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        for step, _ in fit(model, optimizer, dgm):
            before = settings()
            scheduler.step()
            assert [g["lr"] for g in before] == pytest.approx([lr * min(1, 0.5 + step / 20) for lr in (0.03, 0.01)])
            assert [sorted(g) for g in settings()] == [sorted(g) for g in before]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == held


# ------------------------------------------------------------------ steps and initial weights


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("make", [adamw, sgd])
def test_a_layer_steps_as_its_density_asks(mlp, make, exponent):
    config = DGMConfig(
        constant(0.25), units=Units(size=1, distribution="uniform"), step_size=StepSize(exponent=exponent)
    )
    model = mlp(32, 128, 64, 4, dtype=torch.float64)
    optimizer = make(model)
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        for step in range(5):
            twin = copy.deepcopy(model)
            plain = make(twin)
            plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            before = {name: p.clone() for name, p in model.named_parameters()}
            for net, stepper in ((model, optimizer), (twin, plain)):
                stepper.zero_grad()
                loss_of(net, batch(step, 32).double()).backward()
            masks = full_masks(dgm)
            for name, mask in masks.items():
                twin.get_submodule(name).weight.grad.mul_(mask)
            dgm.mask_gradients()
            optimizer.step()
            plain.step()
            for name, p in twin.named_parameters():
                scale = 0.25**-exponent if name in ("0.weight", "2.weight") else 1.0
                expected = before[name] + scale * (p - before[name])
                torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-12, atol=1e-14)
                assert (p - before[name]).abs().max() > 1e-6
            dgm.advance()


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        (WEIGHTS, True),
        (DGMConfig(SCHEDULE, units=Units(size=1), step_size=StepSize(scale_initial_weights=False)), False),
    ],
)
def test_initial_weights_are_scaled(mlp, config, factor):
    model, plain = mlp(32, 128, 64, 4), mlp(32, 128, 64, 4)
    with DGMController(model, adamw(model), config, total_steps=STEPS) as dgm:
        for name, mask in dgm.masks().items():
            scale = dgm.layer_densities()[name] ** -0.5 if factor else 1.0
            expected = plain.get_submodule(name).weight * mask * scale
            torch.testing.assert_close(model.get_submodule(name).weight, expected)
    assert torch.equal(model[4].weight, plain[4].weight)


def test_a_dense_warm_up_changes_nothing_until_it_ends(mlp):
    config = DGMConfig(EstDgm(warmup=10, update_every=4, observe_steps=2), units=Units(size=1))
    model, plain = mlp(32, 64, 4), mlp(32, 64, 4)
    optimizer, theirs = adamw(model), adamw(plain)
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
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


def test_grown_weights_start_at_zero_with_a_clean_state(mlp):
    model = mlp(32, 64, 4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    grown_any = dropped_any = False
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        before = dgm.masks()["0"]
        for _, updated in fit(model, optimizer, dgm):
            after = dgm.masks()["0"]
            changed = before ^ after
            assert updated or not changed.any()
            state = optimizer.state[model[0].weight]
            for tensor in (model[0].weight, state["exp_avg"], state["exp_avg_sq"]):
                assert torch.count_nonzero(tensor[changed]) == 0
            assert torch.count_nonzero(state["exp_avg"][after & before]) > 0
            grown_any |= bool((after & ~before).any())
            dropped_any |= bool((before & ~after).any())
            before = after
    assert grown_any
    assert dropped_any


@pytest.mark.parametrize("block_size", [1, 16])
def test_frozen_keeps_inactive_weights_bitwise_and_never_scales(mlp, block_size):
    config = DGMConfig(SCHEDULE, units=Units(size=block_size), inactive="frozen")
    model = mlp(32, 128, 64, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    start = copy.deepcopy(model.state_dict())
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())
        for step in range(STEPS):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            masks = full_masks(dgm)
            optimizer.zero_grad()
            loss_of(model, batch(step, 32)).backward()
            raw = {name: model.get_submodule(name).weight.grad.clone() for name in masks}
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
            for name, mask in masks.items():
                old = before[f"{name}.weight"]
                expected = torch.where(mask, old - 0.1 * (raw[name] + 0.1 * old), old)
                torch.testing.assert_close(model.get_submodule(name).weight, expected)
                assert torch.equal(model.get_submodule(name).weight[~mask], old[~mask])
                assert (~mask).any()
        assert dgm.density < 0.2


# ------------------------------------------------------------------ gradients


def test_gradients_are_masked_also_where_they_are_infinite_and_without_the_call(mlp):
    model = mlp(32, 64, 4)
    optimizer = sgd(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        off = ~dgm.masks()["0"]
        loss_of(model, batch(0, 32)).backward()
        model[0].weight.grad[off] = float("inf")
        dgm.mask_gradients()
        assert torch.count_nonzero(model[0].weight.grad[off]) == 0
        assert model[0].weight.grad.isfinite().all()
        model[0].weight.grad[off] = float("nan")
        optimizer.step()  # a loop that forgot the call: the hook masks before the step
        assert model[0].weight.isfinite().all()


def write(model, gradient):
    gradient.fill_(1.0)


def write_to_a_view(model, gradient):
    gradient.t().add_(1.0)


def backward_again(model, gradient):
    model[0].weight.square().sum().add(model[0].weight.sum()).backward()


def replace(model, gradient):
    model[0].weight.grad = torch.ones_like(gradient)


@pytest.mark.parametrize("touch", [write, write_to_a_view, backward_again, replace])
@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
def test_the_optimizer_gets_masked_gradients_and_untouched_ones_are_not_masked_again(mlp, config, touch):
    model = mlp(32, 128, 64, 4)
    optimizer = sgd(model)
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append((weight.grad.clone(), weight.grad._version)))
        weight, off = model[0].weight, ~full_masks(dgm)["0"]
        for touched in (False, True, False):
            optimizer.zero_grad(set_to_none=not touched)
            loss_of(model, batch(0, 32)).backward()
            dgm.mask_gradients()
            if touched:
                touch(model, weight.grad)
                assert torch.count_nonzero(weight.grad[off]) > 0
            writes = weight.grad._version
            optimizer.step()
            dgm.advance()
            gradient, version = seen[-1]
            assert torch.count_nonzero(gradient[off]) == 0
            assert version == writes + touched


def test_views_of_one_buffer_are_told_to_be_masked(mlp):
    """As DDP and FSDP make gradients: torch counts the writes to all of them together."""
    model = mlp(32, 64, 64, 4)
    optimizer = sgd(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        loss_of(model, batch(0, 32)).backward()
        buffer = torch.cat([p.grad.flatten() for p in model.parameters()])
        for p, part in zip(model.parameters(), buffer.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = part.view_as(p)
        dgm.mask_gradients()
        writes = buffer._version
        optimizer.step()
        assert buffer._version == writes


def test_the_copy_before_a_step_holds_few_active_blocks_alone(mlp):
    model = mlp(64, 128, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
        for _ in fit(model, optimizer, dgm, width=64):
            kept = [layer.snapshot.values for layer in dgm.masked_weights]
            for layer, copied in zip(dgm.masked_weights, kept, strict=True):
                if copied is not None:  # not right after an update of the masks
                    few = layer.density <= 1 / 3
                    assert copied.numel() == (layer.active * 16 * 16 if few else layer.weight.numel())
    assert copied is not None
    assert few


def test_the_first_call_in_a_step_is_the_one_observed(mlp):
    def final(calls):
        model = mlp(32, 64, 4)
        optimizer = sgd(model)
        with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
            for step in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, batch(step, 32)).backward()
                for _ in range(calls):
                    dgm.mask_gradients()
                optimizer.step()
                dgm.advance()
        return model

    assert equal(final(1), final(3))
    assert equal(final(1), final(0))  # none: the hook before the step observes and masks


def test_a_gradient_scale_is_taken_out(mlp):
    def final(scales, told):
        model = mlp(32, 64, 4)
        optimizer = sgd(model)
        with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
            for step in range(STEPS):
                scale = scales[step % 2]
                optimizer.zero_grad()
                (scale * loss_of(model, batch(step, 32))).backward()
                dgm.mask_gradients(grad_scale=scale if told else 1.0)
                for p in model.parameters():
                    p.grad.div_(scale)
                optimizer.step()
                dgm.advance()
        return model

    plain = final((1.0, 1.0), told=True)
    assert equal(plain, final((2.0**10, 2.0**-3), told=True))
    assert not equal(plain, final((2.0**10, 2.0**-3), told=False))


def fit_with_bad_gradients(mlp, bad_steps, value=float("nan")):
    """Train with a gradient that is not finite at some steps; the loop itself leaves out those updates."""
    model = mlp(32, 64, 64, 4)
    optimizer = sgd(model)
    updated = []
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, batch(step, 32)).backward()
            if step in bad_steps:
                model[2].weight.grad[0, 0] = value
            dgm.mask_gradients()
            for p in model.parameters() if step in bad_steps else ():
                p.grad.zero_()
            optimizer.step()
            if dgm.advance():
                updated.append(step + 1)
    return model, dgm, updated


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_left_out_and_said_once(mlp, value):
    plain, _, updates = fit_with_bad_gradients(mlp, ())
    window = [step for step in range(STEPS) if SCHEDULE.resolve(STEPS)(step).observe]
    assert updates[0] - window[0] == 2
    with pytest.warns(RuntimeWarning, match=f"step {window[0]}: a gradient was NaN or infinite") as said:
        model, _, found = fit_with_bad_gradients(mlp, (window[0], window[2]), value)
    assert len(said) == 1
    assert found == updates
    assert all(p.isfinite().all() for p in model.parameters())
    assert not equal(model, plain)


def test_an_update_waits_until_something_could_be_observed(mlp):
    _, _, updates = fit_with_bad_gradients(mlp, ())
    at = updates[0]
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        model, dgm, late = fit_with_bad_gradients(mlp, (at - 2, at - 1, at))
    # The first sample after the due step is the one of step at + 1.
    assert late == [at + 2, *updates[1:]]
    assert dgm.density == pytest.approx(0.10, abs=1e-3)
    assert all(p.isfinite().all() for p in model.parameters())


class Branches(nn.Module):
    """A network of which one layer gets no gradient."""

    def __init__(self, mlp):
        super().__init__()
        self.used = mlp(32, 64, 64)
        self.unused = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.used(x))


def test_a_layer_without_gradient_follows_the_budget_and_grows_nothing(mlp):
    torch.manual_seed(0)
    model = Branches(mlp)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        start = model.unused.weight.detach().clone()
        before = dgm.masks()["unused"]
        for _ in fit(model, optimizer, dgm):
            after = dgm.masks()["unused"]
            assert not (after & ~before).any()
            before = after
            assert torch.equal(model.unused.weight, start * after)
        assert dgm.density == pytest.approx(0.10, abs=1e-4)
        dropped = start[~after & (start != 0)].abs()
        assert dropped.max() <= start[after].abs().min()


# ------------------------------------------------------------------ other optimizers, wrappers, layers


def test_two_optimizers_each_keep_their_own_layers(mlp):
    model, single = mlp(32, 64, 64, 4), mlp(32, 64, 64, 4)
    first = torch.optim.SGD(model[0].parameters(), 0.1)
    second = torch.optim.SGD([*model[2].parameters(), *model[4].parameters()], 0.1)
    both = sgd(single)
    with (
        DGMController(model, [first, second], WEIGHTS, total_steps=STEPS) as dgm,
        DGMController(single, both, WEIGHTS, total_steps=STEPS) as other,
    ):
        for step in range(STEPS):
            first.zero_grad()
            second.zero_grad()
            loss_of(model, batch(step, 32)).backward()
            for optimizer in (first, second):
                dgm.mask_gradients(optimizer)
                optimizer.step()
            dgm.advance()
        run(single, both, other)
        assert dgm.steps == STEPS
    assert equal(model, single)


def test_steps_are_counted_when_only_one_of_two_optimizers_steps(mlp):
    model = mlp(32, 64, 64, 4)
    first = torch.optim.SGD(model[0].parameters(), 0.1)
    second = torch.optim.SGD([*model[2].parameters(), *model[4].parameters()], 0.1)
    with DGMController(model, [first, second], WEIGHTS, total_steps=STEPS) as dgm:
        assert not dgm.advance()
        assert dgm.steps == 0
        for step in range(6):
            model.zero_grad()
            loss_of(model, batch(step, 32)).backward()
            (first, second)[step % 2].step()
            dgm.advance()
        assert dgm.steps == 6
        model.zero_grad()
        first.step()  # no gradient: nothing happened
        dgm.advance()
        assert dgm.steps == 6


def test_lbfgs_with_a_closure(mlp):
    model = mlp(32, 64, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    losses = []
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        for _ in range(STEPS):

            def closure():
                optimizer.zero_grad()
                loss = loss_of(model, batch(0, 32))
                loss.backward()
                dgm.mask_gradients()
                return loss

            losses.append(optimizer.step(closure).item())
            dgm.advance()
            assert torch.count_nonzero(model[0].weight[~dgm.masks()["0"]]) == 0
        assert (dgm.steps, dgm.density) == (STEPS, round(0.1 * 2048) / 2048)
    assert losses[-1] < 0.5 * losses[0]


# Dynamo and the inductor warn about themselves under some versions of Python and torch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
def test_a_compiled_model_trains_as_the_plain_one(mlp, config):
    torch._dynamo.reset()
    plain, inner = mlp(32, 64, 64, 4), mlp(32, 64, 64, 4)
    compiled = torch.compile(inner, backend="aot_eager")
    one, two = sgd(plain), sgd(compiled)
    with (
        DGMController(plain, one, config, total_steps=STEPS) as dgm,
        DGMController(compiled, two, config, total_steps=STEPS) as other,
    ):
        run(plain, one, dgm, last=16)
        run(compiled, two, other, last=16)
        assert dgm.updates == other.updates >= 3
        for name, mask in dgm.masks().items():
            assert torch.equal(mask, other.masks()[name])
    for a, b in zip(plain.parameters(), inner.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert list(other.masks()) == ["0", "2"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("config", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
def test_a_model_under_way_can_be_copied_and_pickled(mlp, config, duplicate):
    model = mlp(32, 64, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        early = duplicate(model)  # before the first step the model still holds the probes' hooks
        assert list(early.state_dict()) == list(model.state_dict())
        run(model, optimizer, dgm, last=8)
        twin = duplicate(model)
        x = batch(0, 32)
        expected = model(x)
        run(model, optimizer, dgm, first=8, last=16)
    torch.testing.assert_close(twin(x), expected)
    assert list(twin.state_dict()) == list(model.state_dict())


def test_hugging_face_conv1d_layers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = nn.Sequential(pytorch_utils.Conv1D(128, 32), nn.Tanh(), pytorch_utils.Conv1D(64, 128), nn.Linear(64, 4))
    optimizer = adamw(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
        for _ in fit(model, optimizer, dgm):
            for name, mask in full_masks(dgm).items():
                assert torch.count_nonzero(model.get_submodule(name).weight[~mask.t()]) == 0
        assert dgm.masks()["0"].shape == (8, 2)
        assert [d.shape for d in dgm.decisions()] == [(32, 128), (128, 64), (4, 64)]
        assert dgm.density == pytest.approx(0.1, abs=256 / (32 * 128 + 128 * 64))


def test_pyg_linear_layers():
    pyg = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    model = nn.Sequential(pyg.Linear(32, 128), nn.Tanh(), pyg.Linear(128, 64), nn.Linear(64, 4))
    optimizer = adamw(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
        run(model, optimizer, dgm)
        for name, mask in full_masks(dgm).items():
            assert torch.count_nonzero(model.get_submodule(name).weight[~mask]) == 0
        assert [d.backend for d in dgm.decisions()] == ["cpu", "cpu", "dense"]


class Residual(nn.Module):
    """A small residual net: strides, 1x1, 3x3, dilated, 1-D, grouped and depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.down = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(32, 48, 1, stride=2, bias=False)
        self.same = nn.Conv2d(48, 48, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(48, 48, 3, padding=1, groups=3)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.point = nn.Conv2d(48, 64, 1)
        self.length = nn.Conv1d(64, 32, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (self.same(self.down(x).relu()) + self.skip(x)).relu()
        x = self.point(self.depthwise(self.grouped(x)).relu()).relu()
        return self.head(self.length(x.flatten(2)).mean(2))


IN_BLOCKS = ("down", "skip", "same", "point", "length")
IMAGES = DGMConfig(SCHEDULE, units=Units(size=16), selection=Selection(exclude=("stem", "depthwise")))


def fit_images(config, channels_last=False, steps=20):
    """Train a `Residual`; yields it with its controller, from before the first step on."""
    torch.manual_seed(0)
    model = Residual()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        yield model, dgm
        for step in range(steps):
            optimizer.zero_grad()
            x = batch(step, 3 * 64).view(8, 3, 8, 8)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            F.mse_loss(model(x), x[:, 0, 0, :4].sin()).backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
            yield model, dgm


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


def test_layers_that_stay_dense_say_why():
    *_, (_, dgm) = fit_images(dataclasses.replace(IMAGES, backend="reference", units=Units()), steps=1)
    said = {d.name: (d.backend, d.why) for d in dgm.decisions()}
    assert said["grouped"] == ("dense", "grouped convolution: no sparse operator")
    assert said["down"] == ("dense", "fewer than 8 blocks of 16 a side")
    assert said["depthwise"] == ("dense", "excluded")


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
    with DGMController(copied, sgd(copied), IMAGES, total_steps=STEPS, state=saved(state)) as resumed:
        resumed._dispatch.apply()
    assert {(c.batch, c.height, c.width) for c in asked.cases} == seen
    # A state from before there were such operators: choices are for an image of no particular size.
    del state["images"]
    asked.cases.clear()
    with DGMController(copied, sgd(copied), IMAGES, total_steps=STEPS, state=saved(state)) as resumed:
        resumed._dispatch.apply()
        assert {c.geometry.output_size(c.height, c.width) for c in asked.cases} == {(14, 14), (1, 196)}


def test_an_older_run_keeps_its_units_where_automatic_blocks_are_others_now():
    model = nn.Sequential(nn.Conv2d(128, 128, 1), nn.Flatten(), nn.Linear(128, 4))
    config = DGMConfig(SCHEDULE, backend="dense")
    with DGMController(model, sgd(model), config.merged(units={"size": 1}), total_steps=STEPS) as dgm:
        state = dgm.state_dict()
        masks = dgm.masks()
    with DGMController(model, sgd(model), config, total_steps=STEPS, state=state) as resumed:
        assert resumed.decisions()[0].block_size == 1
        assert resumed.decisions()[0].why == "units of 1 as in the checkpoint"
        assert torch.equal(resumed.masks()["0"], masks["0"])
    with DGMController(model, sgd(model), config, total_steps=STEPS) as new:
        assert new.decisions()[0].block_size == 16


@pytest.mark.parametrize(("backend", "skips"), [("dense", False), ("reference", False), ("cpu", True)])
def test_convolutions_count_what_their_backend_skips(backend, skips):
    schedule = dataclasses.replace(constant(0.25), observe_steps=1)
    config = IMAGES.merged(schedule=schedule, units={"distribution": "uniform"}, backend=backend)
    *_, (model, dgm) = fit_images(config, steps=1)
    assert not schedule.resolve(STEPS)(0).observe
    pixels = {"stem": 64, "down": 16, "skip": 16, "same": 16, "grouped": 16, "depthwise": 16, "point": 16, "length": 16}
    products = {name: 2 * 8 * n * getattr(model, name).weight.numel() for name, n in pixels.items()}
    products["head"] = 2 * 8 * 4 * 32
    skipped = sum(products[d.name] * (1 - d.density) for d in dgm.decisions() if d.name in IN_BLOCKS)
    assert dgm.flops["dense"] == 3 * sum(products.values())
    assert dgm.flops["executed"] == pytest.approx(dgm.flops["dense"] - 3 * skipped * skips)


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


# ------------------------------------------------------------------ what it counts


def test_flops_ratios_by_hand(mlp):
    schedule = EstDgm(*(Phase(0.25, 0.25, n) for n in (4, 4, 8)), update_every=4, observe_steps=1, freeze=0.5)
    model = mlp(32, 64, 4)
    optimizer = sgd(model)
    with DGMController(model, optimizer, DGMConfig(schedule, units=Units(size=1)), total_steps=16) as dgm:
        run(model, optimizer, dgm, last=16)
        observed = sum(schedule.resolve(16)(step).observe for step in range(16))
        assert observed == 3
        masked, head = 32 * 64, 64 * 4
        dense = 16 * 3 * (masked + head)
        done = 16 * 3 * head + masked * (16 * 3 * 0.25 + observed * 0.75)
        assert dgm.flops_ratio == pytest.approx(done / dense)
        assert dgm.flops_executed_ratio == 1.0


def test_explored_and_churn(mlp):
    model = mlp(32, 64, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        seen = dgm.masks()
        before = dgm.masks()
        assert dgm.explored == dgm.density
        total = 32 * 64 + 64 * 64
        for _, updated in fit(model, optimizer, dgm):
            now = dgm.masks()
            seen = {name: seen[name] | mask for name, mask in now.items()}
            assert dgm.explored == sum(int(m.sum()) for m in seen.values()) / total
            if updated:
                grown = sum(int((mask & ~before[name]).sum()) for name, mask in now.items())
                assert dgm.churn == grown / sum(int(m.sum()) for m in now.values())
            before = now


def test_masks_are_copies(mlp):
    model = mlp(32, 64, 4)
    with DGMController(model, adamw(model), WEIGHTS, total_steps=STEPS) as dgm:
        dgm.masks()["0"].fill_(False)
        assert dgm.masks()["0"].any()


def test_the_seed_decides_the_first_masks_and_nothing_else_does(mlp):
    def first(seed):
        torch.seed()
        model = mlp(32, 64, 4)
        with DGMController(
            model, adamw(model), DGMConfig(SCHEDULE, units=Units(size=1), seed=seed), total_steps=STEPS
        ) as dgm:
            return dgm.masks()["0"]

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


# ------------------------------------------------------------------ position in the schedule


def test_a_run_limited_by_time_moves_through_the_schedule_by_position(mlp):
    model = mlp(32, 64, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=1000) as dgm:
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
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        run(model, optimizer, dgm, last=5)
        loss_of(model, batch(0, 32)).backward()
        optimizer.step()
        with pytest.raises(ValueError, match="position must not go backwards: was 5, got 3"):
            dgm.advance(position=3)


# ------------------------------------------------------------------ resuming


def saved(thing):
    """Send through a file that holds plain types only."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(mlp, config, stop, tamper=lambda state: None, load_late=False):
    """Train to `stop`, save all, and go on in new objects."""
    model = mlp(32, 256, 128, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        run(model, optimizer, dgm, last=stop)
        state = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "dgm": dgm.state_dict()})
    tamper(state["dgm"])
    model = mlp(32, 256, 128, 4, seed=99)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config, total_steps=STEPS, state=None if load_late else state["dgm"]) as dgm:
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
            with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
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
                DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, state=state) as dgm,
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


# ------------------------------------------------------------------ what it refuses


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


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (lambda shapes, density: [density] * 5, "must return 2 densities in (0, 1], one for each layer"),
        (lambda shapes, density: [2.0, density], "must return 2 densities in (0, 1], one for each layer"),
        (lambda shapes, density: [density / 3] * 2, "must keep to the density 0.7 of the whole, got 0.233"),
    ],
)
def test_a_distribution_must_keep_to_the_budget(mlp, distribution, message):
    model = mlp(32, 64, 64, 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        DGMController(model, sgd(model), DGMConfig(units=Units(distribution=distribution, size=1)), total_steps=STEPS)


def test_flops_count_every_position_that_a_weight_is_applied_to():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 2, stride=2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 2)

        def forward(self, x):
            tokens = self.up(x).flatten(2).repeat(1, 1, 1)[:, :, :8]
            return self.last(self.attention(tokens, tokens, tokens)[0])

    model = Model()
    optimizer = sgd(model)
    with DGMController(model, optimizer, DGMConfig(units=Units(size=1)), total_steps=STEPS) as dgm:
        model(torch.randn(5, 2, 2, 2)).sum().backward()
        optimizer.step()
        dgm.advance()
        sizes = {"up": 24 * 20, "in_proj": 192 * 15, "out_proj": 64 * 15, "last": 16 * 15}  # weights x positions
        assert dgm.flops["dense"] == 6 * sum(sizes.values())


def test_a_model_has_one_controller_at_a_time(mlp):
    model = mlp(32, 64, 64, 4)
    with (
        DGMController(model, sgd(model), BLOCKS, total_steps=STEPS),
        pytest.raises(ValueError, match="under another DGMController already: close that one first"),
    ):
        DGMController(model, sgd(model), BLOCKS, total_steps=STEPS)


def test_the_default_settings_are_valid_comparable_and_picklable():
    assert pickle.loads(pickle.dumps(DGMConfig())) == DGMConfig() != WEIGHTS


def refuse(model, message, config=WEIGHTS, optimizer=None, **kwargs):
    optimizer = optimizer or adamw(model)
    before = traces(model, optimizer), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        DGMController(model, optimizer, config, **{"total_steps": STEPS} | kwargs)
    assert traces(model, optimizer) == before[0]
    assert all(torch.equal(before[1][name], value) for name, value in model.state_dict().items())


def test_a_forced_block_that_does_not_fit_is_refused_with_the_layers_name(mlp):
    message = r"block_size=64 does not fit layer '2' with weight \(96, 128\): block sizes that do are \(1, 16, 32\)"
    refuse(mlp(64, 128, 96, 4), message, DGMConfig(SCHEDULE, units=Units(size=64)))


def test_an_automatic_block_falls_back_and_says_so(mlp):
    model = mlp(64, 100, 128, 128, 4)
    with DGMController(model, adamw(model), DGMConfig(SCHEDULE, backend="dense"), total_steps=STEPS) as dgm:
        assert [(d.name, d.block_size) for d in dgm.decisions() if d.masked] == [("0", 1), ("2", 1), ("4", 16)]
        assert "no block of 16, 32, 64, 128 divides both dimensions" in dgm.decisions()[0].why
        assert dgm.decisions()[2].why == ""


def test_a_forced_backend_that_cannot_run_is_refused(mlp):
    message = "backend='cpu' was asked for but cannot compute layer '0': needs blocks of at least 8"
    refuse(mlp(32, 64, 4), message, DGMConfig(SCHEDULE, units=Units(size=1), backend="cpu"))


def test_a_forced_backend_is_used_from_the_first_step_on(mlp):
    model = mlp(32, 64, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
        for _ in fit(model, optimizer, dgm):
            assert [d.backend for d in dgm.decisions()] == ["cpu", "cpu", "dense"]
        assert [d.why for d in dgm.decisions()] == ["forced", "forced", "output head"]


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
    with DGMController(model, sgd(model[2]), WEIGHTS, total_steps=STEPS) as dgm:
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


@pytest.mark.parametrize(
    ("widths", "config", "total_steps", "message"),
    [
        ((32, 64, 4), WEIGHTS, 41, "made with another schedule: its total_steps is 40, this run's is 41"),
        (
            (32, 64, 4),
            DGMConfig(EstDgm(update_every=4), units=Units(size=1)),
            40,
            "made with another schedule: its schedule is {'explor",
        ),
        (
            (32, 80, 4),
            WEIGHTS,
            40,
            "made with another model .*they differ in \\['0'\\]; '0' is \\(\\(64, 32\\), 1\\) there",
        ),
        ((32, 64, 64, 4), WEIGHTS, 40, "they differ in \\['2'\\]; '2' is None there and \\(\\(64, 64\\), 1\\) here"),
        ((32, 64, 4), BLOCKS, 40, "'0' is \\(\\(64, 32\\), 1\\) there and \\(\\(64, 32\\), 16\\) here"),
    ],
)
def test_a_state_of_another_model_or_schedule_is_refused(mlp, widths, config, total_steps, message):
    model = mlp(32, 64, 4)
    with DGMController(model, adamw(model), WEIGHTS, total_steps=STEPS) as dgm:
        state = dgm.state_dict()
    refuse(mlp(*widths), message, config, total_steps=total_steps, state=state)


def test_a_state_of_another_version_is_refused_and_changes_nothing(mlp):
    model = mlp(32, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        before = dgm.masks()["0"]
        for state in ({}, dgm.state_dict() | {"version": 99}):
            with pytest.raises(ValueError, match=f"expected a state of version 1, got {state.get('version')}"):
                dgm.load_state_dict(state)
        other = dgm.state_dict() | {"total_steps": 7, "steps": 3}
        with pytest.raises(ValueError, match="another schedule"):
            dgm.load_state_dict(other)
        assert dgm.steps == 0
        assert torch.equal(dgm.masks()["0"], before)


# ------------------------------------------------------------------ fused projections


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.plain = nn.Linear(96, 96)
        self.last = nn.Linear(96, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.plain(torch.tanh(self.qkv(x)))))


@pytest.mark.parametrize("block_size", [1, 16])
def test_parts_of_a_fused_weight_have_budgets_of_their_own(block_size):
    torch.manual_seed(0)
    model = Fused()
    with torch.no_grad():
        model.qkv.weight[:64].mul_(10.0)  # queries and keys that would win every unit from the values
    optimizer = sgd(model)
    config = DGMConfig(EstDgm(update_every=4, observe_steps=2), units=Units(size=block_size, distribution="uniform"))
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        note = "3 fused matrices, each with its own budget"
        assert [note in d.why for d in dgm.decisions()] == [True, False, False]
        for _ in fit(model, optimizer, dgm):
            active = [int(part.sum()) for part in dgm.masks()["qkv"].chunk(3)]
            assert max(active) - min(active) <= 1
    assert dgm.masks()["qkv"].chunk(3)[2].any()


def test_without_parts_the_largest_weights_take_all():
    """The control: under another name the same weight is one layer, and its last third loses everything."""
    torch.manual_seed(0)
    model = Fused()
    with torch.no_grad():
        model.qkv.weight[:64].mul_(10.0)
    model = nn.Sequential(model.qkv, nn.Tanh(), model.plain, nn.Tanh(), model.last)
    optimizer = sgd(model)
    schedule = EstDgm(update_every=4, observe_steps=2)
    config = DGMConfig(
        schedule, units=Units(size=16, distribution="uniform"), update_rule=UpdateRule(drop_fraction=0.0)
    )
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        run(model, optimizer, dgm)
    assert not dgm.masks()["0"].chunk(3)[2].any()


def test_single_weights_of_a_convolution_run_dense_and_say_so_whatever_backend_is_forced():
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 6, 16), nn.Linear(16, 2))
    config = DGMConfig(units=Units(size=1), backend="reference")
    with DGMController(model, torch.optim.SGD(model.parameters(), 0.1), config, total_steps=20) as dgm:
        found = {decision.name: decision for decision in dgm.decisions()}
    assert found["0"].backend == "dense"
    assert "no sparse operator for single weights of a convolution" in found["0"].why
    assert found["2"].backend == "reference"
