"""``storage="packed"`` under a `DGMController`: the same numbers as dense storage, state dicts, refusals."""

import copy
import dataclasses
import types
from collections import deque
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from helpers.controller_runs import SCHEDULE, STEPS, adamw, constant, fit, loss_of, run, saved, sgd
from helpers.expert_models import SortedExperts, adapter, sorted_forward
from helpers.storages import (
    ROUNDING,
    LoadsByItself,
    check_equal,
    config,
    double,
    largest_difference,
    largest_state_difference,
    trained,
)
from lightning_estdgm.config import DGMConfig, Selection, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._storage import PackedStorage
from lightning_estdgm.method._patterns import NofM
from lightning_estdgm.method._schedules import ConstantDensity
from lightning_estdgm.method._update_rule import UpdateRule
from lightning_estdgm.modules import _packed_forward
from lightning_estdgm.modules._packed_forward import PackedForward
from lightning_estdgm.presets import preset


def momentum(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def adagrad(model):
    return torch.optim.Adagrad(model.parameters(), 1e-2, initial_accumulator_value=0.1)


def lion(model):
    return pytest.importorskip("pytorch_optimizer").Lion(model.parameters(), lr=1e-3)


def schedule_free(model):
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(model.parameters(), lr=5e-3)
    optimizer.train()
    return optimizer


OPTIMIZERS = (sgd, momentum, adamw, adagrad, lion, schedule_free)
RULES = {
    "random": UpdateRule(grow="random"),
    "consistency": UpdateRule(),
    "gradient": UpdateRule(grow="gradient"),
    "regrown": UpdateRule(regrow=True),
    "redistributed": UpdateRule(redistribute="global"),
}


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_packed_weights_train_as_whole_ones_do(mlp, make):
    runs = [trained(double(mlp(32, 256, 128, 4)), make, config(4, storage)) for storage in ("dense", "packed")]
    check_equal(*runs)
    masks = runs[0][2]
    assert int(masks[0]["0"].sum()) > 4 * int(masks[-1]["0"].sum()) > 0


@pytest.mark.parametrize("unit", [1, (4, 1), 16], ids=str)
def test_units_of_every_kind(mlp, unit):
    check_equal(*(trained(double(mlp(32, 256, 128, 4)), adamw, config(unit, s)) for s in ("dense", "packed")))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules_of_every_kind(mlp, rule):
    check_equal(
        *(trained(double(mlp(32, 256, 128, 4)), adamw, config(4, s, update_rule=rule)) for s in ("dense", "packed"))
    )


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_norms_of_one_observed_step_are_enough(mlp, rule, unit):
    schedule = dataclasses.replace(SCHEDULE, observe_steps=1)
    runs = [
        trained(double(mlp(32, 256, 128, 4)), adamw, config(unit, s, schedule, update_rule=rule))
        for s in ("dense", "packed")
    ]
    check_equal(*runs)


def test_the_comparison_can_fail(mlp):
    dense = trained(double(mlp(32, 256, 128, 4)), adamw, config(4, "dense"))
    packed = trained(double(mlp(32, 256, 128, 4)), adamw, config(4, seed=1))
    assert largest_difference(dense[0], packed[0]) > 1e-4


class Convolutions(nn.Module):
    """A convolution of each number of dimensions, a grouped one, and a transposed one, which stays whole."""

    def __init__(self):
        super().__init__()
        self.two = nn.Conv2d(4, 16, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4, padding_mode="circular", padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2)
        self.one = nn.Conv1d(8, 16, 3, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.up(F.gelu(self.grouped(F.gelu(self.two(x.view(-1, 4, 4, 2))))))
        return self.head(F.gelu(self.one(x.flatten(2))).mean(2))


@pytest.mark.parametrize("unit", [1, 4], ids=str)
def test_convolutions(unit):
    runs = []
    for storage in ("dense", "packed"):
        torch.manual_seed(0)
        runs.append(trained(double(Convolutions()), adamw, config(unit, storage)))
    check_equal(*runs)
    model = runs[1][0]
    assert [isinstance(m, PackedForward) for m in model.children()] == [True, True, False, True, False]


def test_why_a_layer_is_stored_whole_is_said():
    model = Convolutions()
    with DGMController(model, adamw(model), config(4), total_steps=STEPS) as dgm:
        found = {d.name: (d.backend, d.why) for d in dgm.decisions()}
    assert found["two"] == ("packed", "")
    assert found["up"][0] == "dense"
    assert "stored whole: no packed ConvTranspose2d" in found["up"][1]


# --------------------------------------------------------------------------- what stays whole


class Scaled(nn.Linear):
    """Uses its weight as it is stored, but for a factor."""

    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)


class Centred(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Binary(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight + (self.weight.sign() - self.weight).detach(), self.bias)


class Monotone(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.exp() / 32, self.bias)


class MaxNorm(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, 2, 0, 1.0))
        return super().forward(x)


class CentredExperts(SortedExperts):
    def forward(self, x):
        y = torch.einsum("td,ehd->teh", x, self.up - self.up.mean(-1, keepdim=True)).relu()
        return torch.einsum("teh,edh,te->td", y, self.down, self.router(x).softmax(-1))


def with_layer(cls):
    torch.manual_seed(0)
    layer = cls() if issubclass(cls, SortedExperts) else cls(16, 16)
    return nn.Sequential(nn.Linear(32, 16), layer, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def audited(model, storage, steps=STEPS):
    """Train with an audit; return what was decided, and the masks after the first step."""
    optimizer = adamw(model)
    experts = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    selection = Selection(experts=experts)
    with DGMController(model, optimizer, config(4, storage, selection=selection), total_steps=STEPS) as dgm:
        run(model, optimizer, dgm, last=1)
        early = dgm.masks()
        run(model, optimizer, dgm, first=1, last=steps)
        return {d.name: (d.masked, d.why) for d in dgm.decisions()}, early


@pytest.mark.parametrize("cls", [Centred, Binary, Monotone, MaxNorm, CentredExperts], ids=lambda cls: cls.__name__)
def test_whole_layers_that_do_not_use_their_stored_weight_stay_dense_as_with_dense_storage(cls):
    name = "1.up" if cls is CentredExperts else "1"
    (dense, _), (packed, _) = (audited(with_layer(cls), storage) for storage in ("dense", "packed"))
    assert packed[name] == dense[name]
    assert packed[name][0] is False
    assert "does not compute with its weight as it is stored" in packed[name][1]
    assert [k for k, (masked, _) in packed.items() if masked] == [k for k, (masked, _) in dense.items() if masked]


def test_whole_layers_are_masked_once_the_first_step_has_shown_that_they_train_by_their_weight():
    model = with_layer(Scaled)
    decided, early = audited(model, "packed")
    assert list(early) == ["0", "1", "3"]
    assert all(0.5 < mask.float().mean() < 0.9 for mask in early.values())
    masked, why = decided["1"]
    assert masked
    assert "stored whole: no packed Scaled" in why
    assert 0 < torch.count_nonzero(model[1].weight) <= 16 * 16 * 0.2


def test_a_whole_layer_that_ends_the_network_is_found_to_be_the_head_wherever_it_is_registered():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.output, self.first, self.second = Scaled(16, 4), nn.Linear(32, 16), Scaled(16, 16)
            self.third = nn.Linear(16, 16)

        def forward(self, x):
            return self.output(self.third(self.second(self.first(x).relu()).relu()).relu())

    decided, _ = audited(Odd(), "packed", steps=3)
    assert decided["output"] == (False, "output head: its output goes into no other layer")
    assert [name for name, (masked, _) in decided.items() if masked] == ["first", "second"]
    assert decided["third"] == (False, "output head")  # by its place: packed weights are not audited


@pytest.mark.parametrize("stop", [1, 17])
@pytest.mark.parametrize("layer", [Scaled, Centred], ids=lambda cls: cls.__name__)
def test_a_run_with_whole_layers_goes_on_as_if_it_had_not_stopped(layer, stop):
    straight = with_layer(layer)
    decided, _ = audited(straight, "packed")
    model = with_layer(layer)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config(4), total_steps=STEPS) as dgm:
        run(model, optimizer, dgm, last=stop)
        state = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "dgm": dgm.state_dict()})
    model = with_layer(layer)
    optimizer = adamw(model)
    model.load_state_dict(state["model"])
    with DGMController(model, optimizer, config(4), total_steps=STEPS, state=state["dgm"]) as dgm:
        optimizer.load_state_dict(state["optimizer"])
        run(model, optimizer, dgm, first=stop)
        assert {d.name: (d.masked, d.why) for d in dgm.decisions()} == decided
    assert largest_difference(model, straight) == 0.0


