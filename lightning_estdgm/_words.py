"""Words for messages that several packages print."""

from __future__ import annotations

from collections.abc import Sequence


def first_names(names: Sequence[str], shown: int = 3) -> str:
    """Return the first of some names, such as ``"a, b, c, ..."``."""
    return ", ".join(names[:shown]) + ", ..." * (len(names) > shown)
