"""Jobs that train one small model on one device or over several ranks, and say what came out.

The model has layers of every sort that sharding can cut awkwardly; see `Net`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import distributed_jobs as jobs  # noqa: F401  puts the callback tests' folder on the path
from helpers.models import Batches, ResumableLoader, Task, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase
from lightning_estdgm.config import Selection, Units
from lightning_estdgm.distributed._collectives import local_tensor
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.modules._candidates import clean_name
from lightning_estdgm.sparse.backends._protocol import get_backend

EPOCH_STEPS = 8
STEPS = 20
# Masks change before steps 5, 10 and 15; steps 3, 4, 8, 9, 13 and 14 are observed.
SCHEDULE = EstDgm(
    exploration=Phase(0.7, 0.6, 5),
    consolidation=Phase(0.3, 0.3, 5),
    refinement=Phase(0.2, 0.1, 10),
    update_every=5,
    observe_steps=2,
    freeze=0.5,
)
BLOCK_LAYERS = ("wide", "straddling")
WEIGHT_LAYERS = ("uneven", "qkv", "few_rows", "conv")


class Net(Task):
    """Layers masked by blocks: rows that 2 and 4 ranks cut on and between blocks of 16. Layers masked by single
    weights: 13 rows, three fused matrices that parts cut across, 3 rows (of which a rank of 4 gets none), a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.wide = nn.Linear(128, 128)
            self.straddling = nn.Linear(128, 144)
            self.uneven = nn.Linear(144, 13)
            self.qkv = nn.Linear(13, 39)
            self.few_rows = nn.Linear(39, 3)
            self.conv = nn.Conv1d(3, 6, 3, padding=1)
            self.head = nn.Linear(6, 2)
        self.double()  # so that sums in another order come to the same masks
        self.layout = ""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.straddling(torch.tanh(self.wide(x))))
        x = torch.tanh(self.few_rows(torch.tanh(self.qkv(torch.tanh(self.uneven(x))))))
        return self.head(torch.tanh(self.conv(x.unsqueeze(-1))).squeeze(-1))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            LAYOUTS[self.layout](self)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        optimizer.register_step_post_hook(self._count)
        return optimizer


def _fully_shard(net: Net, mesh: Any = None) -> None:
    """Single layers, and the rest with the root: both sorts of FSDP2 module."""
    from torch.distributed.fsdp import fully_shard

    mesh = net.device_mesh["data_parallel"] if mesh is None else mesh
    for layer in (net.wide, net.uneven, net.few_rows):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _hybrid(net: Net) -> None:
    _fully_shard(net, _mesh())


def _tensor_parallel(net: Net, then_shard: bool) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"wide": ColwiseParallel(), "straddling": RowwiseParallel()}
    parallelize_module(net, net.device_mesh["tensor_parallel"], plan)
    if then_shard:
        _fully_shard(net)


LAYOUTS = {
    "FSDP2": _fully_shard,
    "FSDP2, one file": _fully_shard,
    "HSDP": _hybrid,
    "tensor parallel": partial(_tensor_parallel, then_shard=False),
    "FSDP2 and tensor parallel": partial(_tensor_parallel, then_shard=True),
}
TENSOR_PARALLEL = ("tensor parallel", "FSDP2 and tensor parallel")


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 on the CPU: Lightning refuses only the class itself there, and names no CPU device to torch."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return model
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, device_id=cpu, sharding_strategy=self.sharding_strategy, **self.kwargs)


def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))


FSDP1_SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "FSDP1": dict,
    "FSDP1, layer by layer": lambda: {"auto_wrap_policy": {nn.Linear}},
    "FSDP1, hybrid": lambda: {"sharding_strategy": "HYBRID_SHARD", "device_mesh": _mesh()},
}