def test_a_whole_layer_that_is_built_on_the_meta_device_waits_with_values_and_all_units():
    with torch.device("meta"):
        model = with_layer(Scaled)
    storage = PackedStorage(config(4))
    storage.pack(model, lambda: STEPS)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config(4), total_steps=STEPS, storage=storage) as dgm:
        assert list(dgm.masks()) == ["0", "3"]
        run(model, optimizer, dgm, last=1)
        assert list(dgm.masks()) == ["0", "1", "3"]
        assert torch.count_nonzero(model[1].weight) < 16 * 16


# --------------------------------------------------------------------------- what is stored


def test_parameters_gradients_and_states_have_the_size_of_the_active_units(mlp):
    model, optimizer, history = trained(mlp(32, 256, 128, 4), adamw, config(4))
    for index, name in ((0, "0"), (2, "2")):
        parameter = model[index]._parameters["weight"]
        units = int(history[-1][name].sum())
        assert parameter.shape == (units, 4, 4)
        assert parameter.grad.shape == parameter.shape
        assert {x.shape for x in optimizer.state[parameter].values() if x.dim() > 0} == {parameter.shape}
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4


def test_parameters_stay_the_same_objects_in_the_same_order_under_the_same_names(mlp):
    model = mlp(32, 256, 128, 4)
    names = list(model.state_dict())
    before = dict(model.named_parameters())
    trained(model, adamw, config(4))
    after = dict(model.named_parameters())
    assert list(before) == list(after) == names
    assert all(before[name] is after[name] for name in names)


