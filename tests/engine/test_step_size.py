"""Density-aware step size: learning rates scaled for the length of a step, against the step scaled after the fact."""

import copy

import pytest
import torch
from torch import nn

from helpers.controller_runs import (
    STEPS,
    WEIGHTS,
    adamw,
    batch,
    constant,
    equal,
    fit,
    full_masks,
    loss_of,
    run,
    saved,
    sgd,
    traces,
)
from lightning_estdgm.config import DGMConfig, StepSize, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.presets import preset

UNSCALED = WEIGHTS.merged(step_size={"exponent": 0.0})


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, decoupled weight decay."""

    def __init__(self, parameters, lr, weight_decay=0.1):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                m.lerp_(p.grad, 0.01)


class RateInMomentum(torch.optim.SGD):
    """A momentum of steps, each with the rate of its time, as TensorFlow's RMSprop has it."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(m.mul_(0.9).add_(group["lr"] * p.grad))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    "AdamW, rate a tensor": lambda p: torch.optim.AdamW(p, torch.tensor(1e-2, dtype=torch.float64), foreach=False),
    "Adam, L2": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, eps=1e-4, weight_decay=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, weight_decay=0.01),
    "Lion": lambda p: Lion(p, 1e-3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_run_is_the_one_whose_steps_are_scaled_after_they_were_made(mlp, make):
    """Over a whole schedule: p_old + (p_new - p_old) / rho, from a copy of the weights before the step."""
    ours, theirs = (mlp(32, 64, 64, 4, dtype=torch.float64) for _ in range(2))
    optimizer, other = make(ours.parameters()), make(theirs.parameters())
    cycle = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, float(o.defaults["lr"]), total_steps=STEPS + 1, cycle_momentum=cycle)
        for o in (optimizer, other)
    ]
    with (
        DGMController(ours, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm,
        DGMController(theirs, other, UNSCALED, total_steps=STEPS, audit=False) as plain,
    ):
        densities = set()
        for step in range(STEPS):
            for net, stepper, controller in ((ours, optimizer, dgm), (theirs, other, plain)):
                stepper.zero_grad()
                loss_of(net, batch(step, 32).double()).backward()
                controller.mask_gradients()
                before = [layer.weight.clone() for layer in controller.masked_weights]
                stepper.step()
                if controller is plain:
                    for layer, old in zip(controller.masked_weights, before, strict=True):
                        layer.weight.lerp_(old, 1.0 - 1.0 / layer.density)
                        densities.add(layer.density)
                controller.advance()
            for schedule in schedules:
                schedule.step()
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert all(torch.equal(a, b) for a, b in zip(dgm.masks().values(), plain.masks().values(), strict=True))
    assert min(densities) < 0.15 < 0.6 < max(densities)


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("make", [adamw, sgd])
def test_a_layer_steps_as_its_density_asks(mlp, make, exponent):
    config = DGMConfig(
        constant(0.25), units=Units(size=1, distribution="uniform"), step_size=StepSize(exponent=exponent)
    )
    model = mlp(32, 128, 64, 4, dtype=torch.float64)
    optimizer = make(model)
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        masks = full_masks(dgm)
        born = {name: torch.zeros(mask.shape) for name, mask in masks.items()}  # steps done when a unit was grown
        for step in range(5):
            before = {name: p.clone() for name, p in model.named_parameters()}
            twins = {at: copy.deepcopy(model) for at in {0, *torch.cat([b.flatten() for b in born.values()]).tolist()}}
            for at, twin in twins.items():  # optimizers that have counted the steps since then
                plain = make(twin)
                plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                for state in plain.state.values():
                    state |= {"step": state["step"] - at} if "step" in state else {}
                plain.zero_grad()
                loss_of(twin, batch(step, 32).double()).backward()
                for name, mask in masks.items():
                    twin.get_submodule(name).weight.grad.mul_(mask)
                plain.step()
            optimizer.zero_grad()
            loss_of(model, batch(step, 32).double()).backward()
            dgm.mask_gradients()
            optimizer.step()
            for name in before:
                layer, ours = name.removesuffix(".weight"), model.get_parameter(name)
                scale = 0.25**-exponent if layer in masks else 1.0
                for at, twin in twins.items():
                    there = born[layer] == at if layer in masks else torch.full(ours.shape, at == 0)
                    moved = (twin.get_parameter(name) - before[name])[there]
                    expected = before[name][there] + scale * moved
                    torch.testing.assert_close(ours[there], expected, rtol=1e-12, atol=1e-14)
                    assert at or moved.abs().max() > 1e-6
            dgm.advance()
            for name, mask in full_masks(dgm).items():
                born[name][mask.bool() & ~masks[name].bool()] = step + 1
            masks = full_masks(dgm)
        assert len(twins) > 1


DECAYING = {
    "AdamW": lambda p, decay: torch.optim.AdamW(p, 1e-2, weight_decay=decay),
    "AdamW, rate a tensor": lambda p, decay: torch.optim.AdamW(
        p, torch.tensor(1e-2, dtype=torch.float64), weight_decay=decay
    ),
    "Lion": lambda p, decay: Lion(p, 1e-3, decay),
    "SGD": lambda p, decay: torch.optim.SGD(p, 0.05, weight_decay=decay),
}


@pytest.mark.parametrize("make", DECAYING.values(), ids=DECAYING)
def test_weight_decay_that_is_not_scaled_is_the_users_rate_times_his_decay(mlp, make):
    unscaled = {"scale_weight_decay": False}
    config = DGMConfig(constant(0.25), units=Units(size=1, distribution="uniform")).merged(step_size=unscaled)
    model = mlp(32, 128, 64, 4, dtype=torch.float64)
    optimizer = make(model.parameters(), 0.1)
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        masks = full_masks(dgm)
        for step, decay in enumerate((0.1, 0.1, 0.3)):  # before any unit is grown
            optimizer.param_groups[0]["weight_decay"] = decay  # as a scheduler of it does
            twin = copy.deepcopy(model)
            plain = make(twin.parameters(), 0.0)
            plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            plain.param_groups[0]["weight_decay"] = 0.0
            before = {name: p.clone() for name, p in model.named_parameters()}
            for each in (twin, model):
                each.zero_grad()
                loss_of(each, batch(step, 32).double()).backward()
            for name, mask in masks.items():
                twin.get_submodule(name).weight.grad.mul_(mask)
            dgm.mask_gradients()
            plain.step()
            optimizer.step()
            assert [group["weight_decay"] for group in optimizer.param_groups] == [decay]
            rate = float(optimizer.param_groups[0]["lr"])
            for name, ours in model.named_parameters():
                scale = 4.0 if name.removesuffix(".weight") in masks else 1.0
                moved = scale * (twin.get_parameter(name) - before[name])
                torch.testing.assert_close(ours, before[name] + moved - rate * decay * before[name], rtol=0, atol=1e-9)
            dgm.advance()


def test_a_rate_in_the_momentum_keeps_the_density_of_its_step(mlp):
    """As under a scheduler: what is in the momentum was scaled by the density that the layer had then."""
    model = mlp(32, 64, 4)
    optimizer = RateInMomentum(model.parameters(), 0.01)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        (layer,) = dgm.masked_weights
        assert not layer.note
        momentum = torch.zeros_like(layer.weight)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, batch(step, 32)).backward()
            dgm.mask_gradients()
            momentum.mul_(0.9).add_(layer.gradient * 0.01 / layer.density)
            optimizer.step()
            torch.testing.assert_close(optimizer.state[model[0].weight]["m"], momentum)
            dgm.advance()


