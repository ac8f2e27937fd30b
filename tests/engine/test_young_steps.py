"""First steps of grown units: those of a fresh parameter that gets the same gradients, whatever has been counted."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from helpers.controller_runs import STEPS, adamw, saved
from helpers.controller_runs import run as fit_model
from helpers.counting_optimizers import CountedAverage
from helpers.masked_weights import numbered
from helpers.storages import config as storage_config
from helpers.storages import double, largest_difference
from lightning_estdgm.config import DGMConfig, StepSize, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._step_hooks import StepHooks
from lightning_estdgm.engine._young_copies import YoungCopies
from lightning_estdgm.engine._young_steps import YoungSteps
from lightning_estdgm.method._schedules import EstDgm, Phase

TOTAL = 120
SCHEDULE = EstDgm(Phase(0.7, 0.6, 20), Phase(0.4, 0.3, 40), Phase(0.2, 0.1, 60), update_every=15, observe_steps=2)
SIDE = {1: 16, 16: 96}  # of the weights, by block size
RATE = 5e-2


def tensor_rate(parameters):
    return torch.optim.AdamW(parameters, torch.tensor(RATE, dtype=torch.float64), weight_decay=0.1, foreach=False)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, RATE, weight_decay=0.1, eps=1e-3),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.1, fused=True),
    "AdamW, rate a tensor": tensor_rate,
    "AdamW, amsgrad, (0.9, 0.95)": lambda p: torch.optim.AdamW(p, RATE, betas=(0.9, 0.95), amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, RATE),
    "NAdam": lambda p: torch.optim.NAdam(p, RATE, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, RATE),
    "CountedAverage": lambda p: CountedAverage(p, RATE),
}


def config(block=1, exponent=1.0, inactive="zero"):
    return DGMConfig(
        SCHEDULE, units=Units(size=block), step_size=StepSize(exponent=exponent), backend="dense", inactive=inactive
    )


class Run:
    """A run whose gradients are random numbers, of another size in each step, and the same whenever it is repeated."""

    def __init__(self, make, settings, *, block=1, dtype=torch.float64):
        side = SIDE[block]
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(side, side, bias=False), nn.Linear(side, side), nn.Linear(side, 2)).to(dtype)
        with torch.no_grad():
            for p in self.net.parameters():
                p.mul_(2.0**-6)  # so that grown units stay as often as others
        self.make, self.settings, self.side = make, settings, side
        self.optimizer = make(self.net.parameters())
        self.dgm = DGMController(self.net, self.optimizer, settings, total_steps=TOTAL, audit=False)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 25, 0.7)

    def step(self, step, *, closure=False):
        x = torch.randn(4, self.side, generator=torch.Generator().manual_seed(step))
        self.optimizer.zero_grad()
        self.net(x.to(self.net[0].weight.dtype)).square().mean().backward()
        generator = torch.Generator().manual_seed(step)
        for p in self.net.parameters():
            size = 10.0 ** (torch.rand((), generator=generator) * 2 - 3)
            p.grad.copy_(torch.randn(p.shape, generator=generator) * size)
        self.dgm.mask_gradients()
        if closure:
            gradients = [p.grad for p in self.net.parameters()]
            self.optimizer.step(lambda: self._with(gradients))
        else:
            self.optimizer.step()
        if step == 70 and "betas" in self.optimizer.defaults:  # as a scheduler of momenta does
            self.optimizer.param_groups[0]["betas"] = (0.8, 0.99)
        self.schedule.step()

    def _with(self, gradients):
        self.optimizer.zero_grad()
        for p, gradient in zip(self.net.parameters(), gradients, strict=True):
            p.grad = gradient
        return torch.zeros(())

    def through_a_file(self):
        """Return the run as it goes on from a checkpoint."""
        states = saved([x.state_dict() for x in (self.net, self.optimizer, self.dgm, self.schedule)])
        self.dgm.close()
        new = copy.copy(self)
        new.net = copy.deepcopy(self.net)
        new.optimizer = self.make(new.net.parameters())
        new.schedule = torch.optim.lr_scheduler.StepLR(new.optimizer, 25, 0.7)
        for thing, state in zip((new.net, new.optimizer, new.schedule), (*states[:2], states[3]), strict=True):
            thing.load_state_dict(state)
        new.dgm = DGMController(new.net, new.optimizer, self.settings, total_steps=TOTAL, audit=False, state=states[2])
        return new


def expanded(mask, side):
    return mask.repeat_interleave(side // len(mask), 0).repeat_interleave(side // len(mask), 1)


class Fresh:
    """A fresh parameter for units of one layer that were grown at once, with an optimizer of its own."""

    def __init__(self, run, layer, units):
        self.run, self.layer, self.units = run, layer, units
        self.steps = self.compared = 0
        self.weight = nn.Parameter(run.net[int(layer)].weight.detach().clone())
        self.optimizer = run.make([self.weight])

    def step(self, group, scale):
        """Take a step by the gradient of the run; `group` is that of its optimizer, as it was in its step."""
        theirs = self.run.net[int(self.layer)].weight
        self.weight.grad = theirs.grad.clone()
        settings = {key: value for key, value in group.items() if key != "params"}
        self.optimizer.param_groups[0].update(settings | {"lr": group["lr"] * scale})
        self.optimizer.step()
        self.steps += 1
        self.compared += bool(self.units.any())
        torch.testing.assert_close(theirs[self.units], self.weight[self.units], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_grown_units_are_stepped_as_a_fresh_parameter(make):
    """With steps scaled by density, and rates and betas that change in the run."""
    assert_grown_units_are_stepped_as_fresh(make)


@pytest.mark.parametrize("settings", [(16, 1.0, "zero"), (1, 0.0, "zero"), (1, 1.0, "frozen")], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW, fused"])
def test_so_are_blocks_unscaled_and_frozen_ones(name, settings):
    assert_grown_units_are_stepped_as_fresh(OPTIMIZERS[name], *settings)


def assert_grown_units_are_stepped_as_fresh(make, block=1, exponent=1.0, inactive="zero"):
    run = Run(make, config(block, exponent, inactive), block=block)
    lifetime = run.dgm.masked_weights[0].young.lifetime or TOTAL
    fresh, masks = [], run.dgm.masks()
    for step in range(TOTAL):
        group = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in run.optimizer.param_groups[0].items()}
        scales = {n: d**-exponent if inactive == "zero" else 1.0 for n, d in run.dgm.layer_densities().items()}
        run.step(step)
        for grown in (grown for grown in fresh if grown.steps < lifetime):
            grown.step(group, scales[grown.layer])
        run.dgm.advance()
        before, masks = masks, run.dgm.masks()
        for grown in fresh:
            grown.units &= expanded(masks[grown.layer], run.side)
        for name, mask in masks.items():
            if (mask & ~before[name]).any():
                fresh.append(Fresh(run, name, expanded(mask & ~before[name], run.side)))
    assert len(fresh) >= 4
    assert max(grown.compared for grown in fresh) >= 10


def test_units_that_share_the_count_are_stepped_otherwise(monkeypatch):
    monkeypatch.setattr("lightning_estdgm.engine._young_units.YoungUnits.grow", lambda *_: None)
    with pytest.raises(AssertionError, match="not close"):
        assert_grown_units_are_stepped_as_fresh(OPTIMIZERS["AdamW, fused"])


@pytest.mark.parametrize("make", [OPTIMIZERS["AdamW, foreach"], OPTIMIZERS["NAdam"]], ids=["AdamW", "NAdam"])
@pytest.mark.parametrize(("block", "dtype"), [(1, torch.float32), (16, torch.float32), (1, torch.bfloat16)])
def test_a_resumed_run_is_the_straight_one(make, block, dtype):
    straight, broken = (Run(make, config(block), block=block, dtype=dtype) for _ in range(2))
    young = 0
    for step in range(TOTAL):
        if step in (47, 60, 90):  # between two updates, at an update, and where masks are final
            young += sum(len(weight.young.cohorts) for weight in broken.dgm.masked_weights)
            broken = broken.through_a_file()
        for run in (straight, broken):
            run.step(step)
            run.dgm.advance()
        for ours, theirs in zip(broken.net.parameters(), straight.net.parameters(), strict=True):
            assert torch.equal(ours, theirs), step
    assert young >= 4


def test_the_optimizer_is_the_users_before_and_after_a_step():
    run = Run(OPTIMIZERS["AdamW, foreach"], config(exponent=0.0))
    seen = []

    def note(optimizer, *_):
        seen.append((list(map(id, optimizer.param_groups)), set(optimizer.state) <= set(run.net.parameters())))

    run.optimizer.register_step_pre_hook(note)
    run.optimizer.register_step_post_hook(note)
    for step in range(40):
        run.step(step)
        run.dgm.advance()
    assert any(weight.young.cohorts for weight in run.dgm.masked_weights)
    assert len(run.optimizer.state_dict()["state"]) == len(list(run.net.parameters()))
    assert seen == [([id(run.optimizer.param_groups[0])], True)] * 80


def cleared(run):
    run.optimizer.state.clear()


def set_back(run):
    for state in run.optimizer.state.values():
        for value in state.values():
            value.zero_()


def told(run):
    taken_over(run)
    run.dgm.use_optimizers(run.optimizer)


def taken_over(run):
    run.make = OPTIMIZERS["NAdam"]
    run.optimizer = run.make(run.net.parameters())
    run.schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, 25, 0.7)


@pytest.mark.parametrize("begin_anew", [cleared, set_back, told, taken_over])
def test_where_the_optimizer_begins_anew_every_unit_is_stepped_as_a_fresh_parameter(begin_anew):
    run = Run(OPTIMIZERS["AdamW, foreach"], config())
    for step in range(66):
        run.step(step)
        run.dgm.advance()
    assert all(weight.young.living for weight in run.dgm.masked_weights)
    begin_anew(run)
    fresh = [Fresh(run, name, expanded(mask, run.side).clone()) for name, mask in run.dgm.masks().items()]
    for step in range(66, 85):
        group, densities = dict(run.optimizer.param_groups[0]), run.dgm.layer_densities()
        run.step(step)
        for whole in fresh:
            whole.step(group, 1 / densities[whole.layer])
        run.dgm.advance()
        for whole in fresh:
            whole.units &= expanded(run.dgm.masks()[whole.layer], run.side)
    assert all(whole.units.any() for whole in fresh)
    assert all(weight.young.living for weight in run.dgm.masked_weights)  # grown since


def test_packed_weights_go_on_as_others_where_the_optimizer_begins_anew(mlp):
    models = []
    for storage in ("dense", "packed"):
        model = double(mlp(32, 64, 64, 4))
        optimizer = adamw(model)
        with DGMController(model, optimizer, storage_config(1, storage), total_steps=STEPS, audit=False) as dgm:
            fit_model(model, optimizer, dgm, last=22)
            assert any(weight.young.living for weight in dgm.masked_weights)
            optimizer.state.clear()
            fit_model(model, optimizer, dgm, first=22, last=23)
            assert not any(weight.young.living for weight in dgm.masked_weights)
            fit_model(model, optimizer, dgm, first=23)
        models.append(model)
    assert largest_difference(*models) < 1e-12


class Breaking(torch.optim.AdamW):
    breaks = False

    def step(self, closure=None):
        loss = super().step(closure)
        if self.breaks:
            raise KeyboardInterrupt
        return loss


def test_a_step_that_raises_leaves_no_young_units_in_the_optimizer():
    run = Run(lambda p: Breaking(p, RATE), config())
    for step in range(30):
        run.step(step)
        run.dgm.advance()
    run.optimizer.breaks = True
    with pytest.raises(KeyboardInterrupt):
        run.step(30)
    run.optimizer.breaks = False
    run.step(31)
    run.dgm.advance()
    assert len(run.optimizer.param_groups) == 1
    assert set(run.optimizer.state) == set(run.net.parameters())


def test_a_closure_steps_young_units_too():
    plain, closed = (Run(OPTIMIZERS["AdamW, foreach"], config()) for _ in range(2))
    for step in range(60):
        plain.step(step)
        closed.step(step, closure=True)
        plain.dgm.advance()
        closed.dgm.advance()
    for ours, theirs in zip(plain.net.parameters(), closed.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Twice(torch.optim.AdamW):
    """Its step calls its parent's, which runs the hooks a second time, around the closure that they wrapped before."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_calls_its_parents_shows_young_units_once(closure):
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # whose class is patched: `Twice` runs hooks twice
    kinds = (torch.optim.AdamW, Twice)
    plain, twice = (Run(lambda p, kind=kind: kind(p, RATE), config()) for kind in kinds)
    for step in range(TOTAL - 1):
        plain.step(step)
        twice.step(step, closure=closure)
        assert len(twice.optimizer.param_groups) == 1
        for run in (plain, twice):
            run.dgm.advance()
    assert len(twice.optimizer.state) == len(plain.optimizer.state)
    for one, other in zip(plain.net.parameters(), twice.net.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("order", ["Adam first", "SGD first"])
def test_an_inner_optimizer_that_counts_no_steps_leaves_grown_units_young(order):
    """As in MAML and Reptile, whose inner loop steps the same weights by SGD."""
    changes = {}
    for inner in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16), nn.Linear(16, 2)).double()
        adam = torch.optim.Adam(net.parameters(), RATE)
        sgd = torch.optim.SGD(net.parameters(), 0.0)  # moves nothing
        optimizers = ([adam, sgd] if order == "Adam first" else [sgd, adam]) if inner else [adam]
        with DGMController(net, optimizers, config(), total_steps=TOTAL, audit=False) as dgm:
            for step in range(40):
                x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step)).double()
                for optimizer in optimizers[::-1] if order == "Adam first" else optimizers:
                    optimizer.zero_grad()
                    net(x).square().mean().backward()
                    dgm.mask_gradients()
                    optimizer.step()
                dgm.advance()
            assert all(weight.young.living for weight in dgm.masked_weights)
            changes[inner] = [p.detach().clone() for p in net.parameters()]
    assert all(map(torch.equal, changes[False], changes[True]))


