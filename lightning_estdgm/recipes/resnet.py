"""ResNet-50 as a plain model, and the LightningModule that trains it as is usual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from lightning_estdgm._checks import expect_fraction, expect_int, expect_positive
from lightning_estdgm.recipes._optimizers import decay_groups, with_cosine

Batch = tuple[Tensor, Tensor]


class Bottleneck(nn.Module):
    """relu(shortcut(x) + three convolutions of x): 1x1, 3x3 with the stride, 1x1 to four times the width.

    x [batch, in, height, width] to [batch, 4 * width, height / stride, width / stride].
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add the output of the convolutions to x, which is projected where shapes differ."""
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual net of bottlenecks, v1.5: the stride is in the 3x3 convolution.

    Images [batch, 3, height, width] to logits [batch, num_classes]. The widths of the four stages
    are 1, 2, 4 and 8 times ``width``. Names of weights are those of torchvision: its checkpoints load.
    Convolutions start as N(0, 2 / fan_out). Source: He et al. 2016, arXiv 1512.03385; the stride as Goyal et al. 2017.

    Args:
        layers: Number of blocks of each stage.
        num_classes: Number of classes.
        width: Width of the first stage's bottlenecks.

    Raises:
        ValueError: ``layers`` are not four positive numbers, or ``num_classes`` or ``width`` is not positive.

    >>> ResNet((1, 1, 1, 1), num_classes=10, width=8)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, layers: Sequence[int] = (3, 4, 6, 3), num_classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"layers: got {list(layers)}, expected four positive numbers")
        for name, value in (("num_classes", num_classes), ("width", width)):
            expect_int(name, value, at_least=1)
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(layers[0], width, width, stride=1)
        self.layer2 = _stage(layers[1], 4 * width, 2 * width, stride=2)
        self.layer3 = _stage(layers[2], 8 * width, 4 * width, stride=2)
        self.layer4 = _stage(layers[3], 16 * width, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(blocks: int, inputs: int, width: int, stride: int) -> nn.Sequential:
    first = Bottleneck(inputs, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


def resnet50(num_classes: int = 1000) -> ResNet:
    """A ResNet-50 v1.5 with fresh weights: 25.6 million of them for 1,000 classes."""
    return ResNet((3, 4, 6, 3), num_classes)


class ImageClassifier(LightningModule):
    """A residual net in channels-last memory, by SGD with momentum, label smoothing, warm-up and a cosine to 0.

    Weight decay reaches the weights of convolutions and of the head only.
    Source: Goyal et al. 2017, arXiv 1706.02677; He et al. 2019, arXiv 1812.01187.

    Args:
        num_classes: Number of classes.
        layers: Number of blocks of each stage.
        width: Width of the first stage's bottlenecks.
        lr: Learning rate after warm-up.
        momentum: Momentum.
        weight_decay: Weight decay of matrices and kernels.
        label_smoothing: Share of the target spread over all classes.
        warmup: Share of the run in which the rate rises.

    Raises:
        ValueError: The rate is not positive, or a fraction is outside [0, 1).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        label_smoothing: float = 0.1,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        expect_positive("lr", lr)
        for name, value in (("momentum", momentum), ("label_smoothing", label_smoothing), ("warmup", warmup)):
            expect_fraction(name, value)
        self.save_hyperparameters()
        self.lr, self.momentum, self.weight_decay, self.warmup = lr, momentum, weight_decay, warmup
        self.label_smoothing = label_smoothing
        self.model = ResNet(layers, num_classes, width)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images [batch, 3, height, width]."""
        return self.model(x.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step's loss: cross entropy with smoothed labels."""
        x, y = batch
        loss = F.cross_entropy(self(x), y, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss`` (labels as they are) and ``val/accuracy``, a fraction."""
        x, y = batch
        logits = self(x)
        found = {
            "val/loss": F.cross_entropy(logits, y),
            "val/accuracy": (logits.argmax(1) == y).float().mean(),
        }
        self.log_dict(found, batch_size=len(y), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """SGD with decay on matrices only; the learning rate moves every step."""
        optimizer = torch.optim.SGD(
            decay_groups(self, self.weight_decay), lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0
        )
        return with_cosine(self, optimizer, self.warmup, floor=0.0)
