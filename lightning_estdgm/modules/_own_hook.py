"""`OwnHook`: a hook that a copy of its module does not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class OwnHook:
    """Hook on a module of the run's model; a deepcopy or a pickle of the module has one that does nothing in its place.

    torch copies hooks along with a module. A copy, such as a target network made in the first steps, is not the model
    that is watched, and nobody would ever remove the hooks from it.

    Args:
        hook: function with the arguments of the hook.

    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the hook."""
        return self._hook(*args, **kwargs)

    def __reduce__(self) -> Any:
        return OwnHook, (_nothing,)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""
