"""Graphs of models by torch.export."""

import torch
from torch import nn

from lightning_estdgm.export._program import exported_program
from lightning_estdgm.export.targets._protocol import ExportInput


def test_a_process_traces_as_many_models_as_it_likes() -> None:
    """Torch 2.6 by itself refuses the ninth ``nn.Sequential``."""
    for width in range(1, 11):
        model, x = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)), torch.randn(3, 4)
        program, _ = exported_program(ExportInput(model, (x,), {}, "batch", "fp32"))
        torch.testing.assert_close(program.module()(x), model(x))
