"""Sparse models to export, as large as their products need, and their example inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.expert_models import EinsumExperts
from helpers.models import MLP, SCHEDULE, Task, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig, Selection, Units
from lightning_estdgm.method._masks import BlockSize
from lightning_estdgm.recipes import ByteGPT, GraphNet, ImageClassifier

DENSITY = 0.1


def sparse_(model: nn.Module, unit: int = 1, seed: int = 0) -> nn.Module:
    """Zero all but a tenth of the units of each matrix and kernel; half of the zeros are -0.0, as masks leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or any(side % unit for side in parameter.shape[:2]):
                continue
            rows, columns = parameter.shape[0] // unit, parameter.shape[1] // unit
            blocks = torch.rand(rows, columns, *parameter.shape[2:], generator=generator) < DENSITY
            parameter.mul_(blocks.repeat_interleave(unit, 0).repeat_interleave(unit, 1))
    return model.eval()


def mlp(unit: int = 1, width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return sparse_(nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)), unit)


class ByName(nn.Module):
    """A convolution and a linear layer that are given their inputs by torch's own name for them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(32, 64, 3, padding=1), nn.Linear(128, 128)
        sparse_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=self.first(input=x).flatten(1).relu())


class _Trained(Task):
    """A network of linear layers, convolutions or stacked experts, with two layers of one shape."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        body: dict[str, Any] = {
            "linear": lambda: [nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)],
            "convolution": lambda: [nn.Unflatten(1, (4, 4, 4)), *_convolutions(), nn.Flatten(), nn.Linear(512, 64)],
            "experts": lambda: [nn.Linear(64, 16), EinsumExperts(), nn.Linear(16, 64)],
        }
        self.net = nn.Sequential(*body[kind](), nn.GELU(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        return (self(batch[0])[:, 0] - batch[1]).square().mean()


def _convolutions() -> list[nn.Module]:
    first, *alike = (nn.Conv2d(inputs, 32, 3, padding=1) for inputs in (4, 32, 32))
    return [first, nn.ReLU(), alike[0], nn.ReLU(), alike[1], nn.ReLU(), nn.Conv2d(32, 32, 1, groups=4)]


PACKED_IN_TRAINING = ("linear", "convolution", "experts")
"""Kinds of networks that `trained_packed` makes."""


def trained_packed(kind: str, unit: BlockSize = 1) -> tuple[Task, Tensor]:
    """A network that ``storage="packed"`` has trained and left packed, in evaluation mode, and an example input."""
    stacked = Selection(experts=["*.w1", "*.w2"]) if kind == "experts" else Selection()
    dgm = DGMCallback(DGMConfig(SCHEDULE, units=Units(size=unit), storage="packed", selection=stacked))
    module, batches = _Trained(kind), MLP.batches(20, 64)
    make_trainer(dgm, max_epochs=1).fit(module, batches)
    return module.eval(), batches[0][0]


def parts(model: nn.Module) -> list[Any]:
    """What an export must not change of a model: its modules and their classes, its parameters and buffers."""
    tensors = [(id(tensor), tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    modes = [(id(module), type(module), module.training, sorted(vars(module))) for module in model.modules()]
    return [modes, tensors]


def trained_example() -> Tensor:
    """Example input of `models.MLP`, for ``--example helpers.exported:trained_example``."""
    return MLP.batches(1)[0][0]


def negative_mean(model: Any) -> float:
    """Measure of a model, for ``--evaluate helpers.exported:negative_mean``."""
    return -float(model(trained_example()).mean())


def network(kind: str, unit: int = 1) -> tuple[nn.Module, Any, str]:
    """A recipe's network with a tenth of its weights, an example input and what of it may vary."""
    torch.manual_seed(0)
    if kind == "gpt":
        return sparse_(ByteGPT(64, 2, 4, 32), unit), torch.randint(0, 256, (2, 16)), "shape"
    if kind == "conv":
        net = ImageClassifier(10, (1, 1, 1, 1), 16)
        warm_statistics_(net)
        return sparse_(net, unit), torch.randn(1, 3, 32, 32), "batch"
    graph = torch.randn(30, 64), torch.randint(0, 30, (2, 90))
    return sparse_(GraphNet(64, 8, "gcn" if kind == "gcn" else "sage", hidden=64), unit), graph, "shape"


def warm_statistics_(model: nn.Module) -> None:
    """Give batch norms statistics that are not 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]


NETWORKS = ("gpt", "conv", "gcn", "sage")


def skip_without_onnx(kind: str) -> None:
    """Skip what this torch cannot write as ONNX."""
    if kind in ("gpt", "conv") and torch.__version__ < "2.7":
        pytest.skip("torch.onnx of torch 2.6 has no varying sizes of linear layers, and no batch norm")


def other_size(kind: str) -> Any:
    """Input of another size than `network`'s."""
    generator = torch.Generator().manual_seed(5)
    if kind == "gpt":
        return (torch.randint(0, 256, (3, 9), generator=generator),)
    if kind == "conv":
        return (torch.randn(5, 3, 32, 32, generator=generator),)
    return torch.randn(17, 64, generator=generator), torch.randint(0, 17, (2, 50), generator=generator)


def relative_difference(found: Any, expected: Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    found = found[0] if isinstance(found, (tuple, list)) else found
    found, expected = found.detach(), expected.detach()
    difference = float((found - expected).abs().max())
    return difference / float(expected.abs().max()) if math.isfinite(difference) else math.inf
