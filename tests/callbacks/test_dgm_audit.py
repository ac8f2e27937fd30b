"""The audit in real Trainer runs: two-network models, frozen bases, DDP with layers that only one rank uses."""

import copy
import warnings
from types import MethodType

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from helpers import distributed_jobs as jobs
from helpers.models import NO_VALIDATION_LOADER, TinyMLP
from helpers.runs import Run, SaveAt
from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase, Selection, Units

SCHEDULE = EstDgm(
    Phase(0.7, 0.6, 5), Phase(0.3, 0.3, 5), Phase(0.2, 0.1, 10), update_every=5, observe_steps=2, freeze=0.5
)


def mlp(width=32, out=32):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


QUIET = {
    "max_steps": 20,
    "logger": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def forced(storage):
    """A callback that computes all it can sparse."""
    backend = "native" if storage == "dense" else "auto"
    return DGMCallback(DGMConfig(SCHEDULE, units=Units(size=1), backend=backend, storage=storage))


def fit(module, *callbacks, steps=20, total=20, **settings):
    schedule = SCHEDULE if total == 20 else EstDgm(update_every=10, observe_steps=2)
    dgm = DGMCallback(DGMConfig(schedule, units=Units(size=1), backend="dense"), total_steps=total)
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[dgm, *callbacks],
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1} | settings,
    )
    data = torch.randn(320, 32, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(data, 16))
    return dgm


class Byol(pl.LightningModule):
    """A target network that the optimizer holds, moved by an average only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.predictor = mlp(), nn.Linear(32, 32)
        self.target = copy.deepcopy(self.net)

    def training_step(self, x, batch_idx):
        with torch.no_grad():
            t = self.target(x + 0.1 * torch.randn_like(x))
        return (self.predictor(self.net(x)) - t).square().mean()

    def on_train_batch_end(self, *args):
        with torch.no_grad():
            for p, q in zip(self.target.parameters(), self.net.parameters(), strict=True):
                p.lerp_(q, 0.1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_a_target_network_follows_its_average_and_is_never_masked():
    module = Byol()
    dgm = fit(module)
    assert dgm.masks().keys() == {"net.0", "net.2", "net.4"}
    why = {d.name: d.why for d in dgm.decisions()}
    assert why["predictor"] == "output head: its output goes into no other layer"
    assert why["target.0"] == "no gradient reached it in the first 20 steps"
    assert torch.count_nonzero(module.target[0].weight) == 32 * 32
    assert dgm.density == pytest.approx(0.1, abs=0.002)


class ActorCritic(pl.LightningModule):
    """Plays without gradients before it learns, as PPO does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.actor, self.critic = mlp(out=4), mlp(out=1)

    def training_step(self, x, batch_idx):
        with torch.no_grad():
            action = self.actor(x).argmax(1)
        value = self.critic(x).squeeze(1)
        gain = (x[:, 0] - value).detach() * torch.distributions.Categorical(logits=self.actor(x)).log_prob(action)
        return (value - x[:, 0]).square().mean() - gain.mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_heads_that_are_called_without_gradients_as_well_stay_dense():
    dgm = fit(ActorCritic())
    assert dgm.masks().keys() == {"actor.0", "actor.2", "critic.0", "critic.2"}
    why = {d.name: d.why for d in dgm.decisions() if not d.masked}
    assert why == dict.fromkeys(("actor.4", "critic.4"), "output head: its output goes into no other layer")


class Lookahead(pl.LightningModule):
    """Writes slow weights into the network between steps, and moves it by ``.data`` in the last one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp(out=1)
        self.seen = []

    def training_step(self, x, batch_idx):
        self.seen.append(torch.count_nonzero(self.net[0].weight).item())
        return self.net(x).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            if batch_idx == 0:
                self.slow = [p.clone() for p in self.net.parameters()]
            if batch_idx % 5 == 4:
                for p, q in zip(self.net.parameters(), self.slow, strict=True):
                    p.copy_(q.lerp_(p, 0.5))
            if batch_idx == 19:
                self.net[0].weight.data = self.net[0].weight.data + 1.0

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_weights_that_the_user_writes_are_masked_again_before_they_are_used():
    module = Lookahead()
    dgm = fit(module)
    assert module.seen[0] == 32 * 32
    assert module.seen[5] < module.seen[1] < 32 * 32
    mask = dgm.masks()["net.0"]
    assert torch.equal(module.net[0].weight != 0, mask)
    assert torch.count_nonzero(module.net[2].weight[~dgm.masks()["net.2"]]) == 0


class Late(pl.LightningModule):
    """A branch that trains from step 30 on, as a generator with a late start."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.branch, self.head = mlp(), nn.Linear(32, 32), nn.Linear(32, 1)

    def training_step(self, x, batch_idx):
        h = self.net(x)
        return self.head(h + self.branch(h) if self.trainer.global_step >= 30 else h).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_a_layer_that_trains_after_the_audit_is_taken_in():
    dgm = fit(Late(), steps=60, total=60)
    assert dgm.run_summary()["thawed_and_dense"] == []
    assert "branch" in dgm.masks()
    assert dgm.density == pytest.approx(0.1, abs=2e-3)


