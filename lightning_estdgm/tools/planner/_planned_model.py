"""`PlannedModel`: sizes of a model's layers, and what FSDP2 gathers of it; read off its shapes, nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_estdgm.engine._budget import LayerUnits, unit_budgets
from lightning_estdgm.method._masks import BlockSize
from lightning_estdgm.modules._candidates import Candidate, find_candidates
from lightning_estdgm.modules._mask_unit import unit_of
from lightning_estdgm.tools._named_object import named_object
from lightning_estdgm.tools.planner._setup import TrainingSetup

_SPLIT = "no sparse operator under tensor parallelism"


@dataclass(frozen=True)
class PlannedLayer:
    """A linear or convolution layer of the model.

    Attributes:
        name: name in the model.
        shape: shape of its weight, as stored.
        weights: number of its weights.
        block_size: side of a mask unit (1: single weights); 0 where the layer stays dense.
        units: number of mask units.
        active: number of active units, at the setup's density.
        parts: number of matrices that it stacks, each with its own budget.
        has_operator: whether a sparse operator can compute it.
        why: reason why it stays dense, or has the unit it has; often empty.

    """

    name: str
    shape: tuple[int, ...]
    weights: int
    block_size: BlockSize
    units: int
    active: int
    parts: int
    has_operator: bool
    why: str

    @property
    def density(self) -> float:
        """Active share of its weights; 1 where it stays dense."""
        return self.active / self.units if self.block_size else 1.0

    @property
    def active_weights(self) -> int:
        """Number of active weights."""
        return self.weights * self.active // self.units if self.block_size else self.weights


@dataclass(frozen=True)
class PlannedModel:
    """Sizes of a model that the formulas need.

    Attributes:
        parameters: number of all parameters, those shared counted once.
        layers: linear and convolution layers.
        sharding_units: parameters of each part that FSDP2 gathers by itself: the items of the model's module lists.
        root: parameters outside them.
        width: width of the residual stream; ``None`` where unknown, and with it the traffic of tensor parallelism.

    """

    parameters: int
    layers: tuple[PlannedLayer, ...]
    sharding_units: tuple[int, ...] = ()
    root: int = 0
    width: int | None = None

    @property
    def masked(self) -> tuple[PlannedLayer, ...]:
        """Layers that are masked."""
        return tuple(layer for layer in self.layers if layer.block_size)

    @property
    def masked_weights(self) -> int:
        """Number of weights in masked layers."""
        return sum(layer.weights for layer in self.masked)


def load_model(path: str) -> nn.Module:
    """Return what the factory ``"package.module:name"`` makes on the meta device.

    Raises:
        ValueError: if there is no such factory, it fails, or it makes no module.

    """
    factory = named_object("model", path, "factory")
    try:
        with torch.device("meta"):
            model = factory()
    except Exception as e:
        raise ValueError(f"model {path!r} cannot be made without arguments: {type(e).__name__}: {e}") from e
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {path!r} must make an nn.Module, got {type(model).__name__}")
    return model


def inspect_model(model: nn.Module, setup: TrainingSetup, strategy: str = "ddp") -> PlannedModel:
    """List a model's layers and what FSDP2 would gather, by the rules of a run; nothing is computed, so meta will do.

    Under "2d" every layer is taken to be split by tensor parallelism, where no sparse operator can compute it.

    Raises:
        ValueError: if a forced block size does not fit a layer, or there is nothing to mask.

    """
    is_split = strategy == "2d" and setup.tensor_parallel > 1
    total = sum(p.numel() for p in model.parameters())
    gathered = _sharding_units(model)
    layers = tuple(_planned_layers(find_candidates(model), setup, is_split))
    return PlannedModel(total, layers, gathered, total - sum(gathered), getattr(model, "width", None))


def _planned_layers(candidates: Sequence[Candidate], setup: TrainingSetup, is_split: bool) -> Iterator[PlannedLayer]:
    by_weight = is_split and setup.block_size == "auto"
    units = {c.name: (1, _SPLIT) if by_weight else unit_of(c, setup.block_size) for c in candidates if c.masked}
    sizes = {c.name: LayerUnits.of(c, units[c.name][0]) for c in candidates if c.masked}
    budgets = dict(zip(sizes, unit_budgets(list(sizes.values()), setup.distribution, setup.density), strict=True))
    for c in candidates:
        block_size, note = units.get(c.name, (0, ""))
        yield PlannedLayer(
            name=c.name,
            shape=c.stored_shape,
            weights=math.prod(c.stored_shape),
            block_size=block_size,
            units=sizes[c.name].units if c.masked else 0,
            active=sum(budgets[c.name]) if c.masked else 0,
            parts=c.parts,
            has_operator=c.has_operator and not is_split,
            why="; ".join(filter(None, (c.why, note))),
        )


def _sharding_units(model: nn.Module) -> tuple[int, ...]:
    """Return the parameters of each item of the outermost module lists, as ``fully_shard`` is commonly applied."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    nested = {id(inner) for m in lists for item in m for inner in item.modules()}
    sizes = (sum(p.numel() for p in item.parameters()) for m in lists if id(m) not in nested for item in m)
    return tuple(n for n in sizes if n)
