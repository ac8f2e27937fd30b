"""Trial of an optimizer: whether its steps follow the rate of each parameter's group."""

import copy
import random

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_estdgm.engine._optimizer_trial import trial_optimizer
from lightning_estdgm.engine._rate_trial import why_not_scaled


def weight(dim=2, dtype=torch.float32):
    return nn.Parameter(torch.randn([16] * dim, generator=torch.Generator().manual_seed(0)).to(dtype))


def reason(make, dtype=torch.float32):
    p = weight(dtype=dtype)
    optimizer = make([p])
    return why_not_scaled(optimizer, 0, [p], p)


FOLLOWING = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "rate of numpy's": lambda p: torch.optim.SGD(p, np.float32(0.1)),
    "SGD, momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rate of 0, as a warm-up begins": lambda p: torch.optim.SGD(p, 0.0),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "AdamW, tensor": lambda p: torch.optim.AdamW(p, torch.tensor(1e-3)),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, 1e-3),
    "Adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-3),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9),
    "ASGD": lambda p: torch.optim.ASGD(p, 1e-3),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-3),
}
if hasattr(torch.optim, "Muon"):
    FOLLOWING["Muon"] = lambda p: torch.optim.Muon(p, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", FOLLOWING.values(), ids=FOLLOWING)
def test_optimizers_of_torch_that_step_by_the_rate_of_the_group(make, dtype):
    assert reason(make, dtype) == ""


class MadeAtOnce(torch.optim.SGD):
    """Makes its state in ``__init__`` alone, as Adagrad of torch 2.6."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for p in self.param_groups[0]["params"]:
            self.state[p]["steps"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["steps"] += 1
                p.sub_(group["lr"] * p.grad)


def test_state_that_only_the_constructor_makes_is_there_in_the_trial():
    assert reason(lambda p: MadeAtOnce(p, 0.1)) == ""


class Normed(torch.optim.SGD):
    """Steps of one norm for the whole weight, as LARS: an entry's grows by the root of 1 / density, and is scaled."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / p.grad.norm())


def test_steps_that_grow_less_than_the_rate_is_scaled_are_scaled():
    assert reason(lambda p: Normed(p, 0.1)) == ""


class FirstGroup(torch.optim.SGD):
    """Reads the rate of its first group alone."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.param_groups[0]["lr"] * p.grad)


class OneRate(torch.optim.SGD):
    """Steps all by the mean of the groups' rates."""

    @torch.no_grad()
    def step(self, closure=None):
        rate = sum(group["lr"] for group in self.param_groups) / len(self.param_groups)
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(rate * p.grad)


class Relative(torch.optim.SGD):
    """A step of its own size, as Adafactor's relative one."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(1e-3 * p.grad.sign())


class DualAveraging(torch.optim.SGD):
    """Computes weights anew from where they began and the sum of gradients, as FTRL and RDA."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("first", p.clone())
                state["sum"] = state.get("sum", 0) + p.grad
                p.copy_(state["first"] - group["lr"] * state["sum"])


class Cautious(torch.optim.SGD):
    """Divides its steps by the share of entries of the weight that go along with the gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                agrees = (m * p.grad > 0).to(p.dtype)
                p.sub_(group["lr"] * m.sign() * agrees / agrees.mean().clamp(min=1e-3))


class Released(torch.optim.SGD):
    """Steps each parameter by the group in its state, which the user made, as optimi does in the backward."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["group"] = group

    @torch.no_grad()
    def step(self, closure=None, param=None):
        if param is None:
            return super().step(closure)
        return param.sub_(self.state[param]["group"]["lr"] * param.grad)


class ListInGroup(torch.optim.SGD):
    """Keeps momenta in a list in the group, one for each of its parameters, as LDoG keeps its distances."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            momenta = group.setdefault("momenta", [torch.zeros_like(p) for p in group["params"]])
            for p, momentum in zip(group["params"], momenta, strict=False):
                p.sub_(group["lr"] * momentum.lerp_(p.grad, 0.5))


class NormsInGroup(ListInGroup):
    """Keeps one number for each parameter there."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            norms = group.setdefault("norms", [0.0] * len(group["params"]))
            for i, p in enumerate(group["params"]):
                norms[i] += float(p.grad.norm())
                p.sub_(group["lr"] * p.grad / norms[i])


class ByParameterInGroup(torch.optim.SGD):
    """Keeps momenta by parameter in a dictionary in the group, and makes them anew in each step."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            momenta = group.setdefault("momenta", {})
            for p in group["params"]:
                momenta[p] = p.grad if p not in momenta else 0.9 * momenta[p] + p.grad
                p.sub_(group["lr"] * momenta[p])


class Still(torch.optim.SGD):
    def step(self, closure=None):
        pass


class Refusing(torch.optim.SGD):
    def step(self, closure=None):
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("rates of groups must be equal")
        super().step(closure)


class Uncopied(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__(parameters, 0.1)
        self.lock = __import__("threading").Lock()


def without_rate(parameters):
    optimizer = torch.optim.SGD(parameters, 0.1)
    optimizer.param_groups[0]["lr"] = None
    return optimizer


FAILING = {
    "reads it once": (lambda p: torch.optim.Rprop(p, 1e-3), "Rprop does not step by the learning rate"),
    "line search": (lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3), "LBFGS evaluates the loss several times"),
    "of the first group": (lambda p: FirstGroup(p, 0.1), "FirstGroup does not step each parameter by the"),
    "one for all": (lambda p: OneRate(p, 0.1), "OneRate does not step each parameter by the learning rate of its own"),
    "relative": (lambda p: Relative(p, 0.1), "Relative does not step by the learning rate of the parameter group"),
    "anew": (lambda p: DualAveraging(p, 0.1), "DualAveraging computes weights anew by the learning rate: a change of"),
    "released": (lambda p: Released(p, 0.1), "Released keeps the parameter group in its state, and may read the"),
    "cautious": (lambda p: Cautious(p, 0.1), "steps of Cautious grow by 1 / density by themselves"),
    "list in the group": (
        lambda p: ListInGroup(p, 0.1),
        "ListInGroup steps otherwise once its parameter group is split",
    ),
    "norms in the group": (lambda p: NormsInGroup(p, 0.1), "NormsInGroup steps otherwise once its parameter group is"),
    "by parameter in the group": (lambda p: ByParameterInGroup(p, 0.1), "ByParameterInGroup steps otherwise once its"),
    "none": (without_rate, "SGD has no learning rate of its own"),
    "still": (lambda p: Still(p, 0.1), "Still did not move a parameter in 16 steps"),
    "refusing": (lambda p: Refusing(p, 0.1), r"Refusing could not be tried \(RuntimeError: rates of groups must be"),
    "not to be copied": (Uncopied, r"Uncopied could not be tried \(TypeError: cannot pickle"),
}


@pytest.mark.parametrize(("make", "message"), FAILING.values(), ids=FAILING)
def test_optimizers_that_do_not_say_why(make, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(reason(make))


def test_a_trial_leaves_the_run_as_it_was():
    p = weight()
    optimizer = torch.optim.AdamW([p, nn.Parameter(torch.ones(3))], 1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which puts a step of its own on the instance
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), p.clone(), torch.get_rng_state()
    assert why_not_scaled(optimizer, 0, [p], p) == ""
    assert str(optimizer.state_dict()) == str(before[0])
    assert torch.equal(p, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(p.grad, torch.ones_like(p))
    assert len(called) == 1
    scheduler.step()


class Drawing(torch.optim.SGD):
    """Draws from each of the global generators in each step."""

    @torch.no_grad()
    def step(self, closure=None):
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(())
        super().step(closure)


def test_a_run_draws_the_random_numbers_that_it_draws_without_a_trial():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    p = weight()
    with isolate_rng():
        expected = draw()
    with isolate_rng():
        assert why_not_scaled(Drawing([p], 0.1), 0, [p], p) == ""
        assert draw() == expected


def test_a_copy_keeps_what_the_optimizer_holds_of_its_own():
    class Counting(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, 0.1)
            self.count, self.listed = 3, self.param_groups[0]["params"]
            self.inner = torch.optim.Adam(self.param_groups[0]["params"][:1])

    p, other = weight(), weight(1)
    optimizer = Counting([p, other])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a step of its own on the instance
    stand_in, before = weight(), p.clone()
    p.grad, stand_in.grad = torch.ones_like(p), torch.ones_like(p)
    trial = trial_optimizer(optimizer, {p: stand_in})
    trial.step()
    assert torch.equal(p, before)
    torch.testing.assert_close(stand_in, before - 0.1)
    assert type(trial) is Counting
    assert trial.count == 3
    assert trial.listed is trial.param_groups[0]["params"]
    assert [id(held) for held in trial.listed] == [id(stand_in)]
    assert [id(held) for held in trial.inner.param_groups[0]["params"]] == [id(stand_in)]
    assert trial.inner is not optimizer.inner
    assert len(optimizer.param_groups[0]["params"]) == 2
