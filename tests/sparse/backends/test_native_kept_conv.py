"""Weights of convolutions that the native backend keeps in the order of use."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.native_counts import fit_with_validation, kept_bytes, packings
from lightning_estdgm.sparse._conv import masked_conv2d
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology

UNITS = (64, 32, 16, 8, 4, 1, (16, 1), (2, 1), (1, 4), (1, 8), "1 tap")
SAME = ConvGeometry((3, 3), padding=(1, 1))
GEOMETRIES = {
    "same": SAME,
    "odd": ConvGeometry((3, 2), (2, 1), (2, 1), (1, 2)),
    "pointwise": ConvGeometry((1, 1)),
    "strided": ConvGeometry((1, 1), (2, 2)),
}
Case = tuple[Tensor, nn.Parameter, BlockTopology, ConvGeometry]


def case(unit: Any = 16, geometry: ConvGeometry = SAME, channels_last: bool = False, side: int = 64) -> Case:
    torch.manual_seed(0)
    taps = math.prod(geometry.kernel_size) if unit == "1 tap" else 1
    size = 1 if unit == "1 tap" else unit
    rows, columns = (size, size) if isinstance(size, int) else size
    mask = torch.rand(side // rows, side * taps // columns) < 0.4
    mask[0, 0] = True
    topology = BlockTopology.from_mask(mask, size)
    weight = torch.randn(side, side, *geometry.kernel_size)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return torch.randn(2, side, 7, 6), nn.Parameter(weight), topology, geometry


def mask_of(weight: Tensor, topology: BlockTopology) -> Tensor:
    mask = topology.weight_mask()
    return mask.view_as(weight) if mask.numel() == weight.numel() else mask[:, :, None, None]


def checked(x: Tensor, weight: Tensor, topology: BlockTopology, geometry: ConvGeometry) -> int:
    """Compute it, compare it with the masked convolution, and return how often the weight was laid out."""
    before = packings()
    found = masked_conv2d(x, weight, None, topology, geometry, backend="native")
    masked = weight * mask_of(weight, topology)
    expected = F.conv2d(x, masked, None, geometry.stride, geometry.padding, geometry.dilation)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    return packings() - before


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_it_is_laid_out_for_one_call_then_once_for_all(unit: Any, geometry: ConvGeometry, channels_last: bool) -> None:
    x, weight, topology, geometry = case(unit, geometry, channels_last)
    with torch.no_grad():
        assert [checked(x, weight, topology, geometry) for _ in range(4)] == [1, 1, 0, 0]
        other = torch.randn(5, 64, 9, 13)
        assert checked(other, weight, topology, geometry) == 0, "whatever the images"
        row = mask_of(weight, topology).expand_as(weight).nonzero()
        weight.data[tuple(row[len(row) // 2].tolist())] += 2.0  # of one tap; PyTorch counts no version
        assert checked(x, weight, topology, geometry) == 1


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_what_is_kept_gives_the_same_bits(unit: Any) -> None:
    x, weight, topology, geometry = case(unit)
    with torch.no_grad():
        first, *others = (masked_conv2d(x, weight, None, topology, geometry, backend="native") for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def double_(weight: nn.Parameter, topology: BlockTopology) -> None:
    weight.mul_(2)


def load_state_dict(weight: nn.Parameter, topology: BlockTopology) -> None:
    layer = nn.Conv2d(64, 64, 3, bias=False)
    layer.weight = weight
    layer.load_state_dict({"weight": torch.randn(64, 64, 3, 3)})


def other_data(weight: nn.Parameter, topology: BlockTopology) -> None:
    for _ in range(8):  # memory that was freed may be given out again
        weight.data = torch.randn(64, 64, 3, 3)
        gc.collect()


def through_numpy(weight: nn.Parameter, topology: BlockTopology) -> None:
    weight.detach().numpy()[:] = 0.5


def other_memory_format(weight: nn.Parameter, topology: BlockTopology) -> None:
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def swapped_taps(weight: nn.Parameter, topology: BlockTopology) -> None:
    weight.data = weight.data.flip(2)


def another_mask(weight: nn.Parameter, topology: BlockTopology) -> None:
    topology.update_(~topology.mask())


CHANGES: list[Callable[[nn.Parameter, BlockTopology], None]] = [
    double_, load_state_dict, other_data, through_numpy, other_memory_format, swapped_taps, another_mask,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("unit", [64, 16, 1, "1 tap"], ids=str)
def test_right_at_once_after_a_change(change: Callable[[nn.Parameter, BlockTopology], None], unit: Any) -> None:
    x, weight, topology, geometry = case(unit)
    with torch.no_grad():
        for _ in range(3):
            checked(x, weight, topology, geometry)
        change(weight, topology)
        assert checked(x, weight, topology, geometry) == 1
        assert sum(checked(x, weight, topology, geometry) for _ in range(3)) <= 1


@pytest.mark.parametrize("unit", [16, 1, "1 tap"], ids=str)
def test_one_weight_in_two_layers_of_other_dilation(unit: Any) -> None:
    x, weight, topology, geometry = case(unit)
    wide = ConvGeometry((3, 3), padding=(30, 30), dilation=(30, 30))  # so far that single weights have another order
    with torch.no_grad():
        for walked in (geometry, geometry, geometry, wide, wide, wide, geometry):
            checked(x, weight, topology, walked)


def test_memory_is_counted_and_freed() -> None:
    gc.collect()
    before = kept_bytes()
    for unit, each in ((16, 16 * 16 * 9), ("1 tap", 1)):
        x, weight, topology, geometry = case(unit)
        with torch.no_grad():
            for _ in range(3):
                checked(x, weight, topology, geometry)
            assert kept_bytes() - before == topology.nnz * each * 4
            weight.add_(1)
            checked(x, weight, topology, geometry)
        assert kept_bytes() == before, "the first forward of another version frees it"
        del weight
        gc.collect()


def test_gradients_are_of_the_weight_as_it_is() -> None:
    x, weight, topology, geometry = case()
    with torch.no_grad():
        for _ in range(3):
            checked(x, weight, topology, geometry)
    x.requires_grad_()
    masked_conv2d(x, weight, None, topology, geometry, backend="native").sum().backward()
    expected = torch.autograd.grad(F.conv2d(x, weight * mask_of(weight, topology), padding=1).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-3)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.Flatten(), nn.Linear(64 * 25, 8)
        )
        self.packed_in: list[int] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: list[Tensor]) -> None:
        before = packings()
        found = self.net(batch[0])
        self.packed_in.append(packings() - before)
        x = batch[0]
        for layer in self.net:
            x = F.conv2d(x, layer.weight, layer.bias, padding=layer.padding) if hasattr(layer, "stride") else layer(x)
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)  # inactive weights are zero

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_a_validation_epoch_lays_out_each_weight_twice(tmp_path: Path) -> None:
    packings()
    torch.manual_seed(0)
    inputs, model = torch.randn(48, 32, 5, 5), Net()
    fit_with_validation(model, inputs, tmp_path)
    assert model.packed_in[-6:] == [2, 2, 0, 0, 0, 0]