# ------------------------------------------------------------------ copies of the weights in the optimizer


class Masters(torch.optim.SGD):
    """Steps a copy of each weight, as fp32 masters are stepped, and writes it into the weight."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p].setdefault("master", p.clone())
                p.copy_(master.sub_(group["lr"] * p.grad))


def test_an_optimizers_copy_of_the_weights_stays_theirs(mlp):
    model, twin = mlp(32, 64, 64, 4), mlp(32, 64, 64, 4)
    optimizer = Masters(model.parameters(), 0.05)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        for _ in fit(model, optimizer, dgm):
            for layer in dgm.masked_weights:
                assert torch.equal(optimizer.state[layer.parameter]["master"][layer.mask], layer.weight[layer.mask])
    plain = torch.optim.SGD(twin.parameters(), 0.05)
    with DGMController(twin, plain, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        run(twin, plain, dgm)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------ what users see


class Watching(torch.optim.SGD):
    """Notes the rates that its step sees."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.saw = []

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.saw.append([(round(group["lr"], 6), len(group["params"])) for group in self.param_groups])
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)
        return loss


HALF = WEIGHTS.merged(schedule=constant(0.5), units=Units(size=1, distribution="uniform"))


def watched(model, config=HALF, optimizer=None):
    optimizer = optimizer or Watching(model.parameters(), 0.1)
    groups = optimizer.param_groups
    dicts = list(groups)

    def is_the_users():
        same = len(groups) == len(dicts) and all(a is b for a, b in zip(groups, dicts, strict=True))
        return optimizer.param_groups is groups and same

    return optimizer, DGMController(model, optimizer, config, total_steps=STEPS, audit=False), is_the_users