def test_where_the_optimizer_that_counts_steps_goes_no_unit_is_young():
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16), nn.Linear(16, 2))
    adam, sgd = torch.optim.Adam(net.parameters(), RATE), torch.optim.SGD(net.parameters(), RATE)
    with DGMController(net, adam, config(), total_steps=TOTAL, audit=False) as dgm:
        assert all(weight.young.lifetime for weight in dgm.masked_weights)
        dgm.use_optimizers([sgd])
        assert not any(weight.young.lifetime for weight in dgm.masked_weights)


def test_a_step_that_a_scaler_skips_is_not_counted():
    weight = numbered([[1, 0], [0, 1]])
    weight.inactive.apply_mask_(weight)
    optimizer = torch.optim.AdamW([weight.parameter], 0.1, fused=True)
    hooks = StepHooks([optimizer], lambda weights: None, StepSize(), grows=True)
    hooks.register([weight])
    assert weight.young.lifetime > 6_000
    for step in range(4):
        if step == 2:
            weight.young.grow(weight, torch.tensor([[False, False], [False, True]]))
        weight.parameter.grad = torch.ones(2, 2)
        optimizer.found_inf = torch.tensor(float(step == 2))
        optimizer.step()
    (cohort,) = weight.young.cohorts
    assert (cohort.age, float(cohort.numbers["step"])) == (1, 1.0)
    assert float(optimizer.state[weight.parameter]["step"]) == 3.0


