"""All masked weights of a model together."""

import torch

from helpers.controller_runs import STEPS, WEIGHTS, adamw, fit
from lightning_estdgm.engine.controller import DGMController


def test_grown_weights_start_at_zero_with_a_clean_state(mlp):
    model = mlp(32, 64, 4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    grown_any = dropped_any = False
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        before = dgm.masks()["0"]
        for _, updated in fit(model, optimizer, dgm):
            after = dgm.masks()["0"]
            changed = before ^ after
            assert updated or not changed.any()
            state = optimizer.state[model[0].weight]
            for tensor in (model[0].weight, state["exp_avg"], state["exp_avg_sq"]):
                assert torch.count_nonzero(tensor[changed]) == 0
            assert torch.count_nonzero(state["exp_avg"][after & before]) > 0
            grown_any |= bool((after & ~before).any())
            dropped_any |= bool((before & ~after).any())
            before = after
    assert grown_any
    assert dropped_any


def test_explored_and_churn(mlp):
    model = mlp(32, 64, 64, 4)
    optimizer = adamw(model)
    with DGMController(model, optimizer, WEIGHTS, total_steps=STEPS) as dgm:
        seen = dgm.masks()
        before = dgm.masks()
        assert dgm.explored == dgm.density
        total = 32 * 64 + 64 * 64
        for _, updated in fit(model, optimizer, dgm):
            now = dgm.masks()
            seen = {name: seen[name] | mask for name, mask in now.items()}
            assert dgm.explored == sum(int(m.sum()) for m in seen.values()) / total
            if updated:
                grown = sum(int((mask & ~before[name]).sum()) for name, mask in now.items())
                assert dgm.churn == grown / sum(int(m.sum()) for m in now.values())
            before = now
