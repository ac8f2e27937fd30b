"""`EagerHold`: what torch.compile has made runs uncompiled while a controller looks at forwards."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

_held: set[EagerHold] = set()
_stance: Any = None  # torch's, as long as it is set for any of these


class EagerHold:
    """A hold on torch's stance ``"force_eager"``: watches on modules see nothing of a compiled forward.

    The stance is the process's, and controllers do not end in the order in which they began. So all share one, and the
    last hold to end sets back what was before the first. A stance that others have set since stays. A hold that begins
    ends the others, as their owners may have failed in their first step; those that go on begin theirs again.

    Args:
        owner: object that the hold is for; it ends with it at the latest.
        model: the model that is looked at.

    Attributes:
        is_needed: whether a module of the model is compiled; without, nothing is held, as an owner that is never closed
            would keep the compiled code of others from running.

    """

    def __init__(self, owner: object, model: nn.Module) -> None:
        self.is_needed = any(_is_compiled(module) for module in model.modules())
        weakref.finalize(owner, self.hold, False).atexit = False

    def hold(self, wanted: bool) -> None:
        """Begin or end the hold, if it is not so already."""
        global _stance
        wanted = wanted and self.is_needed
        if wanted and self not in _held:
            _held.clear()
        (_held.add if wanted else _held.discard)(self)
        if not _held and _stance is None:
            return
        new = torch.compiler.set_stance("force_eager")  # which alone tells what the stance was
        is_ours = _stance is not None and new.prev is _stance.stance
        if _held and not is_ours:
            _stance = new
            return
        new.__exit__(None, None, None)
        if not _held and is_ours:
            _stance.__exit__(None, None, None)
            _stance = None


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` returns, or was compiled in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
