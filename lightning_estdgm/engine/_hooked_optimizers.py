"""Parameters and torch's step hooks of optimizers and of the optimizers that they wrap; arguments of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_DEPTH = 3  # of nested containers that are searched


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer or a wrapper of one currently holds."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def nested_optimizers(optimizer: Optimizer) -> list[Any]:
    """Return an optimizer and those that it wraps, as attributes or in containers of these, outermost first."""
    found: list[Any] = []
    waiting: list[Any] = [optimizer]
    while waiting:
        candidate = waiting.pop(0)
        if not any(candidate is known for known in found):
            found.append(candidate)
            for name, value in getattr(candidate, "__dict__", {}).items():
                if name not in ("state", "param_groups"):
                    waiting += _optimizers_in(value)
    return found


def _optimizers_in(value: Any, depth: int = 0) -> Iterator[Optimizer]:
    if isinstance(value, Optimizer):
        yield value
    elif isinstance(value, Mapping | list | tuple) and depth < _DEPTH:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _optimizers_in(item, depth + 1)


def with_step_hooks(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers whose steps run torch's step hooks, out of an optimizer and those that it wraps.

    The hooks are run by the class's ``step``, which `Optimizer.__init__` patches. A wrapper that does not call it may
    have a dictionary of hooks, its own or its inner optimizer's, and never run them.
    """
    return [
        inner
        for inner in nested_optimizers(optimizer)
        if getattr(getattr(type(inner), "step", None), "hooked", False)
        and "_optimizer_step_pre_hooks" in getattr(inner, "__dict__", {})
    ]


def closure_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the closure that ``step`` was called with (its first argument is the optimizer); ``None`` without one.

    What cannot be called is another argument: a loss, as of a step by Polyak's rule, or a batch size.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


def with_closure(args: Sequence[Any], kwargs: Mapping[str, Any], closure: Any) -> tuple[Any, Any]:
    """Return the arguments of ``step`` with another closure."""
    if "closure" in kwargs:
        return tuple(args), {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), dict(kwargs)
