"""`AdapterCheck`: whether an adapter's forward is that of its module, seen on the inputs of the first step."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.modules._expert_adapter import dense_product, flat_rows
from lightning_estdgm.modules._forward_watch import replaced_forward
from lightning_estdgm.modules._packed_forward import OF_THE_RUN, PackedForward
from lightning_estdgm.modules._sparse_forward import STATE_PREFIX, SparseForward, dense_class

_AGREEMENT, _NARROW_AGREEMENT = 5e-3, 5e-2  # of the largest output; products may be rounded to TF32


class AdapterCheck:
    """Probe of a forward that runs an adapter's forward beside the module's own, once, on a copy in evaluation mode.

    It touches neither the module nor the random state, and is silent while torch.compile traces.

    Args:
        candidates: Stacks of one module.

    Attributes:
        rows: Number of rows that each stack was multiplied with, by the candidate's name.
        forms: How the module computes each stack by itself, as of `ExpertCase`: ``"batched"`` where every expert has as
            many rows, else ``"grouped"``.

    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._names = {c.kind.weight_name: c.name for c in candidates}
        self._kind = candidates[0].kind
        self._owner = candidates[0].module_name
        self.rows: dict[str, int] = {}
        self.forms: dict[str, str] = {}
        self._why_not = "have run no forward in the first step but compiled ones"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Compare the forwards on the inputs of this one.

        Raises:
            ValueError: The adapter's forward fails, gives another output, or does not ask for all stacks.

        """
        if self.rows or torch.compiler.is_compiling():
            return
        copy: Any = _bare(module, {})
        with torch.no_grad():
            try:
                with _forked(module):
                    wanted = copy.forward(*args, **kwargs)
            except Exception as error:  # such as parts of it that are sharded again by now
                self._why_not = f"cannot be computed again beside their forward ({type(error).__name__}: {error})"
                return
            with _forked(module):
                got = self._forward(copy, module, args, kwargs)
        what = f"the ExpertAdapter of {type(copy).__name__} ({self._owner or 'the model'!r})"
        if missing := [own for own, name in self._names.items() if name not in self.rows]:
            raise ValueError(f"{what} asks for no product with {missing}: these would stay dense unnoticed")
        if difference := _difference(wanted, got):
            raise ValueError(f"{what} gives another output than the module's own forward: {difference}")

    def warn_if_not_made(self) -> None:
        """Warn if no forward of the first step could be compared."""
        if not self.rows:
            warnings.warn(
                f"the experts of {self._owner or 'the model'!r} {self._why_not}, so nothing compares their "
                "ExpertAdapter with that",
                RuntimeWarning,
                stacklevel=2,
            )

    def _forward(self, copy: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        layouts, forward = self._kind.layouts, self._kind.forward
        assert forward is not None

        def product(name: str, x: Tensor, counts: Tensor | None = None) -> Tensor:
            if name not in layouts:
                raise ValueError(f"product({name!r}, ...) names none of its stacks, which are {list(layouts)}")
            stored = getattr(copy, name)
            rows, rows_of_each = flat_rows(name, x, counts, stored, layouts[name])
            if name in self._names:
                self.rows[self._names[name]] = max(1, int(rows_of_each.sum()))
                self.forms[self._names[name]] = "batched" if counts is None else "grouped"
            stack = stored if layouts[name] == "eoi" else stored.transpose(1, 2)
            y = dense_product(rows, rows_of_each, stack)
            return y.view(*x.shape[:-1], y.shape[-1])

        try:
            return forward(copy, product, *args, **kwargs)
        except Exception as error:
            raise ValueError(
                f"the forward of the ExpertAdapter of {type(copy).__name__} fails on the inputs of "
                f"{self._owner or 'the model'!r}: {type(error).__name__}: {error}"
            ) from error


def adapter_checks(candidates: Sequence[Candidate]) -> list[tuple[nn.Module, AdapterCheck]]:
    """Return a check for each module that has masked stacks and an adapter."""
    groups: dict[int, list[Candidate]] = {}
    for c in candidates:
        if c.masked and c.kind.is_adapted:
            groups.setdefault(id(c.module), []).append(c)
    return [(group[0].module, AdapterCheck(group)) for group in groups.values()]


def _bare(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of a module that shares its parameters, in evaluation mode, without hooks and swapped forwards.

    A packed layer's copy is packed as well, and unobserved.
    """
    if id(module) not in done:
        cls: Any = dense_class(type(module)) if isinstance(module, SparseForward) else type(module)
        copy = done[id(module)] = cls.__new__(cls)
        is_packed = isinstance(module, PackedForward)
        state = {name: x for name, x in vars(module).items() if is_packed or not name.startswith(STATE_PREFIX)}
        if is_packed:
            state |= dict.fromkeys(OF_THE_RUN)
        state.pop("forward", None)  # a watched one calls the module's
        if (forward := replaced_forward(module)) is not None:
            state["forward"] = forward
        state |= {name: OrderedDict() for name in state if name.endswith(("_forward_hooks", "_forward_pre_hooks"))}
        buffers = {name: b if b is None else b.clone() for name, b in module._buffers.items()}
        vars(copy).update(state, training=False, _buffers=buffers, _parameters=dict(module._parameters))
        vars(copy)["_modules"] = {name: m if m is None else _bare(m, done) for name, m in module._modules.items()}
    return done[id(module)]


def _forked(module: nn.Module) -> Any:
    """Give the random state back at the end."""
    devices = {p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(devices))


def _difference(wanted: Any, got: Any) -> str:
    """Return how two outputs differ, in words; empty if they do not."""
    ours, theirs = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (wanted, got))
    if (shapes := [tuple(x.shape) for x in ours]) != (others := [tuple(x.shape) for x in theirs]):
        return f"tensors of shapes {others} in the place of {shapes}"
    for x, y in zip(ours, theirs, strict=True):
        narrow = min(torch.finfo(z.dtype).bits for z in (x, y)) < 32 if x.is_floating_point() else False
        autocast = torch.is_autocast_enabled(x.device.type)
        largest = x.double().nan_to_num().abs().max().item() if x.numel() else 0.0
        apart = (x.double() - y.double()).nan_to_num().abs().max().item() if x.numel() else 0.0
        if apart > (_NARROW_AGREEMENT if narrow or autocast else _AGREEMENT) * largest:
            return f"{apart:.3g} apart, where the largest value is {largest:.3g}"
    return ""