class Recording(torch.optim.AdamW):
    """Notes how many parameters each step has."""

    def step(self, closure=None):
        self.shown = sum(len(group["params"]) for group in self.param_groups)
        return super().step(closure)


def test_units_that_were_grown_together_are_one_parameter_whatever_their_weights():
    run = Run(lambda p: Recording(p, RATE), config(exponent=0.0))
    several = 0
    for step in range(100):
        if step == 70:
            run = run.through_a_file()
        cohorts = [cohort for weight in run.dgm.masked_weights for cohort in weight.young.cohorts]
        ages = {cohort.age for cohort in cohorts}
        run.step(step)
        run.dgm.advance()
        assert run.optimizer.shown == len(list(run.net.parameters())) + len(ages)
        several += len(cohorts) > len(ages) > 1
    assert several >= 20


def test_weights_of_one_age_that_have_missed_a_step_keep_their_count():
    weights = [numbered([[1, 0], [0, 1]]) for _ in range(2)]
    for weight in weights:
        weight.inactive.apply_mask_(weight)
    optimizer = torch.optim.AdamW([weight.parameter for weight in weights], 0.1)
    hooks = StepHooks([optimizer], lambda weights: None, StepSize(), grows=True)
    hooks.register(weights)
    for step in range(6):
        if step == 2:
            for weight in weights:
                weight.young.grow(weight, torch.tensor([[False, False], [False, True]]))
        for weight in weights:
            weight.parameter.grad = torch.ones(2, 2)
        if step == 4:
            weights[1].parameter.grad = None
        optimizer.step()
    counts = [float(cohort.numbers["step"]) for weight in weights for cohort in weight.young.cohorts]
    assert counts == [4.0, 3.0]