def test_a_closure_sees_the_users_groups_and_sets_the_rate_of_its_step(mlp):
    model = mlp(32, 64, 4)
    optimizer, dgm, is_the_users = watched(model)
    calls = []

    def closure():
        assert is_the_users()
        assert optimizer.state_dict()["param_groups"][0]["params"] == [0, 1, 2, 3]
        calls.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = loss_of(model, batch(0, 32))
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.3
        return loss

    with dgm:
        optimizer.step(closure)
        assert is_the_users()
        assert optimizer.saw == [[(0.6, 1), (0.3, 3)]]
        optimizer.step(closure=closure)
        dgm.advance()
    assert calls == [0.1, 0.3]


def test_hooks_of_the_user_see_the_users_groups(mlp):
    model = mlp(32, 64, 4)
    optimizer = Watching(model.parameters(), 0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(len(o.param_groups)))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(len(o.param_groups)))
    _, dgm, _ = watched(model, optimizer=optimizer)
    with dgm:
        optimizer.register_step_pre_hook(lambda o, *_: seen.append(len(o.param_groups)))
        optimizer.register_step_post_hook(lambda o, *_: seen.append(len(o.param_groups)))
        dgm.advance()
        run(model, optimizer, dgm, last=2)
    assert seen == [1] * 8
    assert [len(step) for step in optimizer.saw] == [2, 2]


class Failing(Watching):
    fail = False

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        if self.fail:
            raise ArithmeticError("no step")


@pytest.mark.parametrize("again", ["state_dict", "load_state_dict", "mask_gradients", "advance", "close"])
def test_a_step_that_raises_leaves_the_users_groups_for_the_next_use(mlp, again):
    model = mlp(32, 64, 4)
    optimizer, dgm, is_the_users = watched(model, optimizer=Failing(model.parameters(), 0.1))
    before = optimizer.state_dict()
    loss_of(model, batch(0, 32)).backward()
    optimizer.fail = True
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert not is_the_users()
    optimizer.fail = False
    uses = {
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(before),
        "mask_gradients": dgm.mask_gradients,
        "advance": dgm.advance,
        "close": dgm.close,
    }
    used = uses[again]()
    if again == "load_state_dict":
        assert [len(group["params"]) for group in optimizer.param_groups] == [4]
    else:
        assert is_the_users()
    if again == "state_dict":
        assert used["param_groups"] == before["param_groups"]
    if again == "mask_gradients":
        optimizer.step()
        assert dgm.advance() in (True, False)
        assert dgm.steps == 1
        assert optimizer.saw[-1] == [(0.2, 1), (0.1, 3)]


def test_a_closure_that_raises_ends_the_step(mlp):
    model = mlp(32, 64, 4)
    optimizer, dgm, is_the_users = watched(model)
    with dgm:
        with pytest.raises(MemoryError):
            optimizer.step(lambda: [].append(1) or (_ for _ in ()).throw(MemoryError()))
        loss_of(model, batch(0, 32)).backward()
        optimizer.step()  # the next batch, without a call in between
        assert is_the_users()
        assert optimizer.saw == [[(0.2, 1), (0.1, 3)]]
        assert torch.count_nonzero(model[0].weight[~dgm.masks()["0"]]) == 0
        dgm.advance()
        assert dgm.steps == 1


