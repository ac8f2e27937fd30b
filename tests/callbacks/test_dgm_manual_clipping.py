"""Manual optimization that accumulates and clips by itself, against automatic optimization that does the same."""

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from helpers.models import NO_VALIDATION_LOADER, TinyMLP, make_trainer
from helpers.runs import SCHEDULE, STEPS
from lightning_estdgm import DGMCallback, DGMConfig, Units

pytestmark = pytest.mark.filterwarnings(NO_VALIDATION_LOADER)

CLIP = 0.05  # far below the norms: every step is clipped
BATCHES = 8


class Manual(TinyMLP):
    def __init__(self, factor: int, backward: str, algorithm: str, clip: str = "clip_gradients") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.factor, self.how, self.algorithm, self.clip = factor, backward, algorithm, clip

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch) / self.factor
        if self.how == "manual_backward":
            self.manual_backward(loss)
        else:
            loss.backward()
        if (batch_idx + 1) % self.factor:
            return
        optimizer = self.optimizers()
        if self.clip == "clip_gradients":
            self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm=self.algorithm)
        else:
            self.dgm.controller.mask_gradients()
            torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


class Automatic(TinyMLP):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


def fit(module: TinyMLP, factor: int, **settings: Any) -> tuple[TinyMLP, DGMCallback]:
    callback = DGMCallback(DGMConfig(schedule=SCHEDULE, units=Units(size=1), backend="dense"), total_steps=STEPS)
    module.dgm = callback
    torch.manual_seed(0)
    for layer in module.net:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    trainer = make_trainer(callback, max_epochs=STEPS * factor // BATCHES, **settings)
    trainer.fit(module, TinyMLP.batches(BATCHES))
    assert "clip_gradients" not in vars(trainer.precision_plugin)
    return module, callback


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("backward", ["manual_backward", "loss.backward"])
@pytest.mark.parametrize("factor", [1, 2])
def test_clipping_by_hand_equals_clipping_by_the_trainer(factor: int, backward: str, algorithm: str) -> None:
    clips = {"gradient_clip_val": CLIP, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": factor}
    automatic, expected = fit(Automatic(), factor, **clips)
    module, callback = fit(Manual(factor, backward, algorithm), factor)
    assert callback.controller.steps == expected.controller.steps == STEPS
    assert all(torch.equal(mask, expected.masks()[name]) for name, mask in callback.masks().items())
    for a, b in zip(module.parameters(), automatic.parameters(), strict=True):
        assert torch.equal(a, b)


def test_torchs_own_clipping_equals_it_where_gradients_are_masked_before() -> None:
    automatic, _ = fit(Automatic(), 1, gradient_clip_val=CLIP)
    module, _ = fit(Manual(1, "loss.backward", "norm", "torch"), 1)
    for a, b in zip(module.parameters(), automatic.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_window_does_not_depend_on_the_grad_scale() -> None:
    class Scaled(Manual):
        def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
            super().clip_gradients(*args, **kwargs)
            if self.dgm.controller.steps == 3:
                self.window = self.dgm.state_dict()["layers"]["net.0"]["window"]["gradient"]

    windows = []
    for scale in (1.0, 1024.0):
        module = Scaled(1, "manual_backward", "norm")
        fit(module, 1, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))])
        windows.append(module.window)
    assert windows[0].abs().max() > 0
    torch.testing.assert_close(*windows, rtol=1e-2, atol=1e-3)
