"""Only what the first steps show to train by its layer's forward is masked; the rest stays as it is, with a reason."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_estdgm import DGMConfig, DGMController, EstDgm, Phase, Selection, Units
from lightning_estdgm.engine._admission import AUDITED_STEPS

SCHEDULE = EstDgm(
    Phase(0.7, 0.6, 15), Phase(0.3, 0.3, 15), Phase(0.2, 0.1, 30), update_every=5, observe_steps=2, freeze=0.5
)
CONFIG = DGMConfig(SCHEDULE, units=Units(size=1), backend="dense")


def body(width=16):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


class Net(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        self.body, self.head = body(), nn.Linear(16, 1)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.head(self.body(x))


def train(model, config=CONFIG, *, steps=3, loss=None, optimizer=None, after_backward=None, state=None, **settings):
    """Train for some steps of 60; return the controller, closed, and the weights before the first step."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 1e-3)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    with DGMController(model, optimizer, config, total_steps=60, state=state, **settings) as dgm:
        for step in range(steps):
            optimizer.zero_grad()
            (loss(x, step) if loss else model(x).square().mean()).backward()
            if after_backward:
                after_backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
    return dgm, before


def reasons(dgm):
    return {d.name: d.why for d in dgm.decisions() if not d.masked}


def test_the_first_step_is_that_of_the_plain_model_to_the_last_bit():
    model = Net()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.Adam(plain.parameters(), 1e-3)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    plain(x).square().mean().backward()
    optimizer.step()
    seen = {}
    dgm, _ = train(model, steps=1, after_backward=lambda: seen.update(copy.deepcopy(model.state_dict())))
    assert dgm.masks().keys() == {"body.0", "body.2"}
    assert dgm.density == pytest.approx(dgm.schedule(1).density, abs=0.002)
    for name, layer in (("body.0", model.body[0]), ("body.2", model.body[2])):
        mask, scale = dgm.masks()[name], dgm.layer_densities()[name] ** -0.5
        torch.testing.assert_close(layer.weight, plain.get_submodule(name).weight * mask * scale)
    assert torch.equal(model.head.weight, plain.head.weight)
    assert dgm.flops_ratio == 1.0  # of the first step


def test_a_network_that_the_optimizer_holds_and_no_gradient_reaches_is_left_as_it_is():
    model = Net(target=body())
    dgm, before = train(model, steps=AUDITED_STEPS + 1)
    assert dgm.masks().keys() == {"body.0", "body.2"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "target" in name)
    assert reasons(dgm) == {
        "head": "output head: its output goes into no other layer",
        "target.0": f"no gradient reached it in the first {AUDITED_STEPS} steps",
        "target.2": f"no gradient reached it in the first {AUDITED_STEPS} steps",
    }
    waiting, _ = train(Net(target=body()), steps=2)
    assert reasons(waiting)["target.0"] == "no gradient has reached it yet: dense until then"


def test_the_last_layer_that_trains_is_no_output_head_where_frozen_ones_follow():
    """As the last adapter on a frozen network."""
    model = Net(frozen=body().requires_grad_(False))

    def loss(x, step):
        return model.frozen(model.head(model.body(x)).expand(-1, 16)).square().mean()

    dgm, _ = train(model, loss=loss)
    assert dgm.masks().keys() == {"body.0", "body.2"}
    assert reasons(dgm)["head"] == (
        "last layer that trains: its output goes only into layers frozen in its step (include= masks it)"
    )
    assert reasons(dgm)["frozen.0"] == "its weight takes no gradient"
    named, _ = train(model, replace(CONFIG, selection=Selection(include=("head",))), loss=loss)
    assert "head" in named.masks()


def test_gradients_of_zeros_are_none():
    """As where gradients are zeroed in place, or a layer starts behind a zero one."""
    model = Net(target=body())

    def zeros():
        for parameter in model.target.parameters():
            parameter.grad = torch.zeros_like(parameter)

    dgm, before = train(model, after_backward=zeros)
    assert "target.0" not in dgm.masks()
    assert torch.equal(model.target[0].weight, before["target.0.weight"])