class AnyPrecision(FSDPPrecision):
    """Leaves the model's dtype alone. Lightning refuses float64 under FSDP1; sums must be exact enough to compare."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data


def strategy_of(name: str) -> Any:
    """Return the strategy and the layout of `Net`."""
    if name == "one device":
        return "auto"
    if name.startswith("FSDP1"):
        return CPUFSDPStrategy(state_dict_type="sharded", **FSDP1_SETTINGS[name]())
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    tensor = 2 if name in TENSOR_PARALLEL else 1
    return ModelParallelStrategy(
        data_parallel_size=ranks // tensor,
        tensor_parallel_size=tensor,
        save_distributed_checkpoint=name != "FSDP2, one file",
    )


def data(rank: int, ranks: int, accumulate: int = 1) -> ResumableLoader:
    """The same samples in each step, whoever trains on them."""
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(8, 128, generator=generator, dtype=torch.float64) for _ in range(EPOCH_STEPS * accumulate)]
    return ResumableLoader(Batches((x[rank::ranks], x[rank::ranks, :2].sin()) for x in xs))


class Watch(pl.Callback):
    """What the runs hold and agree on, step by step."""

    def __init__(self, dgm: DGMCallback, keep_masks_at: tuple[int, ...]) -> None:
        self.dgm, self.keep_masks_at = dgm, keep_masks_at
        self.steps: list[tuple[int, int, bool, list[int]]] = []
        self.masks: dict[int, dict[str, Tensor]] = {}
        self.held: dict[str, int] = {}

    def on_train_batch_end(self, *args: Any) -> None:
        controller = self.dgm.controller
        assert controller is not None
        masked = [layer for layer in controller.masked_weights if layer.name in controller.layer_densities()]
        samples = [layer.window.samples if layer.window else 0 for layer in masked]
        self.steps.append((controller.steps, controller.updates, controller.observing, samples))
        if controller.steps in self.keep_masks_at:
            self.masks[controller.steps] = controller.masks()
        for layer in masked:
            self.held[layer.name] = max(self.held.get(layer.name, 0), held_elements(layer))


class Forget(pl.Callback):
    """Drops what a checkpoint says of the observation window."""

    def __init__(self, dgm: DGMCallback) -> None:
        self.dgm = dgm

    def on_train_start(self, *args: Any) -> None:
        windows = [layer for layer in self.dgm.controller.masked_weights if layer.window]  # type: ignore[union-attr]
        assert len(windows) == len(self.dgm.masks())
        for layer in windows:
            layer.window = None


class Spoil(pl.Callback):
    """Puts a NaN into one element of a gradient for the time that DGMCallback looks at it; which one rank holds."""

    def __init__(self, dgm: DGMCallback, steps: tuple[int, ...]) -> None:
        self.dgm, self.steps = dgm, steps

    def on_before_optimizer_step(self, *args: Any) -> None:
        controller = self.dgm.controller
        assert controller is not None
        if controller.steps in self.steps:
            layer = next(x for x in controller.masked_weights if x.name == "uneven")
            gradient = layer.gradient
            if gradient is not None:
                gradient[layer.shard.index(gradient.device) == 0] = float("nan")


class Mend(Spoil):
    """Takes the NaN away again."""

    def on_before_optimizer_step(self, *args: Any) -> None:
        for layer in self.dgm.controller.masked_weights:  # type: ignore[union-attr]
            if layer.gradient is not None:
                layer.gradient.nan_to_num_(0.0)


def held_elements(layer: MaskedWeight) -> int:
    """Elements of all tensors that a masked layer holds, the topology's and the parameter's own left out."""
    tensors = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    if layer.window is not None:
        tensors += [value for value in vars(layer.window).values() if isinstance(value, Tensor)]
    return sum(tensor.numel() for tensor in tensors)


class _Counted:
    """Counts what a backend really computes."""

    def __init__(self, name: str) -> None:
        self.calls: Counter[str] = Counter()
        self._backend = get_backend(name)

    def __enter__(self) -> Counter[str]:
        for product in ("linear", "grad_input", "grad_weight"):
            plain = getattr(self._backend, product)

            def counted(*args: Any, plain: Any = plain, product: str = product) -> Tensor:
                self.calls[product] += 1
                return plain(*args)

            setattr(self._backend, product, counted)
        return self.calls

    def __exit__(self, *exc: object) -> None:
        for product in ("linear", "grad_input", "grad_weight"):
            delattr(self._backend, product)


def whole_weights(module: nn.Module, trainer: pl.Trainer) -> dict[str, Tensor]:
    """Gather the weights; on every rank."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(trainer.strategy, FSDPStrategy):
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, writeback=False):
            return {clean_name(name): p.detach().clone() for name, p in module.named_parameters()}
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in module.named_parameters()
    }


