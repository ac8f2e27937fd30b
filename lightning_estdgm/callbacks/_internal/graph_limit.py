"""Room for the graphs of a compiled model whose layers change their backends during a fit."""

from __future__ import annotations

import sys
from typing import Any

from lightning_estdgm._environment import dynamo_settings

_OF_EACH = 4
"""Graphs for one set of backends: in an observation window, outside it, in validation, and for a smaller last batch."""
_OF_EACH_PACKED = 12
"""The same of packed weights: in a window and outside it, in training and in validation; each of these four for the
first sizes, for sizes that change, and for a smaller last batch."""

STATIC_SHAPES = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes")
"""Settings of dynamo by which each size of a packed weight would be a graph of its own; torch 2.6 needs both off."""


class GraphLimit:
    """Raises dynamo's limit on the graphs of one function for a fit, and restores it.

    At the limit, 8 by default, dynamo runs the function uncompiled from then on. Layers change their backends one by
    one as densities fall, and each change is a graph more. Packed weights change their sizes at each mask update, for
    which dynamo makes one graph if sizes of parameters may change, and have an order of units while some are young.
    Does nothing where dynamo was not imported: then nothing is compiled.

    Args:
        layers: number of layers that may change their backend, or are packed.
        packed: whether weights are stored packed.

    """

    def __init__(self, layers: int, *, packed: bool = False) -> None:
        self._before: dict[str, Any] = {}
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None:
            return
        for name in STATIC_SHAPES if packed else ():
            self._before[name] = getattr(dynamo.config, name)
            setattr(dynamo.config, name, False)
        wanted = (_OF_EACH_PACKED if packed else _OF_EACH) * (1 + layers)
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
