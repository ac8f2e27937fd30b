"""The state of one masked weight, whatever layer it belongs to."""

import pytest
import torch
from torch import nn

from helpers.controller_runs import BLOCKS, STEPS, adamw, fit, full_masks, run
from lightning_estdgm.engine.controller import DGMController


def test_hugging_face_conv1d_layers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = nn.Sequential(pytorch_utils.Conv1D(128, 32), nn.Tanh(), pytorch_utils.Conv1D(64, 128), nn.Linear(64, 4))
    optimizer = adamw(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
        for _ in fit(model, optimizer, dgm):
            for name, mask in full_masks(dgm).items():
                assert torch.count_nonzero(model.get_submodule(name).weight[~mask.t()]) == 0
        assert dgm.masks()["0"].shape == (8, 2)
        assert [d.shape for d in dgm.decisions()] == [(32, 128), (128, 64), (4, 64)]
        assert dgm.density == pytest.approx(0.1, abs=256 / (32 * 128 + 128 * 64))


def test_pyg_linear_layers():
    pyg = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    model = nn.Sequential(pyg.Linear(32, 128), nn.Tanh(), pyg.Linear(128, 64), nn.Linear(64, 4))
    optimizer = adamw(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
        run(model, optimizer, dgm)
        for name, mask in full_masks(dgm).items():
            assert torch.count_nonzero(model.get_submodule(name).weight[~mask]) == 0
        assert [d.backend for d in dgm.decisions()] == ["cpu", "cpu", "dense"]
