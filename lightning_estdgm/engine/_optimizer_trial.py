"""`trial_optimizer`: a copy of an optimizer that holds throw-away parameters, to see what it does with a parameter.

What is looked for in a trial is elsewhere: whether ``lr`` is read per group in `_step_size`, what a fresh parameter's
state is in `_optimizer_state`. No trial touches the optimizer of the run.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer


def trial_optimizer(optimizer: Optimizer, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> Optimizer:
    """Return a copy of an optimizer, settings and inner optimizers included, that holds throw-away parameters.

    It has no state and no hooks. Of each group, only the parameters with a stand-in are left; groups without any are
    empty, so that groups keep their indices.

    Args:
        optimizer: optimizer of a run, or a wrapper of one.
        stand_ins: throw-away parameters, by the parameters that they stand in for.

    Raises:
        Exception: whatever the optimizer's ``__deepcopy__`` raises, if it cannot be copied.

    """
    memo: dict[int, Any] = {}
    for inner in _nested(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                memo[id(parameter)] = stand_ins.get(parameter)
        memo[id(inner.state)] = defaultdict(dict)
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            hooks = inner.__dict__.get(name)
            if hooks is not None:
                memo[id(hooks)] = type(hooks)()
    trial = copy.deepcopy(optimizer, memo)
    for inner in _nested(trial):
        for group in inner.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter is not None]
    return trial


def _nested(optimizer: Optimizer) -> list[Any]:
    """Return an optimizer and those that it wraps, outermost first."""
    found: list[Any] = []
    waiting: list[Any] = [optimizer]
    while waiting:
        candidate = waiting.pop(0)
        if not any(candidate is known for known in found):
            found.append(candidate)
            waiting += [value for value in getattr(candidate, "__dict__", {}).values() if isinstance(value, Optimizer)]
    return found