def test_where_young_units_lie_is_sought_once_until_masks_change(monkeypatch):
    made = []
    init = YoungCopies.__init__
    monkeypatch.setattr(YoungCopies, "__init__", lambda copies, parts: made.append(len(parts)) or init(copies, parts))
    run = Run(OPTIMIZERS["AdamW, foreach"], config(exponent=0.0))
    made.clear()  # those of the trial
    for step in range(100):
        run.step(step)
        run.dgm.advance()
    assert 4 <= len(made) <= run.dgm.updates


def test_a_gradient_is_freed_after_the_step():
    run = Run(OPTIMIZERS["AdamW, foreach"], config())
    for step in range(40):
        run.step(step)
        run.dgm.advance()
    assert all(weight.young.living for weight in run.dgm.masked_weights)
    gradients = [StorageWeakRef(parameter.grad.untyped_storage()) for parameter in run.net.parameters()]
    run.optimizer.zero_grad()
    assert all(gradient.expired() for gradient in gradients)


class Forgetful(CountedAverage):
    """Keeps no mean of a single number."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.numel() == 1:
                    del self.state[p]["mean"]


def test_where_the_optimizer_drops_an_entry_that_of_the_whole_weight_stays():
    """Of two cohorts, one has a mean of its own after its first step, and one that of the whole weight's tenth."""
    weight = numbered([[1, 1], [1, 1]])
    optimizer = Forgetful([weight.parameter], 0.1)
    optimizer.state[weight.parameter] = {"count": 9, "mean": torch.zeros(2, 2)}
    weight.young.live(100)
    weight.young.grow(weight, torch.tensor([[False, False], [False, True]]))
    weight.young.cohorts[0].age = 1  # so that the two are no one parameter
    weight.young.grow(weight, torch.tensor([[True, True], [False, False]]))
    weight.parameter.grad = torch.ones(2, 2)
    steps = YoungSteps(optimizer)
    steps.enter({id(weight.parameter): weight})
    optimizer.step()
    steps.commit()
    tenth = 0.1 / (1 - 0.9**10)
    torch.testing.assert_close(optimizer.state[weight.parameter]["mean"], torch.tensor([[1, 1], [tenth, tenth]]))
    assert [cohort.numbers for cohort in weight.young.cohorts] == [{"count": 1}, {"count": 1}]
