"""What a model costs a GPU under each way of sharding it: memory, traffic, mask updates; calculated, not measured.

Pure functions of sizes. ``estdgm plan`` prints them, docs/scaling.md explains them, and tests/test_plan.py checks them
against small jobs of two processes.

Units: bytes a GPU, FLOPs a GPU; 1 GB is 10^9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn

from lightning_estdgm.config import DGMConfig, Units
from lightning_estdgm.engine.step_size import FEW
from lightning_estdgm.method import distributions as densities
from lightning_estdgm.method.masks import mask_shape, unit_size
from lightning_estdgm.modules.candidates import find_candidates
from lightning_estdgm.modules.mask_unit import unit_of
from lightning_estdgm.recipes.decoder_block import DecoderBlock

__all__ = [
    "STRATEGIES",
    "Model",
    "PlannedLayer",
    "Setup",
    "gpt",
    "gpt_shape",
    "inspect",
    "load_model",
    "memory",
    "plan",
    "plan_tables",
    "scaling_tables",
    "traffic",
    "update_cost",
]

STRATEGIES = ("ddp", "fsdp2", "2d")
"""DDP; FSDP2 over all GPUs; FSDP2 over groups of GPUs that share each layer by tensor parallelism."""

PARAMETER_BYTES = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2}
OPTIMIZER_STATES = {"adamw": 2, "sgd-momentum": 1, "sgd": 0}
GPT_SIZES: dict[str, tuple[int, int]] = {
    "125M": (12, 768), "350M": (24, 1024), "760M": (24, 1536), "1.3B": (24, 2048), "2.7B": (32, 2560),
    "6.7B": (32, 4096), "13B": (40, 5120), "70B": (80, 8192),
}  # fmt: skip
"""Decoder blocks and width: GPT-3's table 2.1 (arXiv 2005.14165); 70B as Chinchilla (arXiv 2203.15556)."""

_VOCABULARY, _CONTEXT = 50_257, 2048
_SPLIT = "no sparse operator under tensor parallelism"
_SIZE_TOLERANCE = 0.08  # a published shape stands for sizes this close to it


