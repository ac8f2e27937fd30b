"""What is observed under ``storage="packed"`` is the gradient of the step, however that comes to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.controller_runs import STEPS, adamw
from helpers.storages import check_equal, config
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._update_rule import UpdateRule

RULES = {"norms": UpdateRule(keep="magnitude", grow="gradient"), "sums": UpdateRule()}
Backward = Callable[["Net", Tensor, torch.optim.Optimizer], None]


class Net(nn.Module):
    def __init__(self, convolution: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 48)
        self.middle: nn.Module = nn.Linear(48, 48)
        if convolution:
            self.middle = nn.Sequential(nn.Unflatten(-1, (8, 6)), nn.Conv1d(8, 8, 3, padding=1), nn.Flatten(-2))
        self.last = nn.Linear(48, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def plain(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    net(x).square().mean().backward()


def two_micro_batches(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    for half in x.chunk(2):
        net(half).square().mean().backward()


def gradient_penalty(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    x = x.clone().requires_grad_()
    y = net(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (y.square().mean() + (slope.norm(2, 1) - 1).square().mean()).backward()


def attack_by_grad(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    given = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(given).square().mean(), given)
    net(x + 0.1 * slope.sign()).square().mean().backward()


def cleared(net: Net, x: Tensor, optimizer: torch.optim.Optimizer, *, to_none: bool = True) -> None:
    given = x.clone().requires_grad_()
    net(given).sum().backward()
    optimizer.zero_grad(set_to_none=to_none)
    assert given.grad is not None
    net(x + 0.1 * given.grad.sign()).square().mean().backward()


def cleared_to_zero(net: Net, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    cleared(net, x, optimizer, to_none=False)


def cleared_after_the_forward(net: Net, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    net(x).sum().backward()
    loss = net(x).square().mean()
    optimizer.zero_grad()
    loss.backward()


def vectors(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    torch.stack([net(one) for one in x]).square().mean().backward()


def jagged(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    net(torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)).values().square().mean().backward()


def nested(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    h = torch.tanh(net.first(x.double()))
    h = net.middle(torch.nested.as_nested_tensor([h[:3], h[3:]])).to_padded_tensor(0.0)
    net.last(torch.tanh(h)).square().mean().backward()


def sparse(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    net(x.relu().to_sparse()).square().mean().backward()


def side_gradient(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    loss = net(x).square().mean()
    torch.autograd.grad(net(x).sum(), list(net.parameters()))  # to log its norm, say
    loss.backward()


def frozen_meanwhile(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    net.requires_grad_(False)
    net(x.clone().requires_grad_()).sum().backward()  # as the generator's step through a discriminator
    net.requires_grad_(True)
    net(x).square().mean().backward()


def cast_between(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    net.float()
    net.double()
    net(x).square().mean().backward()


def reentrant_checkpoint(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    y = net(checkpoint(net.first, x.clone().requires_grad_(), use_reentrant=True)[:, :32])
    y.square().mean().backward()


def checkpointed(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    checkpoint(net, x, use_reentrant=False).square().mean().backward()


def per_sample(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    slopes = torch.func.vmap(torch.func.grad(lambda one: net(one).square().sum()))(x)
    (net(x).square().mean() + slopes.square().mean()).backward()


def directional(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    y, along = torch.func.jvp(net, (x,), (torch.ones_like(x),))
    (y.square().mean() + along.square().mean()).backward()


WAYS: list[Backward] = [
    plain,
    two_micro_batches,
    gradient_penalty,
    attack_by_grad,
    cleared,
    cleared_to_zero,
    cleared_after_the_forward,
    side_gradient,
    vectors,
    jagged,
    nested,
    sparse,
    frozen_meanwhile,
    cast_between,
    reentrant_checkpoint,
    checkpointed,
    per_sample,
    directional,
]


def by_grad(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    parameters = list(net.parameters())
    slopes = torch.autograd.grad(net(x).square().mean(), parameters)
    for parameter, slope in zip(parameters, slopes, strict=True):
        parameter.grad = slope  # as PCGrad and GradNorm do


def by_func(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    parameters = dict(net.named_parameters())
    slopes = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).square().mean())(parameters)
    for name, parameter in parameters.items():
        parameter.grad = slopes[name]


def with_inputs(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    net(x).square().mean().backward(inputs=list(net.parameters()))


def first_by_grad(net: Net, x: Tensor, _: torch.optim.Optimizer) -> None:
    h = torch.tanh(net.first(x))
    shared = h.detach().requires_grad_()
    net.last(torch.tanh(net.middle(shared))).square().mean().backward()
    parameters = list(net.first.parameters())
    for parameter, slope in zip(parameters, torch.autograd.grad(h, parameters, shared.grad), strict=True):
        parameter.grad = slope


def middle_left_out(net: Net, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    is_first = not optimizer.state
    h = torch.tanh(net.first(x))
    net.last(torch.tanh(net.middle(h)) if is_first else h).square().mean().backward()
    (1e-3 * sum(p.square().sum() for p in net.parameters())).backward()


def train(storage: str, rule: UpdateRule, way: Backward, *, convolution: bool = False):
    net = Net(convolution)
    optimizer = adamw(net)
    history = []
    batches = torch.randn(STEPS, 8, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = config(1, storage, update_rule=rule)
    with DGMController(net, optimizer, settings, total_steps=STEPS, audit=False) as dgm:
        for x in batches:
            optimizer.zero_grad()
            way(net, x, optimizer)
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
            history.append(dgm.masks())
    return net, optimizer, history


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # which torch's jvp uses
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_masks_are_those_of_dense_storage(way: Backward, rule: str) -> None:
    check_equal(*(train(storage, RULES[rule], way) for storage in ("dense", "packed")))


@pytest.mark.parametrize("way", [plain, gradient_penalty, cleared, side_gradient], ids=lambda way: way.__name__)
def test_convolutions_too(way: Backward) -> None:
    check_equal(*(train(storage, RULES["sums"], way, convolution=True) for storage in ("dense", "packed")))


def test_another_gradient_gives_other_masks() -> None:
    one, other = (train("packed", RULES["sums"], way)[2] for way in (plain, gradient_penalty))
    assert not torch.equal(one[-1]["middle"], other[-1]["middle"])


REFUSED: dict[Backward, str] = {
    by_grad: r"2 layers \(first, middle\)",
    by_func: r"2 layers \(first, middle\)",
    with_inputs: r"2 layers \(first, middle\)",
    first_by_grad: r"1 layers \(first\)",
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", REFUSED, ids=lambda way: way.__name__)
def test_gradients_that_no_backward_adds_are_refused_where_masks_are_due(way: Backward, rule: str) -> None:
    with pytest.raises(ValueError, match=f"has not observed the gradients of {REFUSED[way]}.*use storage='dense'"):
        train("packed", RULES[rule], way)
    train("dense", RULES[rule], way)


def test_growth_at_random_takes_gradients_that_no_backward_adds() -> None:
    rule = UpdateRule(keep="magnitude", grow="random")
    check_equal(*(train(storage, rule, by_grad) for storage in ("dense", "packed")))


def test_a_layer_that_losses_leave_out_and_a_penalty_reaches_is_not_refused() -> None:
    history = train("packed", RULES["sums"], middle_left_out)[2]
    assert history[-1]["middle"].float().mean() < 0.3 * history[0]["middle"].float().mean()
