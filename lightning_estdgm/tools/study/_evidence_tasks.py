"""Tasks on published data: Fashion-MNIST, Cora and CiteSeer, WikiText's text, the standard library's source."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from lightning import LightningDataModule, LightningModule

from lightning_estdgm.recipes import GraphFiles, GraphNet, IdxImages, StdlibText, TextFiles
from lightning_estdgm.tools.study._data_folders import data_folder
from lightning_estdgm.tools.study._networks import Classifier, residual_net
from lightning_estdgm.tools.study._task import Task
from lightning_estdgm.tools.study._variants import StudyGPT

WIKITEXT = ("wiki.valid.tokens", "wiki.test.tokens")
"""The validation and test files of WikiText-2, which are those of WikiText-103 too: a small text of their own here."""


def _fashion(seed: int) -> LightningDataModule:
    return IdxImages(data_folder("fashion-mnist"), batch_size=64, seed=seed, train_images=6000)


def _fashion_model(lr: float, width: int = 64) -> LightningModule:
    return Classifier(residual_net(width, stem_stride=2), lr)


def _wikitext(seed: int) -> LightningDataModule:
    files = [os.path.join(data_folder("wikitext-2"), name) for name in WIKITEXT]
    return TextFiles(files, context=128, batch_size=32, seed=seed, val_fraction=0.1)


def _gpt(width: int, heads: int) -> Callable[..., LightningModule]:
    def model(lr: float, **changes: Any) -> LightningModule:
        return StudyGPT(**{"context": 128, "layers": 2, "width": width, "heads": heads, "lr": lr, **changes})

    return model


def _graph(name: str, seed: int) -> LightningDataModule:
    return GraphFiles(data_folder("planetoid"), normalize=True, name=name)


@cache
def _graph_sizes(folder: str, name: str) -> tuple[int, int]:
    files = GraphFiles(folder, name=name)
    return files.features, files.classes


_PUBLISHED: dict[str, dict[str, Any]] = {
    "gcn": {"hidden": 16, "dropout": 0.5},
    "gat": {"hidden": 64, "heads": 8, "dropout": 0.6},
}
_RATES = {"gcn": (0.003, 0.01, 0.03), "gat": (0.0015, 0.005, 0.015)}
_STEPS = {"gcn": 200, "gat": 400}


def _graph_model(name: str, kind: str, lr: float, **changes: Any) -> LightningModule:
    features, classes = _graph_sizes(data_folder("planetoid"), name)
    return GraphNet(features, classes, **{"kind": kind, "lr": lr, **_PUBLISHED[kind], **changes})


def _graph_task(name: str, kind: str, title: str, step_s: float) -> Task:
    return Task(
        f"{name}-{kind}",
        f"{kind.upper()} as published on {title}, public split, {_STEPS[kind]} steps on the whole graph",
        "accuracy",
        _STEPS[kind],
        _RATES[kind],
        partial(_graph_model, name, kind),
        partial(_graph, name),
        is_tested=True,
        step_s=step_s,
    )


EVIDENCE_TASKS: tuple[Task, ...] = (
    _graph_task("cora", "gcn", "Cora", 0.03),
    _graph_task("cora", "gat", "Cora", 0.06),
    _graph_task("citeseer", "gcn", "CiteSeer", 0.07),
    _graph_task("citeseer", "gat", "CiteSeer", 0.1),
    Task(
        "fashion",
        "residual conv net (1.2 M weights) on 6,000 images of Fashion-MNIST, 8 passes",
        "accuracy",
        744,
        (1e-3, 3e-3, 1e-2),
        _fashion_model,
        _fashion,
        is_tested=True,
        step_s=0.3,
    ),
    Task(
        "stdlib",
        "byte-level GPT (width 256, 2 layers, 1.6 M masked weights), one pass over 2 MB of Python's standard library",
        "loss",
        1000,
        (1e-3, 2e-3, 4e-3),
        _gpt(256, 4),
        lambda seed: StdlibText(context=128, batch_size=16, seed=seed),
        step_s=0.2,
    ),
    Task(
        "wikitext",
        "byte-level GPT (width 96, 2 layers, 0.22 M masked weights), 8 passes over 2.1 MB of WikiText's validation "
        "and test files; no WikiText-103 result",
        "loss",
        4200,
        (2e-3, 4e-3, 8e-3),
        _gpt(96, 4),
        _wikitext,
        step_s=0.06,
    ),
)
"""Tasks of the preset ``evidence``."""
