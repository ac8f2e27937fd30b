"""Small LightningModules that the callback tests share; each records what its run did, independently of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Phase
from lightning_estdgm.method._masks import expand_mask
from lightning_estdgm.modules._candidates import clean_name

MakeOptimizer = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.5),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-3, max_iter=2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


# Advice of Lightning that these tests need not take.
NO_VALIDATION_LOADER = "ignore:You defined a `validation_step` but have no `val_dataloader`"

# 20 steps: masks change before steps 5, 10 and 15, and steps 3, 4, 8, 9, 13 and 14 are observed.
SCHEDULE = EstDgm(
    exploration=Phase(0.7, 0.6, 5),
    consolidation=Phase(0.3, 0.3, 5),
    refinement=Phase(0.2, 0.1, 10),
    update_every=5,
    observe_steps=2,
    freeze=0.5,
)


def callback_for(**settings: Any) -> DGMCallback:
    return DGMCallback(DGMConfig(schedule=SCHEDULE).merged(**settings))


class Batches(list[Any]):
    """Batches in a fixed order. No plain list: Lightning takes that for a collection of loaders."""


class Task(pl.LightningModule):
    """One optimizer, maybe a scheduler; counts real optimizer steps and records learning rates."""

    def __init__(self, optimizer: str = "adamw", scheduler: str | None = None) -> None:
        super().__init__()
        self.optimizer_name = optimizer
        self.scheduler_name = scheduler
        self.optimizer_steps = 0
        self.rates: list[tuple[float, ...]] = []
        self.group_keys: set[tuple[str, ...]] = set()

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), batch_size=1)

    def parameter_groups(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        if self.optimizer_name == "lbfgs":
            return self.parameters()
        return [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer_name](self.parameter_groups())
        optimizer.register_step_post_hook(self._count)
        if self.scheduler_name is None:
            return optimizer
        if self.scheduler_name == "onecycle":
            steps = int(self.trainer.estimated_stepping_batches)
            cycle = bool({"momentum", "betas"} & set(optimizer.defaults))
            scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=1e-3, total_steps=steps + 1, cycle_momentum=cycle
            )
            config = {"scheduler": scheduler, "interval": "step"}
        elif self.scheduler_name == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)
            config = {"scheduler": scheduler, "interval": "epoch"}
        else:
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            config = {"scheduler": scheduler, "monitor": "flat", "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer is called even for a skipped step
        self.optimizer_steps += int(found_inf is None or found_inf.item() == 0)

    def on_train_batch_end(self, *args: Any) -> None:
        for optimizer in self.trainer.optimizers:
            self.rates.append(tuple(group["lr"] for group in optimizer.param_groups))
            self.group_keys |= {tuple(group) for group in optimizer.param_groups}

    def on_train_epoch_end(self) -> None:
        self.log("flat", 1.0)


class MLP(Task):
    """128 wide, so that its layers are masked by blocks of 16."""

    def __init__(self, width: int = 128, optimizer: str = "adamw", scheduler: str | None = None) -> None:
        super().__init__(optimizer, scheduler)
        self.net = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x).squeeze(-1), y)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    @staticmethod
    def batches(n: int, width: int = 128) -> Batches:
        generator = torch.Generator().manual_seed(1)
        xs = [torch.randn(8, width, generator=generator) for _ in range(n)]
        return Batches((x, x[:, 0] * x[:, 1]) for x in xs)


class TinyMLP(MLP):
    """16 wide, so that its layers are masked by single weights."""

    def __init__(self, optimizer: str = "adamw", scheduler: str | None = None) -> None:
        super().__init__(16, optimizer, scheduler)

    @staticmethod
    def batches(n: int, width: int = 16) -> Batches:
        return MLP.batches(n, width)


class ConvNet(Task):
    def __init__(self, optimizer: str = "adamw", scheduler: str | None = None) -> None:
        super().__init__(optimizer, scheduler)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()
        )
        self.head = nn.Linear(8, 4)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.features(x).mean((2, 3))), y)

    @staticmethod
    def batches(n: int) -> Batches:
        generator = torch.Generator().manual_seed(1)
        return Batches(
            (torch.randn(4, 3, 6, 6, generator=generator), torch.randint(4, (4,), generator=generator))
            for _ in range(n)
        )


class Encoder(Task):
    """`nn.TransformerEncoder`: fused attention projections, and the fast path in evaluation."""

    def __init__(self, optimizer: str = "adamw", scheduler: str | None = None) -> None:
        super().__init__(optimizer, scheduler)
        self.embed = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 11)

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(self.embed(batch))).flatten(0, 1), batch.flatten())

    @staticmethod
    def batches(n: int) -> Batches:
        generator = torch.Generator().manual_seed(1)
        return Batches(torch.randint(11, (2, 5), generator=generator) for _ in range(n))


class GPT2(Task):
    """Hugging Face GPT-2: `Conv1D` stores its weight (in, out), and the head is the embedding."""

    def __init__(self, optimizer: str = "adamw", scheduler: str | None = None) -> None:
        super().__init__(optimizer, scheduler)
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=13, n_positions=8, n_embd=128, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        self.model = GPT2LMHeadModel(config)

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    @staticmethod
    def batches(n: int) -> Batches:
        generator = torch.Generator().manual_seed(1)
        return Batches(torch.randint(13, (2, 6), generator=generator) for _ in range(n))


class ViT(Task):
    def __init__(self, optimizer: str = "adamw", scheduler: str | None = None) -> None:
        super().__init__(optimizer, scheduler)
        from transformers import ViTConfig, ViTForImageClassification

        self.model = ViTForImageClassification(
            ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=8,
                patch_size=4,
                num_labels=3,
            )
        )

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(pixel_values=batch[0]).logits, batch[1])

    @staticmethod
    def batches(n: int) -> Batches:
        generator = torch.Generator().manual_seed(1)
        return Batches(
            (torch.randn(2, 3, 8, 8, generator=generator), torch.randint(3, (2,), generator=generator))
            for _ in range(n)
        )


class GCN(Task):
    """A small PyG graph net; its convolutions hold PyG's own `Linear`."""

    def __init__(self, optimizer: str = "adamw", scheduler: str | None = None) -> None:
        super().__init__(optimizer, scheduler)
        from torch_geometric.nn import GCNConv

        self.first = GCNConv(12, 24)
        self.second = GCNConv(24, 24)
        self.head = GCNConv(24, 3)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, edges, y = batch
        hidden = F.relu(self.second(F.relu(self.first(x, edges)), edges))
        return F.cross_entropy(self.head(hidden, edges), y)

    @staticmethod
    def batches(n: int) -> Batches:
        generator = torch.Generator().manual_seed(1)
        return Batches(
            (
                torch.randn(10, 12, generator=generator),
                torch.randint(10, (2, 30), generator=generator),
                torch.randint(3, (10,), generator=generator),
            )
            for _ in range(n)
        )


