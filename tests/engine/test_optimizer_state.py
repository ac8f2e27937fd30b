"""State of dropped and grown units: what the optimizer gives a fresh parameter, whatever kind of state it keeps."""

import copy
from collections import deque
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers.controller_runs import (
    BLOCKS,
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
)
from helpers.masked_weights import numbered
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._optimizer_state import OptimizerStates
from lightning_estdgm.engine._state_entries import state_entries
from lightning_estdgm.engine._state_rules import Constant, CopyOfWeight, Kept, Requantised, Strided
from lightning_estdgm.engine._state_trial import StateUnknownError, TrialFailedError, fresh_state_rules, keeps_more
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.presets import preset


class Custom(torch.optim.SGD):
    """Descends gradients, and keeps what `update` makes of a parameter, its gradient and its state."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p])
                    p.sub_(p.grad, alpha=group["lr"])

    def update(self, p, state): ...


class Codes(Custom):
    def update(self, p, state):
        moment = (state["codes"].float() - 127) / 127 * state["absmax"] if state else torch.zeros_like(p)
        moment = 0.9 * moment + p.grad
        state["absmax"] = moment.abs().max()
        state["codes"] = (moment / state["absmax"] * 127).round().add(127).to(torch.uint8)


class Master(Custom):
    def update(self, p, state):
        state.setdefault("master", p.float().clone()).sub_(p.grad)


class Rotated(Custom):
    def update(self, p, state):
        state.setdefault("moment", torch.zeros_like(p)).add_(torch.linalg.qr(p.grad.double())[0].to(p.dtype))


class Statistics(Custom):
    def update(self, p, state):
        state.setdefault("statistics", [torch.zeros(len(p), len(p))])[0].add_(p.grad @ p.grad.T)


class Table(Custom):
    def update(self, p, state):
        state.setdefault("table", torch.arange(float(p.numel())).view_as(p))


class Unknown(Custom):
    def update(self, p, state):
        state["odd"] = torch.linspace(1, 2, p.numel()).view_as(p) * (1 + p.square())


class Outside(Custom):
    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        self.by_parameter, self.by_id = {}, {}

    def update(self, p, state):
        self.by_parameter.setdefault(p, torch.zeros_like(p)).add_(p.grad)
        self.by_id.setdefault(id(p), {"sum": torch.zeros_like(p)})["sum"].add_(p.grad)


class Stacked(Custom):
    def update(self, p, state):
        state.setdefault("both", torch.zeros(2, *p.shape)).add_(p.grad)


class Flat(Custom):
    def update(self, p, state):
        state.setdefault("flat", torch.zeros(p.numel())).add_(p.grad.flatten())


class Sliced(Custom):
    """Keeps the first weights and a sum of gradients, whole and of every third weight, as Prodigy with ``slice_p``."""

    def update(self, p, state):
        state.setdefault("first", p.clone())
        state.setdefault("sum", torch.zeros_like(p)).add_(p.grad)
        state.setdefault("first_sliced", p.flatten()[::3].clone())
        state.setdefault("sum_sliced", torch.zeros_like(p).flatten()[::3].clone()).add_(p.grad.flatten()[::3])


class Look(Custom):
    """Slow weights, made where the parameter is added."""

    def add_param_group(self, group):
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["slow"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        self.calls = getattr(self, "calls", 0) + 1
        for p in self.param_groups[0]["params"] if self.calls % 5 == 0 else ():
            p.copy_(self.state[p]["slow"].lerp_(p, 0.5))


class Queue(Custom):
    def update(self, p, state):
        state.setdefault("queue", deque(maxlen=3)).append(p.grad.clone())


class Leader(Custom):
    """Computes weights anew from its sums, so that those without gradients become 0, as FTRL does."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                z, n = (state.setdefault(name, torch.zeros_like(p)) for name in "zn")
                z += p.grad - ((n + p.grad.square()).sqrt() - n.sqrt()) / group["lr"] * p
                n += p.grad.square()
                p.copy_((-z * group["lr"] / n.sqrt()).nan_to_num(0.0))


