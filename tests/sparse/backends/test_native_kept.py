"""Weights that the native backend keeps in the order of use: laid out once while they are the same, anew after."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.native_counts import fit_with_validation, kept_bytes, packings
from lightning_estdgm.sparse._linear import masked_linear
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends.native import _kept

UNITS = (64, 32, 16, 4, 1, (16, 1), (1, 4))


def case(unit: Any = 16, side: int = 128) -> tuple[Tensor, nn.Parameter, BlockTopology]:
    torch.manual_seed(0)
    rows, columns = (unit, unit) if isinstance(unit, int) else unit
    topology = BlockTopology.from_mask(torch.rand(side // rows, side // columns) < 0.4, unit)
    return torch.randn(9, side), nn.Parameter(torch.randn(side, side)), topology


def checked(x: Tensor, weight: Tensor, topology: BlockTopology) -> int:
    """Compute it, compare it with the masked product, and return how often the weight was laid out."""
    before = packings()
    found = masked_linear(x, weight, None, topology, backend="native")
    torch.testing.assert_close(found, F.linear(x, weight * topology.weight_mask()), rtol=1e-4, atol=1e-4)
    return packings() - before


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_it_is_laid_out_for_one_call_then_once_for_all(unit: Any) -> None:
    x, weight, topology = case(unit)
    with torch.no_grad():
        assert [checked(x, weight, topology) for _ in range(5)] == [1, 1, 0, 0, 0]
        assert checked(torch.randn(40, 128), weight, topology) == 0, "whatever the input"


def double_(weight: nn.Parameter, topology: BlockTopology) -> None:
    weight.mul_(2)


def load_state_dict(weight: nn.Parameter, topology: BlockTopology) -> None:
    layer = nn.Linear(128, 128, bias=False)
    layer.weight = weight
    layer.load_state_dict({"weight": torch.randn(128, 128)})


def other_data(weight: nn.Parameter, topology: BlockTopology) -> None:
    weight.data = torch.randn(128, 128)


def other_data_twice(weight: nn.Parameter, topology: BlockTopology) -> None:
    for _ in range(8):  # memory that was freed may be given out again
        weight.data = torch.randn(128, 128)
        gc.collect()


def through_data(weight: nn.Parameter, topology: BlockTopology) -> None:
    weight.data.mul_(3)  # PyTorch counts no version


def one_through_data(weight: nn.Parameter, topology: BlockTopology) -> None:
    row, column = topology.weight_mask().nonzero()[1234].tolist()
    weight.data[row, column] += 2.0


def through_numpy(weight: nn.Parameter, topology: BlockTopology) -> None:
    weight.detach().numpy()[:] = 0.5


def transposed(weight: nn.Parameter, topology: BlockTopology) -> None:
    weight.data = weight.data.t()


def another_mask(weight: nn.Parameter, topology: BlockTopology) -> None:
    topology.update_(~topology.mask())


CHANGES: list[Callable[[nn.Parameter, BlockTopology], None]] = [
    double_, load_state_dict, other_data, other_data_twice, through_data, one_through_data, through_numpy, transposed,
    another_mask,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("unit", [64, 16, 1], ids=str)
def test_right_at_once_after_a_change(change: Callable[[nn.Parameter, BlockTopology], None], unit: int) -> None:
    x, weight, topology = case(unit)
    with torch.no_grad():
        for _ in range(3):
            checked(x, weight, topology)
        change(weight, topology)
        assert checked(x, weight, topology) == 1
        assert sum(checked(x, weight, topology) for _ in range(3)) <= 1


def test_another_topology_and_weights_of_one_memory() -> None:
    x, weight, topology = case()
    other = BlockTopology.from_mask(~topology.mask(), 16)
    with torch.no_grad():
        for _ in range(3):
            checked(x, weight, topology)
        assert checked(x, weight, other) == 1
        halves = torch.randn(2, 128, 128)
        first, second = nn.Parameter(halves[0]), nn.Parameter(halves[1])
        for _ in range(3):
            checked(x, first, topology)
            checked(x, second, topology)


def test_memory_is_bounded_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, topology = case()
    gc.collect()
    before = kept_bytes()
    with torch.no_grad():
        for _ in range(3):
            checked(x, weight, topology)
        assert kept_bytes() - before == topology.nnz * 16 * 16 * 4
        weight.add_(1)
        checked(x, weight, topology)
        assert kept_bytes() == before, "the first forward of another version frees it"
        for _ in range(3):
            checked(x, weight, topology)
        del weight
        gc.collect()
        assert kept_bytes() == before, "it ends with the weight"
        monkeypatch.setattr(_kept, "_MOST_BYTES", before + 10)
        weight = nn.Parameter(torch.randn(128, 128))
        assert [checked(x, weight, topology) for _ in range(3)] == [1, 1, 1], "no room: laid out for each call"
        assert kept_bytes() == before


def test_inference_mode_and_gradients() -> None:
    x, weight, topology = case()
    with torch.inference_mode():
        made = torch.randn(128, 128)  # without a version
        assert [checked(x, made, topology) for _ in range(3)] == [1, 1, 1]
        assert [checked(x, weight, topology) for _ in range(3)] == [1, 1, 0]
    x.requires_grad_()
    masked_linear(x, weight, None, topology, backend="native").sum().backward()
    masked = weight.detach() * topology.weight_mask()
    torch.testing.assert_close(x.grad, masked.sum(0).expand(9, 128), rtol=1e-4, atol=1e-4)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128), nn.Linear(128, 8))
        self.packed_in: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def counted(self, where: str) -> Iterator[None]:
        before = packings()
        yield
        self.packed_in.append((where, packings() - before))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        with self.counted("training"):
            out = self.net(batch[0])
        return out.square().mean()

    def validation_step(self, batch: list[Tensor]) -> None:
        with self.counted("validation"):
            found = self.net(batch[0])
        x = batch[0]
        for layer in self.net:
            x = layer(x) if isinstance(layer, nn.GELU) else F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)  # inactive weights are zero

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_a_validation_epoch_lays_out_each_weight_twice(tmp_path: Path) -> None:
    packings()
    torch.manual_seed(0)
    inputs, model = torch.randn(48, 128), Net()
    fit_with_validation(model, inputs, tmp_path)
    counts = model.packed_in[-7:]
    assert counts[0] == ("training", 2), "two layers beside the head, whose weights each step changes"
    assert counts[1:] == [("validation", n) for n in (2, 2, 0, 0, 0, 0)]
