"""Published methods against their papers' rules, worked out in numpy from what a plain loop saw before each update."""

import math
import pickle
import re
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_estdgm import DGMCallback
from lightning_estdgm.config import DGMConfig, StepSize, Units
from lightning_estdgm.engine.controller import DGMController
from lightning_estdgm.method.patterns import NofM
from lightning_estdgm.method.schedules import EstDgm
from lightning_estdgm.method.update_rule import UpdateRule
from lightning_estdgm.presets import PRESETS, preset

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
    with DGMController(model, optimizer, config, total_steps=steps) as dgm:
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


# ------------------------------------------------------------------ one method after the other


@pytest.mark.parametrize(("block_size", "keep"), [(1, "magnitude"), (16, "weight_and_gradient"), (16, "magnitude")])
def test_est_dgm_keeps_weights_by_magnitude_and_blocks_by_gradient_too(mlp, block_size, keep):
    schedule = EstDgm(update_every=EVERY, observe_steps=2)
    config = DGMConfig(schedule, units=Units(size=block_size), backend="dense", step_size=StepSize(exponent=0.0))
    if (block_size, keep) == (16, "magnitude"):  # as published methods do
        config = config.merged(update_rule={"keep": keep})
    updates, _, dgm = trained(mlp, config, widths=(64, 96, 64, 4))

    def norms(x):
        rows, columns = (n // block_size for n in x.shape)
        return np.linalg.norm(x.reshape(rows, block_size, columns, block_size), axis=(1, 3))

    differ = 0
    for step, layers in updates.items():
        for seen in layers.values():
            weight, gradient = norms(seen.weight), np.mean([norms(g) for g in seen.gradients], 0)
            both = weight / weight[seen.mask].mean() + gradient / max(gradient[seen.mask].mean(), 1e-30)
            k = count(seen.new_mask)
            stay = min(count(seen.mask), k)
            stay -= int(cosine(0.3, step, max(updates)) * stay)
            stay = max(stay, k - count(~seen.mask))
            kept = best(weight if keep == "magnitude" else both, seen.mask, stay)
            assert (kept == (seen.mask & seen.new_mask)).all()
            differ += (best(weight, seen.mask, stay) != best(both, seen.mask, stay)).any()
    assert dgm.updates > 8
    assert differ > 4  # the two scores could be told apart


def test_growth_at_random_observes_nothing_by_single_weights(mlp):
    schedule = EstDgm(update_every=EVERY, observe_steps=2)
    for block_size, observed in ((1, 0), (16, 2)):
        config = DGMConfig(
            schedule,
            units=Units(size=block_size),
            update_rule=UpdateRule(grow="random"),
            backend="dense",
            step_size=StepSize(exponent=0.0),
        )
        updates, _, _ = trained(mlp, config, widths=(64, 96, 64, 4))
        assert {len(seen.gradients) for layers in updates.values() for seen in layers.values()} == {observed}


def test_static_is_a_random_erk_mask_that_stays(mlp):
    updates, masks, dgm = trained(mlp, preset("static", DENSITY))
    assert not updates
    assert dgm.updates == 0
    for name, ideal in zip(("0", "2"), erk_counts(DENSITY), strict=True):
        assert abs(count(masks[0][name]) - ideal) < 1
        assert all((mask[name] == masks[0][name]).all() for mask in masks)
    other = trained(mlp, preset("static", DENSITY, seed=1))[1]
    assert any((other[0][name] != masks[0][name]).any() for name in ("0", "2"))


def test_set_drops_the_smallest_and_grows_at_random(mlp):
    updates, _, _ = trained(mlp, preset("set", DENSITY, update_every=EVERY), 4 * STEPS)
    assert list(updates) == list(range(EVERY, 4 * STEPS, EVERY))

    def kept(seen):
        n = count(seen.mask)
        assert count(seen.new_mask) == n
        return best(abs(seen.weight), seen.mask, n - math.floor(0.3 * n))

    for layers in updates.values():
        for seen in layers.values():
            assert_weights_follow(seen)
    assert_random(updates, kept)


def test_random_growth_is_fixed_by_the_seed_alone(mlp):
    def masks_of(config):
        return trained(mlp, config, 24)[1]

    torch.manual_seed(1)
    first = masks_of(preset("set", DENSITY, update_every=EVERY))
    torch.manual_seed(2)
    again = masks_of(preset("set", DENSITY, update_every=EVERY))
    other = masks_of(preset("set", DENSITY, update_every=EVERY, seed=1))
    assert all((a[name] == b[name]).all() for a, b in zip(first, again, strict=True) for name in a)
    assert any((first[-1][name] != other[-1][name]).any() for name in first[-1])


def test_layers_of_one_shape_grow_by_chances_of_their_own(mlp):
    updates, _, _ = trained(mlp, preset("set", DENSITY, update_every=EVERY), 32, (16, 16, 16, 4))
    shared = grown = 0
    for layers in updates.values():
        first, second = (seen.new_mask & ~seen.mask for seen in layers.values())
        shared, grown = shared + count(first & second), grown + count(first)
    assert grown > 60
    assert shared < grown / 3


def test_snfs_moves_weights_to_layers_of_large_momentum(mlp):
    updates, masks, _ = trained(mlp, preset("snfs", DENSITY, update_every=EVERY))
    assert [count(masks[0][n]) / masks[0][n].size for n in ("0", "2")] == pytest.approx([DENSITY] * 2, abs=0.005)
    budget = sum(map(count, masks[0].values()))
    moved = 0
    for step, layers in updates.items():
        rate = cosine(0.5, step, STEPS)
        momenta = {name: abs(np.mean(seen.gradients, axis=0)) for name, seen in layers.items()}
        assert all(len(seen.gradients) == EVERY for seen in layers.values())
        kept = {
            name: best(abs(seen.weight), seen.mask, count(seen.mask) - math.floor(rate * count(seen.mask)))
            for name, seen in layers.items()
        }
        contribution = {name: momenta[name][seen.mask].mean() for name, seen in layers.items()}
        dropped = budget - sum(map(count, kept.values()))
        for name, seen in layers.items():
            share = dropped * contribution[name] / sum(contribution.values())
            grown = count(seen.new_mask) - count(kept[name])
            assert abs(grown - share) < 1, (step, name)
            assert (seen.new_mask == (kept[name] | best(momenta[name], ~kept[name], grown))).all()
            assert_weights_follow(seen)
            moved += count(seen.new_mask) != count(seen.mask)
        assert sum(count(seen.new_mask) for seen in layers.values()) == budget
    assert moved > 8


def rigl_mask(seen, share):
    n = count(seen.mask)
    kept = best(abs(seen.weight), seen.mask, n - math.floor(share * n))
    assert len(seen.gradients) == 1
    return kept | best(abs(seen.gradients[0]), ~kept, n - count(kept))


def test_rigl_drops_by_magnitude_and_grows_by_gradient(mlp):
    updates, masks, _ = trained(mlp, preset("rigl", DENSITY, update_every=EVERY))
    assert list(updates) == list(range(EVERY, 48, EVERY))  # updates end at 75 % of 64 steps
    regrown = 0
    for step, layers in updates.items():
        share = cosine(0.3, step, 48)
        for seen in layers.values():
            assert (seen.new_mask == rigl_mask(seen, share)).all(), step
            assert_weights_follow(seen)
            dropped = seen.mask & ~best(
                abs(seen.weight), seen.mask, count(seen.mask) - math.floor(share * count(seen.mask))
            )
            regrown += count(dropped & seen.new_mask)
    assert regrown > 0  # so the oracle tells apart whether dropped weights may come back
    assert [count(masks[-1][n]) for n in ("0", "2")] == [count(masks[0][n]) for n in ("0", "2")]


def test_gmp_prunes_along_the_cubic_and_regrows_nothing(mlp):
    updates, masks, _ = trained(mlp, preset("gmp", DENSITY, update_every=EVERY, begin=0.125, end=0.75))
    assert all(mask.all() for mask in masks[8].values())
    for step in range(8, STEPS):
        x = min(1.0, (step - 8) // EVERY * EVERY / 40)
        sparsity = (1 - DENSITY) + (0 - (1 - DENSITY)) * (1 - x) ** 3  # Zhu & Gupta, equation 1
        for mask in masks[step].values():
            assert abs(count(mask) - (1 - sparsity) * mask.size) <= 1, step
    for layers in updates.values():
        for seen in layers.values():
            assert not seen.gradients  # nothing is observed that nothing is decided by
            assert (seen.new_mask == best(abs(seen.weight), seen.mask, count(seen.new_mask))).all()
            assert_weights_follow(seen)


def test_ac_dc_is_dense_and_the_largest_of_all_layers_in_turns(mlp):
    updates, masks, dgm = trained(mlp, preset("ac/dc", DENSITY), 100)
    dense = [all(mask.all() for mask in at.values()) for at in masks]
    expected = [True] * 10 + ([False] * 5 + [True] * 5) * 6 + [False] * 5 + [True] * 10 + [False] * 15
    assert dense == expected  # as in the authors' configuration for 100 epochs
    assert [dgm.schedule(s).phase for s in (0, 10, 15, 99)] == ["dense", "sparse", "dense", "sparse"]
    for step, layers in updates.items():
        if not dense[step]:
            everything = np.concatenate([abs(seen.weight).ravel() for seen in layers.values()])
            threshold = np.sort(everything)[-round(DENSITY * everything.size)]
            for seen in layers.values():
                assert (seen.new_mask == (abs(seen.weight) >= threshold)).all()
        for seen in layers.values():
            assert_weights_follow(seen)
    shares = [count(mask) / mask.size for mask in masks[-1].values()]
    assert abs(shares[0] - shares[1]) > 0.02  # layers differ: it is global


@pytest.mark.parametrize("soft", [False, True])
def test_mest_drops_by_weight_and_gradient_and_grows_at_random(mlp, soft):
    config = preset("mest", DENSITY, update_every=EVERY, soft=soft, gradient_weight=0.5)
    updates, masks, _ = trained(mlp, config, 256)
    size = sum(mask.size for mask in masks[0].values())
    for step, at in enumerate(masks):
        surplus = (1.5 if step < 144 else 1.25 if step < 192 else 1.0) if soft else 1.0
        assert sum(map(count, at.values())) == round(surplus * DENSITY * size), step
    assert max(updates) == (193 if soft else 188)

    def kept(seen):
        score = abs(seen.weight) + 0.5 * abs(seen.gradients[0])
        n = min(count(seen.mask), count(seen.new_mask))
        keep = n - math.floor(share * n) if not soft else n - math.floor((1 - DENSITY / density) * n)
        return best(score, seen.mask, keep)

    for step, layers in updates.items():
        share = 0.2 if step < 144 else 0.1
        density = DENSITY * (1.5 if step < 144 else 1.25 if step < 192 else 1.0)
        for seen in layers.values():
            assert (seen.new_mask & kept(seen) == kept(seen)).all()
            if soft and step <= 144:  # it has dropped to the final density before it grew
                assert abs(count(kept(seen)) - DENSITY * seen.mask.size) < 2
            assert_weights_follow(seen)
    share, density = 0.2, 1.5 * DENSITY
    assert_random({step: layers for step, layers in updates.items() if step < 144}, kept)


def test_granet_prunes_globally_then_regenerates_by_gradient(mlp):
    updates, masks, _ = trained(mlp, preset("granet", DENSITY, update_every=EVERY))
    sizes = {name: mask.size for name, mask in masks[0].items()}
    assert abs(sum(map(count, masks[0].values())) - 0.5 * sum(sizes.values())) < 1
    for step, layers in updates.items():
        x = min(1.0, step / 44)  # 0.6875 of 64 steps
        density = DENSITY + (0.5 - DENSITY) * (1 - x) ** 3
        everything = np.concatenate([np.where(s.mask, abs(s.weight), -1).ravel() for s in layers.values()])
        threshold = np.sort(everything)[-round(density * everything.size)]
        for seen in layers.values():
            pruned = seen.mask & (abs(seen.weight) >= threshold)
            n = count(pruned)
            kept = best(abs(seen.weight), pruned, n - math.floor(cosine(0.5, step, STEPS) * n))
            expected = kept | best(abs(seen.gradients[0]), ~kept, n - count(kept))
            assert (seen.new_mask == expected).all(), step
            assert_weights_follow(seen)
    assert max(updates) > 48


def test_srigl_gives_every_output_one_fan_in_and_ablates_those_without_salient_weights(mlp):
    updates, masks, _ = trained(mlp, preset("srigl", DENSITY, update_every=EVERY, ablate=0.5))
    fan_ins = {
        name: round(ideal / masks[0][name].shape[0])
        for name, ideal in zip(("0", "2"), erk_counts(DENSITY), strict=True)
    }
    assert all((masks[0][name].sum(1) == fan_in).all() for name, fan_in in fan_ins.items())
    ablated = 0
    for step, layers in updates.items():
        share = cosine(0.3, step, 48)
        for name, seen in layers.items():
            outputs, inputs = seen.mask.shape
            n, k = count(seen.mask), fan_ins[name]
            keep = n - math.floor(share * n)
            kept = best(abs(seen.weight), seen.mask, keep)
            salient = kept | best(abs(seen.gradients[0]), np.ones_like(kept), n - keep)
            alive = salient.sum(1) >= 0.5 * k
            fan_in = min(inputs, k * outputs // alive.sum())
            expected = np.zeros_like(kept)
            for row in np.flatnonzero(alive):
                stay = best(abs(seen.weight[row]), kept[row], min(fan_in, kept[row].sum()))
                expected[row] = stay | best(abs(seen.gradients[0][row]), ~stay, fan_in - stay.sum())
            assert (seen.new_mask == expected).all(), (step, name)
            assert set(seen.new_mask.sum(1)) <= {0, fan_in}
            assert_weights_follow(seen)
            ablated += (~alive).sum()
    assert ablated > 0


# ------------------------------------------------------------------ weights that learn outside the forward


def simulated(mlp, steps, lr, momentum, choose, penalty, learns, every, widths=WIDTHS):
    """Top-KAST and SR-STE from their definitions: dense weights, a masked copy in the forward, its gradient on all.

    `choose` gives the forward mask of dense weights, `learns` the weights that are updated, `penalty` what is added to
    the gradient. Returns the masked weights after each step.
    """
    model = mlp(*widths)
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in dense.items()}
    masked = ("0.weight", "2.weight")
    data = torch.Generator().manual_seed(0)
    seen = []
    for step in range(steps):
        if step % every == 0:
            active = {n: choose(dense[n]) for n in masked}
            moving = {n: learns(dense[n]) | active[n] for n in masked}
        x = torch.randn(16, widths[0], generator=data)
        forward = {n: (w * active.get(n, 1)).requires_grad_() for n, w in dense.items()}
        F.mse_loss(torch.func.functional_call(model, forward, x), x[:, : widths[-1]].sin() * 3).backward()
        for n, w in dense.items():
            gradient = forward[n].grad
            if n in masked:
                gradient = torch.where(moving[n], gradient + penalty(w, active[n]), 0.0)
            velocity[n] = momentum * velocity[n] + gradient
            moved = w - lr * velocity[n]
            dense[n] = torch.where(moving[n], moved, w) if n in masked else moved
        chosen = active
        if (step + 1) % every == 0 and step + 1 < steps:
            chosen = {n: choose(dense[n]) for n in masked}
        seen.append({n: (w * chosen.get(n, 1)).detach().clone() for n, w in dense.items()})
    return seen


def largest(weight, k):
    return torch.from_numpy(best(weight.abs().numpy(), np.ones(weight.shape, bool), k))


def two_of_four(weight):
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], 4):
            mask[row, first : first + 4] = largest(weight[row, first : first + 4], 2)
    return mask