def test_growth_at_random_sees_no_gradient_of_inactive_units(mlp, monkeypatch):
    seen = []
    see = _packed_forward._see
    monkeypatch.setattr(_packed_forward, "_see", lambda *args: (seen.append(args), see(*args)))
    trained(mlp(32, 256, 128, 4), adamw, config(4, update_rule=UpdateRule(keep="magnitude", grow="random")))
    assert not seen
    trained(mlp(32, 256, 128, 4), adamw, config(4, update_rule=UpdateRule(keep="magnitude", grow="gradient")), steps=3)
    assert seen


# --------------------------------------------------------------------------- state


def resumed(mlp, first, second, stop, make=adamw, through=saved):
    model = double(mlp(32, 256, 128, 4))
    optimizer = make(model)
    with DGMController(model, optimizer, first, total_steps=STEPS, audit=False) as dgm:
        run(model, optimizer, dgm, last=stop)
        state = through({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "dgm": dgm.state_dict()})
    model = double(mlp(32, 256, 128, 4, seed=99))
    optimizer = make(model)
    model.load_state_dict(state["model"])
    with DGMController(model, optimizer, second, total_steps=STEPS, state=state["dgm"], audit=False) as dgm:
        optimizer.load_state_dict(state["optimizer"])
        run(model, optimizer, dgm, first=stop)
    return model, optimizer


@pytest.mark.parametrize("stop", [2, 17], ids=["in a window", "between windows"])
@pytest.mark.parametrize("storages", [("packed", "packed"), ("packed", "dense"), ("dense", "packed")], ids="-".join)
def test_a_run_goes_on_from_either_storage_in_either(mlp, storages, stop):
    first, second = (config(4, storage) for storage in storages)
    model, optimizer = resumed(mlp, first, second, stop)
    straight = trained(double(mlp(32, 256, 128, 4)), adamw, second)
    exact = 0.0 if storages == ("packed", "packed") else ROUNDING
    assert largest_difference(model, straight[0]) <= exact
    assert largest_state_difference(optimizer, straight[1]) <= exact


def rprop(model):
    return torch.optim.Rprop(model.parameters(), lr=1.3e-3)


def test_state_that_does_not_begin_at_0_goes_on_to_the_bit(mlp):
    model, optimizer = resumed(mlp, config(4), config(4), 17, rprop)
    straight = trained(double(mlp(32, 256, 128, 4)), rprop, config(4))
    assert largest_difference(model, straight[0]) == 0.0
    assert largest_state_difference(optimizer, straight[1]) == 0.0


def by_itself(model):
    return LoadsByItself(model.parameters(), 1e-2)


@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize("storages", [("packed", "packed"), ("packed", "dense"), ("dense", "packed")], ids="-".join)
def test_an_optimizer_that_loads_its_state_without_torchs_hooks_goes_on(mlp, storages, unit):
    first, second = (config(unit, storage) for storage in storages)
    model, optimizer = resumed(mlp, first, second, 17, by_itself)
    straight = trained(double(mlp(32, 256, 128, 4)), by_itself, second)
    exact = 0.0 if storages == ("packed", "packed") else ROUNDING
    assert largest_difference(model, straight[0]) <= exact
    assert largest_state_difference(optimizer, straight[1]) <= exact


def lookahead(model):
    return pytest.importorskip("pytorch_optimizer").Lookahead(torch.optim.AdamW(model.parameters(), 1e-2))


def test_a_wrapper_with_slow_weights_of_its_own_trains_as_with_dense_storage(mlp):
    dense, packed = (trained(double(mlp(32, 256, 128, 4)), lookahead, config(4, s)) for s in ("dense", "packed"))
    assert all(torch.equal(a[n], b[n]) for a, b in zip(dense[2], packed[2], strict=True) for n in a)
    assert largest_difference(dense[0], packed[0]) < ROUNDING
    plain = trained(double(mlp(32, 256, 128, 4)), adamw, config(4))
    assert largest_difference(plain[0], packed[0]) > 1e-4