class Adapted(pl.LightningModule):
    """Low-rank adapters on a frozen base."""

    def __init__(self):
        super().__init__()
        self.base = mlp(128, 128).requires_grad_(False)
        self.down, self.up, self.head = nn.Linear(128, 4), nn.Linear(4, 128), nn.Linear(128, 1)

    def training_step(self, x, batch_idx):
        x = x.repeat(1, 4)
        return self.head(self.base(x) + self.up(self.down(x))).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-3)


def test_a_frozen_base_is_said_with_the_way_out():
    with pytest.warns(
        UserWarning, match=r"masks 1,024 weights, and 3 layers with 49,152 weights are frozen.*inactive="
    ):
        fit(Adapted())


class Sometimes(pl.LightningModule):
    """Rank 1 uses its own branch in the first step, rank 0 does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.branch, self.head = mlp(), nn.Linear(32, 32), nn.Linear(32, 1)

    def training_step(self, x, batch_idx):
        h = self.body(x)
        if self.global_rank == 1:
            h = h + self.branch(h)
        return self.head(h).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def ranks_that_differ():
    module = Sometimes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dgm = fit(module, devices=2, strategy="ddp_find_unused_parameters_true")
    return dgm.masks(), [(d.name, d.why) for d in dgm.decisions()], dgm.controller.final_density


class EndsOnOneRank(Sometimes):
    """On rank 0 every output is fed back, so that only rank 1 sees which layer the network ends in."""

    def __init__(self):
        super().__init__()
        self.body = self.branch = None
        self.head, self.cell, self.output = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def training_step(self, x, batch_idx):
        for _ in range(3):
            x = self.output(self.cell(x).tanh())
        return (self.head(x) if self.global_rank == 1 else x).square().mean()


def ranks_that_end_differently():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dgm = fit(EndsOnOneRank(), devices=2, strategy="ddp_find_unused_parameters_true")
    return set(dgm.masks()), [(d.name, d.masked, d.why) for d in dgm.decisions()]


def test_ranks_agree_on_the_head_where_only_one_of_them_has_seen_an_end():
    (one, told), (two, told_too) = jobs.run(ranks_that_end_differently, 2)
    assert one == two == {"cell", "output"}
    assert told == told_too


def test_ranks_agree_on_what_only_one_of_them_has_seen():
    (one, told, density), (two, told_too, _) = jobs.run(ranks_that_differ, 2)
    assert one.keys() == two.keys() == {"body.0", "body.2", "body.4", "branch"}
    assert all(torch.equal(mask, two[name]) for name, mask in one.items())
    assert told == told_too
    assert density == pytest.approx(0.1, abs=0.002)


class GradientsByTransforms(pl.LightningModule):
    """Gradients of each sample by torch.func, as private training clips them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = mlp()

    def training_step(self, x, batch_idx):
        given = {name: weight.detach() for name, weight in self.net.named_parameters()}

        def loss(weights, x):
            return (torch.func.functional_call(self.net, weights, x) - x.sin()).square().mean()

        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(given, x)
        for name, weight in self.net.named_parameters():
            weight.grad = gradients[name].mean(0)
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def test_layers_whose_gradients_torch_func_makes_are_masked_as_others_are():
    class Plain(GradientsByTransforms):
        def training_step(self, x, batch_idx):
            self.optimizers().zero_grad()
            (self.net(x) - x.sin()).square().mean().backward()
            self.optimizers().step()

    module, plain = GradientsByTransforms(), Plain()
    masks, expected = fit(module).masks(), fit(plain).masks()
    assert list(masks) == ["net.0", "net.2"]
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, whole := weight.values())
        return x @ whole.T + bias

    @staticmethod
    def backward(ctx, gradient):
        x, whole = ctx.saved_tensors
        return gradient @ whole, gradient.T @ x, gradient.sum(0)


