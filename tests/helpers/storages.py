"""Runs of one model by both storages, and how far apart they end."""

import copy
from collections import defaultdict

import torch

from helpers.controller_runs import SCHEDULE, STEPS, fit
from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine._controller import DGMController

ROUNDING = 1e-12  # of 40 steps in float64; a step of another size or a lost state shows at 1e-4 and more


class LoadsByItself(torch.optim.AdamW):
    """Has a ``load_state_dict`` that runs none of torch's hooks, as bitsandbytes has."""

    def load_state_dict(self, state_dict):
        state, held = defaultdict(dict), [p for group in self.param_groups for p in group["params"]]
        for index, entries in copy.deepcopy(state_dict["state"]).items():
            state[held[index]] = entries
        groups = zip(state_dict["param_groups"], self.param_groups, strict=True)
        groups = [{**loaded, "params": group["params"]} for loaded, group in groups]
        self.__setstate__({"state": state, "param_groups": groups})


def config(unit=4, storage="packed", schedule=SCHEDULE, **settings):
    backend = "auto" if storage == "packed" else "dense"
    return DGMConfig(schedule, units=Units(size=unit), storage=storage, backend=backend, **settings)


def double(model):
    """Return a model in float64, for inputs in float32."""
    model.double().register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return model


def trained(model, make, settings, steps=STEPS):
    """Return (model, optimizer, masks after each step)."""
    optimizer = make(model)
    history = []
    with DGMController(model, optimizer, settings, total_steps=STEPS, audit=False) as dgm:
        history.extend(dgm.masks() for _ in fit(model, optimizer, dgm, last=steps))
    return model, optimizer, history


def largest_difference(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def largest_state_difference(one, other):
    one, other = one.state_dict()["state"], other.state_dict()["state"]
    assert one.keys() == other.keys()
    return max(
        (
            (torch.as_tensor(x) - torch.as_tensor(other[index][key])).abs().max().item()
            for index in one
            for key, x in one[index].items()
        ),
        default=0.0,
    )


def check_equal(dense, packed):
    assert all(torch.equal(a[n], b[n]) for a, b in zip(dense[2], packed[2], strict=True) for n in a)
    assert largest_difference(dense[0], packed[0]) < ROUNDING
    assert largest_state_difference(dense[1], packed[1]) < ROUNDING
