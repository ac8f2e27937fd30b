"""`DGMCallback` in a real Trainer against `helpers.oracle`, number for number over 50 steps, with failing controls."""

import dataclasses
import itertools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from helpers.oracle import train
from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase
from lightning_estdgm.config import Units

STEPS = 50
PHASES = [(0.7, 0.6, 12), (0.3, 0.2, 18), (0.15, 0.1, 20)]
SCHEDULE = EstDgm(*(Phase(*phase) for phase in PHASES), update_every=5, observe_steps=3)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.hidden = nn.Linear(24, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        return self.head(F.gelu(self.hidden(F.gelu(self.conv(x.view(-1, 4, 4, 4))).flatten(1))))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 160)
        self.second = nn.Linear(160, 128, bias=False)
        self.head = nn.Linear(128, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@dataclasses.dataclass(frozen=True)
class Case:
    """One network and how it is trained; the method's rules stand in `rules`, spelled as the oracle spells them."""

    network: type[nn.Module]
    names: tuple[str, ...]
    block: int
    optimizer: str
    clip: float | None = None
    micro: int = 1
    backend: str = "dense"
    dtype: torch.dtype = torch.float32
    rules: tuple[tuple[str, object], ...] = ()

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.network().to(self.dtype)

    def new_optimizer(self, model):
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)
        return torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)

    def data(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(STEPS * self.micro, 16, 64, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (STEPS * self.micro, 16), generator=generator)
        return list(zip(x.to(self.dtype), y, strict=True))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Module(pl.LightningModule):
    def __init__(self, case):
        super().__init__()
        self.case, self.net = case, case.model()

    def training_step(self, batch, batch_idx):
        return loss_fn(self.net, batch)

    def configure_optimizers(self):
        return self.case.new_optimizer(self)


class Recorder(pl.Callback):
    """Notes the masks whenever they have changed."""

    def __init__(self, dgm):
        self.dgm, self.history = dgm, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        masks = list(self.dgm.masks().values())
        before = next(reversed(self.history.values()), None)
        if self.dgm.controller.steps == 0:  # dense
            return
        if before is None or any(not torch.equal(a, b) for a, b in zip(before, masks, strict=True)):
            self.history[trainer.global_step] = masks


def by_callback(case):
    rules = dict(case.rules)
    parts = {
        "drop": ("update_rule", "drop_fraction"),
        "gamma": ("update_rule", "gamma"),
        "exponent": ("step_size", "exponent"),
        "scale_init": ("step_size", "scale_initial_weights"),
    }
    seed = rules.pop("seed", 0)
    config = DGMConfig(SCHEDULE, units=Units(size=case.block), backend=case.backend, seed=seed)
    for name, value in rules.items():
        part, field = parts.get(name, (name, None))
        config = config.merged(**{part: value if field is None else {field: value}})
    module, dgm = Module(case), DGMCallback(config)
    recorder = Recorder(dgm)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=case.micro,
        gradient_clip_val=case.clip,
        callbacks=[dgm, recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(case.data(), batch_size=None, shuffle=False))
    assert trainer.global_step == STEPS
    return module.net, trainer.optimizers[0], recorder.history


def by_oracle(case, **broken):
    model = case.model()
    optimizer = case.new_optimizer(model)
    data = case.data()
    batches = [data[i : i + case.micro] for i in range(0, len(data), case.micro)]
    settings = {"block": case.block, "clip": case.clip} | dict(case.rules) | broken
    return model, optimizer, train(model, case.names, optimizer, batches, loss_fn, PHASES, **settings)


def difference(one, other):
    """Return (largest difference in weights and optimizer state, whether all masks were equal at all times)."""
    (model, optimizer, history), (model2, optimizer2, history2) = one, other
    worst = 0.0
    for a, b in zip(model.parameters(), model2.parameters(), strict=True):
        worst = max(worst, (a - b).abs().max().item())
        for name, value in optimizer.state[a].items():
            theirs = optimizer2.state[b][name]
            worst = max(worst, (torch.as_tensor(value) - torch.as_tensor(theirs)).abs().max().item())
    # The callback's history leaves out updates that changed nothing.
    steps = sorted(history.keys() | history2.keys())
    latest = [[next(h[s] for s in range(step, -1, -1) if s in h) for step in steps] for h in (history, history2)]
    same = all(torch.equal(a, b) for x, y in zip(*latest, strict=True) for a, b in zip(x, y, strict=True))
    return worst, same


CONV = Case(Conv, ("conv", "hidden"), 1, "adamw")
MLP = Case(Mlp, ("first", "second"), 16, "sgd")
EXACT = {
    "weights, adamw, convolution": CONV,
    "weights, sgd, clipped": dataclasses.replace(CONV, optimizer="sgd", clip=0.2),
    "weights, adamw, accumulated, clipped": dataclasses.replace(CONV, micro=3, clip=0.2),
    "weights, other rules": dataclasses.replace(
        CONV, rules=(("gamma", 0.5), ("drop", 0.5), ("exponent", 0.5), ("scale_init", False), ("seed", 5))
    ),
    "weights, frozen": dataclasses.replace(CONV, rules=(("inactive", "frozen"),)),
    "blocks, sgd": MLP,
    "blocks, adamw, clipped, accumulated": dataclasses.replace(MLP, optimizer="adamw", clip=0.2, micro=2),
    "blocks, frozen": dataclasses.replace(MLP, optimizer="adamw", rules=(("inactive", "frozen"),)),
}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_the_callback_is_the_oracle_to_the_last_bit(case):
    # The dense forward is the same sequence of the same operations on both sides, so nothing may differ at all.
    assert difference(by_callback(case), by_oracle(case)) == (0.0, True)


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_steps_scaled_by_their_rates_are_those_scaled_after_they_were_made(case):
    # In float64, up to the rounding of the interpolation; weight decay and momentum included.
    case = dataclasses.replace(case, dtype=torch.float64)
    worst, same = difference(by_callback(case), by_oracle(case, by_rate=False))
    assert same
    assert worst < 1e-12


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("inactive", ["zero", "frozen"])
def test_sparse_backends_follow_the_oracle(backend, inactive):
    # They add up the same products in another order. In float64 a sum of 160 is off by 1e-16 relative to it; 50 steps
    # of a contracting network leave that below 1e-12, while any broken rule (below) shows at 1e-4 or more.
    case = dataclasses.replace(MLP, dtype=torch.float64, rules=(("inactive", inactive),))
    worst, same = difference(by_callback(dataclasses.replace(case, backend=backend)), by_oracle(case))
    assert same
    assert worst < 1e-12


@pytest.fixture(scope="module")
def trained():
    return {
        name: by_callback(EXACT[name])
        for name in ("weights, adamw, accumulated, clipped", "blocks, sgd", "blocks, frozen")
    }


@pytest.mark.parametrize(
    "broken",
    [
        {"gamma": 0.0},
        {"consistent": False},
        {"drop": 0.2},
        {"exponent": 0.9},
        {"scale_init": False},
        {"clear_state": False},
        {"observe": 2},
        {"every": 6},
        {"freeze": 0.5},
        {"seed": 1},
        {"clip": 0.25},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["weights, adamw, accumulated, clipped", "blocks, sgd"])
def test_a_broken_rule_is_seen(trained, name, broken):
    if "clip" in broken and EXACT[name].clip is None:
        broken = {"clip": 0.01}
    worst, _ = difference(trained[name], by_oracle(EXACT[name], **broken))
    assert worst > 1e-4


@pytest.mark.parametrize("name", ["weights, adamw, accumulated, clipped", "blocks, frozen"])
def test_a_count_of_steps_that_grown_weights_share_is_seen(trained, name):
    worst, _ = difference(trained[name], by_oracle(EXACT[name], own_counts=False))
    assert worst > 1e-4


def test_a_broken_frozen_rule_is_seen(trained):
    worst, _ = difference(trained["blocks, frozen"], by_oracle(EXACT["blocks, frozen"], inactive="zero"))
    assert worst > 1e-4


def test_the_case_is_no_trivial_one(trained):
    """The runs above drop and grow, and their masks follow the densities asked for."""
    for name in ("weights, adamw, accumulated, clipped", "blocks, sgd"):
        history = list(trained[name][2].values())
        assert len(history) >= 8
        grown = [sum(int((b & ~a).sum()) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(history)]
        assert sum(n > 0 for n in grown) >= 4
        total = sum(mask.numel() for mask in history[0])
        shares = [sum(int(mask.sum()) for mask in masks) / total for masks in (history[0], history[-1])]
        assert shares == pytest.approx([0.7, 0.1], abs=1 / total)