def local_optimizer_state(module: nn.Module, trainer: pl.Trainer) -> dict[str, Tensor]:
    """Return this rank's part of the optimizer's state."""
    names = {parameter: clean_name(name) for name, parameter in module.named_parameters()}
    return {
        f"{names[parameter]}: {key}": local_tensor(value).detach().clone()
        for optimizer in trainer.optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if parameter.numel() > 0  # a part of FSDP1's may be empty
    }


def train(
    strategy: str = "one device",
    *,
    save: Path | None = None,
    save_at: tuple[int, ...] = (),
    resume: Path | None = None,
    forget_window: bool = False,
    spoil: tuple[int, ...] = (),
    block_size: int | str = "auto",
    accumulate: int = 1,
    inactive: str = "zero",
    backend: str = "reference",
    exclude: tuple[str, ...] = (),
    rule: dict[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train `Net` for `STEPS` steps as this rank, and return what this rank saw."""
    warnings.simplefilter("ignore")
    rank, ranks = 0, 1
    if torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # Ranks of one tensor-parallel group see the same samples.
    together = 2 if strategy in TENSOR_PARALLEL else 1
    loader = data(rank // together, ranks // together, accumulate)
    pl.seed_everything(seed, verbose=False)
    module = Net()
    module.layout = strategy
    dgm = DGMCallback(
        DGMConfig(
            SCHEDULE,
            units=Units(size=block_size, distribution="uniform"),
            backend=backend,
            inactive=inactive,
            selection=Selection(exclude=exclude),
        ).merged(**(rule or {}))
    )
    watch = Watch(dgm, save_at)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            done = dgm.controller.steps  # type: ignore[union-attr]
            if save is not None and done in save_at and (index + 1) % accumulate == 0:
                trainer.save_checkpoint(save / f"{done}.ckpt")

    trainer = make_trainer(
        *([Spoil(dgm, spoil)] if spoil else []),
        dgm,
        *([Mend(dgm, spoil)] if spoil else []),
        watch,
        Save(),
        *([Forget(dgm)] if forget_window else []),
        strategy=strategy_of(strategy),
        devices=ranks,
        max_steps=STEPS,
        max_epochs=3,  # so that the length is asked of the loader, too
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        plugins=[AnyPrecision("32-true")] if strategy.startswith("FSDP1") else None,
    )
    with _Counted(backend) as calls:
        trainer.fit(module, loader, ckpt_path=resume)
    controller = dgm.controller
    assert controller is not None
    return {
        "masks": dgm.masks(),
        "weights": whole_weights(module, trainer),
        "optimizer": local_optimizer_state(module, trainer),
        "steps": watch.steps,
        "masks at": watch.masks,
        "held": watch.held,
        "local": {x.name: x.weight.numel() for x in controller.masked_weights},
        "units": {x.name: x.units for x in controller.masked_weights},
        "counters": {
            "density": controller.density,
            "explored": controller.explored,
            "churn": controller.churn,
            "flops_ratio": controller.flops_ratio,
            "flops_executed_ratio": controller.flops_executed_ratio,
            "optimizer steps": module.optimizer_steps,
        },
        "decisions": {d.name: (d.shape, d.masked, d.block_size, d.density) for d in dgm.decisions()},
        "backends": {d.name: d.backend for d in dgm.decisions()},
        "why": {d.name: d.why for d in dgm.decisions()},
        "calls": dict(calls),
    }