def fitted_weights(mlp, config, steps, closure, widths=WIDTHS):
    model = mlp(*widths)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    data = torch.Generator().manual_seed(0)
    seen = []
    with DGMController(model, optimizer, config, total_steps=steps) as dgm:
        for _ in range(steps):
            x = torch.randn(16, widths[0], generator=data)

            def backward(x=x):
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), x[:, : widths[-1]].sin() * 3)
                loss.backward()
                dgm.mask_gradients()
                return loss

            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            dgm.advance()
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return seen, dgm


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("every", [1, 4])
def test_top_kast_learns_outside_the_forward(mlp, closure, every):
    config = preset("top-kast", DENSITY, update_every=every, backward_density=0.5, penalty=0.01)
    got, dgm = fitted_weights(mlp, config, 32, closure)
    expected = simulated(
        mlp,
        32,
        0.3,
        0.9,
        choose=lambda w: largest(w, round(DENSITY * w.numel())),
        learns=lambda w: largest(w, round(0.5 * w.numel())),
        penalty=lambda w, active: torch.where(active, 0.01 * w, 0.01 / DENSITY * w),
        every=every,
    )
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=f"{name} after step {step}")
    assert dgm.explored > DENSITY + 0.1
    assert dgm.flops_ratio == pytest.approx((2 * DENSITY + 0.5) / 3, abs=0.25)