@pytest.mark.parametrize("stop", [2, 17], ids=["in a window", "between windows"])
@pytest.mark.parametrize("first", ["packed", "dense"])
def test_a_wrapper_with_slow_weights_of_its_own_goes_on_packed(mlp, first, stop):
    model, _ = resumed(mlp, config(4, first), config(4), stop, lookahead)
    straight = trained(double(mlp(32, 256, 128, 4)), lookahead, config(4))
    assert largest_difference(model, straight[0]) <= (0.0 if first == "packed" else ROUNDING)


def test_a_loop_that_zips_parameters_with_a_copys_ends_with_a_note_on_state_dict(mlp):
    net = mlp(32, 256, 128, 4)
    model = nn.ModuleList([net, copy.deepcopy(net)])
    with (
        pytest.raises(RuntimeError, match="doesn't match") as error,
        DGMController(model, sgd(net), config(1), total_steps=STEPS, audit=False),
    ):
        model[1][0].weight.detach().copy_(dict(net.named_parameters())["0.weight"].detach())
    said = "".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert "its copy (1 of 0) cannot be zipped" in said


class Queued(torch.optim.SGD):
    """Descends the oldest of some last gradients, which it keeps in a queue."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                queue = self.state[p].setdefault("queue", deque())
                queue.append(p.grad.clone())
                p.sub_(queue.popleft() if len(queue) > 3 else queue[0], alpha=group["lr"])


def queued(model):
    return Queued(model.parameters(), 0.05)


def test_state_in_a_queue_moves_along_and_goes_on(mlp):
    dense, packed = (trained(double(mlp(32, 256, 128, 4)), queued, config(4, s)) for s in ("dense", "packed"))
    assert largest_difference(dense[0], packed[0]) < ROUNDING
    queues = [[s["queue"] for s in o.state_dict()["state"].values()] for _, o, _ in (dense, packed)]
    pairs = [(x, y) for one, other in zip(*queues, strict=True) for x, y in zip(one, other, strict=True)]
    assert max((x - y).abs().max().item() for x, y in pairs) < ROUNDING
    model, _ = resumed(mlp, config(4), config(4), 7, queued, copy.deepcopy)
    assert largest_difference(model, packed[0]) == 0.0


@pytest.mark.parametrize("late", [False, True], ids=["masks first", "model first"])
def test_weights_and_masks_load_in_either_order_into_a_packed_model(mlp, late):
    source, _, history = trained(mlp(32, 256, 128, 4), adamw, config(4), steps=20)
    optimizer = adamw(model := mlp(32, 256, 128, 4))
    with DGMController(model, optimizer, config(4), total_steps=STEPS) as first:
        run(model, optimizer, first, last=20)
        state = first.state_dict()
    model = mlp(32, 256, 128, 4, seed=5)
    with DGMController(model, adamw(model), config(4), total_steps=STEPS) as dgm:
        if not late:
            dgm.load_state_dict(state)
        model.load_state_dict(source.state_dict())
        assert largest_difference(model, source) == 0.0  # nothing is lost on the way
        if late:
            dgm.load_state_dict(state)
        assert largest_difference(model, source) == 0.0
        assert all(torch.equal(dgm.masks()[name], history[-1][name]) for name in history[-1])


def test_state_dicts_have_the_keys_shapes_and_zeros_of_dense_storage(mlp):
    (dense, optimizer, _), (packed, optimizer2, _) = (
        trained(mlp(32, 256, 128, 4), adamw, config(4, s)) for s in ("dense", "packed")
    )
    shapes = [{k: tuple(v.shape) for k, v in model.state_dict().items()} for model in (dense, packed)]
    assert shapes[0] == shapes[1]
    assert all(torch.equal(dense.state_dict()[k] == 0, packed.state_dict()[k] == 0) for k in shapes[0])
    states = [o.state_dict() for o in (optimizer, optimizer2)]
    shapes = [
        {i: {k: torch.as_tensor(x).shape for k, x in s.items()} for i, s in state["state"].items()} for state in states
    ]
    assert shapes[0] == shapes[1]
    plain = mlp(32, 256, 128, 4)
    plain.load_state_dict(packed.state_dict())
    torch.testing.assert_close(plain(torch.ones(2, 32)), packed(torch.ones(2, 32)))


def test_a_weight_of_another_mask_ends_the_run_before_its_next_step_and_is_not_lost(mlp):
    model, other = mlp(32, 256, 128, 4), mlp(32, 256, 128, 4, seed=5)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config(4), total_steps=STEPS) as dgm:
        run(model, optimizer, dgm, last=2)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(torch.ones(2, 32)), other(torch.ones(2, 32)))
        with pytest.raises(ValueError, match="a weight was loaded that is not 0 outside the mask"):
            run(model, optimizer, dgm, first=2, last=3)
        assert largest_difference(model, other) == 0.0


def test_a_weight_of_another_shape_is_refused(mlp):
    model = mlp(32, 256, 128, 4)
    with DGMController(model, adamw(model), config(4), total_steps=STEPS):
        with pytest.raises(RuntimeError, match="expected the whole weight \\(256, 32\\) of layer '0'"):
            model.load_state_dict({**model.state_dict(), "0.weight": torch.ones(3, 4, 4)})
        with pytest.raises(RuntimeError, match="assign=True would replace the parameter"):
            model.load_state_dict(model.state_dict(), assign=True)


def test_masks_are_recovered_from_weights(mlp):
    source, *_ = trained(mlp(32, 256, 128, 4), adamw, config(4, schedule=constant(0.2)), steps=9)
    model = mlp(32, 256, 128, 4, seed=5)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config(4, schedule=constant(0.2)), total_steps=STEPS, draw_masks=False) as dgm:
        model.load_state_dict(source.state_dict())
        dgm.recover(9, 9)
        assert largest_difference(model, source) == 0.0
        run(model, optimizer, dgm, first=9)
    assert dgm.density == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    ("way", "make"),
    [("load", adamw), ("load", rprop), ("load", queued), ("recover", adamw)],
    ids=["load-adamw", "load-rprop", "load-queued", "recover-adamw"],
)
def test_state_that_is_loaded_before_the_masks_is_that_of_the_file(mlp, way, make):
    model = mlp(32, 256, 128, 4)
    optimizer = make(model)
    settings = config(4, schedule=constant(0.2))
    with DGMController(model, optimizer, settings, total_steps=STEPS) as dgm:
        run(model, optimizer, dgm, last=7)
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        masks = dgm.state_dict()
    model = mlp(32, 256, 128, 4, seed=5)
    storage = PackedStorage(settings)
    storage.pack(model, lambda: STEPS)
    optimizer = make(model)
    with DGMController(model, optimizer, settings, total_steps=STEPS, draw_masks=False, storage=storage) as dgm:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        dgm.load_state_dict(masks) if way == "load" else dgm.recover(7, 7)
        loaded = optimizer.state_dict()
        for expected, got in zip(tree_leaves(state["state"]), tree_leaves(loaded["state"]), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        run(model, optimizer, dgm, first=7, last=8)


def test_whole_state_of_other_masks_is_let_go_of_at_the_next_step(mlp):
    model, other = mlp(32, 256, 128, 4), mlp(32, 256, 128, 4, seed=5)
    optimizer, dense = adamw(model), adamw(other)
    loss_of(other, torch.ones(8, 32)).backward()
    dense.step()
    with DGMController(model, optimizer, config(4), total_steps=STEPS) as dgm:
        optimizer.load_state_dict(dense.state_dict())
        assert len(model[2]._estdgm_loaded_states) == 2  # both moments
        run(model, optimizer, dgm, last=1)
        assert not model[2]._estdgm_loaded_states


WRITES = (
    lambda t: t.mul_(0.9),
    lambda t: t.copy_(t + 1),
    lambda t: torch._foreach_mul_([t], 0.9),
    lambda t: torch.mul(t, 0.9, out=t),
    lambda t: t[0].zero_(),
    lambda t: t.view(-1).clamp_(min=0),
    lambda t: t.T[:, :2].copy_(torch.ones(32, 2)),
    lambda t: [row.div_(row.norm()) for row in t],
    lambda t: t.chunk(2)[1].fill_(0.1),
    lambda t: torch.unbind(t)[3].__setitem__(0, 1.0),
)


def test_writing_to_a_state_dict_raises_and_copies_of_it_are_plain(mlp, tmp_path):
    model = trained(mlp(32, 256, 128, 4), adamw, config(4))[0]
    average = copy.deepcopy(model)
    for tensor in (average.state_dict()["0.weight"], average[0].weight):
        for write in WRITES:
            for value in (tensor, tensor.data):
                with pytest.raises(RuntimeError, match="would write to a copy: the layer stores its active units only"):
                    write(value)
        torch.ones(256, 32).add_(tensor)
        for plain in (tensor.clone(), tensor + 1, copy.deepcopy(tensor), tensor[0] + 1, tensor.T.clone(), tensor[0, 0]):
            assert type(plain) is torch.Tensor
        assert f"{tensor[0, 0]:.3f}" == f"{tensor[0, 0].item():.3f}"
        for view in (tensor[:8], tensor.t(), tensor[3].detach()):
            other = nn.Parameter(view)
            assert other.requires_grad
            torch.testing.assert_close(other.detach(), view.clone())
            assert type(torch.compile(lambda x: 2 * x, backend="eager")(view.detach())) is torch.Tensor
        other = nn.Linear(32, 8)
        other.load_state_dict({"weight": tensor[:8], "bias": torch.zeros(8)}, assign=True)
        torch.save(tensor, tmp_path / "saved.pt")
        assert type(torch.load(tmp_path / "saved.pt", weights_only=True)) is torch.Tensor


def test_an_average_of_state_dicts_is_kept_in_clones(mlp):
    averages = []
    for storage in ("dense", "packed"):
        model = double(mlp(32, 256, 128, 4))
        optimizer = adamw(model)
        with DGMController(model, optimizer, config(4, storage), total_steps=STEPS, audit=False) as dgm:
            average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            for _ in fit(model, optimizer, dgm):
                for name, tensor in model.state_dict().items():
                    average[name].lerp_(tensor, 0.2)
        averages.append(average)
    for name, mean in averages[0].items():
        torch.testing.assert_close(averages[1][name], mean, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------- after a run


def test_a_second_run_of_either_storage_follows(mlp):
    for storage in ("packed", "dense"):
        model, _, history = trained(mlp(32, 256, 128, 4), adamw, config(4))
        expected = copy.deepcopy(model).state_dict()
        optimizer = adamw(model)
        with DGMController(model, optimizer, config(4, storage, constant(0.1)), total_steps=STEPS, audit=False) as dgm:
            assert all(torch.equal(dgm.masks()[name], history[-1][name]) for name in history[-1])
            assert all(torch.equal(a, b) for a, b in zip(expected.values(), model.state_dict().values(), strict=True))
            run(model, optimizer, dgm)


def test_a_model_under_a_controller_is_refused_to_another(mlp):
    model = mlp(32, 256, 128, 4)
    with (
        DGMController(model, adamw(model), config(4), total_steps=STEPS),
        pytest.raises(ValueError, match="under another DGMController already"),
    ):
        DGMController(model, adamw(model), config(4), total_steps=STEPS)


def test_averages_of_weights_follow(mlp):
    averages = []
    for storage in ("dense", "packed"):
        model = double(mlp(32, 256, 128, 4))
        optimizer = adamw(model)
        with DGMController(model, optimizer, config(4, storage), total_steps=STEPS, audit=False) as dgm:
            average = copy.deepcopy(model)
            for _, updated in fit(model, optimizer, dgm):
                if updated:
                    dgm.mask_copy_(average)
                with torch.no_grad():
                    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                        mean.lerp_(now, 0.2)
        averages.append(average)
    assert largest_difference(*averages) < ROUNDING


# --------------------------------------------------------------------------- refusals


def test_a_model_on_the_meta_device_is_not_kept_whole():
    with torch.device("meta"):
        late = nn.Sequential(nn.Linear(32, 256), nn.Linear(256, 128), nn.Linear(128, 4))
    storages = {}
    for name, model in {"late": late, "whole": nn.Sequential(nn.Linear(32, 256), nn.Linear(256, 4))}.items():
        storages[name] = PackedStorage(config(4))
        storages[name].pack(model, lambda: STEPS)
    kept = {name: [w.inactive.original for w in storage._weights] for name, storage in storages.items()}
    assert all(original is None for original in kept["late"])
    assert all(original.shape == (256, 32) for original in kept["whole"])


def dense_traces(model):
    return [type(m) for m in model.modules()], [sorted(vars(m)) for m in model.modules()]


def factored(model):
    return torch.optim.Adafactor(model.parameters(), lr=1e-2)


def shampoo(model):
    return pytest.importorskip("pytorch_optimizer").Shampoo(model.parameters(), lr=1e-3)


def lbfgs(model):
    return torch.optim.LBFGS(model.parameters(), lr=0.1)


class ScaledByItsMean(torch.optim.SGD):
    """Divides each gradient by its mean magnitude, which is another over active units alone; it keeps no state."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad / parameter.grad.abs().mean())