def test_nothing_is_left_behind(mlp):
    model = mlp(32, 64, 4)
    optimizer = adamw(model)
    before = traces(model, optimizer), len(optimizer._optimizer_state_dict_pre_hooks)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        run(model, optimizer, dgm, last=3)
    assert (traces(model, optimizer), len(optimizer._optimizer_state_dict_pre_hooks)) == before
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_a_group_that_comes_later_is_scaled_as_the_first_ones(mlp):
    model = mlp(32, 64, 64, 4)
    optimizer, dgm, _ = watched(model)
    with dgm:
        moved = optimizer.param_groups[0]["params"].pop(2)
        assert moved is model[2].weight
        optimizer.add_param_group({"params": [moved], "lr": 0.01})
        run(model, optimizer, dgm, last=1)
    assert optimizer.saw == [[(0.2, 1), (0.1, 4), (0.02, 1)]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]


def test_frozen_weights_are_stepped_by_the_users_rate(mlp):
    model = mlp(32, 64, 4)
    optimizer, dgm, _ = watched(model, HALF.merged(inactive="frozen"))
    with dgm:
        run(model, optimizer, dgm, last=1)
    assert optimizer.saw == [[(0.1, 4)]]


def test_a_dense_warm_up_is_not_scaled(mlp):
    model = mlp(32, 64, 4)
    optimizer, dgm, _ = watched(model, preset("rigl", 0.5, step_size={"exponent": 1.0}, units={"size": 1}))
    with dgm:
        for layer in dgm.masked_weights:
            layer.set_mask(torch.ones_like(layer.mask))
        run(model, optimizer, dgm, last=1)
    assert optimizer.saw == [[(0.1, 4)]]


# ------------------------------------------------------------------ nested optimizers


class Wrapper(torch.optim.Optimizer):
    """Initialised with groups of its own over the inner optimizer's parameters; copies their settings, as ZeRO does."""

    def __init__(self, inner):
        super().__init__([{"params": list(group["params"])} for group in inner.param_groups], inner.defaults)
        self.inner = inner

    def step(self, closure=None):
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs["lr"] = ours["lr"]
        return self.inner.step(closure)


class Twice(Watching):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("kind", ["wrapper", "twice", "sharing", "each other"])
def test_nested_steps_are_scaled_once_where_the_arithmetic_is(mlp, kind, closed):
    model = mlp(32, 64, 4)
    Watching(model.parameters(), 0.1)  # its class is patched: `Twice` runs hooks twice
    inner = (Twice if kind == "twice" else Watching)(model.parameters(), 0.1)
    outer = Wrapper(inner) if kind != "twice" else inner
    if kind == "each other":
        inner.outer = outer
    if kind == "sharing":
        outer.param_groups = inner.param_groups
    _, dgm, is_the_users = watched(model, optimizer=outer)
    with dgm:
        outer.param_groups[0]["lr"] = 0.2

        def closure():
            assert is_the_users()
            loss = loss_of(model, batch(0, 32))
            loss.backward()
            return loss

        if closed:
            outer.step(closure)
        else:
            closure()
            outer.step()
        assert is_the_users()
        dgm.advance()
        assert dgm.steps == 1
    assert inner.saw == [[(0.4, 1), (0.2, 3)]]
    assert len(inner.param_groups) == 1


def test_parameters_that_another_rank_steps_are_none_of_the_wrappers_own(mlp):
    """As a ZeroRedundancyOptimizer's inner optimizer holds this rank's part of each group."""
    model = mlp(32, 64, 64, 4)
    inner = Watching(model.parameters(), 0.1)
    outer = Wrapper(inner)
    inner.param_groups[0]["params"][2:] = []
    _, dgm, is_the_users = watched(model, optimizer=outer)
    with dgm:
        run(model, outer, dgm, last=1)
        assert is_the_users()
        assert not any(layer.note for layer in dgm.masked_weights)
    assert inner.saw == [[(0.2, 1), (0.1, 1)]]


class Hybrid(torch.optim.Optimizer):
    """Steps matrices by itself and gives the rest to an inner optimizer, as Muon beside AdamW."""

    def __init__(self, matrices, rest):
        super().__init__([{"params": matrices}, {"params": rest}], {"lr": 0.1})
        self.inner = Watching(rest, 0.1)
        self.saw = []

    @torch.no_grad()
    def step(self, closure=None):
        self.saw.append([(round(group["lr"], 6), len(group["params"])) for group in self.param_groups])
        rest = {id(p) for group in self.inner.param_groups for p in group["params"]}
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) not in rest:
                    p.sub_(group["lr"] * p.grad.sign())
        self.inner.step()


