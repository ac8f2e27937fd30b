"""Data of the study's tasks, none of which needs a download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


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


def split(count: int, seed: int = 0, val_fraction: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
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
    train, val = (torch.from_numpy(part) for part in split(len(y)))
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