def test_n_of_m_is_sr_ste(mlp):
    config = preset("n:m", 0.5, m=4, update_every=1, decay=0.02)
    widths = (12, 24, 20, 4)
    got, dgm = fitted_weights(mlp, config, 24, True, widths)
    expected = simulated(
        mlp,
        24,
        0.3,
        0.9,
        choose=two_of_four,
        learns=lambda w: torch.ones_like(w, dtype=torch.bool),
        penalty=lambda w, active: torch.where(active, 0.0, 0.02 * w),
        every=1,
    )
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=f"{name} after step {step}")
    for mask in dgm.masks().values():
        assert (mask.view(mask.shape[0], -1, 4).sum(2) == 2).all()
    assert dgm.explored > 0.6


def test_steps_of_weights_outside_the_forward_are_scaled_like_the_others(mlp):
    def after_one_step(exponent):
        config = preset(
            "top-kast", 0.25, penalty=0.0, backward_density=1.0, units={"size": 16}, step_size={"exponent": exponent}
        )
        model = mlp(32, 64, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with DGMController(model, optimizer, replace(config, backend="cpu"), total_steps=8) as dgm:
            (layer,) = dgm.masked_weights
            before = model[0].weight.detach() + layer.inactive.shadow.weights
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
            F.mse_loss(model(x), x[:, :4]).backward()
            gradient = model[0].weight.grad.clone()
            optimizer.step()
            return before, gradient, model[0].weight.detach() + layer.inactive.shadow.weights

    for exponent, factor in ((0.0, 1.0), (1.0, 4.0)):
        before, gradient, after = after_one_step(exponent)
        assert torch.count_nonzero(gradient) == gradient.numel()
        torch.testing.assert_close(after, before - 0.1 * factor * gradient)


def test_a_scaler_that_skips_and_scales_changes_nothing(mlp):
    """With a fused optimizer, which steps by scaled gradients and is called for infinite ones, too."""

    def weights(scaler, infinite_at=()):
        model = mlp(12, 24, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        data = torch.Generator().manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100, backoff_factor=0.5, enabled=scaler)
        config = preset("top-kast", 0.2, update_every=4, penalty=0.05)
        with DGMController(model, optimizer, config, total_steps=100) as dgm:
            for step in range(12 + len(infinite_at)):
                infinite = step in infinite_at
                x = torch.full((8, 12), torch.inf) if infinite else torch.randn(8, 12, generator=data)
                optimizer.zero_grad()
                loss = model(x).square().mean()
                scaler.scale(loss).backward()
                if infinite:
                    model[0].weight.grad.fill_(torch.inf)
                dgm.mask_gradients(grad_scale=scaler.get_scale())
                scaler.step(optimizer)
                scaler.update()
                dgm.advance()
                mask = dgm.masks()["0"]
                assert torch.count_nonzero(model[0].weight[~mask]) == 0
        return [p.detach().clone() for p in model.parameters()]

    plain = weights(scaler=False)
    for a, b, c in zip(plain, weights(scaler=True), weights(scaler=True, infinite_at=(3, 6)), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_a_step_without_a_gradient_leaves_the_reserve_where_it_is(mlp):
    model = mlp(12, 24, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    with DGMController(model, optimizer, preset("top-kast", 0.2), total_steps=8) as dgm:
        (layer,) = dgm.masked_weights
        weight, held = model[0].weight.detach().clone(), layer.inactive.shadow.weights.clone()
        optimizer.step()
        optimizer.step(lambda: None)
        assert torch.equal(model[0].weight, weight)
        assert torch.equal(layer.inactive.shadow.weights, held)


# ------------------------------------------------------------------ presets as such


def test_est_dgm_is_the_default():
    assert preset("est-dgm", 0.1) == DGMConfig()
    assert preset("est-dgm", 0.3).schedule.resolve(100).densities[-1] == 0.3


def test_low_density_est_dgm_changes_phases_and_drop_fraction_only():
    low = preset("est-dgm", 0.2, phases="low-density", update_every=5, update_rule={"gamma": 0.5})
    assert low == DGMConfig(
        EstDgm.low_density(0.2, update_every=5), update_rule=UpdateRule(drop_fraction=0.1, gamma=0.5)
    )


def test_sparse_to_denser_est_dgm_grows_at_random():
    denser = preset("est-dgm", 0.2, phases="sparse-to-denser", update_every=5)
    assert denser == DGMConfig(
        EstDgm.sparse_to_denser(0.2, update_every=5), update_rule=UpdateRule(grow="random", regrow=True)
    )
    with pytest.raises(ValueError, match="phases must be 'cycle', 'low-density' or 'sparse-to-denser', got 'lean'"):
        preset("est-dgm", 0.2, phases="lean")


def test_published_methods_keep_blocks_by_their_own_score():
    assert {preset(name, 0.5, units={"size": 16}).update_rule.keep for name in ("rigl", "set", "gmp", "granet")} == {
        "magnitude"
    }


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_print_compare_and_pickle(name):
    config = preset(name, 0.5)
    assert config == preset(name, 0.5)
    assert pickle.loads(pickle.dumps(config)) == config
    schedule = config.schedule.resolve(200)
    assert schedule(199).density == 0.5
    callback = DGMCallback.from_preset(
        name, 0.5, step_size={"exponent": 0.5}, selection={"exclude": ("0",)}, total_steps=7
    )
    assert callback.config == config.merged(step_size={"exponent": 0.5}, selection={"exclude": ("0",)})
    assert callback.total_steps == 7
    assert callback.run_summary()["name"] == (config.method or "EST-DGM")
    published = name != "est-dgm"
    assert (config.step_size.exponent, config.step_size.scale_initial_weights, config.units.size) == (
        (0.0, False, 1) if published else (1.0, True, "auto")
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: preset("RigL", 0.1), ValueError, "expected a method out of ['ac/dc', 'est-dgm'"),
        (lambda: preset("rigl", 0.1, zeta=0.3), TypeError, "'rigl' takes ['alpha', 'stop', 'update_every'] and"),
        (lambda: preset("rigl", 0.0), ValueError, "density must lie in (0, 1], got 0.0"),
        (lambda: preset("n:m", 0.3), ValueError, "whole number of 4ths, got 0.3"),
        (lambda: preset("n:m", 0.5, m=1), ValueError, "whole number of 1ths, got 0.5"),
        (lambda: preset("top-kast", 0.3, backward_density=0.2), ValueError, "at least density, got 0.2 and 0.3"),
        (lambda: preset("srigl", 0.1, update_rule={"regrow": False}), ValueError, "needs regrow=True"),
        (lambda: preset("granet", 0.1, units={"size": "auto"}), ValueError, "units of one size in all layers"),
        (lambda: preset("top-kast", 0.1, inactive="frozen"), ValueError, "leave one out"),
        (
            lambda: DGMCallback.from_preset("top-kast", compress_gradients=True),
            ValueError,
            "compress_gradients sends the gradients of active units only",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_layers_that_do_not_fit_are_named(mlp):
    model = mlp(12, 24, 10, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for config, message in (
        (preset("n:m", 0.5, m=8), "layer '0': N:8 needs inputs that are a multiple of 8, got a mask of (24, 12)"),
        (
            preset("rigl", 0.3, update_rule={"pattern": NofM(4)}),
            "layer '0': N:4 needs a density that is a whole number of 4ths",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            DGMController(model, optimizer, config, total_steps=8)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda e: e.weight[0], "one number a unit, of shape (24, 12), got (12,)"),
        (lambda e: e.weight * math.nan, "must not be NaN"),
    ],
)
def test_bad_scores_are_refused(mlp, score, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(mlp, preset("rigl", 0.2, update_every=EVERY, update_rule={"grow": score}), 8)


def test_a_drop_fraction_outside_its_range_is_refused(mlp):
    with pytest.raises(ValueError, match="must return a share in"):
        trained(
            mlp,
            preset("rigl", 0.2, update_every=EVERY, update_rule={"drop_fraction": lambda progress, density: 1.0}),
            8,
        )
