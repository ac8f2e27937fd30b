"""Networks of the study's tasks."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from lightning_estdgm.recipes._optimizers import decay_groups, with_cosine


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
        self._log_quality("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/accuracy``."""
        self._log_quality("test", batch)

    def _log_quality(self, part: str, batch: Any) -> None:
        *inputs, target = batch
        logits = self.net(*inputs)
        self.log(f"{part}/loss", F.cross_entropy(logits, target), batch_size=len(target))
        self.log(f"{part}/accuracy", (logits.argmax(1) == target).float().mean(), batch_size=len(target))

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices and kernels only; the rate moves every step."""
        optimizer = torch.optim.AdamW(decay_groups(self, self.weight_decay), lr=self.lr)
        return with_cosine(self, optimizer, warmup=0.05, floor=0.0)


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


def residual_net(width: int = 32, classes: int = 10, stem_stride: int = 1) -> nn.Module:
    """Three residual blocks of width, 2 width and 4 width on one-channel images, mean pooling, a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stem_stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        ResidualBlock(width, width, 1),
        ResidualBlock(width, 2 * width, 2),
        ResidualBlock(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


class StudyGraphNet(nn.Module):
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
