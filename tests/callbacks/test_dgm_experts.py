"""Mixtures of experts in real runs of a Trainer: treatments of inactive weights, resuming, copies, torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from helpers.compatibility import SCHEDULE, STEPS, check
from helpers.compatibility_models import Sample
from helpers.expert_models import ADAPTERS, adapter, hugging_face
from helpers.models import ResumableLoader, make_trainer, weight_masks
from helpers.runs import SaveAt, differences, end_of
from lightning_estdgm import DGMCallback, DGMConfig, Selection, Units
from lightning_estdgm.method import BackwardSet

MODELS = ("Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3")
OWN = tuple(ADAPTERS)


def is_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


class Between(nn.Module):
    """Experts of one's own behind a linear layer."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(32, 32), experts

    def forward(self, x: Tensor) -> Any:
        return self.experts(self.first(x))


def sample(name: str, **sizes: int) -> Sample:
    """A LightningModule with a mixture of experts: one of transformers, or one with an adapter."""
    if name not in ADAPTERS:
        pytest.importorskip("transformers", minversion="5")  # experts in one parameter
        model = hugging_face(name, **sizes)
        return Sample(
            model,
            lambda generator: torch.randint(0, 32, (2, 8), generator=generator),
            lambda model, ids: model(input_ids=ids, labels=ids).loss,
        )
    experts = ADAPTERS[name][0](width=32, hidden=64)

    def loss(model: Any, x: Tensor) -> Tensor:
        return (model(x).reshape(12, 32) - x.sin()).square().mean()

    return Sample(Between(experts), lambda g: torch.randn(12, 32, generator=g), loss)


def settings(name: str, **change: Any) -> DGMConfig:
    """Blocks of 16 in the experts, computed by the cpu backend; linear layers stay dense."""
    adapters = [adapter(name)] if name in ADAPTERS else []
    config = DGMConfig(
        SCHEDULE, Units(size=16), selection=Selection(exclude=[is_linear], experts=adapters), backend="cpu"
    )
    return config.merged(**change)


def of_experts(callback: DGMCallback) -> dict[str, str]:
    return {d.name: d.backend for d in callback.decisions() if d.masked}


@pytest.mark.parametrize("name", [*MODELS, *OWN])
def test_a_run_keeps_every_invariant_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    outcome = check(lambda: sample(name), tmp_path, config=settings(name))
    assert len(outcome.layers) == (2 if name in ADAPTERS else 4)
    assert outcome.sparse == outcome.layers


@pytest.mark.parametrize("inactive", ["frozen", BackwardSet(0.8)], ids=["frozen", "backward set"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "sorted"])
def test_other_inactive_weights_train_as_dense_experts_do_and_resume(name: str, inactive: Any, tmp_path: Path) -> None:
    def fit(backend: str, *extra: pl.Callback, ckpt: Path | None = None) -> Any:
        pl.seed_everything(0, verbose=False)
        module = sample(name)
        callback = DGMCallback(settings(name, inactive=inactive, backend=backend))
        trainer = make_trainer(callback, Reseed(), *extra, max_steps=STEPS, max_epochs=-1)
        trainer.fit(module, ResumableLoader(module.batches(STEPS)), ckpt_path=ckpt)
        assert set(of_experts(callback).values()) == {backend}
        return module, callback, trainer

    stopped = tmp_path / "stopped.ckpt"
    straight = fit("cpu", SaveAt("on_train_batch_end", 7, stopped))
    assert not differences(end_of(*straight), end_of(*fit("cpu", ckpt=stopped)))
    dense = fit("dense")
    for ours, theirs in zip(straight[0].parameters(), dense[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    for weight, mask in weight_masks(straight[0], straight[1]).values():
        assert (torch.count_nonzero(weight[~mask]) > 0) == (inactive == "frozen")


class Reseed(pl.Callback):
    """For dropout: Lightning's checkpoints hold no state of generators."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


class Copies(pl.Callback):
    """Copies the module in mid-run, by deepcopy, pickle and torch.save; copies give the same loss."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 9:
            return
        model = module.model.eval()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        assert any(type(m).__name__.startswith("Masked") for m in model.modules())
        wanted = module.loss_of(model, batch)
        for twin in copies:
            assert not any(type(m).__name__.startswith("Masked") for m in twin.modules())
            loss = module.loss_of(twin, batch)
            torch.testing.assert_close(loss, wanted)
            loss.backward()
            self.seen += 1
        module.model.train()


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "einsum"])
def test_copies_in_mid_run_are_plain_and_give_the_same_loss(name: str) -> None:
    pl.seed_everything(0, verbose=False)
    module, copies = sample(name), Copies()
    trainer = make_trainer(DGMCallback(settings(name)), copies, max_steps=STEPS, max_epochs=-1)
    trainer.fit(module, ResumableLoader(module.batches(STEPS)))
    assert copies.seen == 3


@pytest.mark.parametrize("name", ["Mixtral", "sorted"])
def test_frozen_experts_stay_as_they_are(name: str) -> None:
    pl.seed_everything(0, verbose=False)
    module = sample(name)
    stacks = [p for p in module.parameters() if p.dim() == 3]
    for stack in stacks:
        stack.requires_grad_(False)
    before = [stack.clone() for stack in stacks]
    callback = DGMCallback(settings(name, selection={"exclude": []}, units={"size": "auto"}))
    trainer = make_trainer(callback, max_steps=STEPS, max_epochs=-1)
    with pytest.warns(UserWarning, match=f"{len(stacks)} layers with .* weights are frozen"):
        trainer.fit(module, ResumableLoader(module.batches(STEPS)))
    why = {d.name: d.why for d in callback.decisions() if len(d.shape) == 3}
    assert len(why) == len(stacks) > 0
    assert set(why.values()) == {"its weight takes no gradient"}
    assert all(torch.equal(a, b) for a, b in zip(stacks, before, strict=True))


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "bmm"])
def test_experts_compiled_without_a_graph_break_train_as_eager_ones(name: str) -> None:
    def fit(compiled: bool) -> Any:
        torch.compiler.reset()
        pl.seed_everything(0, verbose=False)
        module = sample(name, **({} if name in ADAPTERS else {"num_hidden_layers": 1}))
        if compiled:
            module.model.compile(fullgraph=True, backend="aot_eager")
        callback = DGMCallback(settings(name))
        trainer = make_trainer(callback, max_steps=STEPS, max_epochs=-1)
        trainer.fit(module, ResumableLoader(module.batches(STEPS)))
        assert set(of_experts(callback).values()) == {"cpu"}
        return module

    eager, compiled = fit(False), fit(True)
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
