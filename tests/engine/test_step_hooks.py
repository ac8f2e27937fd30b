"""Hooks on optimizers' steps: which steps count, and what they leave to the user."""

import pytest
import torch

from helpers.controller_runs import STEPS, WEIGHTS, batch, equal, fit, loss_of, run, sgd
from helpers.masked_weights import numbered
from lightning_estdgm.config import StepSize
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._step_hooks import StepHooks


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
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        for step, _ in fit(model, optimizer, dgm):
            before = settings()
            scheduler.step()
            assert [g["lr"] for g in before] == pytest.approx([lr * min(1, 0.5 + step / 20) for lr in (0.03, 0.01)])
            assert [sorted(g) for g in settings()] == [sorted(g) for g in before]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == held


def test_two_optimizers_each_keep_their_own_layers(mlp):
    model, single = mlp(32, 64, 64, 4), mlp(32, 64, 64, 4)
    first = torch.optim.SGD(model[0].parameters(), 0.1)
    second = torch.optim.SGD([*model[2].parameters(), *model[4].parameters()], 0.1)
    both = sgd(single)
    with (
        DGMController(model, [first, second], WEIGHTS, total_steps=STEPS, audit=False) as dgm,
        DGMController(single, both, WEIGHTS, total_steps=STEPS, audit=False) as other,
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
    with DGMController(model, [first, second], WEIGHTS, total_steps=STEPS, audit=False) as dgm:
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
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
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


# ------------------------------------------------------------------ the hooks by themselves


def hooked(make, mask_gradients=lambda weights: None, exponent=0.0):
    weight = numbered([[1, 0], [0, 1]])
    weight.inactive.apply_mask_(weight)
    optimizer = make([weight.parameter])
    hooks = StepHooks([optimizer], mask_gradients, StepSize(exponent=exponent))
    hooks.register([weight])
    return weight, optimizer, hooks


def momentum(parameters):
    return torch.optim.SGD(parameters, 1.0, momentum=0.9, weight_decay=0.1)


def test_the_optimizers_that_hold_masked_weights_are_known_and_let_go():
    weight, optimizer, hooks = hooked(momentum)
    other = momentum([torch.nn.Parameter(torch.ones(2, 2))])
    both = StepHooks([optimizer, other], lambda weights: None, StepSize(exponent=0))
    both.register([weight])
    assert both.held == {id(p) for o in (optimizer, other) for p in o.param_groups[0]["params"]}
    assert (both.weights_of(optimizer), both.weights_of(other)) == ([weight], [])
    assert (len(optimizer._optimizer_step_pre_hooks), len(other._optimizer_step_pre_hooks)) == (2, 0)
    for _ in range(2):
        both.remove()
        hooks.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_step_masks_gradients_first_and_weights_after():
    asked = []
    weight, optimizer, hooks = hooked(momentum, asked.append, exponent=1.0)
    weight.parameter.grad = torch.ones(2, 2)
    optimizer.step()
    assert asked == [[weight]]
    assert hooks.stepped
    # Steps of 1 + 0.1 w, twice as large at a density of a half: from 1 to -1.2 and from 4 to 1.2.
    torch.testing.assert_close(weight.weight, torch.tensor([[-1.2, 0.0], [0.0, 1.2]]))


@pytest.mark.parametrize(("rate", "gradient", "counts"), [(0.0, 0.0, False), (0.0, 1.0, True), (1.0, 0.0, True)])
def test_a_step_without_rate_and_gradients_is_none_of_training(rate, gradient, counts):
    """As torch's distributed checkpoints take one, to make an optimizer's state."""
    weight, optimizer, hooks = hooked(momentum)
    optimizer.param_groups[0]["lr"] = rate
    weight.weight.fill_(3.0)  # loaded from a checkpoint, while the masks are still the old ones
    weight.parameter.grad = torch.full((2, 2), gradient)
    optimizer.step()
    assert hooks.stepped == counts
    assert (torch.count_nonzero(weight.weight) == 4) == (not counts)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_gradient_in_a_sparse_layout_tells_a_step_of_training(value):
    """As an embedding with `sparse=True` has one: torch counts no values of those that are not zero."""
    weight, optimizer, hooks = hooked(lambda parameters: torch.optim.SGD(parameters, 0.0))
    words = torch.nn.Embedding(3, 2, sparse=True)
    optimizer.add_param_group({"params": list(words.parameters())})
    weight.parameter.grad = torch.zeros(2, 2)
    (value * words(torch.tensor([1, 1]))).sum().backward()
    optimizer.step()
    assert hooks.stepped == bool(value)


def test_a_closure_masks_by_itself_and_is_not_wrapped_without_shadow_weights():
    asked = []
    weight, optimizer, hooks = hooked(momentum, asked.append)

    def closure():
        weight.parameter.grad = torch.ones(2, 2)
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert not asked
    assert hooks.stepped
    assert torch.count_nonzero(weight.weight[~weight.mask]) == 0


class Clearing(torch.optim.SGD):
    """Clears the gradients in its step, as some memory-saving optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.zero_grad()
        return loss


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_clears_its_gradients_counts_and_its_weights_stay_masked(mlp, with_closure):
    model, plain = mlp(32, 64, 64, 4), mlp(32, 64, 64, 4)
    optimizer, theirs = Clearing(model.parameters(), 0.1, momentum=0.9), torch.optim.SGD(plain.parameters(), 0.1, 0.9)
    with (
        DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm,
        DGMController(plain, theirs, WEIGHTS, total_steps=STEPS, audit=False) as other,
    ):
        for step in range(STEPS):

            def closure(step=step):
                loss_of(model, batch(step, 32)).backward()
                dgm.mask_gradients()

            if with_closure:
                optimizer.step(torch.enable_grad()(closure))
            else:
                closure()
                optimizer.step()
            dgm.advance()
            for name, mask in dgm.masks().items():
                assert torch.count_nonzero(model.get_submodule(name).weight[~mask]) == 0
        run(plain, theirs, other)
        assert dgm.steps == STEPS
    assert equal(model, plain)
