"""Tasks of the study. A task builds its model and its data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule

from lightning_estdgm.recipes import StdlibText
from lightning_estdgm.tools.study._datasets import (
    Arrays,
    WholeGraph,
    citation_graph,
    cluttered_digits,
    digit_images,
    split,
)
from lightning_estdgm.tools.study._evidence_tasks import EVIDENCE_TASKS
from lightning_estdgm.tools.study._networks import Classifier, StudyGraphNet, perceptron, residual_net
from lightning_estdgm.tools.study._task import Task
from lightning_estdgm.tools.study._variants import StudyGPT


def _conv_task(name: str, what: str, steps: int, images: Callable[[], Any]) -> Task:
    def data(seed: int) -> LightningDataModule:
        train, val = images()
        return Arrays(train, val, batch_size=64, seed=seed)

    return Task(
        name, what, "accuracy", steps, (1e-3, 3e-3, 1e-2, 3e-2), lambda lr: Classifier(residual_net(), lr), data
    )


def _graph_model(lr: float) -> LightningModule:
    adjacency, features, label = citation_graph()
    return Classifier(StudyGraphNet(adjacency, features.shape[1], 256, int(label.max()) + 1), lr)


def _graph_data(seed: int) -> LightningDataModule:
    _, features, label = citation_graph()
    train, val = (torch.from_numpy(part) for part in split(len(label), val_fraction=0.5))
    return WholeGraph(features, (train[:280], label[train[:280]]), (val, label[val]))


def _tabular_data(seed: int) -> LightningDataModule:
    from sklearn.datasets import load_breast_cancer

    table, label = load_breast_cancer(return_X_y=True)
    train, val = split(len(label))
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
    Task(
        "medium",
        "byte-level GPT of width 256 (2 layers, 1.6 M masked weights), for mask units, one pass over the same text",
        "loss",
        1000,
        (2e-3,),
        partial(_gpt, width=256, layers=2, heads=4),
        lambda seed: StdlibText(context=128, batch_size=16, seed=seed),
    ),
)
"""The tasks that need no data set."""

ALL_TASKS = (*TASKS, *EVIDENCE_TASKS)
"""All tasks of the study."""


def task_named(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: There is none; the message lists the known ones.

    """
    for task in ALL_TASKS:
        if task.name == name:
            return task
    raise ValueError(f"unknown task {name!r}, expected one of: {', '.join(task.name for task in ALL_TASKS)}")
