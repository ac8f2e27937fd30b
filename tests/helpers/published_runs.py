"""A plain loop that notes what a mask update saw and did, and the papers' rules in numpy."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from lightning_estdgm.engine._controller import DGMController

STEPS, EVERY, DENSITY = 64, 4, 0.2
WIDTHS = (12, 24, 20, 4)


@dataclass
class Seen:
    """One layer at one mask update: mask, weights before and after, and gradients of its window, oldest first."""

    mask: np.ndarray
    weight: np.ndarray
    gradients: list[np.ndarray]
    state: np.ndarray
    new_mask: np.ndarray = field(default=None)
    new_weight: np.ndarray = field(default=None)
    new_state: np.ndarray = field(default=None)


def trained(mlp, config, steps=STEPS, widths=WIDTHS, seed=0):
    """Train in a plain loop. Returns {step of an update: {layer: Seen}}, the masks of each step, and the controller."""
    model = mlp(*widths)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    data = torch.Generator().manual_seed(seed)
    updates, masks, window = {}, [], []
    with DGMController(model, optimizer, config, total_steps=steps, audit=False) as dgm:
        layers = {name: model.get_submodule(name) for name in dgm.masks()}
        for step in range(steps):
            masks.append({name: mask.numpy() for name, mask in dgm.masks().items()})
            x = torch.randn(16, widths[0], generator=data)
            optimizer.zero_grad()
            F.mse_loss(model(x), x[:, : widths[-1]].sin() * 3).backward()
            if dgm.observing:
                window.append({name: layer.weight.grad.numpy().copy() for name, layer in layers.items()})
            dgm.mask_gradients()
            optimizer.step()

            def state(name, layers=layers):
                return optimizer.state[layers[name].weight]["momentum_buffer"].numpy().copy()

            before = {
                name: Seen(
                    masks[-1][name], layer.weight.detach().numpy().copy(), [g[name] for g in window], state(name)
                )
                for name, layer in layers.items()
            }
            if dgm.advance():
                for name, seen in before.items():
                    seen.new_mask = dgm.masks()[name].numpy()
                    seen.new_weight = layers[name].weight.detach().numpy().copy()
                    seen.new_state = state(name)
                updates[step + 1] = before
                window = []
    return updates, masks, dgm


def best(scores, among, k):
    """A mask of the `k` largest scores among some, ties to the lowest index."""
    flat = np.where(among, scores, -np.inf).ravel()
    mask = np.zeros(flat.size, dtype=bool)
    mask[np.argsort(-flat, kind="stable")[:k]] = True
    return mask.reshape(scores.shape)


def count(mask):
    return int(mask.sum())


def cosine(share, step, end):
    return share / 2 * (1 + math.cos(math.pi * step / end))


def assert_weights_follow(seen):
    """Kept weights and their momentum are untouched; all others, and what is new, are 0."""
    stays = seen.mask & seen.new_mask
    assert (seen.new_weight[stays] == seen.weight[stays]).all()
    assert (seen.new_weight[~stays] == 0).all()
    assert (seen.new_state[stays] == seen.state[stays]).all()
    assert (seen.new_state[~stays] == 0).all()


def assert_random(updates, kept_of):
    """What was grown beyond the kept ones looks drawn: spread over the candidates, otherwise in every update."""
    places, brought_in = [], 0
    for layers in updates.values():
        for name, seen in layers.items():
            kept = kept_of(seen)
            assert (seen.new_mask & kept == kept).all()
            brought_in += count(seen.new_mask & ~seen.mask)
            candidates = np.flatnonzero(~kept.ravel())
            grown = np.searchsorted(candidates, np.flatnonzero((seen.new_mask & ~kept).ravel()))
            places += [(name, place / len(candidates)) for place in grown]
    shares = np.array([share for _, share in places])
    assert len(shares) > 200
    assert brought_in > 0.7 * len(shares)  # most of the candidates were inactive
    assert abs(shares.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(shares))
    assert np.histogram(shares, 8, (0, 1))[0].min() > len(shares) / 16


def erk_counts(density):
    """Active weights of each masked layer by hand: in proportion to inputs plus outputs, none above 1."""
    shapes = [(24, 12), (20, 24)]
    epsilon = density * sum(o * i for o, i in shapes) / sum(o + i for o, i in shapes)
    ideal = [epsilon * (o + i) for o, i in shapes]
    assert all(x < o * i for x, (o, i) in zip(ideal, shapes, strict=True))
    return ideal
