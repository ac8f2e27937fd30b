"""The state of one masked weight, whatever layer it belongs to."""

import pytest
import torch
from torch import nn

from helpers.controller_runs import BLOCKS, STEPS, adamw, fit, full_masks, run
from helpers.masked_weights import candidates_of, numbered
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.engine._observation import observe


def test_hugging_face_conv1d_layers():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = nn.Sequential(pytorch_utils.Conv1D(128, 32), nn.Tanh(), pytorch_utils.Conv1D(64, 128), nn.Linear(64, 4))
    optimizer = adamw(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS, audit=False) as dgm:
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
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS, audit=False) as dgm:
        run(model, optimizer, dgm)
        for name, mask in full_masks(dgm).items():
            assert torch.count_nonzero(model.get_submodule(name).weight[~mask]) == 0
        assert [d.backend for d in dgm.decisions()] == ["cpu", "cpu", "dense"]


# ------------------------------------------------------------------ one weight by itself


def test_a_mask_is_taken_over_with_its_counts_and_leaves_the_weight_alone():
    weight = numbered([[1, 0, 1, 0], [0, 0, 0, 1]], block_size=2)
    before = weight.weight.clone()
    assert (weight.units, weight.unit_size, weight.active, weight.part_active) == (8, 4, 3, [3])
    assert (weight.density, weight.is_dense, weight.explored_units) == (3 / 8, False, 3)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    weight.set_mask(mask, explored=~mask)
    assert (weight.active, weight.density, weight.explored_units) == (0, 0.0, 8)
    weight.set_mask(~mask)
    assert weight.is_dense
    assert torch.equal(weight.weight, before)
    weight.whole_mask().fill_(False)
    assert weight.mask.all()


def test_active_units_are_counted_for_each_fused_matrix():
    fused = candidates_of((12, 4), (2, 2), names=("qkv", "last"))[0]
    weight = MaskedWeight(fused, 1)
    assert weight.part_active == [16, 16, 16]
    mask = torch.zeros(12, 4, dtype=torch.bool)
    mask[:2] = mask[8] = True
    weight.set_mask(mask)
    assert weight.part_active == [8, 0, 4]


def test_optimizer_state_is_cleared_at_the_given_units_and_counts_of_steps_stay():
    weight = numbered([[1, 0], [0, 1]], block_size=2)
    other = torch.nn.Parameter(torch.ones(4, 4))
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 4), "row": torch.ones(4)}
    states = {weight.parameter: state, other: {"exp_avg": torch.ones(4, 4)}}
    weight.clear_optimizer_state_(states, torch.tensor([[True, False], [False, False]]))
    assert state["exp_avg"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert state["step"] == 3
    assert state["row"].all()
    assert states[other]["exp_avg"].all()


def test_errors_get_the_layers_name():
    weight = numbered([[1, 0]])
    with pytest.raises(ValueError, match=r"^layer '0': too few$"), weight.naming_errors():
        raise ValueError("too few")
    with pytest.raises(TypeError, match=r"^other$"), weight.naming_errors():
        raise TypeError("other")


def test_a_state_holds_all_but_the_weight():
    weight = numbered([[1, 0, 1, 0], [0, 0, 0, 1]], block_size=2)
    weight.explored |= torch.tensor([[True] * 4, [False] * 4])
    weight.backend, weight.final_backend, weight.why = "cpu", "native", "faster"
    weight.parameter.grad = torch.ones_like(weight.parameter)
    assert observe([weight], 0.5)
    state = weight.state_dict()
    again = numbered([[1, 1, 1, 1], [0, 0, 0, 0]], block_size=2)
    before = again.weight.clone()
    again.load_state_dict(state)
    assert torch.equal(again.mask, weight.mask)
    assert torch.equal(again.explored, weight.explored)
    assert (again.active, again.backend, again.final_backend, again.why) == (3, "cpu", "native", "faster")
    assert again.window.samples == 1
    assert torch.equal(again.window.gradient, torch.full((4, 8), 0.5))
    assert torch.equal(again.window.norm, torch.ones(2, 4))  # blocks of four: 2, halved
    assert torch.equal(again.weight, before)
    weight.window = None
    again.load_state_dict(weight.state_dict())
    assert again.window is None