def test_a_layer_that_starts_to_train_later_is_taken_in_then():
    """As layers that are dropped at random, experts without tokens, a generator that trains every n-th step."""
    model = Net(late=nn.Linear(16, 16))

    def loss(x, step):
        return model.head(model.body(model.late(x)) if step >= 4 else model.body(x)).square().mean()

    dgm, _ = train(model, steps=4, loss=loss)
    assert "late" not in dgm.masks()
    dgm, before = train(model, steps=5, loss=loss)
    assert dgm.masks().keys() == {"body.0", "body.2", "late"}
    late = dgm.masks()["late"]
    assert torch.equal(model.late.weight != 0, late)
    total = sum(mask.sum().item() for mask in dgm.masks().values())
    assert total == round(dgm.schedule(5).density * 3 * 256)
    assert not torch.equal(model.late.weight * 1.0, before["late.weight"])


def test_heads_are_found_by_what_they_feed_and_named_layers_in_the_middle_are_masked():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy, self.value = nn.Linear(16, 3), nn.Linear(16, 1)
            self.head, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            h = self.last(self.head(x).relu()).relu()
            return torch.cat([self.policy(h), self.value(h)], 1)

    dgm, _ = train(Odd())
    assert dgm.masks().keys() == {"head", "last"}
    assert reasons(dgm).keys() == {"policy", "value"}
    dgm, _ = train(Odd(), CONFIG.merged(selection=Selection(include=["value"], exclude=["last"])))
    assert dgm.masks().keys() == {"head", "value"}
    assert reasons(dgm)["last"] == "excluded"


def test_if_every_layer_ends_the_network_only_the_last_called_is_the_head():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], 1)

    dgm, _ = train(Parallel())
    assert dgm.masks().keys() == {"a"}


class Standardised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def test_layers_that_do_not_compute_with_their_stored_weight_stay_dense_and_unscaled():
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = Standardised(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 1)

        def forward(self, x):
            return self.head(self.third(F.linear(self.first(x), self.second.weight).relu()).relu())

    model = Uses()
    dgm, _ = train(model)
    assert dgm.masks().keys() == {"third"}
    why = reasons(dgm)
    assert why["first"].startswith("Standardised does not compute with its weight as it is stored (sub())")
    assert why["second"] == "its weight is used by itself: its forward was not called"
    assert torch.count_nonzero(model.first.weight) == torch.count_nonzero(model.second.weight) == 256


@pytest.mark.parametrize("held", ["list", "dict", "sequential", "dict of lists"])
def test_weights_of_layers_in_a_container_are_seen_where_the_module_around_it_uses_them(held):
    containers = {
        "list": nn.ModuleList,
        "dict": lambda layers: nn.ModuleDict(zip("ab", layers, strict=True)),
        "sequential": lambda layers: nn.Sequential(*layers),
        "dict of lists": lambda layers: nn.ModuleDict({"all": nn.ModuleList(layers)}),
    }

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.Linear(16, 16), nn.Linear(16, 1)]
            self.first, self.held = nn.Linear(16, 16), containers[held](layers)

        def forward(self, x):
            x = self.first(x).relu()
            for layer in (m for m in self.held.modules() if isinstance(m, nn.Linear)):
                x = F.linear(x.relu(), layer.weight, layer.bias)
            return x

    dgm, _ = train(Holds())
    assert dgm.masks().keys() == {"first"}  # which is no output head: it feeds them
    assert set(reasons(dgm).values()) == {"its weight is used by itself: its forward was not called"}


def test_products_in_nested_containers_are_counted_once():
    class Sums(nn.ModuleList):
        def forward(self, x):
            return sum(F.linear(x, layer.weight) for layer in self)

    class Holds(nn.Module):
        def __init__(self, plain):
            super().__init__()
            torch.manual_seed(0)
            layers = [nn.Linear(16, 16), nn.Linear(16, 16)]
            self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 1)
            self.layers = nn.ModuleList(layers) if plain else nn.Sequential(nn.Sequential(Sums(layers)))

        def forward(self, x):
            x = self.first(x).relu()
            return self.head(self.layers(x) if isinstance(self.layers, nn.Sequential) else Sums.forward(self.layers, x))

    nested, plain = (train(Holds(plain))[0] for plain in (False, True))
    assert nested.flops == plain.flops
    assert nested.flops["dense"] == 3 * 6 * 32 * (3 * 16 * 16 + 16)  # of three steps


def test_layers_whose_forwards_are_called_by_themselves_are_masked_and_counted_as_others():
    class Direct(Net):
        def forward(self, x):
            for layer in self.body:
                x = layer.forward(x)
            return self.head.forward(x)

    torch.manual_seed(0)
    direct = Direct()
    (dgm, _), (as_others, _) = train(direct), train(Net())
    assert dgm.masks().keys() == {"body.0", "body.2"}
    assert reasons(dgm) == reasons(as_others)
    assert dgm.flops == as_others.flops
    assert not any("forward" in vars(module) for module in direct.modules())