def by_mean(model):
    return ScaledByItsMean(model.parameters(), lr=1e-3)


class Hiding(torch.optim.Optimizer):
    """Steps by another optimizer, whose groups it shows, and which it holds in an object that nobody looks into."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.param_groups, self.held = inner.param_groups, types.SimpleNamespace(optimizer=inner)

    def step(self, closure=None):
        return self.held.optimizer.step(closure)


def hidden(model):
    return Hiding(momentum(model))


def projected(model):
    return pytest.importorskip("pytorch_optimizer").AdamP(model.parameters(), 1e-3)


class OneOfTwo(torch.optim.Optimizer):
    """Steps by two optimizers in a list, of which the second does not work element by element."""

    def __init__(self, several):
        super().__init__([p for optimizer in several for p in optimizer.param_groups[0]["params"]], {})
        self.several = several

    def step(self, closure=None):
        for optimizer in self.several:
            optimizer.step(closure)


@pytest.mark.parametrize("make", [factored, shampoo, lbfgs, by_mean, hidden, projected], ids=lambda make: make.__name__)
def test_optimizers_that_do_not_work_element_by_element_are_refused(mlp, make):
    model = mlp(32, 256, 128, 4)
    before, weights = dense_traces(model), copy.deepcopy(model)
    optimizer = make(model)
    with pytest.raises(
        ValueError, match=f"layer '0' cannot be stored packed under {type(optimizer).__name__}: .* Use storage='dense'"
    ):
        DGMController(model, optimizer, config(4), total_steps=STEPS)
    assert dense_traces(model) == before
    assert largest_difference(model, weights) == 0.0


def test_each_of_several_optimizers_in_one_is_tried(mlp):
    model = mlp(32, 256, 128, 4)
    optimizer = OneOfTwo([momentum(model[:2]), by_mean(model[2:])])
    with pytest.raises(ValueError, match="layer '2' cannot be stored packed under ScaledByItsMean: "):
        DGMController(model, optimizer, config(4), total_steps=STEPS)


class InBlocks(torch.optim.SGD):
    """Keeps its moment in codes with a scale for each 256, for weights of `least` elements or more."""

    least = 4096

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state, in_codes = self.state[p], p.numel() >= self.least and p.numel() % 256 == 0
                moment = state.get("moment", torch.zeros_like(p))
                moment = (moment.view(-1, 256) * state["scales"]).view_as(p) if "scales" in state else moment
                moment = state["moment"] = 0.9 * moment + p.grad
                p.sub_(moment, alpha=group["lr"])
                if in_codes:
                    state["scales"] = moment.view(-1, 256).abs().amax(1, keepdim=True) / 127 + 1e-30
                    state["moment"] = (moment.view(-1, 256) / state["scales"]).round().to(torch.int8).view_as(p)


class InBlocksIfLarger(InBlocks):
    least = 8192


class FactoredIfLarge(torch.optim.SGD):
    """Keeps sums of squares, of matrices from 16 x 16 on by row and column alone."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state, square = self.state[p], p.grad.square()
                if p.dim() == 2 and min(p.shape) >= 16:
                    rows = state.setdefault("rows", torch.zeros(len(p), 1)).add_(square.mean(1, keepdim=True))
                    columns = state.setdefault("columns", torch.zeros(1, p.shape[1])).add_(square.mean(0, keepdim=True))
                    sums = rows * columns / rows.mean()
                else:
                    sums = state.setdefault("sums", torch.zeros_like(p)).add_(square)
                p.sub_(p.grad / (sums.sqrt() + 1e-8), alpha=group["lr"])