class Int8Weight(torch.Tensor):
    """A weight kept in int8, which knows the operators of its training alone, as that of torchao does."""

    @staticmethod
    def __new__(cls, whole):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=torch.float32)

    def __init__(self, whole):
        self.scale = whole.abs().max() / 127
        self.int8 = (whole / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self):
        return ["int8", "scale"], None

    def values(self):
        return self.int8 * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return Int8Product.apply(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values())
        if function is torch.ops.aten.add_.Tensor:
            args[0].__init__(args[0].values() + args[1] * kwargs["alpha"])
            return args[0]
        raise NotImplementedError(f"{cls.__name__} has no {function}")


class PartlyInt8(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp()
        self.net[2].weight = nn.Parameter(Int8Weight(self.net[2].weight.detach()))

    def training_step(self, x, batch_idx):
        return (self.net(x) - x.sin()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, foreach=False)


def test_a_quantised_weight_stays_dense_with_the_reason():
    module = PartlyInt8()
    before = module.net[2].weight.values()
    dgm = fit(module)
    assert dgm.masks().keys() == {"net.0"}
    assert "its weight is of class Int8Weight, in which units cannot be set to zero" in [d.why for d in dgm.decisions()]
    assert not torch.equal(module.net[2].weight.values(), before)


def centred(weight: torch.Tensor) -> torch.Tensor:
    return weight - weight.mean(1, keepdim=True)


def with_columns(weight, value):
    copied = weight.clone()
    copied[:, :16] = value
    return copied


def set_to(weight, value):
    weight.data = torch.full_like(weight.data, value)
    return weight


def masked_in_place(weight):
    weight.data *= UPPER  # as PixelCNN's convolutions do
    return weight


UPPER = torch.ones(32, 32).triu().bool()
OTHER_WEIGHTS = {
    "abs": lambda w: w.abs() + 1e-2,
    "square": lambda w: w.square() + 1e-2,
    "pow": lambda w: torch.exp(-(w**2)),
    "negative pow": lambda w: w.pow(-2.0).clamp(max=1.0),
    "max": lambda w: torch.max(w, torch.tensor(0.01)),
    "min": lambda w: torch.min(w, torch.tensor(-0.01)),
    "masked_fill": lambda w: w.masked_fill(UPPER, 0.1),
    "where": lambda w: torch.where(UPPER, w, 0.1),
    "compared": lambda w: w + 0.1 * (w >= 0),
    "vmap": torch.func.vmap(lambda row: row - row.mean()),
    "written": lambda w: with_columns(w, 0.1),
    "set": lambda w: set_to(w, 0.1),
    "sigmoid": lambda w: w.sigmoid(),
    "clamp": lambda w: w.clamp(min=0.1, max=1.0),
    "clamp by a tensor": lambda w: w.clamp(torch.tensor(0.1)),
}
SAME_ZEROS = {
    "abs": torch.abs,
    "square": lambda w: w.square() / w.norm(),
    "pow": lambda w: w**3 / w.pow(2).sum(1, keepdim=True),
    "max": lambda w: w / torch.max(w.abs(), 1, keepdim=True)[0],
    "vmap": torch.func.vmap(lambda row: row * 2.0),
    "written": lambda w: with_columns(w, 0.0),
    "masked_fill": lambda w: w.masked_fill(UPPER, 0.0),
    "where": lambda w: torch.where(UPPER, w, torch.zeros_like(w)),
    "triu": torch.triu,
    "flip": lambda w: w.flip(0, 1).flip(1, 0),
    "pad": lambda w: F.pad(w, (1, 1))[:, 1:-1],
    "pruned": lambda w: w * (w.abs() > w.abs().mean()),
    "noise": lambda w: w * (1.0 + 0.1 * torch.rand_like(w)),
    "in place": masked_in_place,
    "copied": lambda w: torch.zeros(32, 32).copy_(w),
    "normalize": F.normalize,
    "rot90": lambda w: w.rot90(2).rot90(2),
    "relu": lambda w: F.relu(w).relu(),
    "tanh": torch.tanh,
    "ternary": lambda w: (w / w.abs().mean()).round().clamp(-1, 1) * w,
    "clamp": lambda w: w.clamp(max=0.1).clamp_(min=-0.1),
}


class Own(nn.Linear):
    """Computes with what it makes of its weight."""

    def __init__(self, make):
        super().__init__(32, 32)
        self.make = make

    def forward(self, x):
        return F.linear(x, self.make(self.weight), self.bias).tanh()


class Owns(pl.LightningModule):
    def __init__(self, makes):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*map(Own, makes), nn.Linear(32, 32), nn.Linear(32, 32))

    def training_step(self, x, batch_idx):
        return (self.net(x) - x.sin()).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_layer_is_masked_where_its_forward_computes_with_the_zeros_of_its_weight_and_nowhere_else():
    scripted = torch.jit.script(centred)
    made = {
        "script": scripted,
        **OTHER_WEIGHTS,
        **{f"{name}, with its zeros": make for name, make in SAME_ZEROS.items()},
    }
    module = Owns(made.values())
    masks = fit(module).masks()
    stored = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * (torch.arange(32) % 4 == 0)
    for i, (name, make) in enumerate(made.items()):
        weight = nn.Parameter(stored.clone())
        keeps_zeros = bool((make(weight)[stored == 0] == 0).all())
        assert (f"net.{i}" in masks) is keeps_zeros is name.endswith("zeros"), name


