"""Which adapter serves a strategy, and how others add theirs."""

import re
from collections.abc import Iterator
from typing import Any

import lightning.pytorch.strategies as pl_strategies
import pytest
import torch
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from torch import nn

from lightning_estdgm import _registry
from lightning_estdgm.distributed._shard import Shard
from lightning_estdgm.distributed.adapters._protocol import ENTRY_POINT_GROUP, Adapter, adapter_for, adapters, shard_of
from lightning_estdgm.distributed.adapters.whole import Whole
from lightning_estdgm.engine._controller import DGMController


@pytest.mark.parametrize(
    ("strategy", "adapter"),
    [
        (pl_strategies.SingleDeviceStrategy("cpu"), "base"),
        (pl_strategies.DDPStrategy(), "base"),
        (FabricDDP(), "base"),
        (pl_strategies.FSDPStrategy(), "fsdp1"),
        (pl_strategies.ModelParallelStrategy(), "fsdp2"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__module__,
)
def test_strategies_are_known_by_their_class(strategy: Any, adapter: str) -> None:
    assert adapter_for(strategy).name == adapter
    users = type("Users", (type(strategy),), {})
    users_own = object.__new__(users)
    assert adapter_for(users_own).name == adapter


@pytest.mark.parametrize(
    ("bases", "why"),
    [
        (("DeepSpeedStrategy", "DDPStrategy"), ": it partitions weights where nothing can mask them"),
        (("XLAStrategy", "DDPStrategy"), ": it was never tried on XLA devices"),
        (("SingleDeviceXLAStrategy", "SingleDeviceStrategy"), ": it was never tried on XLA devices"),
        (("HivemindStrategy",), ""),
    ],
)
def test_others_are_refused_although_they_are_subclasses(bases: tuple[str, ...], why: str) -> None:
    cls: type = object
    for name in reversed(bases):
        cls = type(name, (cls,), {})
    known = sorted({strategy for adapter in adapters().values() for strategy in adapter.strategies})
    assert {"DDPStrategy", "FSDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy"} <= {*known}
    message = f"expected a strategy out of {known} (or a subclass), got {bases[0]}{why}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapter_for(cls())


class DeepSpeedAdapter:
    """What another package could bring."""

    name = "deepspeed"
    strategies = ("DeepSpeedStrategy",)

    def check(self, strategy: Any) -> None:
        pass

    def model(self, strategy: Any) -> nn.Module:
        return strategy.model

    def shard(self, model: nn.Module, module: nn.Module, weight_name: str, transposed: bool) -> Shard | None:
        return None


class Point:
    def __init__(self, name: str, found: Any) -> None:
        self.name, self.value, self.found = name, f"other_package:{name}", found

    def load(self) -> Any:
        return self.found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Point]]:
    points: list[Point] = []
    plain = _registry.entry_points

    def entry_points(**selection: Any) -> Any:
        return points if selection == {"group": ENTRY_POINT_GROUP} else plain(**selection)

    monkeypatch.setattr(_registry, "entry_points", entry_points)
    adapters.cache_clear()
    yield points
    monkeypatch.undo()
    adapters.cache_clear()


def test_an_adapter_of_another_package_is_found_and_comes_first(installed: list[Point]) -> None:
    installed.append(Point("deepspeed", DeepSpeedAdapter()))
    first, *others, last = adapters()
    assert (first, last) == ("deepspeed", "base")
    assert {"fsdp1", "fsdp2"} <= {*others}
    assert isinstance(DeepSpeedAdapter(), Adapter)
    strategy = type("DeepSpeedStrategy", (), {})()
    assert adapter_for(strategy).name == "deepspeed"


@pytest.mark.parametrize(
    ("point", "error", "message"),
    [
        (
            Point("odd", object()),
            TypeError,
            r"entry point 'odd' \(other_package:odd\) must be an Adapter \(name, strat",
        ),
        (
            Point("twice", type("Twice", (DeepSpeedAdapter,), {"name": "fsdp2"})()),
            ValueError,
            "'fsdp2' is already taken",
        ),
    ],
)
def test_bad_adapters_are_refused(installed: list[Point], point: Point, error: type[Exception], message: str) -> None:
    installed.append(point)
    with pytest.raises(error, match=message):
        adapters()


def test_a_plain_weight_is_whole() -> None:
    layer = nn.Linear(4, 6)
    shard = shard_of(nn.Sequential(layer), layer, "weight", transposed=True)
    assert isinstance(shard, Whole)
    assert (shard.shape, shard.groups) == ((4, 6), ())
    assert shard.local(layer.weight).data_ptr() == layer.weight.data_ptr()


def test_a_flat_weight_that_no_adapter_knows_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    net[0].weight = nn.Parameter(torch.zeros(24))
    with pytest.raises(ValueError, match=r"layer '0': the weight of a Linear must have at least two .* shape \(24,\)"):
        DGMController(net, torch.optim.SGD(net.parameters(), 0.1), total_steps=30, audit=False)