def of_library(name, **settings):
    return lambda model: getattr(pytest.importorskip("pytorch_optimizer"), name)(model.parameters(), 1e-3, **settings)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda model: InBlocks(model.parameters(), 1e-3), "InBlocks keeps a state 'scales'"),
        (lambda model: InBlocksIfLarger(model.parameters(), 1e-3), "InBlocksIfLarger keeps a state 'scales'"),
        (lambda model: FactoredIfLarge(model.parameters(), 1e-3), "FactoredIfLarge keeps a state 'rows'"),
        (of_library("FlashAdamW"), "FlashAdamW keeps a state 'exp_avg::scales'"),
        (of_library("SaRA"), "SaRA keeps a state 'exp_avg'"),
        (of_library("AdaShift"), "AdaShift keeps a state 'exp_avg_sq' that is one number for the whole weight"),
        (of_library("ScalableShampoo"), "ScalableShampoo could not be tried .RuntimeError"),
    ],
    ids=[
        "codes",
        "codes of larger weights",
        "factors of larger weights",
        "FlashAdamW",
        "SaRA",
        "AdaShift",
        "ScalableShampoo",
    ],
)
def test_state_that_cannot_follow_single_weights_is_refused_at_the_start(mlp, make, why):
    model = mlp(32, 256, 128, 4)
    before, weights = dense_traces(model), copy.deepcopy(model)
    with pytest.raises(ValueError, match=f"layer '0' cannot be stored packed under .*: {why}.* Use storage='dense'"):
        DGMController(model, make(model), config(1), total_steps=STEPS)
    assert dense_traces(model) == before
    assert largest_difference(model, weights) == 0.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"inactive": "frozen"}, "inactive='frozen'"),
        ({"update_rule": UpdateRule(pattern=NofM(4), regrow=True)}, "update_rule.pattern"),
        ({"backend": "cpu"}, "backend='cpu'"),
    ],
    ids=["inactive", "pattern", "backend"],
)
def test_settings_that_need_inactive_weights_are_refused(settings, named):
    with pytest.raises(ValueError, match=f"storage='packed'.*{named}.*storage='dense'"):
        DGMConfig(storage="packed", **settings)