class MadeAtOnce(Custom):
    """Makes its state in ``__init__`` alone, from an argument, as Adagrad of torch 2.6."""

    def __init__(self, params, lr=0.01, start=0.0):
        super().__init__(params, lr)
        self.defaults["start"] = start
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"] = torch.full_like(p, start)

    def update(self, p, state):
        state["sum"].addcmul_(p.grad, p.grad)


def rules(optimizer):
    found = fresh_state_rules(optimizer, optimizer.param_groups[0]["params"][0])
    return {".".join(path): rule for (_, path), rule in found.items()}


def weight_of(shape=(16, 16), dtype=torch.float32):
    return nn.Parameter(torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (torch.optim.AdamW, {"state.exp_avg": Constant(0.0), "state.exp_avg_sq": Constant(0.0)}),
        (torch.optim.Rprop, {"state.prev": Constant(0.0), "state.step_size": Constant(pytest.approx(0.01))}),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), {"state.sum": Constant(0.5)}),
        (lambda p: MadeAtOnce(p, start=0.5), {"state.sum": Constant(0.5)}),
        (torch.optim.ASGD, {"state.ax": CopyOfWeight()}),
        (torch.optim.Adafactor, {}),
        (Codes, {"state.codes": Constant(127)}),
        (Master, {"state.master": CopyOfWeight()}),
        (Look, {"state.slow": CopyOfWeight()}),
        (Leader, {"state.z": Constant(0.0), "state.n": Constant(0.0)}),
        (Outside, {"by_parameter": Constant(0.0), "by_id.sum": Constant(0.0)}),
        (Stacked, {"state.both.0": Constant(0.0), "state.both.1": Constant(0.0)}),
        (Flat, {"state.flat": Constant(0.0)}),
        (
            Sliced,
            {
                "state.first": CopyOfWeight(),
                "state.sum": Constant(0.0),
                "state.first_sliced": Strided(CopyOfWeight(), 3),
                "state.sum_sliced": Strided(Constant(0.0), 3),
            },
        ),
    ],
)
def test_a_trial_finds_what_a_fresh_parameter_has(make, expected):
    optimizer = make([weight_of()])
    before = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    assert rules(optimizer) == expected
    assert str(optimizer.state_dict()) == str(before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_copy_in_another_dtype_is_one():
    assert rules(Master([weight_of(dtype=torch.bfloat16)])) == {"state.master": CopyOfWeight()}


@pytest.mark.parametrize(
    ("make", "name", "why"),
    [
        (Rotated, "state.moment", "mix the gradients"),
        (Statistics, "state.statistics.0", "mix the gradients"),
        (Table, "state.table", "neither weights nor gradients"),
    ],
)
def test_state_that_is_no_weights_own_is_kept(make, name, why):
    rule = rules(make([weight_of()]))[name]
    assert isinstance(rule, Kept)
    assert why in rule.why


def test_settings_of_the_group_count_and_schedulers_do_not_step_the_optimizer_of_the_run():
    weight, other = weight_of(), weight_of((8, 8))
    optimizer = torch.optim.Rprop([{"params": [other], "lr": 0.5}, {"params": [weight]}], lr=0.25)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    found = fresh_state_rules(optimizer, weight)
    assert found["Rprop", ("state", "step_size")] == Constant(0.25)
    assert fresh_state_rules(optimizer, other)["Rprop", ("state", "step_size")] == Constant(0.5)
    assert torch.equal(weight, before)


def test_an_optimizer_that_cannot_be_stepped_fails_its_trial():
    class Broken(Custom):
        def update(self, p, state):
            raise RuntimeError("no")

    with pytest.raises(TrialFailedError, match="RuntimeError: no"):
        rules(Broken([weight_of()]))
    with pytest.raises(StateUnknownError, match="odd"):
        rules(Unknown([weight_of()]))


# --------------------------------------------------------------------------- reset


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(Constant(0.0), 0.0), (Constant(127), 127.0), (Kept(""), 9.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("flat", [False, True])
def test_a_rule_writes_at_the_given_units_in_any_dtype(rule, expected, dtype, flat):
    weight = numbered([[1, 0], [0, 1]], block_size=2)
    state = torch.full((16,) if flat else (4, 4), 9, dtype=dtype)
    rule.reset_(state, weight, torch.tensor([[True, False], [False, False]]))
    assert state.view(4, 4)[:2, :2].eq(expected).all()
    assert state.view(4, 4)[2:].eq(9).all()
    assert state.view(4, 4)[:, 2:].eq(9).all()


def test_a_copy_takes_the_weights_values():
    weight = numbered([[1, 0], [0, 1]], block_size=2)
    state = torch.zeros(4, 4, dtype=torch.bfloat16)
    CopyOfWeight().reset_(state, weight, torch.tensor([[True, False], [False, True]]))
    assert state.tolist() == [[1, 2, 0, 0], [5, 6, 0, 0], [0, 0, 11, 12], [0, 0, 15, 16]]


def test_a_packed_tensor_is_written_back_whole():
    class Packed:
        def __init__(self, values):
            self.values = values

        def dequantize(self):
            return self.values.clone()

        def copy_(self, dense):
            self.values.copy_(dense)

    state = Packed(torch.ones(2, 2))
    Requantised(0.0).reset_(state, numbered([[1, 0], [0, 1]]), torch.tensor([[True, False], [False, False]]))
    assert state.values.tolist() == [[0, 1], [1, 1]]


def test_entries_of_other_parameters_and_counts_are_left_out():
    one, other = weight_of(), weight_of()
    optimizer = torch.optim.AdamW([one, other])
    for parameter in (one, other):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = dict(state_entries(optimizer, one))
    assert sorted(found) == [("state", "exp_avg"), ("state", "exp_avg_sq")]
    assert found["state", "exp_avg"] is optimizer.state[one]["exp_avg"]


# --------------------------------------------------------------------------- whole runs


def test_codes_are_reset_in_a_run_and_after_load_state_dict_has_made_them_floats(mlp):
    model = mlp(32, 32, 32, 4)
    optimizer = Codes(model.parameters())
    weight = model[0].weight
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        old = dgm.masks()["0"]
        for step, updated in fit(model, optimizer, dgm):
            new = dgm.masks()["0"]
            if updated:
                assert optimizer.state[weight]["codes"][old ^ new].eq(127).all()
            if step == 8:
                optimizer.load_state_dict(saved(optimizer.state_dict()))
                assert optimizer.state[weight]["codes"].is_floating_point()
            old = new
    assert dgm.updates > 2


def test_queued_gradients_are_reset(mlp):
    model = mlp(32, 32, 32, 4)
    optimizer = Queue(model.parameters())
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        for _, updated in fit(model, optimizer, dgm):
            if updated:
                queue = optimizer.state[model[0].weight]["queue"]
                assert all(torch.count_nonzero(gradient[~dgm.masks()["0"]]) == 0 for gradient in queue)
    assert dgm.updates > 2


@pytest.mark.parametrize(("make", "entry"), [(Master, "master"), (Look, "slow")])
def test_copies_follow_the_first_mask_and_every_update(mlp, make, entry):
    model = mlp(32, 32, 32, 4)
    optimizer = make(model.parameters())
    state = optimizer.state[model[0].weight]
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        if entry in state:  # made with the optimizer, before masks were drawn
            assert torch.equal(state[entry], model[0].weight)
        for _, updated in fit(model, optimizer, dgm):
            if updated:
                inactive = ~dgm.masks()["0"]
                assert torch.count_nonzero(state[entry][inactive]) == 0
    assert dgm.density == pytest.approx(0.1, abs=0.01)


def test_a_first_mask_that_drops_nothing_leaves_copies_as_they_are(mlp):
    ends = []
    for masked in (True, False):
        model = mlp(32, 32, 32, 4)
        optimizer = Look(model.parameters())
        if masked:
            config = replace(WEIGHTS, schedule=constant(1.0))
            with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:  # masks are drawn after a step
                run(model, optimizer, dgm)
                assert dgm.masks()
        else:
            for step in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, batch(step, 32)).backward()
                optimizer.step()
        ends.append(model)
    assert equal(*ends)


@pytest.mark.parametrize(("entry", "settings"), [("slow", WEIGHTS), ("slow", BLOCKS), ("first_sliced", WEIGHTS)])
def test_copies_of_kept_weights_are_scaled_as_these_when_the_first_mask_is_drawn(mlp, entry, settings):
    model = mlp(32, 64, 64, 4)
    optimizer = (Look if entry == "slow" else Sliced)(model.parameters())
    weight, stride = model[2].weight, 1 if entry == "slow" else 3
    with DGMController(model, optimizer, settings, total_steps=STEPS) as dgm:
        for _ in fit(model, optimizer, dgm, last=1):
            pass
        active = full_masks(dgm)["2"]
        assert 0 < active.sum() < active.numel()
        scale = dgm.layer_densities()["2"] ** -0.5
    untouched = mlp(32, 64, 64, 4)[2].weight.detach()  # of which there is a copy from before the step
    assert not torch.equal(untouched * scale * active, weight)
    expected = (untouched * scale * active).flatten()[::stride]
    assert torch.equal(optimizer.state[weight][entry].flatten(), expected)


@pytest.mark.parametrize("settings", [WEIGHTS, BLOCKS], ids=["weights", "blocks"])
@pytest.mark.parametrize("first", ["masks", "state"])
def test_state_of_one_in_three_weights_is_that_part_of_the_whole_state(mlp, settings, first):
    model = mlp(32, 64, 64, 4)
    optimizer = Sliced(model.parameters())
    if first == "state":
        loss_of(model, batch(0, 32)).backward()
        optimizer.step()
    with DGMController(model, optimizer, settings, total_steps=STEPS, audit=False) as dgm:
        for _ in fit(model, optimizer, dgm):
            for layer in (model[0], model[2]):
                state = optimizer.state[layer.weight]
                for entry in ("first", "sum"):
                    assert torch.equal(state[f"{entry}_sliced"], state[entry].flatten()[::3])
    assert dgm.updates > 2


def test_prodigy_that_keeps_every_eleventh_weight_estimates_its_rate_as_with_all(mlp):
    prodigy = pytest.importorskip("prodigyopt").Prodigy
    rates = {}
    for slice_p in (1, 11):
        model = mlp(32, 64, 64, 4)
        optimizer = prodigy(model.parameters(), lr=1.0, slice_p=slice_p)
        with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
            run(model, optimizer, dgm)
        rates[slice_p] = optimizer.param_groups[0]["d"]
    assert rates[1] / 2 < rates[11] < 2 * rates[1]


def test_a_run_is_refused_at_its_start_by_the_name_of_optimizer_and_entry(mlp):
    model = mlp(32, 32, 32, 4)
    message = r"layer '0': Unknown keeps a state 'state\.odd'.*Selection\(exclude="
    with pytest.raises(ValueError, match=message):
        DGMController(model, Unknown(model.parameters()), WEIGHTS, total_steps=STEPS, audit=False)


def test_a_schedule_without_mask_updates_runs_with_any_state(mlp):
    model = mlp(32, 32, 32, 4)
    optimizer = Unknown(model.parameters())
    with DGMController(model, optimizer, preset("static", density=0.5), total_steps=STEPS, audit=False) as dgm:
        run(model, optimizer, dgm)


class InOneVector(Custom):
    """Keeps a sum of gradients and of their squares, of all parameters in one vector each."""

    def __init__(self, params, lr=0.01, momentum=True):
        super().__init__(params, lr)
        size = sum(p.numel() for group in self.param_groups for p in group["params"])
        self.momentum, self.sums, self.squares = momentum, torch.zeros(size), torch.zeros(size)

    @torch.no_grad()
    def step(self, closure=None):
        start = 0
        for group in self.param_groups:
            for p in group["params"]:
                part, start = slice(start, start + p.numel()), start + p.numel()
                sums, squares = self.sums[part].view_as(p), self.squares[part].view_as(p)
                sums.mul_(0.9 if self.momentum else 0.0).add_(p.grad)
                squares.addcmul_(p.grad, p.grad)
                p.addcdiv_(sums, squares.sqrt() + 1e-8, value=-group["lr"])


@pytest.mark.parametrize("lr", [0.01, 0.0])
@pytest.mark.parametrize("momentum", [True, False])
def test_state_in_a_place_that_is_not_searched_is_kept_and_said(mlp, lr, momentum):
    model = mlp(32, 32, 32, 4)
    optimizer = InOneVector(model.parameters(), lr, momentum=momentum)
    message = r"InOneVector keeps state of layer '0' in a place that is not searched: it stays.*optimizer\.state"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        dgm = DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False)
    dgm.close()
    assert len(caught) == 1
    static = preset("static", density=0.5)  # masks do not change, so nothing is said
    DGMController(model, optimizer, static, total_steps=STEPS, audit=False).close()


