"""The whole method, step by step, in plain PyTorch: what the package must reproduce number for number.

Written from the method's description alone, with nothing imported from the package. Slow and dense on purpose. Every
rule is an argument, so that a test can break one and see that it matters.
"""

import math

import torch


def changes(phases, every, freeze):
    """Steps at which masks change, and the densities they change to; `phases` are (start, end, steps)."""
    out, first = {}, 0
    for start, end, steps in phases:
        is_last = (start, end, steps) == phases[-1]
        moving = steps - round(freeze * steps) if is_last else steps
        gaps = max(1, round(moving / every))
        points = gaps + 1 if is_last else gaps
        for i in range(points):
            out[first + round(i * moving / gaps)] = start + (end - start) * (i / (points - 1) if points > 1 else 0.0)
        first += steps
    return out


def erk_units(shapes, counts, sizes, density):
    """Active units of each layer: densities go as sum(shape) / prod(shape), at most 1, largest remainders first."""
    total, capped = sum(math.prod(s) for s in shapes), set()
    while True:
        free = [i for i in range(len(shapes)) if i not in capped]
        factor = (density * total - sum(math.prod(shapes[i]) for i in capped)) / sum(sum(shapes[i]) for i in free)
        share = [1.0 if i in capped else factor * sum(s) / math.prod(s) for i, s in enumerate(shapes)]
        if max(share) <= 1.0:
            break
        capped |= {i for i in free if share[i] > 1.0}
    units = [math.floor(n * rho + 1e-9) for n, rho in zip(counts, share, strict=True)]
    left = round(density * total) - sum(k * size for k, size in zip(units, sizes, strict=True))
    for i in sorted(range(len(units)), key=lambda i: units[i] - counts[i] * share[i]):
        if left > 0 and sizes[i] <= 2 * left and units[i] < counts[i]:  # to the nearest unit
            units[i], left = units[i] + 1, left - sizes[i]
    return units


def top(scores, k):
    """Mask of the k largest; ties to the lowest index."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=True, stable=True)[:k]] = True
    return mask.view_as(scores)


def train(
    model,
    names,
    optimizer,
    batches,
    loss_fn,
    phases,
    *,
    block=1,
    every=5,
    observe=3,
    freeze=0.25,
    gamma=1.0,
    drop=0.3,
    exponent=1.0,
    by_rate=True,
    scale_init=True,
    inactive="zero",
    clear_state=True,
    own_counts=True,
    consistent=True,
    clip=None,
    seed=0,
):
    """Train `model` in place, masking the weights `names`; return {step: masks} at each change of the masks.

    A batch is a list of micro-batches, whose mean loss is descended. The first step is dense: masks are drawn after it.
    """
    weights = [dict(model.named_parameters())[f"{name}.weight"] for name in names]
    shapes = [tuple(w.shape) for w in weights]
    size = block * block

    def norm(w):
        return w.abs() if block == 1 else w.view(w.shape[0] // block, block, -1, block).norm(dim=(1, 3))

    def full(mask):
        return mask if block == 1 else mask.repeat_interleave(block, 0).repeat_interleave(block, 1)

    def rho(mask):
        return int(mask.sum()) / mask.numel()

    grown = []  # index of the weight, units grown at once, a fresh copy of the weight and an optimizer of its own
    plan = changes(phases, every, freeze)
    counts = [math.prod(s) // size for s in shapes]
    generator, seen, history = torch.Generator().manual_seed(seed), [], {}
    masks = [torch.ones(norm(w).shape, dtype=torch.bool) for w in weights]
    for step, batch in enumerate(batches):
        if step == 1 or (step in plan and step > 0):
            units = erk_units(shapes, counts, [size] * len(counts), plan.get(step, plan[0]))
            with torch.no_grad():
                if step == 1:
                    masks = [
                        top(torch.rand(norm(w).shape, generator=generator), k)
                        for w, k in zip(weights, units, strict=True)
                    ]
                    for w, m in zip(weights, masks, strict=True) if inactive == "zero" else ():
                        w.masked_fill_(~full(m), 0.0).mul_(rho(m) ** -0.5 if scale_init else 1.0)
                    for w, m in zip(weights, masks, strict=True):
                        for value in optimizer.state[w].values() if clear_state else ():
                            if torch.is_tensor(value) and value.shape == w.shape:
                                value.masked_fill_(~full(m), 0.0)
                else:
                    fraction = drop * 0.5 * (1 + math.cos(math.pi * step / max(plan)))
                    for i, (w, k) in enumerate(zip(weights, units, strict=True)):
                        mean_norm = torch.stack([norm(g[i]) for g in seen]).mean(0)
                        mean_grad = norm(torch.stack([g[i] for g in seen]).mean(0)) if consistent else mean_norm
                        growth = mean_norm * torch.nan_to_num(mean_grad / mean_norm) ** gamma
                        stay = min(int(masks[i].sum()), k)
                        keep = max(stay - int(fraction * stay), k - int((~masks[i]).sum()))
                        worth = norm(w)
                        if block > 1:  # both over their means of the active units
                            worth = worth / worth[masks[i]].mean() + mean_norm / mean_norm[masks[i]].mean()
                        kept = top(worth.masked_fill(~masks[i], -math.inf), keep)
                        new = kept | top(growth.masked_fill(masks[i], -math.inf), k - keep)
                        if inactive == "zero":
                            w.masked_fill_(~full(new), 0.0)
                        for value in optimizer.state[w].values() if clear_state else ():
                            if torch.is_tensor(value) and value.shape == w.shape:
                                value.masked_fill_(full(new ^ masks[i]), 0.0)
                        for older in grown:
                            older[1] &= new if older[0] == i else True
                        copy = torch.nn.Parameter(w.clone())
                        settings = next(g for g in optimizer.param_groups if any(p is w for p in g["params"]))
                        own = type(optimizer)([settings | {"params": [copy]}])
                        grown.append([i, new & ~masks[i], copy, own])
                        masks[i] = new
            seen = []
            history[step] = [m.clone() for m in masks]
        optimizer.zero_grad()
        for micro in batch:
            (loss_fn(model, micro) / len(batch)).backward()
        if any(step < at <= step + observe for at in plan):
            seen.append([w.grad.clone() for w in weights])
        for w, m in zip(weights, masks, strict=True):
            w.grad.masked_fill_(~full(m), 0.0)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = [w.detach().clone() for w in weights]
        scaled = inactive == "zero" and by_rate  # else the step is scaled after it was made
        rates = {id(w): rho(m) ** -exponent for w, m in zip(weights, masks, strict=True)} if scaled else {}
        groups = optimizer.param_groups
        optimizer.param_groups = [
            group | {"params": [p], "lr": group["lr"] * rates.get(id(p), 1.0)}
            for group in groups
            for p in group["params"]
        ]
        optimizer.step()
        optimizer.param_groups = groups
        for i, units, copy, own in grown if own_counts else ():  # they step as fresh weights do
            with torch.no_grad():
                copy.copy_(before[i])
            copy.grad = weights[i].grad
            own.param_groups[0]["lr"] = groups[0]["lr"] * rates.get(id(weights[i]), 1.0)
            own.step()
            with torch.no_grad():
                weights[i][full(units & masks[i])] = copy[full(units & masks[i])]
        with torch.no_grad():
            for w, m, old in zip(weights, masks, before, strict=True):
                if inactive == "frozen":
                    w.copy_(torch.where(full(m), w, old))
                else:
                    w.lerp_(old, 0.0 if by_rate else 1 - rho(m) ** -exponent).masked_fill_(~full(m), 0.0)
    return history