class PutsIn(Owns):
    """Has other weights in its forward than in its optimizer's steps, as XNOR-Net and pruners that hook the forward."""

    def __init__(self, make, how):
        super().__init__([torch.tanh])
        self.make, self.layer = make, self.net[1]
        if how == "hooks":
            self.layer.register_forward_pre_hook(lambda *_: self.put_in())
            self.layer.register_forward_hook(lambda *_: self.take_back())
        self.how = how

    def put_in(self):
        weight = self.layer.weight
        self.kept = weight.data.clone()
        if self.how == "new":
            weight.data = self.make(weight.data)
        else:
            weight.data.copy_(self.make(weight.data))

    def take_back(self):
        self.layer.weight.data.copy_(self.kept)

    def training_step(self, batch, batch_idx):
        if self.how != "hooks":
            self.put_in()
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        if self.how != "hooks":
            self.take_back()

    def validation_step(self, batch, batch_idx):
        self.net(batch)

    def val_dataloader(self):
        return DataLoader(torch.ones(16, 32), 16)


@pytest.mark.parametrize("how", ["hooks", "new", "written"])
def test_a_layer_whose_forward_has_other_weights_than_its_steps_stays_dense(how):
    binary = PutsIn(lambda w: torch.where(w < 0, -1.0, 1.0) * w.abs().mean(), how)
    dgm = fit(binary)
    assert bool(binary.layer.weight.all())
    assert "values that are put in for the forward" in next(d.why for d in dgm.decisions() if d.name == "net.1")
    assert "net.1" not in dgm.masks()
    assert "net.1" in fit(PutsIn(lambda w: w * (w.abs() > 0.01), how)).masks()


class Teaches(Owns):
    """Looks at the output of other weights, put in for that forward, before its own or after."""

    def __init__(self, *, first, recorded):
        super().__init__([torch.tanh])
        self.first, self.recorded = first, recorded

    def teach(self, x):
        layers = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        kept = [layer.weight.data for layer in layers]
        for layer in layers:
            layer.weight.data = layer.weight.data + 0.1
        with torch.set_grad_enabled(self.recorded):
            output = self.net(x).detach()
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data = weight
        return output

    def training_step(self, x, batch_idx):
        taught = self.teach(x) if self.first else None
        output = self.net(x)
        return (output - (self.teach(x) if taught is None else taught)).square().mean()

    def validation_step(self, x, batch_idx):
        self.teach(x)

    def val_dataloader(self):
        return DataLoader(torch.ones(16, 32), 16)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_other_forwards_find_other_weights_in_is_masked(first, recorded):
    assert fit(Teaches(first=first, recorded=recorded)).masks().keys() == {"net.0", "net.1"}


class Spared(TinyMLP):
    """Has a layer that is never called."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.spare = nn.Linear(16, 16)


def resume(path, cls, before=None, after=None):
    """Resume a run of one selection with another one; return the callback."""
    run = Run(cls, config={"selection": before or Selection()})
    run.fit(SaveAt("on_train_batch_end", 30, path))
    run.config = {"selection": after or Selection()}
    return run.fit(ckpt=path)[1]


@pytest.mark.filterwarnings(NO_VALIDATION_LOADER)
def test_a_head_that_a_resumed_run_includes_is_refused_by_name(tmp_path):
    message = r"they differ in \['net\.4'\]; 'net\.4' is None there .* Pass that run's model, and its .* selection="
    with pytest.raises(ValueError, match=message):
        resume(tmp_path / "saved.ckpt", TinyMLP, after=Selection(include=["net.4"]))


@pytest.mark.filterwarnings(NO_VALIDATION_LOADER)
def test_an_included_layer_that_the_audit_left_dense_is_resumed(tmp_path):
    included = Selection(include=["spare", "net.4"])
    dgm = resume(tmp_path / "saved.ckpt", Spared, included, included)
    assert dgm.masks().keys() == {"net.0", "net.2", "net.4"}
    (spare,) = (d for d in dgm.decisions() if d.name == "spare")
    assert spare.why == "no gradient reached it in the first 20 steps"


class Convolves(pl.LightningModule):
    """A convolution in the middle, the one that is asked about."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer
        self.net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
        self.net(torch.ones(1, 2, 4, 4))

    def training_step(self, x, batch_idx):
        return self.net(x.view(-1, 2, 4, 4)).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


