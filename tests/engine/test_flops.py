"""Training FLOPs: what masks ask for, what backends skip, what dense training takes."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.controller_runs import IMAGES, IN_BLOCKS, STEPS, constant, fit_images, run, sgd
from helpers.masked_weights import candidates_of, numbered
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._flops import FlopCounter
from lightning_estdgm.method._backward_set import BackwardSet
from lightning_estdgm.method._schedules import EstDgm, Phase


def test_flops_ratios_by_hand(mlp):
    schedule = EstDgm(*(Phase(0.25, 0.25, n) for n in (4, 4, 8)), update_every=4, observe_steps=1, freeze=0.5)
    model = mlp(32, 64, 4)
    optimizer = sgd(model)
    with DGMController(model, optimizer, DGMConfig(schedule, units=Units(size=1)), total_steps=16, audit=False) as dgm:
        run(model, optimizer, dgm, last=16)
        observed = sum(schedule.resolve(16)(step).observe for step in range(16))
        assert observed == 3
        masked, head = 32 * 64, 64 * 4
        dense = 16 * 3 * (masked + head)
        done = 16 * 3 * head + masked * (16 * 3 * 0.25 + observed * 0.75)
        assert dgm.flops_ratio == pytest.approx(done / dense)
        assert dgm.flops_executed_ratio == 1.0


@pytest.mark.parametrize(("backend", "skips"), [("dense", False), ("reference", False), ("cpu", True)])
def test_convolutions_count_what_their_backend_skips(backend, skips):
    schedule = dataclasses.replace(constant(0.25), observe_steps=1)
    config = IMAGES.merged(schedule=schedule, units={"distribution": "uniform"}, backend=backend)
    *_, (model, dgm) = fit_images(config, steps=1)
    assert not schedule.resolve(STEPS)(0).observe
    pixels = {"stem": 64, "down": 16, "skip": 16, "same": 16, "grouped": 16, "depthwise": 16, "point": 16, "length": 16}
    products = {name: 2 * 8 * n * getattr(model, name).weight.numel() for name, n in pixels.items()}
    products["head"] = 2 * 8 * 4 * 32
    skipped = sum(products[d.name] * (1 - d.density) for d in dgm.decisions() if d.name in IN_BLOCKS)
    assert dgm.flops["dense"] == 3 * sum(products.values())
    assert dgm.flops["executed"] == pytest.approx(dgm.flops["dense"] - 3 * skipped * skips)


def test_flops_count_every_position_that_a_weight_is_applied_to():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 2, stride=2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 2)

        def forward(self, x):
            tokens = self.up(x).flatten(2).repeat(1, 1, 1)[:, :, :8]
            return self.last(self.attention(tokens, tokens, tokens)[0])

    model = Model()
    optimizer = sgd(model)
    with DGMController(model, optimizer, DGMConfig(units=Units(size=1)), total_steps=STEPS, audit=False) as dgm:
        model(torch.randn(5, 2, 2, 2)).sum().backward()
        optimizer.step()
        dgm.advance()
        sizes = {"up": 24 * 20, "in_proj": 192 * 15, "out_proj": 64 * 15, "last": 16 * 15}  # weights x positions
        assert dgm.flops["dense"] == 6 * sum(sizes.values())


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "checkpointed"])
def test_flops_count_every_forward_of_a_step_and_no_recomputation(recomputes):
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            for _ in range(10):
                x = checkpoint(self.body, x, use_reentrant=False) if recomputes else self.body(x)
            return self.head(x)

    model = Repeated()
    optimizer = sgd(model)
    with DGMController(model, optimizer, DGMConfig(units=Units(size=1)), total_steps=STEPS, audit=False) as dgm:
        model(torch.randn(5, 8)).sum().backward()
        optimizer.step()
        dgm.advance()
        assert dgm.flops["dense"] == 6 * 64 * 5 * (10 + 1)
        assert dgm.state_dict()["positions"] == {"body": 5, "head": 5}  # of one forward, which is timed


# ------------------------------------------------------------------ the counter by itself


@pytest.mark.parametrize(
    ("inactive", "observing", "backend", "analytic", "executed"),
    [
        # Output and input gradient by the weights in the forward, weight gradient by those that learn, all of 32 * 5.
        ("zero", False, "dense", 0.75, 3.0),
        ("zero", False, "reference", 0.75, 3.0),
        ("zero", False, "cpu", 0.75, 0.75),
        ("zero", True, "cpu", 1.5, 1.5),
        ("frozen", False, "cpu", 2.25, 2.25),
        (BackwardSet(density=0.5), False, "cpu", 1.0, 1.0),
    ],
)
def test_three_products_a_layer_each_by_the_weights_that_take_part(inactive, observing, backend, analytic, executed):
    weight = numbered([[1, 1, 0, 0, 0, 0, 0, 0]] * 4, inactive=inactive)
    weight.inactive.apply_mask_(weight)
    weight.backend = backend
    head = candidates_of((8, 8), (2, 4))[1]
    counter = FlopCounter()
    assert (counter.ratio, counter.executed_ratio) == (1.0, 1.0)
    for _ in range(2):
        counter.count([weight.candidate, head], [weight], {"0": 5, "1": 7}, observing=observing)
    product, others = 2 * 32 * 5, 3 * 2 * 8 * 7
    assert counter.dense == 2 * (3 * product + others)
    assert counter.analytic == 2 * (analytic * product + others)
    assert counter.executed == 2 * (executed * product + others)
    assert counter.ratio == counter.analytic / counter.dense
    assert counter.executed_ratio == counter.executed / counter.dense
    again = FlopCounter()
    again.load_state_dict(counter.state_dict())
    assert vars(again) == vars(counter)


def test_a_layer_that_was_not_seen_counts_as_one_position():
    weight = numbered([[1, 0]])
    counter = FlopCounter()
    counter.count([weight.candidate], [weight], {}, observing=False)
    assert counter.dense == 3 * 2 * 2