def test_the_layer_before_a_cosine_head_is_masked():
    class Cosine(Net):
        def forward(self, x):
            return F.linear(self.body(x), F.normalize(self.head.weight))

    dgm, _ = train(Cosine())
    assert dgm.masks().keys() == {"body.0", "body.2"}
    assert reasons(dgm) == {"head": "its weight is used by itself: its forward was not called"}


def test_layers_whose_gradients_a_copy_computes_are_named_and_masked_without_the_audit():
    def reptile(**settings):
        model = Net()
        copied = copy.deepcopy(model)

        def hand_over():
            for parameter, other in zip(model.parameters(), copied.parameters(), strict=True):
                parameter.grad, other.grad = other.grad, None

        loss = lambda x, step: copied(x).square().mean()  # noqa: E731
        return train(model, loss=loss, after_backward=hand_over, **settings)[0]

    dgm = reptile(audit=False)
    assert dgm.masks().keys() == {"body.0", "body.2"}
    with pytest.warns(RuntimeWarning, match=r"the run goes on dense"):
        dgm = reptile()
    why = reasons(dgm)["body.0"]
    assert why.startswith("no forward of it was seen")
    assert "audit=False" in why


def test_a_run_in_which_nothing_can_be_masked_says_so_and_goes_on():
    model = nn.Sequential(Standardised(16, 16), nn.ReLU(), nn.Linear(16, 1))
    with pytest.warns(
        RuntimeWarning, match=r"the run goes on dense: .* no layer that can be masked. {'0': 'Standardis"
    ):
        dgm, _ = train(model, steps=30)
    assert dgm.density == 1.0
    assert dgm.steps == 30
    assert dgm.masks() == {}


def test_resume_keeps_the_verdicts_and_what_still_waits():
    def loss_of(model):
        return lambda x, step: (model.head(model.body(model.late(x))) if step % 8 == 7 else model(x)).square().mean()

    def fresh():
        torch.manual_seed(0)
        return Net(late=nn.Linear(16, 16), target=body())

    straight = fresh()
    dgm, _ = train(straight, steps=8, loss=loss_of(straight))
    model = fresh()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    first, _ = train(model, steps=5, loss=loss_of(model), optimizer=optimizer)
    state = first.state_dict()
    assert state["waiting_layers"] == ["late", "target.0", "target.2"]
    assert state["dense_layers"] == {"head": "output head: its output goes into no other layer"}
    again, _ = train(model, steps=3, loss=lambda x, step: loss_of(model)(x, step + 5), optimizer=optimizer, state=state)
    assert again.decisions() == dgm.decisions()
    assert all(torch.equal(value, straight.state_dict()[name]) for name, value in model.state_dict().items())


def test_states_of_before_the_audit_are_read():
    model = Net()
    old = train(model, audit=False)[0].state_dict()
    del old["waiting_layers"], old["dense_layers"]
    dgm, _ = train(model, state=old)
    assert dgm.masks().keys() == {"body.0", "body.2"}
    assert reasons(dgm) == {"head": "output head"}


def test_without_the_audit_masks_are_drawn_at_once_by_what_is_declared():
    model = Net(target=body())
    dgm, _ = train(model, steps=0, audit=False)
    assert dgm.masks().keys() == {"body.0", "body.2", "target.0"}
    assert reasons(dgm) == {"head": "output head", "target.2": "output head"}


def test_zeros_of_an_earlier_mask_outlive_the_first_step():
    model = Net()
    first, _ = train(model, steps=60)
    masks = {name: model.get_submodule(name).weight != 0 for name in first.masks()}
    dgm, before = train(model, steps=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(mask, masks.get(name, torch.ones_like(mask))) for name, mask in dgm.masks().items())
    assert "2 of 2 masked layers (body.0, body.2) hold zeros" in dgm.recovered
    dgm, before = train(model, steps=1)
    for name, was in masks.items():
        assert bool((dgm.masks()[name] & was).eq(was).all())  # what was active still is
        weight = model.get_submodule(name).weight
        assert torch.count_nonzero(weight[~was]) == 0  # grown weights start at zero, unscaled ones go on
        torch.testing.assert_close(
            weight[was], before[f"{name}.weight"][was], atol=0.02, rtol=0
        )  # not scaled by 0.7 ** -0.5