def test_presets_of_learning_weights_are_refused():
    with pytest.raises(ValueError, match="storage='packed'"):
        preset("top-kast", 0.1, storage="packed")
    assert preset("rigl", 0.1, storage="packed").storage == "packed"


def test_an_unknown_storage_is_refused():
    with pytest.raises(ValueError, match="storage must be 'dense' or 'packed', got 'sparse'"):
        DGMConfig(storage="sparse")


class Unused(nn.Module):
    """A layer whose forward is not called: its weight is used by itself, or not at all."""

    def __init__(self, uses_weight):
        super().__init__()
        self.uses_weight = uses_weight
        self.first, self.odd, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(F.linear(x, self.odd.weight) if self.uses_weight else x)


def test_a_weight_that_is_used_by_itself_ends_the_run_at_its_first_step():
    model = Unused(uses_weight=True)
    optimizer = adamw(model)
    with (
        DGMController(model, optimizer, config(4), total_steps=STEPS) as dgm,
        pytest.raises(ValueError, match=r"layer 'odd': its weight is used by itself.*Selection"),
    ):
        run(model, optimizer, dgm, last=1)


def test_a_weight_that_no_gradient_reaches_ends_the_run_once_that_is_certain():
    model = Unused(uses_weight=False)
    optimizer = adamw(model)
    with DGMController(model, optimizer, config(4), total_steps=STEPS) as dgm:
        with pytest.warns(RuntimeWarning, match=r"1 layers \(odd\) in the first step, .* after 20 steps"):
            run(model, optimizer, dgm, last=1)
        run(model, optimizer, dgm, first=1, last=19)
        with pytest.raises(
            ValueError, match=r"no gradient has reached the weights of 1 layers \(odd\) in the first 20"
        ):
            run(model, optimizer, dgm, first=19, last=20)


