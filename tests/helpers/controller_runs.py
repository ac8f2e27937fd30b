"""Plain loops under a `DGMController`: models, optimizers, settings, and what such runs leave behind."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_estdgm.config import DGMConfig, Selection, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._masks import expand_mask
from lightning_estdgm.method._schedules import EstDgm, Phase

STEPS = 40
SCHEDULE = EstDgm(update_every=4, observe_steps=2)  # updates before steps 3, 6, 10, 13, ...
WEIGHTS = DGMConfig(SCHEDULE, units=Units(size=1), backend="dense")
BLOCKS = DGMConfig(SCHEDULE, units=Units(size=16), backend="cpu")


def constant(density: float) -> EstDgm:
    return EstDgm(*(Phase(density, density, share) for share in (0.15, 0.35, 0.5)), update_every=4, observe_steps=2)


def batch(step: int, width: int) -> torch.Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(1000 + step))


def loss_of(model, x):
    y = model(x)
    return F.mse_loss(y, x[:, :4].sin().to(y.dtype))  # torch 2.6 differentiates no loss of two dtypes


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def fit(model, optimizer, dgm, first=0, last=STEPS, width=32):
    """Do the steps `first` to `last`; yields after each, for what a test wants to see."""
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, batch(step, width)).backward()
        dgm.mask_gradients()
        optimizer.step()
        yield step, dgm.advance()


def run(*args, **kwargs):
    for _ in fit(*args, **kwargs):
        pass


def full_masks(dgm):
    """Weight masks by layer name."""
    sizes = {d.name: d.block_size for d in dgm.decisions() if d.masked}
    return {n: m if sizes[n] == 1 else expand_mask(m, sizes[n]) for n, m in dgm.masks().items()}


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def saved(thing):
    """Send through a file that holds plain types only."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def traces(model, optimizer):
    """All that the controller could leave behind."""
    return (
        [type(m) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        [len(m._forward_hooks) for m in model.modules()],
        [name for name, _ in model.named_buffers()],
        list(model.state_dict()),
        len(optimizer._optimizer_step_pre_hooks),
        len(optimizer._optimizer_step_post_hooks),
    )


def refuse(model, message, config=WEIGHTS, optimizer=None, **kwargs):
    optimizer = optimizer or adamw(model)
    before = traces(model, optimizer), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        DGMController(model, optimizer, config, **{"total_steps": STEPS} | kwargs, audit=False)
    assert traces(model, optimizer) == before[0]
    assert all(torch.equal(before[1][name], value) for name, value in model.state_dict().items())


class Residual(nn.Module):
    """A small residual net: strides, 1x1, 3x3, dilated, 1-D, grouped and depthwise convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.down = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(32, 48, 1, stride=2, bias=False)
        self.same = nn.Conv2d(48, 48, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(48, 48, 3, padding=1, groups=3)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.point = nn.Conv2d(48, 64, 1)
        self.length = nn.Conv1d(64, 32, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (self.same(self.down(x).relu()) + self.skip(x)).relu()
        x = self.point(self.depthwise(self.grouped(x)).relu()).relu()
        return self.head(self.length(x.flatten(2)).mean(2))


IN_BLOCKS = ("down", "skip", "same", "point", "length")
IMAGES = DGMConfig(SCHEDULE, units=Units(size=16), selection=Selection(exclude=("stem", "depthwise")))


def fit_images(config, channels_last=False, steps=20):
    """Train a `Residual`; yields it with its controller, from before the first step on."""
    torch.manual_seed(0)
    model = Residual()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        yield model, dgm
        for step in range(steps):
            optimizer.zero_grad()
            x = batch(step, 3 * 64).view(8, 3, 8, 8)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            F.mse_loss(model(x), x[:, 0, 0, :4].sin()).backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
            yield model, dgm