@pytest.mark.parametrize("lr", [1e-2, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p, lr: torch.optim.AdamW(p, lr, amsgrad=True),
        torch.optim.Rprop,
        lambda p, lr: torch.optim.Adagrad(p, lr, initial_accumulator_value=0.5),
        lambda p, lr: torch.optim.RMSprop(p, lr, momentum=0.5, centered=True),
        torch.optim.Adafactor,  # its steps depend on other elements
        *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else []),  # not in torch 2.6
        Master,
        Look,
        Sliced,
        Rotated,
        Statistics,
        Outside,
        Queue,
    ],
)
def test_an_optimizer_whose_state_is_found_keeps_no_more(make, dtype, lr):
    weight = weight_of(dtype=dtype)
    optimizer = make([weight], lr)
    before = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    assert not keeps_more(optimizer, weight, fresh_state_rules(optimizer, weight))
    assert str(optimizer.state_dict()) == str(before[0])
    assert torch.equal(weight, before[1])


class Handle:
    def __deepcopy__(self, memo):
        raise RuntimeError("there is one of me")


class Untried(Codes):
    """Cannot be copied."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        self.handle = Handle()


def test_an_optimizer_that_cannot_be_tried_is_read_at_weights_without_gradients(mlp):
    model = mlp(32, 32, 32, 4)
    optimizer = Untried(model.parameters())
    with pytest.warns(RuntimeWarning, match=r"could not try Untried: RuntimeError: there is one of me"):
        dgm = DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False)
    old = dgm.masks()["0"]
    with dgm:
        for _, updated in fit(model, optimizer, dgm):
            if updated:
                changed = old ^ dgm.masks()["0"]
                assert optimizer.state[model[0].weight]["codes"][changed].eq(127).all()
            old = dgm.masks()["0"]


def test_state_that_cannot_be_found_is_kept_and_said(mlp):
    model = mlp(32, 32, 32, 4)
    optimizer = Custom(model.parameters())
    dense_first = DGMConfig(constant(0.5), units=Units(size=1))
    with DGMController(model, optimizer, dense_first, total_steps=STEPS, audit=False) as dgm:
        optimizer.state[model[0].weight]["late"] = torch.rand(32, 32)
        with pytest.warns(RuntimeWarning, match=r"state 'Custom\.state\.late' is kept as it is"):
            run(model, optimizer, dgm)


def test_a_choice_of_weights_stays_as_it_is(mlp):
    """SaRA steps the weights that were small at first, and keeps moments of these alone."""
    sara = pytest.importorskip("pytorch_optimizer").SaRA
    model = mlp(32, 32, 32, 4)
    optimizer = sara(model.parameters(), lr=1e-2, threshold=0.1)
    rule = fresh_state_rules(optimizer, model[0].weight)["SaRA", ("state", "mask")]
    assert isinstance(rule, Kept)
    assert "which weights have state" in rule.why
    chosen = [optimizer.state[p]["mask"].clone() for p in model.parameters()]
    schedule = EstDgm(update_every=4, observe_steps=2)
    config = DGMConfig(schedule, units=Units(size=1), backend="dense")
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        run(model, optimizer, dgm)
    assert dgm.updates > 2
    for p, mask in zip(model.parameters(), chosen, strict=True):
        state = optimizer.state[p]
        assert torch.equal(state["mask"], mask)
        assert state["exp_avg"].numel() == mask.sum()


@pytest.mark.parametrize(
    "settings", [WEIGHTS, replace(WEIGHTS, backend="auto", storage="packed")], ids=["dense", "packed"]
)
def test_each_of_two_optimizers_of_one_class_over_the_same_weights_has_its_own_values(mlp, settings):
    model = mlp(32, 32, 32, 4)
    starts = (0.25, 2.0)
    pair = [torch.optim.Adagrad(model.parameters(), 0.01, initial_accumulator_value=start) for start in starts]
    with DGMController(model, pair, settings, total_steps=STEPS, audit=False) as dgm:
        old = dgm.masks()["0"]
        for step in range(STEPS):
            optimizer = pair[step % 2]
            optimizer.zero_grad()
            loss_of(model, batch(step, 32)).backward()
            dgm.mask_gradients()
            optimizer.step()
            if dgm.advance():
                changed = old ^ dgm.masks()["0"]
                for each, start in zip(pair, starts, strict=True):
                    sums = each.state_dict()["state"][0]["sum"]
                    assert changed.any()
                    assert sums[changed].eq(start).all()
                old = dgm.masks()["0"]
    assert dgm.updates > 2


class Sharing(torch.optim.Optimizer):
    """Steps by another optimizer, and keeps its state as its own, as `ZeroRedundancyOptimizer` does once loaded."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner, self.handle = inner, Handle()  # so it cannot be tried, and what it wraps can

    def step(self, closure=None):
        loss = self.inner.step(closure)
        for p, state in self.inner.state.items():
            self.state[p] = dict(state)
        return loss


