"""What the study trains: four small tasks whose data needs no download. A task builds its model and its data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_estdgm.recipes import StdlibText
from lightning_estdgm.recipes.rates import run_steps, warmup_cosine
from lightning_estdgm.tools.study.variants import StudyGPT

__all__ = ["TASKS", "Task", "task_named"]


@dataclass(frozen=True)
class Task:
    """One task of the study.

    Attributes:
        name: of the task.
        what: one sentence for the reader.
        metric: what decides: ``"loss"`` (validation, nats) or ``"accuracy"`` (validation, a share).
        steps: optimizer steps of a whole run.
        rates: peak learning rates that are swept.
        model: a model with weights from the global random state, from a learning rate and, for the GPTs, arguments of
            `variants.StudyGPT`.
        data: the data, from a seed that decides the order of batches (and nothing about the split).

    """

    name: str
    what: str
    metric: str
    steps: int
    rates: tuple[float, ...]
    model: Callable[..., LightningModule]
    data: Callable[[int], LightningDataModule]


# ---- models


class Classifier(LightningModule):
    """Any network with class logits, trained by AdamW with warm-up and a cosine; logs validation loss and accuracy."""

    def __init__(self, net: nn.Module, lr: float, weight_decay: float = 0.05) -> None:
        super().__init__()
        self.net, self.lr, self.weight_decay = net, lr, weight_decay

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy of a batch ``(*inputs, classes)``."""
        *inputs, target = batch
        return F.cross_entropy(self.net(*inputs), target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        *inputs, target = batch
        logits = self.net(*inputs)
        self.log("val/loss", F.cross_entropy(logits, target), batch_size=len(target))
        self.log("val/accuracy", (logits.argmax(1) == target).float().mean(), batch_size=len(target))

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices and kernels only; the rate moves every step."""
        decayed = [p for p in self.parameters() if p.ndim >= 2]
        rest = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr)
        factor = partial(warmup_cosine, steps=run_steps(self), warmup=0.05, floor=0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut: a strided 1x1 where the shape changes."""

    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if stride == 1 and inner == out else nn.Conv2d(inner, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inner, H, W] -> [N, out, H / stride, W / stride]``."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def residual_net(width: int = 32, classes: int = 10) -> nn.Module:
    """Three residual blocks of width, 2 width and 4 width on one-channel images, mean pooling, a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        ResidualBlock(width, width, 1),
        ResidualBlock(width, 2 * width, 2),
        ResidualBlock(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


class GraphNet(nn.Module):
    """Graph convolutions by Kipf and Welling: linear, mean over neighbours weighted by degrees, ReLU.

    The normalised adjacency is part of the network, since the graph does not change: a sparse CSR tensor.
    """

    def __init__(self, adjacency: Tensor, features: int, width: int, classes: int, layers: int = 3) -> None:
        super().__init__()
        sizes = [features, *[width] * (layers - 1)]
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, nodes: Tensor) -> Tensor:
        """Logits of ``nodes``: ``[all nodes, features], [n] -> [n, classes]``."""
        for layer in self.layers:
            x = F.dropout(F.relu(self.adjacency @ layer(x)), 0.5, self.training)
        return (self.adjacency @ self.head(x))[nodes]


def perceptron(features: int, classes: int, width: int = 256) -> nn.Module:
    """Three hidden layers with ReLU and layer norm."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.ReLU(),
        nn.LayerNorm(width),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.LayerNorm(width),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


# ---- data


class Arrays(LightningDataModule):
    """Tensors in memory: shuffled batches for training, from ``seed`` alone, and one batch for validation."""

    def __init__(self, train: tuple[Tensor, ...], val: tuple[Tensor, ...], batch_size: int, seed: int) -> None:
        super().__init__()
        self.train, self.val, self.batch_size, self.seed = train, val, batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in another order each epoch; a last smaller one is left out."""
        generator = torch.Generator().manual_seed(self.seed)
        data = TensorDataset(*self.train)
        return DataLoader(data, self.batch_size, shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        """The whole of it in one batch."""
        return DataLoader(TensorDataset(*self.val), len(self.val[0]), generator=torch.Generator())


class WholeGraph(LightningDataModule):
    """A graph that each step sees whole: a batch is (features of all nodes, nodes, their classes)."""

    def __init__(self, features: Tensor, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.features, self.parts = features, {"train": train, "val": val}

    def train_dataloader(self) -> DataLoader[Any]:
        """One batch an epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """One batch."""
        return self._loader("val")

    def _loader(self, part: str) -> DataLoader[Any]:
        batch = (self.features, *self.parts[part])
        return DataLoader([batch], batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]


def _split(count: int, seed: int = 0, val_fraction: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for validation; the same for every run, so that runs differ in nothing else."""
    order = np.random.default_rng(seed).permutation(count)
    cut = round(count * val_fraction)
    return order[cut:], order[:cut]


def digit_images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's digits: 1,797 images of 8 x 8, values in [0, 1], ``[n, 1, 8, 8]``; a quarter for validation."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x = torch.tensor(images / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(classes)
    train, val = (torch.from_numpy(part) for part in _split(len(y)))
    return (x[train], y[train]), (x[val], y[val])


def cluttered_digits(
    train: int = 12_000, val: int = 3_000, size: int = 16, noise: float = 0.2
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The harder image set: the class of the brighter of two digits, ``[n, 1, size, size]``.

    Each image is made from two of scikit-learn's digits (training images from training digits only): both are put at
    random places of an empty canvas, values add up where they overlap; the one to be named has a brightness drawn from
    [0.8, 1], the other from [0.3, 0.6]; then normal noise of standard deviation ``noise`` is added. Always the same.
    """
    parts = digit_images()
    made = []
    for index, count in enumerate((train, val)):
        digits, classes = (part.numpy() for part in parts[index])
        draw = np.random.default_rng(1000 + index)
        canvas = draw.normal(0.0, noise, (count, 1, size, size)).astype(np.float32)
        target, other = draw.integers(len(classes), size=(2, count))
        for which, low, high in ((target, 0.8, 1.0), (other, 0.3, 0.6)):
            places = draw.integers(size - 8 + 1, size=(count, 2))
            light = draw.uniform(low, high, count).astype(np.float32)
            for i, (row, col) in enumerate(places):
                canvas[i, 0, row : row + 8, col : col + 8] += light[i] * digits[which[i], 0]
        made.append((torch.from_numpy(canvas), torch.from_numpy(classes[target])))
    return made[0], made[1]


def citation_graph(
    nodes: int = 2_700, classes: int = 7, words: int = 512, degree: float = 4.0, homophily: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """A generated graph like those of citations: normalised adjacency (CSR), features, classes. Always the same.

    A degree-corrected block model: nodes have Pareto-distributed attractiveness; each node draws about ``degree``
    links, a share ``homophily`` of them to its own class. A node's features are the presence of words: 18 of ``words``,
    of which 3 come from the 40 words that its class prefers. Sizes, and what a dense network reaches, are near Cora's.
    """
    draw = np.random.default_rng(7)
    label = draw.integers(classes, size=nodes)
    pull = draw.pareto(2.5, nodes) + 1.0
    members = [np.flatnonzero(label == c) for c in range(classes)]
    chances = [pull[m] / pull[m].sum() for m in members]
    everyone = pull / pull.sum()
    edges = []
    for node in range(nodes):
        for _ in range(draw.poisson(degree / 2)):
            near = draw.random() < homophily
            kin = members[label[node]]
            edges.append((node, draw.choice(kin, p=chances[label[node]]) if near else draw.choice(nodes, p=everyone)))
    pairs = torch.tensor(edges).t()
    loops = torch.arange(nodes).expand(2, -1)
    index = torch.cat([pairs, pairs.flip(0), loops], 1).unique(dim=1)
    degrees = torch.bincount(index[0], minlength=nodes).float().rsqrt()
    values = degrees[index[0]] * degrees[index[1]]
    adjacency = torch.sparse_coo_tensor(index, values, (nodes, nodes), check_invariants=True).coalesce()
    features = np.zeros((nodes, words), np.float32)
    preferred = [draw.permutation(words)[:40] for _ in range(classes)]
    for node in range(nodes):
        features[node, draw.choice(preferred[label[node]], 3, replace=False)] = 1.0
        features[node, draw.choice(words, 15, replace=False)] = 1.0
    return adjacency, torch.from_numpy(features), torch.from_numpy(label)


def _conv_task(name: str, what: str, steps: int, images: Callable[[], Any]) -> Task:
    def data(seed: int) -> LightningDataModule:
        train, val = images()
        return Arrays(train, val, batch_size=64, seed=seed)

    return Task(
        name, what, "accuracy", steps, (1e-3, 3e-3, 1e-2, 3e-2), lambda lr: Classifier(residual_net(), lr), data
    )


def _graph_model(lr: float) -> LightningModule:
    adjacency, features, label = citation_graph()
    return Classifier(GraphNet(adjacency, features.shape[1], 256, int(label.max()) + 1), lr)


def _graph_data(seed: int) -> LightningDataModule:
    _, features, label = citation_graph()
    train, val = (torch.from_numpy(part) for part in _split(len(label), val_fraction=0.5))
    return WholeGraph(features, (train[:280], label[train[:280]]), (val, label[val]))


def _tabular_data(seed: int) -> LightningDataModule:
    from sklearn.datasets import load_breast_cancer

    table, label = load_breast_cancer(return_X_y=True)
    train, val = _split(len(label))
    scaled = (table - table[train].mean(0)) / table[train].std(0)
    x, y = torch.tensor(scaled, dtype=torch.float32), torch.tensor(label)
    return Arrays((x[train], y[train]), (x[val], y[val]), batch_size=32, seed=seed)


def _gpt(lr: float, **changes: Any) -> LightningModule:
    return StudyGPT(context=128, lr=lr, **changes)


TASKS: tuple[Task, ...] = (
    Task(
        "gpt",
        "byte-level GPT (width 96, 4 layers, 0.44 M masked weights) on the source of Python's standard library",
        "loss",
        1500,
        (2e-3, 4e-3, 8e-3),
        partial(_gpt, width=96, layers=4, heads=3),
        lambda seed: StdlibText(context=128, batch_size=16, seed=seed),
    ),
    _conv_task("digits", "residual conv net on scikit-learn's digits", 400, digit_images),
    _conv_task("clutter", "residual conv net naming the brighter of two noisy digits", 800, cluttered_digits),
    Task(
        "graph",
        "three graph convolutions on a generated citation-like graph of 2,700 nodes, 280 of them labelled",
        "accuracy",
        150,
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        _graph_model,
        _graph_data,
    ),
    Task(
        "tabular",
        "a perceptron on scikit-learn's breast cancer table (569 x 30)",
        "accuracy",
        300,
        (1e-3, 3e-3, 1e-2),
        lambda lr: Classifier(perceptron(30, 2), lr),
        _tabular_data,
    ),
    Task(
        "wide",
        "byte-level GPT of width 512 (2 layers, 6.3 M masked weights), for blocks, on the same text",
        "loss",
        400,
        (2.5e-4, 5e-4, 1e-3),
        partial(_gpt, width=512, layers=2, heads=8),
        lambda seed: StdlibText(context=128, batch_size=4, seed=seed),
    ),
)
"""All tasks of the study."""


def task_named(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: there is none; the message lists the known ones.

    """
    for task in TASKS:
        if task.name == name:
            return task
    raise ValueError(f"unknown task {name!r}, expected one of: {', '.join(task.name for task in TASKS)}")