class Standardised(nn.Conv2d):
    """Standardises its weight where torch's class computes."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def seamless(self, x, weight, bias):
    return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def convolution():
    return nn.Conv2d(8, 8, 3, padding=1)


def test_a_convolution_whose_class_computes_with_other_weights_stays_dense():
    dgm = fit(Convolves(Standardised(8, 8, 3, padding=1)))
    assert [name for name in dgm.masks() if name in ("layer", "net.2")] == []


@pytest.mark.parametrize(("where", "storage"), [("module", "dense"), ("class", "dense"), ("module", "packed")])
def test_what_computes_a_convolution_stays_the_users(where, storage, monkeypatch):
    layer = convolution()
    if where == "module":
        layer._conv_forward = MethodType(seamless, layer)
    else:
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", seamless)
    module = Convolves(layer)
    trainer = pl.Trainer(**QUIET, callbacks=[dgm := forced(storage)])
    trainer.fit(module, DataLoader(torch.randn(320, 32), 16))
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(module.layer(x), seamless(None, x, module.layer.weight, module.layer.bias))
    assert "_conv_forward" in next(d.why for d in dgm.decisions() if d.name in ("layer", "net.2"))


def test_a_linear_forward_that_is_patched_stays_the_users(monkeypatch):
    own, module, seen = nn.Linear.forward, Owns([torch.tanh]), []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x) + 1.0)

    class Looks(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            layer, x = pl_module.net[1], torch.ones(2, 32)
            seen.append((layer(x), nn.functional.linear(x, layer.weight, layer.bias) + 1.0))

    data = DataLoader(torch.randn(320, 32), 16)
    pl.Trainer(**QUIET, callbacks=[forced("dense"), Looks()]).fit(module, data)
    ((found, expected),) = seen
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"'net.1': \"its forward is not torch's\""):
        pl.Trainer(**QUIET, callbacks=[forced("packed")]).fit(module, data)


def test_padding_that_is_made_circular_in_mid_run_is_heeded():
    module, seen = Convolves(convolution()), []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx < trainer.num_training_batches - 1:
                return
            x, layer = torch.randn(2, 8, 5, 5), pl_module.layer
            layer.padding_mode = "circular"
            seen.append((type(layer), layer(x), seamless(None, x, layer.weight, layer.bias)))

    pl.Trainer(**QUIET, callbacks=[forced("dense"), Looks()]).fit(module, DataLoader(torch.randn(320, 32), 16))
    ((cls, found, expected),) = seen
    assert cls is not nn.Conv2d  # computed sparse until then
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_module_may_script_itself_where_training_ends():
    class Scripts(Convolves):
        def on_train_end(self):
            x = torch.randn(2, 8, 5, 5)
            torch.testing.assert_close(torch.jit.script(self.layer)(x), self.layer(x))
            assert [type(layer) for layer in self.modules()] == [type(layer) for layer in twin.modules()]
            (mask,) = (m for name, m in dgm.masks().items() if self.get_submodule(name) is self.layer)
            assert not self.layer.weight[~mask].any()
            saved = self.state_dict()["layer.weight"]
            assert torch.equal(saved, self.layer.weight)

    twin, module = Scripts(convolution()), Scripts(convolution())
    pl.Trainer(**QUIET, callbacks=[dgm := forced("dense")]).fit(module, DataLoader(torch.randn(320, 32), 16))
    assert next(d.backend for d in dgm.decisions() if d.name in ("layer", "net.2")) == "native"
    assert dgm.run_summary()["sparse_operators_ran"]


@pytest.mark.parametrize("weight", ["none", "deleted"])
def test_a_layer_whose_weight_another_one_makes_is_none_to_mask(weight):
    class Target(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.maker = nn.Linear(32, 32), nn.Linear(32, 128)
            self.target = nn.Linear(32, 4, bias=False)
            if weight == "deleted":
                del self.target.weight
            else:
                self.target.weight = None

        def training_step(self, x, batch_idx):
            made = self.maker(x.mean(0)).view(4, 32)
            return nn.functional.linear(self.body(x).relu(), made).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    dgm = fit(Target())
    assert "maker" in dgm.masks()
    assert "target" not in {decision.name for decision in dgm.decisions()}
