"""Packed storage of models without storage: values layer by layer, the same as on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_estdgm import DGMCallback, DGMConfig
from lightning_estdgm.config import Selection, Units
from lightning_estdgm.engine._late_values import LateValues
from lightning_estdgm.method._schedules import ConstantDensity
from lightning_estdgm.tools._quiet import QUIET_TRAINER


class Net(LightningModule):
    """Embedding, masked layers with a norm between, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.build()

    def build(self) -> None:
        self.tokens = nn.Embedding(11, 16)
        self.up = nn.Linear(16, 64)
        self.norm = nn.BatchNorm1d(64)
        self.down = nn.Linear(64, 16, bias=False)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.tokens.weight

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.down(self.norm(self.up(self.tokens(batch))).relu())), batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class BuiltLate(Net):
    """The same, built on the meta device in `configure_model`."""

    def __init__(self) -> None:
        LightningModule.__init__(self)

    def configure_model(self) -> None:
        if not hasattr(self, "up"):
            with torch.device("meta"):
                self.build()


class Start(Callback):
    """Keeps the state at the first step."""

    state: dict[str, Tensor]
    sizes: dict[str, torch.Size]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.sizes = {name: parameter.shape for name, parameter in pl_module.named_parameters()}


def fit(module: LightningModule, block_size: int = 4, steps: int = 4) -> Start:
    config = DGMConfig(
        ConstantDensity(0.25, update_every=2, observe_steps=1),
        units=Units(size=block_size),
        selection=Selection(exclude=["head"]),
        storage="packed",
    )
    start = Start()
    batches = DataLoader(torch.arange(11).repeat(steps), batch_size=11)
    trainer = Trainer(**QUIET_TRAINER, max_steps=steps, logger=False, callbacks=[DGMCallback(config), start])
    trainer.fit(module, batches)
    return start


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("make", [on_meta, BuiltLate])
def test_values_are_those_of_a_start_on_a_device(make: Any, block_size: int) -> None:
    torch.manual_seed(3)
    here = Net()
    expected = fit(here, block_size)
    late = make()
    torch.manual_seed(3)
    got = fit(late, block_size)
    assert got.sizes == expected.sizes
    assert got.sizes["up.weight"].numel() == 16 * 64 // 4
    assert got.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        assert torch.equal(got.state[name], value), name
    for name, value in here.state_dict().items():
        assert torch.equal(late.state_dict()[name], value), name
    assert late.head.weight is late.tokens.weight
    torch.manual_seed(4)
    assert not torch.equal(fit(make(), block_size).state["up.weight"], expected.state["up.weight"])


def test_the_dense_network_never_exists_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(Net):
        def build(self) -> None:
            self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
            self.head = nn.Linear(64, 4)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.head(self.layers(batch[:, None].float().expand(-1, 64))).square().mean()

    with torch.device("meta"):
        module = Deep()
    give, most = LateValues._give, []

    def counted(self: LateValues, layer: nn.Module) -> nn.Module:
        given = give(self, layer)
        here = [p for p in module.parameters() if not p.is_meta]
        most.append(sum(p.numel() for p in here if p.dim() > 1))
        return given

    monkeypatch.setattr(LateValues, "_give", counted)
    fit(module)
    assert most[:6] == [64 * 64 * (1 + before / 4) for before in range(6)]
    assert most[6:] == [64 * 64 * 6 / 4 + 64 * 4]


def test_a_module_without_first_values_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(16))

    class Scaled(Net):
        def build(self) -> None:
            super().build()
            self.scale = Scale()

    with torch.device("meta"):
        module = Scaled()
    with pytest.raises(ValueError, match=r"'scale' \(Scale\) lies on the meta device and has no reset_parameters"):
        LateValues(module)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_what_has_values_keeps_them() -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    late = LateValues(model)
    assert not late.reach(model.up)
    late.finish()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
