"""Optimizers, and those that they wrap, whose steps can be seen through torch's step hooks."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer, or a wrapper of one, holds now."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def with_step_hooks(optimizer: Optimizer) -> list[Optimizer]:
    """Return those of an optimizer and of the ones that it wraps whose steps run torch's step hooks.

    Torch runs them from the class's ``step``, which `Optimizer.__init__` patches; a wrapper that does without that
    initialisation may have a hook's dictionary, its own or its inner optimizer's, and never look at it.
    """
    found: list[Optimizer] = []
    waiting, seen = [optimizer], set()
    while waiting:
        candidate = waiting.pop(0)
        if id(candidate) in seen:
            continue
        seen.add(id(candidate))
        own = getattr(candidate, "__dict__", {})
        if getattr(getattr(type(candidate), "step", None), "hooked", False) and "_optimizer_step_pre_hooks" in own:
            found.append(candidate)
        waiting += [value for value in own.values() if isinstance(value, Optimizer)]
    return found
