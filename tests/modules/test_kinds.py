"""Kinds of layers from other libraries: recognised by name, masked as what they are."""

import pytest
import torch
from torch import nn

from helpers.swapped_layers import run, swapped
from lightning_estdgm.modules._candidates import find_candidates


def test_hugging_face_conv1d_is_masked_as_out_by_in():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    c, full = swapped(module=pytorch_utils.Conv1D(48, 32))
    assert c.has_operator
    assert c.weight.shape == (32, 48)
    assert c.shape == (48, 32)
    x = torch.randn(2, 3, 32)
    expected = x @ (c.module.weight * full.t()) + c.module.bias
    torch.testing.assert_close(c.module(x), expected)
    torch.testing.assert_close(c.module(x=x), expected)
    assert torch.count_nonzero(run(c.module, x)[2].t()[~full]) == 0


def test_pyg_linear_is_masked():
    pyg = pytest.importorskip("torch_geometric.nn")
    c, full = swapped(module=pyg.Linear(32, 48))
    assert c.has_operator
    x = torch.randn(5, 32)
    expected = x @ (c.module.weight * full).t() + c.module.bias
    torch.testing.assert_close(c.module(x), expected)
    torch.testing.assert_close(c.module(x=x), expected)
    gcn = nn.ModuleList([pyg.GCNConv(16, 16), nn.Linear(16, 2)])
    verdicts = {found.name: (found.masked, found.why) for found in find_candidates(gcn)}
    assert verdicts == {"0.lin": (True, ""), "1": (False, "output head")}
