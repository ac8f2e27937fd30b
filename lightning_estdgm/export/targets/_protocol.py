"""Targets of `export_model`: the protocol that they follow, and their discovery.

A target is one module of this folder with a module-level ``TARGET``, or an entry point of the group
``lightning_estdgm.export_targets`` that loads to one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lightning_estdgm._registry import offers
from lightning_estdgm.export import targets as targets_folder

ENTRY_POINT_GROUP = "lightning_estdgm.export_targets"


class ExportError(RuntimeError):
    """A model could not be exported to a target; nothing was written. The message names the layer or step, and why."""


@dataclass(frozen=True)
class ExportInput:
    """What a target is given.

    Attributes:
        model: a copy of the user's model on the CPU, in evaluation mode, without gradients, its zeros ``+0.0``. A
            target may change it.
        args: positional inputs of one forward.
        kwargs: inputs by name.
        dynamic: which dimensions of the inputs may vary: ``"batch"`` (the first of each), ``"shape"`` (every one that
            the model lets vary) or ``"none"``.
        values: type of the stored values of sparse layers, one of the target's.

    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic: str
    values: str


@runtime_checkable
class ExportTarget(Protocol):
    """A form that a model is written in, and the runtime that it is checked with.

    A class that inherits from it has the defaults of what it leaves out.

    Attributes:
        name: name, as given to ``--to``.
        suffix: ending of the file's name.
        values: types of stored values that it offers, the default first.
        requires: modules that it imports, of other distributions.
        extra: extra of this package that installs them; empty if it needs none.
        runs_here: whether `load` runs what was written as it will be run, so that its time says something.

    """

    name: str
    suffix: str
    values: Sequence[str] = ("fp32",)
    requires: Sequence[str] = ()
    extra: str = ""
    runs_here: bool = True

    def write(self, given: ExportInput, path: Path) -> list[str]:
        """Write the model; other files may go beside `path`, their names beginning with its stem.

        Returns:
            Sentences that a user has to know: layers that stay dense and why, what it gains, what it needs.

        Raises:
            ExportError: if it cannot be written, with the reason.

        """
        ...

    def load(self, path: Path, given: ExportInput) -> Callable[..., Any]:
        """Return what was written as a function of the model's inputs, run by the target's own runtime."""
        ...

    def tolerance(self, values: str) -> float | None:
        """Largest difference that its arithmetic explains, relative to the largest output; None where it is lossy."""
        return 1e-3 if values == "fp32" else None  # another order of sums; other types are lossy

    def stored(self, given: ExportInput) -> Callable[..., Any] | None:
        """Return the model with the weights that are stored, as PyTorch computes it; None where that cannot be given.

        It is asked for where `tolerance` is None, and what was written has to equal it.
        """
        return None


@functools.cache
def discover() -> dict[str, ExportTarget]:
    """Return every target by name; those of this package cannot be replaced by others.

    Raises:
        TypeError: if an offer is no target.

    """
    found: dict[str, ExportTarget] = {}
    for offer in offers(targets_folder, "TARGET", ENTRY_POINT_GROUP):
        target = offer.load()
        if not isinstance(target, ExportTarget):
            raise TypeError(f"{offer.origin} is no ExportTarget: {type(target).__name__}")
        found.setdefault(target.name, target)
    return found


def missing_runtime(target: ExportTarget) -> str | None:
    """Return which modules of a target are not installed and the command that installs them; None if all are there."""
    if not (missing := [name for name in target.requires if find_spec(name) is None]):
        return None
    return f"{target.name} needs {', '.join(missing)}: pip install 'lightning-estdgm[{target.extra}]'"