class GAN(pl.LightningModule):
    """Manual optimization of a generator and a discriminator, each with its own optimizer."""

    def __init__(self, *, toggle: bool = True, plain_backward: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.plain_backward = plain_backward
        self.generator = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.discriminator = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
        self.optimizer_steps = [0, 0]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        noise = x.flip(0)
        self._one(optimizer_g, 0, lambda: F.softplus(-self.discriminator(self.generator(noise))).mean())
        self._one(
            optimizer_d,
            1,
            lambda: (
                F.softplus(-self.discriminator(x)).mean()
                + F.softplus(self.discriminator(self.generator(noise).detach())).mean()
            ),
        )

    def _one(self, optimizer: Any, index: int, loss: Callable[[], Tensor]) -> None:
        if self.toggle:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        value = loss()
        if self.plain_backward:
            value.backward()
        else:
            self.manual_backward(value)
        self.before_step(index)
        optimizer.step()
        self.optimizer_steps[index] += 1
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def before_step(self, index: int) -> None:
        """For tests that look at the gradients the optimizer gets."""

    def configure_optimizers(self) -> list[Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-3),
            torch.optim.SGD(self.discriminator.parameters(), lr=1e-2, momentum=0.9),
        ]


class ResumableLoader:
    """Batches in a fixed order; goes on where a checkpoint left it, as Lightning lets a stateful loader do."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Endless(torch.utils.data.IterableDataset):
    """Batches without a length, `n` of them or for ever."""

    def __init__(self, batches: list[Any], n: int | None = None) -> None:
        self.batches = batches
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        i = 0
        while self.n is None or i < self.n:
            yield self.batches[i % len(self.batches)]
            i += 1


def endless_loader(batches: list[Any], n: int | None = None) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(Endless(batches, n), batch_size=None)


def make_trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """A quiet Trainer on one CPU device."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **quiet | settings)


