"""Room for the graphs of a compiled model whose layers change their backends during a fit."""

from __future__ import annotations

import sys

from lightning_estdgm._environment import dynamo_settings

_OF_EACH = 4
"""Graphs for one set of backends: in an observation window, outside it, in validation, and for a smaller last batch."""


class GraphLimit:
    """Raises dynamo's limit on the graphs of one function for a fit, and restores it.

    At the limit, 8 by default, dynamo runs the function uncompiled from then on. Layers change their backends one by
    one as densities fall, and each change is a graph more. Does nothing where dynamo was not imported: then nothing is
    compiled.

    Args:
        layers: number of layers that may change their backend.

    """

    def __init__(self, layers: int) -> None:
        self._before: dict[str, int] = {}
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None:
            return
        wanted = _OF_EACH * (1 + layers)
        limits = dynamo_settings(dynamo.config, recompile_limit=wanted, accumulated_recompile_limit=wanted)
        for name in limits:
            if (limit := getattr(dynamo.config, name)) < wanted:
                self._before[name] = limit
                setattr(dynamo.config, name, wanted)

    def restore(self) -> None:
        """Set the limits back. May be called twice."""
        for name, limit in self._before.items():
            setattr(sys.modules["torch._dynamo"].config, name, limit)
        self._before.clear()