def test_what_a_wrapper_steps_by_itself_is_scaled_there(mlp):
    model = mlp(32, 64, 64, 4)
    matrices = [model[0].weight]
    optimizer = Hybrid(matrices, [p for p in model.parameters() if p is not matrices[0]])
    _, dgm, is_the_users = watched(model, optimizer=optimizer)
    with dgm:
        run(model, optimizer, dgm, last=1)
        assert is_the_users()
        assert not any(layer.note for layer in dgm.masked_weights)
    assert optimizer.saw == [[(0.2, 1), (0.1, 5)]]
    assert optimizer.inner.saw == [[(0.1, 4), (0.2, 1)]]


def test_gradients_scaled_for_a_fused_optimizer(mlp):
    def trained(scaled):
        model = mlp(32, 64, 4)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
            for step in range(8):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, batch(step, 32))).backward()
                dgm.mask_gradients(grad_scale=scaler.get_scale())
                scaler.step(optimizer)
                scaler.update()
                dgm.advance()
        return list(model.parameters())

    for a, b in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_of_an_optimizer_without_rates_say_so_once_and_step_unscaled(mlp):
    model = nn.Sequential(*mlp(32, 64, 64, 4))
    optimizer = torch.optim.Rprop(model.parameters(), 1e-3)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        run(model, optimizer, dgm, last=8)
        for layer in dgm.decisions()[:2]:
            assert layer.why.count("steps not scaled by density: Rprop does not step by the learning rate") == 1
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3]


# ------------------------------------------------------------------ what optimizers keep in their groups


class Averaging(torch.optim.SGD):
    """Steps and averages, weighting by squared rates that it sums in each group, as schedule-free optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["weights"] = group.get("weights", 0.0) + group["lr"] ** 2
            share = group["lr"] ** 2 / group["weights"]
            for p in group["params"]:
                state = self.state[p]
                z = state.setdefault("z", p.clone())
                z.sub_(group["lr"] * p.grad)
                p.lerp_(z, share)


def test_a_run_that_is_resumed_goes_on_with_what_the_optimizer_kept_of_each_layer(mlp):
    model = mlp(32, 64, 64, 4)
    optimizer = Averaging(model.parameters(), 0.1)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        run(model, optimizer, dgm, last=9)
        assert optimizer.param_groups[0]["weights"] == pytest.approx(9 * 0.1**2)
        at = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), saved(dgm.state_dict())
        run(model, optimizer, dgm, first=9)
    own = at[2]["rates"][0]
    assert own.keys() == {"0", "2"}
    assert min(values["weights"] for values in own.values()) > 9 * 0.1**2
    for state, same in ((at[2], True), ({**at[2], "rates": []}, False)):
        again = mlp(32, 64, 64, 4)
        again.load_state_dict(at[0])
        other = Averaging(again.parameters(), 0.1)
        other.load_state_dict(copy.deepcopy(at[1]))
        with DGMController(again, other, WEIGHTS, total_steps=STEPS, state=state, audit=False) as dgm:
            run(again, other, dgm, first=9)
        assert equal(model, again) == same


class Listed(torch.optim.SGD):
    """Momenta in a list in the group that is made in its first step, one for each parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            momenta = group.setdefault("momenta", [torch.zeros_like(p) for p in group["params"]])
            for p, momentum in zip(group["params"], momenta, strict=False):
                p.sub_(group["lr"] * momentum.mul_(0.9).add_(p.grad))


def test_a_list_in_the_group_keeps_the_order_of_its_parameters():
    """Where one of equal layers stays dense, splitting the group would give others its momentum."""
    trained = []
    for exponent in (1.0, 0.0):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(4)])
        optimizer = Listed(model.parameters(), 0.02)
        settings = WEIGHTS.merged(step_size={"exponent": exponent}, selection={"exclude": ["0"]})
        with DGMController(model, optimizer, settings, total_steps=STEPS, audit=False) as dgm:
            for step in range(STEPS):
                optimizer.zero_grad()
                model(batch(step, 32)).square().mean().backward()
                dgm.mask_gradients()
                optimizer.step()
                dgm.advance()
            notes = {weight.note for weight in dgm.masked_weights}
            assert all(
                ("Listed steps otherwise once its parameter group is split" in n) == (exponent > 0) for n in notes
            )
        trained.append(model)
    assert equal(*trained)