def test_closing_leaves_no_hook_behind():
    model = Net(target=body())
    dgm, _ = train(model, steps=1)
    dgm.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_recovered_masks_wait_where_the_weights_hold_no_zeros():
    model = Net(target=body())
    train(model, steps=50)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(32, 16)
    with DGMController(model, optimizer, CONFIG, total_steps=60, draw_masks=False) as dgm:
        dgm.recover(50, 50)
        assert dgm.masks().keys() == {"body.0", "body.2"}
        model(x).square().mean().backward()
        optimizer.step()
        dgm.advance()
        assert dgm.masks().keys() == {"body.0", "body.2"}
    assert torch.equal(model.target[0].weight, before["target.0.weight"])
    assert "body.0, body.2" in dgm.recovered


class Unseen(torch.optim.SGD):
    """Steps by a method of its own, which runs no hooks, as SAM's `first_step` and `second_step`."""

    @torch.no_grad()
    def apply_update(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=1e-2)


def test_steps_that_are_not_seen_are_said_once_and_change_nothing():
    model = Net()
    optimizer = Unseen(model.parameters(), 1e-2)

    def steps(dgm, n):
        for _ in range(n):
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            dgm.mask_gradients()
            optimizer.apply_update()
            dgm.advance()

    with DGMController(model, optimizer, CONFIG, total_steps=60) as dgm:
        with pytest.warns(RuntimeWarning, match=r"3 layers \(body.0, body.2, head\) change .* steps was seen") as told:
            steps(dgm, 20)
        assert len([w for w in told if "steps was seen" in str(w.message)]) == 1
        assert all(mask.all() for mask in dgm.masks().values())
        assert dgm.steps == 0
    assert torch.count_nonzero(model.body[0].weight) == 256


def test_accumulated_gradients_are_no_unseen_steps(recwarn):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with DGMController(model, optimizer, CONFIG, total_steps=60) as dgm:
        for _ in range(20):
            model(torch.randn(8, 16)).square().mean().backward()
            dgm.mask_gradients()
            dgm.advance()
    assert [str(w.message) for w in recwarn if "steps was seen" in str(w.message)] == []


@pytest.mark.parametrize("batches", [2, 3, 4])
def test_steps_that_are_seen_every_few_batches_are_not_called_unseen(batches):
    """At 2 every batch without a step follows one with: the weights have moved whenever they are looked at."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with DGMController(model, optimizer, CONFIG, total_steps=60) as dgm:
        for batch in range(1, 60 * batches + 1):
            model(torch.randn(8, 16)).square().mean().backward()
            if batch % batches == 0:
                dgm.mask_gradients()
                optimizer.step()
                optimizer.zero_grad()
            dgm.advance()
        assert (dgm.steps, dgm.position) == (60, 60)
        assert dgm.density == dgm.final_density


def test_steps_that_are_not_seen_any_more_are_said_in_a_run_with_masks():
    model = Net()
    optimizer = Unseen(model.parameters(), 1e-2)
    with DGMController(model, optimizer, CONFIG, total_steps=60) as dgm:

        def batches(n, step):
            for _ in range(n):
                optimizer.zero_grad()
                model(torch.randn(8, 16)).square().mean().backward()
                dgm.mask_gradients()
                step()
                dgm.advance()

        batches(10, optimizer.step)
        batches(50, optimizer.apply_update)  # the first of them has nothing to compare with
        with pytest.warns(RuntimeWarning, match=r"steps was seen.*Masks stay as they are, and the schedule stands"):
            batches(1, optimizer.apply_update)
        assert dgm.steps == 10


def test_heads_that_start_at_zero_are_all_heads():
    """In the first step only they get a gradient: what is behind them trains from the second on."""

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = body(), nn.Linear(16, 1), nn.Linear(16, 1)
            nn.init.zeros_(self.a.weight)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            h = self.body(x)
            return torch.cat([self.a(h), self.b(h)], 1) - 1

    dgm, _ = train(Zero(), steps=4)
    assert dgm.masks().keys() == {"body.0", "body.2"}
    assert reasons(dgm).keys() == {"a", "b"}


def test_where_outputs_are_fed_back_the_last_registered_layer_is_the_head():
    class Feedback(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.output = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            for _ in range(3):
                x = self.output(self.cell(x).tanh())
            return x

    dgm, _ = train(Feedback())
    assert dgm.masks().keys() == {"cell"}
