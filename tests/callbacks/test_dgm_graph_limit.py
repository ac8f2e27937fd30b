"""A compiled model stays compiled, however many layers turn sparse one after the other."""

import itertools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from helpers.models import Batches, make_trainer
from lightning_estdgm import DGMCallback, DGMConfig, EstDgm, Units
from lightning_estdgm._environment import dynamo_settings
from lightning_estdgm.callbacks._internal.graph_limit import STATIC_SHAPES
from lightning_estdgm.sparse.autotune._choice import BackendSelector

LIMITS = tuple(dynamo_settings(torch._dynamo.config, recompile_limit=0, accumulated_recompile_limit=0))


class FourShapes(pl.LightningModule):
    """Layers of different widths, each of which turns sparse at a density of its own."""

    def __init__(self, backend="eager"):
        super().__init__()
        torch.manual_seed(0)
        widths = (128, 144, 160, 176, 192)
        self.net = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)), nn.Linear(192, 1))
        self.graphs = CompileCounterWithBackend(backend)
        self.compiled = [torch.compile(self.net, backend=self.graphs)]  # in a list: not registered a second time

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.compiled[0](batch).squeeze(-1), batch[:, 0] * batch[:, 1])

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def _turns_sparse_by_width(case, names):
    threshold = 0.2 + 0.1 * (case.out_features - 128) / 16
    return {name: 2.0 if name == "dense" and case.density < threshold else 1.0 for name in names}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return Batches([torch.randn(n, 128, generator=generator) for n in (16, 16, 16, 16, 16, 16, 16, 9)])


def test_crossings_of_four_shapes_stay_within_the_limit_of_graphs(monkeypatch, batches):
    monkeypatch.setitem(BackendSelector.__init__.__kwdefaults__, "measure", _turns_sparse_by_width)
    torch._dynamo.reset()
    before = [getattr(torch._dynamo.config, name) for name in LIMITS]
    model, callback = FourShapes(), DGMCallback(DGMConfig(EstDgm(update_every=4, observe_steps=2), Units(size=16)))
    with torch._dynamo.config.patch(dynamo_settings(torch._dynamo.config, fail_on_recompile_limit_hit=True)):
        make_trainer(callback, max_epochs=8).fit(model, batches, batches)
    assert {d.final_backend for d in callback.decisions() if d.masked} == {"cpu"}
    assert model.graphs.frame_count > before[0]  # or the test shows nothing
    assert [getattr(torch._dynamo.config, name) for name in LIMITS] == before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at them
@pytest.mark.parametrize("size", [1, 16])
def test_packed_weights_of_changing_sizes_stay_within_it_and_train_as_uncompiled(size, batches):
    ends, settings = [], [*LIMITS, *STATIC_SHAPES]
    for is_compiled in (True, False):
        torch._dynamo.reset()
        before = [getattr(torch._dynamo.config, name) for name in settings]
        model = FourShapes("aot_eager")
        if not is_compiled:
            model.compiled = [model.net]
        callback = DGMCallback(DGMConfig(EstDgm(update_every=4, observe_steps=2), Units(size=size), storage="packed"))
        with torch._dynamo.config.patch(dynamo_settings(torch._dynamo.config, fail_on_recompile_limit_hit=True)):
            make_trainer(callback, max_epochs=12).fit(model, batches, batches)
        assert [getattr(torch._dynamo.config, name) for name in settings] == before
        ends.append((dict(model.state_dict()), callback.masks()))
        assert callback.controller.updates > 14
        assert model.graphs.frame_count <= 14 * is_compiled  # and not two for each update
    torch.testing.assert_close(*ends)