@pytest.mark.filterwarnings("ignore:the optimizer's state")
def test_state_that_a_wrapper_shares_is_reset_by_what_is_known_of_the_optimizer_inside(mlp):
    model = mlp(32, 32, 32, 4)
    inner = adamw(model)
    optimizer = Sharing(inner)
    dense_first = DGMConfig(EstDgm(update_every=4, observe_steps=2, warmup=0.2), units=Units(size=1), backend="dense")
    with DGMController(model, optimizer, dense_first, total_steps=STEPS, audit=False) as dgm:
        for _, updated in fit(model, optimizer, dgm):
            if updated:
                inactive = ~dgm.masks()["0"]
                assert inactive.any()
                assert not inner.state[model[0].weight]["exp_avg"][inactive].any()
    assert dgm.updates > 2


def test_the_history_of_lbfgs_is_cleared_at_updates(mlp):
    model = mlp(32, 32, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        for step in range(STEPS):

            def closure(step=step):
                optimizer.zero_grad()
                loss = loss_of(model, batch(step, 32))
                loss.backward()
                dgm.mask_gradients()
                return loss

            optimizer.step(closure)
            assert len(optimizer.state) == 1
            updated = dgm.advance()
            assert len(optimizer.state) == (0 if updated else 1)
    assert dgm.updates > 2


def test_a_run_takes_no_random_numbers_for_trials(mlp):
    model = mlp(32, 32, 4)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    states = OptimizerStates([adamw(model)])
    with DGMController(model, adamw(model), WEIGHTS, total_steps=STEPS, audit=False) as dgm:
        states.prepare(dgm.masked_weights, changes_masks=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_made_of_the_rate_is_not_remembered_for_another_rate(mlp):
    for lr in (1e-3, 0.5):
        model = mlp(16, 16, 4)
        optimizer = torch.optim.Rprop(model.parameters(), lr=lr)
        with DGMController(model, optimizer, total_steps=100) as dgm:
            rules = dgm._states._rules[id(model[0].weight)]
            assert rules[id(optimizer), ("state", "step_size")].value == pytest.approx(lr)


def test_a_trial_that_failed_is_made_again(mlp, monkeypatch):
    def short_of_memory(*args):
        raise torch.OutOfMemoryError("by the test")

    settings = {"lr": 1e-3, "betas": (0.9, 0.9871)}
    notes = []
    for is_short in (True, False):
        model = mlp(16, 16, 4)
        with monkeypatch.context() as patch:
            if is_short:
                for module in ("_rate_trial", "_count_trial"):
                    patch.setattr(f"lightning_estdgm.engine.{module}.trial_optimizer", short_of_memory)
            with DGMController(model, torch.optim.Adam(model.parameters(), **settings), total_steps=100) as dgm:
                notes.append(dgm.masked_weights[0].note)
    assert "steps not scaled by density: Adam could not be tried (OutOfMemoryError: by the test)" in notes[0]
    assert "tried" not in notes[1]
