"""Packed storage of models without storage: values layer by layer, the same as on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_estdgm import DGMCallback, DGMConfig
from lightning_estdgm.config import Selection, Units
from lightning_estdgm.engine._late_values import LateValues
from lightning_estdgm.method._schedules import ConstantDensity
from lightning_estdgm.recipes.gpt import GPT
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


def start_of_a_gpt(device: str, tied: bool, seed: int = 3) -> Start:
    torch.manual_seed(seed)
    with torch.device(device):
        module = GPT(width=32, layers=2, heads=2, context=8, tied=tied, vocabulary=64)
    if device == "meta":
        torch.manual_seed(seed)
    config = DGMConfig(ConstantDensity(0.25, update_every=2), units=Units(size=4), storage="packed")
    start = Start()
    trainer = Trainer(
        **QUIET_TRAINER, max_steps=2, logger=False, limit_val_batches=0, callbacks=[DGMCallback(config), start]
    )
    tokens = torch.arange(36).view(4, 9)
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=2)
    trainer.fit(module, loader, loader)
    return start


@pytest.mark.parametrize("tied", [False, True])
def test_a_gpt_starts_with_the_values_of_its_own_initialisation(tied: bool) -> None:
    expected, got = start_of_a_gpt("cpu", tied), start_of_a_gpt("meta", tied)
    assert got.sizes == expected.sizes
    for name, value in expected.state.items():
        assert torch.equal(got.state[name], value), name
    torch.manual_seed(3)
    dense = GPT(width=32, layers=2, heads=2, context=8, tied=tied, vocabulary=64)
    for embedding in ("tokens.weight", "positions.weight", "head.weight"):
        assert torch.equal(got.state[embedding], dense.state_dict()[embedding])
    query = got.state["blocks.0.query.weight"]
    active = query != 0
    scale = (query[active] / dense.blocks[0].query.weight[active]).unique()  # for the layer's density
    assert scale.max() - scale.min() < 1e-5


class Small(nn.Module):
    """A model in the way of nanoGPT: values by `_init_weights`, and more beside it, if asked."""

    def __init__(self, *, beside: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.last = nn.Linear(8, 3)
        self.apply(self._init_weights)
        if beside:
            nn.init.normal_(self.last.weight, std=0.5)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.25)  # the bias keeps its own values
        if module is self.inner:
            nn.init.trunc_normal_(self.inner[2].weight, std=0.125)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = Small()
        self.after = nn.Linear(8, 8)


@pytest.mark.parametrize("make", [Small, Nested])
def test_a_hook_for_each_module_gives_the_values_of_a_start_on_a_device(make: Any) -> None:
    torch.manual_seed(3)
    here, after = make(), torch.rand(3)
    with torch.device("meta"):
        late = make()
    torch.manual_seed(3)
    values = LateValues(late)
    values.reach((late.small if make is Nested else late).inner[0])
    assert (late.small if make is Nested else late).last.weight.is_meta
    values.finish()
    assert torch.equal(torch.rand(3), after)
    for name, value in here.state_dict().items():
        assert torch.equal(late.state_dict()[name], value), name


def test_a_model_of_transformers_starts_with_its_own_values() -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    torch.manual_seed(3)
    here = transformers.LlamaForCausalLM(config)
    with torch.device("meta"):
        late = transformers.LlamaForCausalLM(config)
    torch.manual_seed(3)
    LateValues(late).finish()
    for name, value in (*here.state_dict().items(), *here.named_buffers()):
        assert torch.equal(late.state_dict().get(name, dict(late.named_buffers()).get(name)), value), name


def test_values_that_a_constructor_gives_by_other_code_are_named() -> None:
    with torch.device("meta"):
        model = Small(beside=True)
    with pytest.warns(RuntimeWarning, match=r"1 parameters on the meta device \(last.weight\) were given first values"):
        LateValues(model)


def test_a_hook_that_cannot_be_tried_is_named() -> None:
    class Asks(Small):
        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.normal_(module.weight)
            elif isinstance(module, nn.Linear) and hasattr(self, "last") and module.weight.sum() > 0:
                pass

    with torch.device("meta"):
        model = Asks.__new__(Asks)
        nn.Module.__init__(model)
        model.last = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="first values of Linear cannot be drawn layer by layer: on the meta device"):
        LateValues(model)


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