@dataclass(frozen=True)
class Setup:
    """How the model is trained.

    Attributes:
        gpus: of the whole job.
        density: active share of the masked weights, in (0, 1]; the default is where EST-DGM ends.
        tensor_parallel: GPUs that share each layer, under "2d".
        precision: "32-true", "bf16-mixed" or "bf16-true".
        optimizer: "adamw", "sgd-momentum" or "sgd": how many tensors it keeps for a weight.
        block_size: of the masks: "auto", 1 or a block size.
        distribution: "erk" or "uniform".
        tokens: that one GPU trains on in a step.
        update_every: optimizer steps between mask updates.
        observe_steps: of them observed.

    """

    gpus: int = 8
    density: float = 0.1
    tensor_parallel: int = 2
    precision: str = "32-true"
    optimizer: str = "adamw"
    block_size: int | Literal["auto"] = "auto"
    distribution: str = "erk"
    tokens: int = 16_384
    update_every: int = 200
    observe_steps: int = 8

    def __post_init__(self) -> None:
        for name in ("gpus", "tensor_parallel", "tokens", "update_every", "observe_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        if self.observe_steps > self.update_every:
            raise ValueError(
                f"observe_steps must not exceed update_every, got {self.observe_steps} and {self.update_every}"
            )
        for name, known in (("precision", tuple(PARAMETER_BYTES)), ("optimizer", tuple(OPTIMIZER_STATES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        DGMConfig(units=Units(size=self.block_size, distribution=self.distribution))  # refuses what a run would

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one weight, gradient or optimizer state."""
        return PARAMETER_BYTES[self.precision]


@dataclass(frozen=True)
class PlannedLayer:
    """A linear or convolution layer of the model.

    Attributes:
        name: in the model.
        shape: of its weight, as stored.
        weights: their number.
        block_size: side of a mask unit (1: single weights); 0 where the layer stays dense.
        units: mask units.
        active: of them, at the setup's density.
        parts: matrices that it stacks, each with its own budget.
        has_operator: whether a sparse operator can compute it.
        why: why it stays dense, or has the unit it has; often empty.

    """

    name: str
    shape: tuple[int, ...]
    weights: int
    block_size: int
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
        """Weights that are active."""
        return self.weights * self.active // self.units if self.block_size else self.weights


@dataclass(frozen=True)
class Model:
    """What the formulas need to know of a model.

    Attributes:
        parameters: all of them, those shared counted once.
        layers: its linear and convolution layers.
        sharding_units: parameters of each part that FSDP2 gathers by itself: the items of the model's module lists.
        root: parameters outside them.
        width: of the residual stream; ``None`` where unknown, and with it the traffic of tensor parallelism.

    """

    parameters: int
    layers: tuple[PlannedLayer, ...]
    sharding_units: tuple[int, ...] = ()
    root: int = 0
    width: int | None = None

    @property
    def masked(self) -> tuple[PlannedLayer, ...]:
        """The layers that are masked."""
        return tuple(layer for layer in self.layers if layer.block_size)

    @property
    def masked_weights(self) -> int:
        """Their weights."""
        return sum(layer.weights for layer in self.masked)


# --------------------------------------------------------------------------- models without storage


class GPT(nn.Module):
    """The recipe's decoder blocks between embeddings and a head that shares their weight, to be counted, not run."""

    def __init__(self, layers: int, width: int, vocabulary: int = _VOCABULARY, context: int = _CONTEXT) -> None:
        super().__init__()
        self.width = width
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(DecoderBlock(width, max(1, width // 128)) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    @classmethod
    def on_meta(cls, layers: int, width: int) -> GPT:
        """Make one without storage."""
        with torch.device("meta"):
            return cls(layers, width)


def gpt_shape(parameters: float) -> tuple[int, int]:
    """Return decoder blocks and width of a GPT of about so many parameters.

    A published shape where one is within 8 %; else the width of the nearest, with as many blocks as it takes.

    >>> gpt_shape(13e9), gpt_shape(30e9)
    ((40, 5120), (37, 8192))
    """
    if not (parameters > 0 and math.isfinite(parameters)):
        raise ValueError(f"params must be a positive number such as 13e9, got {parameters!r}")

    def distance(shape: tuple[int, int]) -> float:
        return abs(math.log(_gpt_parameters(*shape) / parameters))

    layers, width = min(GPT_SIZES.values(), key=distance)
    if distance((layers, width)) > math.log1p(_SIZE_TOLERANCE):
        one = _gpt_parameters(1, width) - _gpt_parameters(0, width)
        layers = round((parameters - _gpt_parameters(0, width)) / one)
    if layers < 1:
        raise ValueError(
            f"params must be at least {_gpt_parameters(1, width):.3g}, one block of width {width} with its embeddings, "
            f"got {parameters:.3g}"
        )
    return layers, width


def _gpt_parameters(layers: int, width: int) -> int:
    return layers * (12 * width**2 + 4 * width) + (_VOCABULARY + _CONTEXT + 2) * width


def gpt(parameters: float) -> nn.Module:
    """Return a GPT of about so many parameters on the meta device: shapes, no storage."""
    return GPT.on_meta(*gpt_shape(parameters))


def load_model(path: str) -> nn.Module:
    """Return what the factory ``"package.module:name"`` makes on the meta device.

    Raises:
        ValueError: if there is no such factory, it fails, or it makes no module.

    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"model must be given as package.module:factory, got {path!r}")
    try:
        factory = getattr(import_module(module_name), name)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"model {path!r} cannot be found: {e}") from e
    try:
        with torch.device("meta"):
            model = factory()
    except Exception as e:
        raise ValueError(f"model {path!r} cannot be made without arguments: {type(e).__name__}: {e}") from e
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {path!r} must make an nn.Module, got {type(model).__name__}")
    return model


def inspect(model: nn.Module, setup: Setup, strategy: str = "ddp") -> Model:
    """List a model's layers and what FSDP2 would gather, by the rules of a run; nothing is computed, so meta will do.

    Under "2d" every layer is taken to be split by tensor parallelism, where no sparse operator can compute it.

    Raises:
        ValueError: if a forced block size does not fit a layer, or there is nothing to mask.

    """
    candidates = find_candidates(model)
    is_split = strategy == "2d" and setup.tensor_parallel > 1
    by_weight = is_split and setup.block_size == "auto"
    units = {c.name: (1, _SPLIT) if by_weight else unit_of(c, setup.block_size) for c in candidates if c.masked}
    parts, counts, sizes = [], [], []
    for c in candidates:
        if c.masked:
            block_size, _ = units[c.name]
            parts += [c.part_shape] * c.parts
            counts += [math.prod(mask_shape(c.part_shape, block_size))] * c.parts
            sizes += [unit_size(c.part_shape, block_size)] * c.parts
    shares = densities.DISTRIBUTIONS[setup.distribution](parts, setup.density)
    budget = iter(densities.allocate(counts, sizes, shares, setup.density))
    layers = []
    for c in candidates:
        weight: Tensor = getattr(c.module, c.kind.weight_name)
        block_size, note = units.get(c.name, (0, ""))
        layers.append(
            PlannedLayer(
                name=c.name,
                shape=tuple(weight.shape),
                weights=weight.numel(),
                block_size=block_size,
                units=c.parts * math.prod(mask_shape(c.part_shape, block_size)) if c.masked else 0,
                active=sum(next(budget) for _ in range(c.parts)) if c.masked else 0,
                parts=c.parts,
                has_operator=c.has_operator and not is_split,
                why="; ".join(filter(None, (c.why, note))),
            )
        )
    total = sum(p.numel() for p in model.parameters())
    gathered = _sharding_units(model)
    return Model(total, tuple(layers), gathered, total - sum(gathered), getattr(model, "width", None))


def _sharding_units(model: nn.Module) -> tuple[int, ...]:
    """Return the parameters of each item of the outermost module lists, as ``fully_shard`` is commonly applied."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    nested = {id(inner) for m in lists for item in m for inner in item.modules()}
    sizes = (sum(p.numel() for p in item.parameters()) for m in lists if id(m) not in nested for item in m)
    return tuple(n for n in sizes if n)


# --------------------------------------------------------------------------- formulas

_SCORE_BYTES = 4  # float32, also for low-precision weights
_INDEX_BYTES = 4
_WORD_BYTES = 8
_PASS_BYTES = 256 * _WORD_BYTES  # counts of one pass of `distributed.selection`
_PASSES = 4  # over float32 scores; more where scores are equal

# What the operators of an observed step and of an update read and write for each weight that the GPU holds, in bytes;
# of an update without clearing optimizer state. For float32; counted at torch's dispatcher in the runs that check them.
_OBSERVED_BYTES = {("whole", "block"): 16, ("whole", "weight"): 36, ("part", "block"): 29, ("part", "weight"): 44}
_UPDATE_BYTES = {("whole", "block"): 24, ("whole", "weight"): 235, ("part", "block"): 59, ("part", "weight"): 1604}


@dataclass(frozen=True)
class _Layout:
    """How a strategy lays a model over the GPUs: shards a weight, ranks that gather and reduce, GPUs of a layer."""

    shards: int
    ranks: int
    tensor_parallel: int


def _layout(setup: Setup, strategy: str) -> _Layout:
    if strategy == "ddp":
        return _Layout(1, setup.gpus, 1)
    if strategy == "fsdp2":
        return _Layout(setup.gpus, setup.gpus, 1)
    if strategy == "2d":
        if setup.gpus % setup.tensor_parallel:
            raise ValueError(
                f"tensor_parallel={setup.tensor_parallel} does not divide gpus={setup.gpus}: each group of GPUs that "
                "share a layer must be whole"
            )
        return _Layout(setup.gpus, setup.gpus // setup.tensor_parallel, setup.tensor_parallel)
    raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")


def memory(model: Model, setup: Setup, strategy: str) -> dict[str, float]:
    """Return what one GPU holds, in bytes, by kind: what training needs without the method, then what it adds.

    Activations are not in it. "gathered" is what is whole at one time under FSDP2: the root's weights and gradients,
    two units' weights (the next is fetched while one computes) and one unit's gradients. "weights before the step" are
    what the step is scaled from.
    "observation window" exists only in the steps observed.
    """
    layout, each = _layout(setup, strategy), setup.parameter_bytes
    share = each / layout.shards
    n = model.parameters
    masked = [layer for layer in model.masked if layer.density < 1.0]
    largest = max(model.sharding_units, default=0)
    held: dict[str, float] = {
        "weights": n * share,
        "gradients": n * share,
        "optimizer state": OPTIMIZER_STATES[setup.optimizer] * n * share,
        "DDP's buckets": 0.0,
        "gathered": 0.0,
    }
    if layout.ranks > 1 and strategy == "ddp":
        held["DDP's buckets"] = n * share
    elif layout.ranks > 1:
        held["gathered"] = (2 * model.root + 3 * largest) * each / layout.tensor_parallel
    held["masks"] = sum(_mask_bytes(layer, layout) for layer in model.masked)
    held["block index lists"] = float(sum(_topology_bytes(layer) for layer in model.masked))
    held["weights before the step"] = sum(
        layer.weights * share if runs is None else layer.active_weights * each + 2 * _INDEX_BYTES * runs
        for layer, runs in ((layer, _runs(layer, layout)) for layer in masked)
    )
    held["observation window"] = sum(
        _SCORE_BYTES * (layer.weights / layout.shards + layer.units / _mask_shards(layer, layout))
        for layer in model.masked
    )
    return held


ADDED = ("masks", "block index lists", "weights before the step", "observation window")
"""The kinds of memory that the method adds."""


def _mask_shards(layer: PlannedLayer, layout: _Layout) -> int:
    """Masks of single weights are sharded as the weights are; those of blocks are whole on every rank."""
    return layout.shards if layer.block_size == 1 else 1


def _mask_bytes(layer: PlannedLayer, layout: _Layout) -> float:
    """Two bool tensors, active and ever active; blocks of a part of a weight also laid out by weights."""
    laid_out = layer.weights / layout.shards if layout.shards > 1 and layer.block_size > 1 else 0.0
    return 2.0 * layer.units / _mask_shards(layer, layout) + laid_out


def _runs(layer: PlannedLayer, layout: _Layout) -> float | None:
    """How many runs of adjacent elements the active blocks make up; None where the step copies the whole weight."""
    if layout.shards > 1 or layer.block_size == 1 or layer.density > FEW:
        return None
    return layer.active_weights / (layer.block_size * math.prod(layer.shape[2:]))


def _topology_bytes(layer: PlannedLayer) -> int:
    """Two lists with room for every block, and where each row and column starts."""
    if layer.block_size < 2 or not layer.has_operator:
        return 0
    rows, columns = (side // layer.block_size for side in layer.shape[:2])
    return _INDEX_BYTES * (2 * rows * columns + rows + columns + 2)


def traffic(model: Model, setup: Setup, strategy: str) -> dict[str, float]:
    """Return what one GPU hands to collectives in a step, in bytes, by kind; and what a ring then sends.

    "dense": without the method. "active units": DDP outside observation windows, with `compress_gradients`. "mean":
    over the steps between two updates, those observed included. FSDP2 sends the same with and without the method.
    A ring of W ranks sends (W - 1) / W of what is gathered or scattered, and twice that of what is all-reduced.
    """
    layout, each = _layout(setup, strategy), setup.parameter_bytes
    ring = (layout.ranks - 1) / layout.ranks
    n = model.parameters / layout.tensor_parallel
    found: dict[str, float] = {}
    if layout.ranks == layout.tensor_parallel == 1:
        return found
    if strategy == "ddp":
        idle = sum(layer.weights - layer.active_weights for layer in model.masked)
        observed = setup.observe_steps / setup.update_every
        found["all-reduce, dense"] = n * each
        found["all-reduce, active units"] = (n - idle) * each
        found["all-reduce, mean"] = (n - (1.0 - observed) * idle) * each
        found["ring, dense"] = 2.0 * ring * found["all-reduce, dense"]
        found["ring, EST-DGM"] = 2.0 * ring * found["all-reduce, mean"]
        return found
    inner = sum(model.sharding_units) / layout.tensor_parallel
    found["all-gather"] = (n + inner) * each if layout.ranks > 1 else 0.0  # forward; again in the backward but the root
    found["reduce-scatter"] = n * each if layout.ranks > 1 else 0.0
    found["ring, dense"] = ring * (found["all-gather"] + found["reduce-scatter"])
    if layout.tensor_parallel > 1 and model.width is not None:
        activation = 4 if setup.precision == "32-true" else 2
        # Two products a block whose outputs are summed over the group, in the forward and in the backward.
        found["all-reduce of activations"] = 4.0 * len(model.sharding_units) * setup.tokens * model.width * activation
        around = (layout.tensor_parallel - 1) / layout.tensor_parallel
        found["ring, dense"] += 2.0 * around * found["all-reduce of activations"]
    found["ring, EST-DGM"] = found["ring, dense"]
    return found


def update_cost(model: Model, setup: Setup, strategy: str) -> dict[str, float]:
    """Return what masks cost one GPU beyond the products: bytes that operators move in its memory, and bytes it sends.

    "every step": gradients masked, weights copied, the step scaled, weights masked; where something changes gradients
    before the step, as clipping does, these are masked twice. "more in an observed step" and "in an update" come on
    top; "mean a step" is over the steps between two updates. "against the optimizer": that mean over what a fused
    optimizer moves. "FLOPs of observing": whole weight gradients in observed steps, against all FLOPs of a dense step.

    What is sent is handed to collectives: of blocks, the squares of units; of single weights, 256 counts a pass.
    """
    layout, each = _layout(setup, strategy), setup.parameter_bytes
    is_part = layout.shards > 1
    holding = "part" if is_part else "whole"
    around = (layout.ranks > 1) + (layout.tensor_parallel > 1) if is_part else 0  # groups to reduce over
    states = OPTIMIZER_STATES[setup.optimizer]
    every = observed = update = sent_observed = sent_update = idle = 0.0
    for layer in model.masked:
        grain = "weight" if layer.block_size == 1 else "block"
        here = layer.weights / layout.shards
        fill = 2 * each + (1 if is_part or grain == "weight" else 0)  # read, write, and the mask
        runs = _runs(layer, layout)
        every += here * 2 * fill
        # Copy and interpolation; of active blocks alone, these are copied out and in, by an index of three readings.
        every += here * 5 * each if runs is None else layer.active_weights * 9 * each + 3 * 2 * _INDEX_BYTES * runs
        observed += here * _OBSERVED_BYTES[holding, grain]
        update += here * (_UPDATE_BYTES[holding, grain] + states * fill)
        words = 2.0 if grain == "weight" else 1.0 + layer.units
        sent_observed += around * _WORD_BYTES * words
        ranked = 4 * _WORD_BYTES + 2 * _PASSES * layer.parts * _PASS_BYTES
        sent_update += around * (ranked if grain == "weight" else 2 * _WORD_BYTES * layer.units)
        idle += layer.weights - layer.active_weights if layer.density < 1.0 else 0.0
    if setup.gpus > 1:
        compared = sum(layer.block_size > 1 or not is_part for layer in model.masked)
        sent_update += _WORD_BYTES * (2 + compared) * setup.gpus
    period = setup.update_every
    mean = every + (setup.observe_steps * observed + update) / period
    optimizer = (2 * states + 3) * each * model.parameters / layout.shards
    return {
        "every step": every,
        "more in an observed step": observed,
        "in an update": update,
        "mean a step": mean,
        "against the optimizer": mean / optimizer,
        "sent in an observed step": sent_observed,
        "sent in an update": sent_update,
        "sent, mean a step": (setup.observe_steps * sent_observed + sent_update) / period,
        "FLOPs of observing": setup.observe_steps / period * idle / (3.0 * model.parameters),
    }


# --------------------------------------------------------------------------- one plan


def plan(model: nn.Module, setup: Setup, strategies: Sequence[str] = STRATEGIES) -> dict[str, Any]:
    """Return all the numbers of one model under each strategy, in plain types.

    Raises:
        ValueError: on an unknown strategy, one that cannot be laid over so many GPUs, or what `inspect` refuses.

    """
    return {
        "format": "lightning_estdgm.plan",
        "version": 1,
        "calculated": True,
        "setup": asdict(setup),
        "strategies": {
            strategy: _plan_one(inspect(model, setup, strategy), setup, strategy) for strategy in strategies
        },
    }


def _plan_one(model: Model, setup: Setup, strategy: str) -> dict[str, Any]:
    return {
        "parameters": model.parameters,
        "masked_weights": model.masked_weights,
        "density": sum(layer.active_weights for layer in model.masked) / model.masked_weights,
        "layers": [asdict(layer) | {"density": layer.density} for layer in model.layers],
        "memory_bytes": memory(model, setup, strategy),
        "traffic_bytes_per_step": traffic(model, setup, strategy),
        "mask_work": update_cost(model, setup, strategy),
    }


def plan_tables(result: Mapping[str, Any]) -> list[Table]:
    """Lay a plan out for printing: layers, memory, traffic, mask updates."""
    setup, strategies = result["setup"], result["strategies"]
    columns = [_heading(strategy, setup) for strategy in strategies]

    def table(title: str, key: str, rows: Mapping[str, Sequence[float]]) -> Table:
        drawn = Table(title=title, title_justify="left")
        drawn.add_column(key)
        for column in columns:
            drawn.add_column(column, justify="right")
        for name, values in rows.items():
            if any(values):
                drawn.add_row(name, *(_amount(name, value) for value in values))
        return drawn

    def rows_of(kind: str) -> dict[str, list[float]]:
        names = dict.fromkeys(name for s in strategies.values() for name in s[kind])
        return {name: [s[kind].get(name, 0.0) for s in strategies.values()] for name in names}

    held = rows_of("memory_bytes")
    totals = {
        "dense training": [sum(x for k, x in s["memory_bytes"].items() if k not in ADDED) for s in strategies.values()],
        "EST-DGM adds, at most": [sum(s["memory_bytes"][k] for k in ADDED) for s in strategies.values()],
    }
    layers: dict[str, list[str]] = {}
    for strategy, numbers in strategies.items():
        layers.setdefault(str(numbers["layers"]), []).append(strategy)
    return [
        *(_layer_table(strategies[names[0]], [_heading(name, setup) for name in names]) for names in layers.values()),
        table("Memory of one GPU, without activations", "held", held | totals),
        table(
            "Traffic of one GPU in a step", "handed to collectives, sent by a ring", rows_of("traffic_bytes_per_step")
        ),
        table("Mask work of one GPU", "work", rows_of("mask_work")),
    ]


def _layer_table(numbers: Mapping[str, Any], headings: Sequence[str]) -> Table:
    n, masked = numbers["parameters"], numbers["masked_weights"]
    table = Table(
        title=f"{'; '.join(headings)}: {n:,} parameters, {masked:,} of them masked ({masked / n:.1%}), "
        f"density {numbers['density']:.3f}",
        title_justify="left",
    )
    for column in ("count", "layers", "shape", "unit", "density", "why"):
        table.add_column(column, justify="right" if column in ("count", "density") else "left", overflow="fold")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for layer in numbers["layers"]:
        groups.setdefault((layer["shape"], layer["block_size"], layer["why"]), []).append(layer)
    for (shape, block_size, why), group in groups.items():
        names = [layer["name"] for layer in group]
        lowest, highest = (f"{pick(layer['density'] for layer in group):.3f}" for pick in (min, max))
        table.add_row(
            str(len(names)),
            ", ".join(names) if len(names) < 4 else f"{names[0]} ... {names[-1]}",
            " x ".join(map(str, shape)),
            "-" if not block_size else "weight" if block_size == 1 else f"{block_size} x {block_size}",
            "dense" if not block_size else lowest if lowest == highest else f"{lowest} to {highest}",
            why,
        )
    return table


def _heading(strategy: str, setup: Mapping[str, Any]) -> str:
    gpus, tensor = setup["gpus"], setup["tensor_parallel"]
    named = {"ddp": f"DDP, {gpus} GPUs", "fsdp2": f"FSDP2, {gpus} GPUs", "2d": f"2-D, {gpus // tensor} x {tensor} GPUs"}
    return named[strategy]


def _amount(name: str, value: float) -> str:
    """Write bytes in the largest unit below them; ratios as such."""
    if name == "against the optimizer":
        return f"{value:.2f} times"
    if name == "FLOPs of observing":
        return f"{value:.2%}"
    if value == 0:
        return "-"
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{float(f'{value:.3g}'):g} {unit}"


# --------------------------------------------------------------------------- docs/scaling.md

_SCALING_SETUPS = (
    ("DDP, 8 GPUs", "ddp", Setup(gpus=8)),
    ("FSDP2, 8 GPUs", "fsdp2", Setup(gpus=8)),
    ("FSDP2, 64 GPUs", "fsdp2", Setup(gpus=64)),
    ("2-D, 8 x 8 GPUs", "2d", Setup(gpus=64, tensor_parallel=8)),
)


def scaling_tables() -> str:
    """Return the tables of docs/scaling.md: every published size under four set-ups, as Markdown."""
    modules = {name: GPT.on_meta(*shape) for name, shape in GPT_SIZES.items()}
    plans = {
        name: [plan(module, setup, [s])["strategies"][s] for _, s, setup in _SCALING_SETUPS]
        for name, module in modules.items()
    }

    def added(numbers: Mapping[str, Any], window: bool) -> float:
        kinds = [kind for kind in ADDED if window or kind != "observation window"]
        return sum(numbers["memory_bytes"][kind] for kind in kinds)

    def total(numbers: Mapping[str, Any]) -> float:
        return sum(x for kind, x in numbers["memory_bytes"].items() if kind not in ADDED)

    def sent(numbers: Mapping[str, Any]) -> str:
        ring = numbers["traffic_bytes_per_step"]
        return " / ".join(_amount("", ring[kind]) for kind in ("ring, dense", "ring, EST-DGM"))

    def work(numbers: Mapping[str, Any]) -> str:
        cost = numbers["mask_work"]
        moved, ratio, given = (cost[k] for k in ("mean a step", "against the optimizer", "sent, mean a step"))
        return f"{_amount('', moved)} ({ratio:.2f}), {_amount('', given)}"

    cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "Memory: dense, + between windows, + in a window": lambda x: (
            f"{_amount('', total(x))} + {_amount('', added(x, False))}, + {_amount('', added(x, True))}"
        ),
        "Traffic of a step: dense / EST-DGM": sent,
        "Mask work of a step: moved (against AdamW), sent": work,
    }
    headings = [name for name, _, _ in _SCALING_SETUPS]
    lines = ["| size | blocks x width | parameters | masked |", "|---|---|---|---|"]
    for name, (layers, width) in GPT_SIZES.items():
        numbers = plans[name][0]
        share = numbers["masked_weights"] / numbers["parameters"]
        lines.append(f"| {name} | {layers} x {width} | {numbers['parameters']:,} | {share:.1%} |")
    for title, cell in cells.items():
        lines += ["", f"**{title}**", "", f"| size | {' | '.join(headings)} |", "|---|" + "---|" * len(headings)]
        lines += [f"| {name} | {' | '.join(map(cell, columns))} |" for name, columns in plans.items()]
    return "\n".join(lines)
