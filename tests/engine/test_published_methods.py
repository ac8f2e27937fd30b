"""Published methods against their papers' rules, worked out in numpy from what a plain loop saw before each update."""

import math

import numpy as np
import pytest

from helpers.published_runs import (
    DENSITY,
    EVERY,
    STEPS,
    assert_random,
    assert_weights_follow,
    best,
    cosine,
    count,
    erk_counts,
    trained,
)
from lightning_estdgm.config import DGMConfig, StepSize, Units
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.presets import preset


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
