"""A module's own hook that calls something more at its end, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def extend_hook(module: Any, name: str, then: Callable[[], None]) -> Callable[[], None]:
    """Have a hook of a module call a function at its end, the next time.

    Args:
        module: module whose hook it is; it gets an attribute until then.
        name: name of the hook.
        then: function to call.

    Returns:
        A function that takes this back. It may be called twice.

    """
    hook, own = getattr(module, name), vars(module).get(name)

    def extended(*args: Any, **kwargs: Any) -> Any:
        give_back()
        result = hook(*args, **kwargs)
        then()
        return result

    def give_back() -> None:
        if vars(module).get(name) is extended:
            del vars(module)[name]
            if own is not None:
                vars(module)[name] = own

    vars(module)[name] = extended
    return give_back