def doubled(module, product, x):
    return sorted_forward(module, lambda name, *args: product(name, *args) * (2 if name == "up" else 1), x)


@pytest.mark.parametrize("forward", [sorted_forward, doubled])
def test_an_adapter_of_a_module_that_holds_a_packed_layer_is_compared(forward):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), SortedExperts(), nn.Linear(16, 4))
    optimizer = adamw(model)
    settings = config(4, selection=Selection(experts=[adapter("sorted", forward=forward)]))
    refused = pytest.raises(ValueError, match=r"gives another output than the module's own forward: .* apart")
    with DGMController(model, optimizer, settings, total_steps=STEPS) as dgm:
        assert isinstance(model[1].router, PackedForward)
        with refused if forward is doubled else nullcontext():
            run(model, optimizer, dgm)


def test_excluding_that_layer_is_a_way_out():
    model = Unused(uses_weight=True)
    optimizer = adamw(model)
    settings = config(4, selection=Selection(exclude=["odd"]))
    with DGMController(model, optimizer, settings, total_steps=STEPS) as dgm:
        run(model, optimizer, dgm)
    assert isinstance(model.first, PackedForward)
    assert type(model.odd) is nn.Linear


def test_a_weight_that_no_optimizer_holds_is_refused(mlp):
    model = mlp(32, 256, 128, 4)
    optimizer = torch.optim.AdamW([*model[0].parameters(), *model[4].parameters()])
    before = dense_traces(model)
    model_masks = DGMController(model, optimizer, config(4), total_steps=STEPS)
    assert list(model_masks.masks()) == ["0"]  # the other is stored whole
    model_masks.close()
    assert type(model[2]) is before[0][3]


def test_tied_weights_are_stored_whole(mlp):
    model = mlp(32, 32, 32, 4)
    model[2].weight = model[0].weight
    model.append(nn.Linear(4, 32))
    model.append(nn.Linear(32, 4))
    with DGMController(model, adamw(model), config(4), total_steps=STEPS) as dgm:
        found = {d.name: d.why for d in dgm.decisions()}
    assert found["0"] == found["2"] == "its weight is shared with another module"
    assert loss_of(model, torch.ones(2, 32)).isfinite()


# --------------------------------------------------------------------------- loss scaling, compiled models


def losses_of(storage, *, scaled=False, compiled=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    settings = DGMConfig(ConstantDensity(0.25, update_every=4, observe_steps=1), Units(size=4), storage=storage)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**30, growth_interval=3)
    losses, skipped = [], 0
    with DGMController(model, optimizer, settings, total_steps=12, audit=False) as dgm:
        for step in range(16):
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=scaled):
                loss = forward(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            dgm.mask_gradients()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            skipped += not dgm.stepped
            if dgm.stepped:
                dgm.advance(dgm.position + 1)
        assert dgm.updates >= 1
    return losses, skipped


@pytest.mark.parametrize("mode", [{"scaled": True}, {"compiled": True}], ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at them
def test_loss_scaling_and_compiled_models_train_as_with_dense_storage(mode):
    torch.compiler.reset()
    (expected, skipped), (got, also) = losses_of("dense", **mode), losses_of("packed", **mode)
    assert skipped == also
    assert (skipped > 0) == mode.get("scaled", False)
    assert got == pytest.approx(expected, rel=2e-2 if mode.get("scaled") else 1e-4)