def weight_masks(module: nn.Module, callback: DGMCallback) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Each masked weight parameter with its mask, expanded to the weight's shape as stored."""
    modules = {clean_name(name): layer for name, layer in module.named_modules()}
    blocks = {d.name: d.block_size for d in callback.decisions()}
    found = {}
    for name, mask in callback.masks().items():
        parent, _, last = name.rpartition(".")
        stacked = getattr(modules.get(parent), last, None)  # experts in one parameter, named by it
        if isinstance(stacked, nn.Parameter):
            found[name] = (stacked, _expert_mask(stacked, mask, blocks[name]))
            continue
        layer = modules[name]
        weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
        transposed = "Conv1D" in type(layer).__name__
        side = blocks[name] or weight.shape[1 if transposed else 0] // mask.shape[0]  # 0: the first step has not ended
        if side != 1:
            mask = expand_mask(mask, side)
        if transposed:
            mask = mask.t()
        if mask.dim() < weight.dim():
            mask = mask[(..., *[None] * (weight.dim() - 2))].expand(weight.shape)
        assert mask.shape == weight.shape
        found[name] = (weight, mask)
    return found


def _expert_mask(stack: nn.Parameter, mask: Tensor, block: int) -> Tensor:
    """The mask of experts that are stacked in one parameter ``(experts, rows, columns)``."""
    side = max(block, 1)
    return mask.repeat_interleave(side, 0).repeat_interleave(side, 1).view(stack.shape)


def assert_masked(module: nn.Module, callback: DGMCallback) -> None:
    """Weights are exactly zero outside the masks, and mostly not inside; every layer holds exactly its units."""
    kept = {d.name: d for d in callback.decisions() if d.masked}
    for name, (weight, mask) in weight_masks(module, callback).items():
        if name not in kept:  # the first step, which is dense, has not ended
            assert mask.all()
            continue
        assert torch.count_nonzero(weight[~mask]) == 0, name
        assert torch.isfinite(weight).all(), name
        assert torch.count_nonzero(weight[mask]) > 0.5 * mask.sum(), name
        units = callback.masks()[name]
        assert int(units.sum()) == round(kept[name].density * units.numel()), name


def assert_final(module: nn.Module, callback: DGMCallback) -> None:
    """The run has ended in refinement, at the schedule's last density, kept exactly."""
    assert_masked(module, callback)
    assert callback.phase == "refinement"
    masked = [d for d in callback.decisions() if d.masked]
    assert all(d.density == d.final_density for d in masked)
    active = sum(int(mask.sum()) for _, mask in weight_masks(module, callback).values())
    total = sum(weight.numel() for weight, _ in weight_masks(module, callback).values())
    budget = round(callback.schedule(callback.schedule.total_steps - 1).density * total)
    largest_unit = max(d.block_size**2 * math.prod(d.shape[2:]) if d.block_size > 1 else 1 for d in masked)
    assert abs(active - budget) < largest_unit if largest_unit > 1 else active == budget
    assert callback.density == active / total


def leftovers(module: nn.Module, trainer: pl.Trainer) -> list[str]:
    """What the callback has left on the model, its optimizers or the progress bar."""
    found = []
    for name, layer in module.named_modules():
        found += [f"{name}.{key}" for key in (*vars(layer), *layer._buffers) if "estdgm" in key]
        if "estdgm" in type(layer).__module__ or type(layer).__name__.startswith("Masked"):
            found.append(f"{name} is {type(layer).__name__}")
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found += [f"{name}: {hook}" for hook in getattr(layer, hooks).values()]
    for optimizer in trainer.optimizers:
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            found += [str(h) for h in getattr(optimizer, hooks).values() if "estdgm" in getattr(h, "__module__", "")]
    if trainer.progress_bar_callback is not None:
        found += [key for key in vars(trainer.progress_bar_callback) if key == "get_metrics"]
    return found
