"""Layers that are masked or not, and why."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm
from torch.testing._internal.two_tensor import TwoTensor

from lightning_estdgm.modules._candidates import find_candidates


def verdicts(model, **selectors):
    return {c.name: (c.masked, c.why) for c in find_candidates(model, **selectors)}


class Everything(nn.Module):
    """One layer of each sort."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)
        self.conv = nn.Conv2d(4, 8, 3)
        self.transposed = nn.ConvTranspose1d(4, 8, 3)
        self.attention = nn.MultiheadAttention(16, 2)
        self.recurrent = nn.LSTM(16, 16)
        self.tied = nn.Linear(16, 10, bias=False)
        self.tied.weight = self.embedding.weight
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.classifier = nn.Linear(16, 4)
        self.last = nn.Linear(16, 4)


def test_linear_and_convolution_are_masked_and_the_rest_is_not():
    assert verdicts(Everything()) == {
        "linear": (True, ""),
        "conv": (True, ""),
        "transposed": (True, ""),
        "attention": (True, ""),
        "attention.out_proj": (True, ""),
        "tied": (False, "its weight is shared with another module"),
        "frozen": (False, "its weight takes no gradient"),
        "classifier": (False, "output head"),
        "last": (False, "output head"),
    }


def test_include_and_exclude_take_patterns_and_predicates():
    got = verdicts(
        Everything(), include=["last", lambda name, module: name == "classifier"], exclude=["attention*", "conv"]
    )
    assert got["last"] == got["classifier"] == (True, "included")
    assert got["attention"] == got["attention.out_proj"] == got["conv"] == (False, "excluded")
    assert got["linear"] == (True, "")
    by_kind = verdicts(Everything(), exclude=[lambda name, module: isinstance(module, nn.Conv2d)])
    assert [name for name, (_, why) in by_kind.items() if why == "excluded"] == ["conv"]


def test_exclude_wins_over_include_and_neither_unfreezes():
    assert verdicts(Everything(), include=["last"], exclude=["last"])["last"] == (False, "excluded")
    assert verdicts(Everything(), include=["frozen"])["frozen"] == (False, "its weight takes no gradient")


def test_attention_without_a_fused_projection_and_parametrised_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    torch.nn.utils.parametrizations.spectral_norm(model[1])
    assert verdicts(model)["1"] == (False, "its weight is not a plain parameter")
    apart = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=4), nn.Linear(8, 8))
    assert set(verdicts(apart)) == {"0.out_proj", "1"}


def followed():
    """Return a network, and a copy that is registered after it."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    return nn.ModuleDict({"net": net, "target": copy.deepcopy(net)})


def test_the_head_is_the_last_layer_that_trains():
    model = followed()
    assert verdicts(model)["net.2"] == (True, "")
    assert verdicts(model, held={id(p) for p in model["net"].parameters()})["net.2"] == (False, "output head")
    model["target"].requires_grad_(False)
    assert verdicts(model)["net.2"] == (False, "output head")
    assert verdicts(model)["net.0"] == (True, "")
    model["net"][2].requires_grad_(False)  # of one layer that trains, nothing says that it is the head
    assert verdicts(model)["net.0"] == (True, "")


def test_a_head_whose_weight_is_computed_from_what_trains_is_the_last():
    model = nn.Sequential(nn.Linear(8, 8), spectral_norm(nn.Linear(8, 2)))
    assert verdicts(model)["0"] == (True, "")
    assert verdicts(model, held={id(p) for p in model.parameters()})["0"] == (True, "")


def test_a_layer_used_twice_is_one_layer():
    layer = nn.Linear(8, 8)
    assert list(verdicts(nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(8, 2)))) == ["0", "3"]


def test_names_are_free_of_wrappers():
    model = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), backend="eager")
    assert list(verdicts(model)) == ["0", "1"]


@pytest.mark.parametrize("label", ["include", "exclude"])
def test_a_selector_that_matches_nothing_is_refused(label):
    message = f"{label}='encoder.*' matches none of the layers that can be masked: ['0', '1']"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_candidates(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), **{label: ["0", "encoder.*"]})


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (nn.Sequential(nn.LayerNorm(8), nn.ReLU()), ""),
        (nn.Sequential(nn.Linear(8, 2)), "; found {'0': 'output head'} (name one in include=)"),
        (nn.ParameterDict({"w": nn.Parameter(torch.zeros(3, 8, 8))}), "are named in experts=: {'w': (3, 8, 8)}"),
    ],
)
def test_a_model_without_a_layer_to_mask_is_refused(model, found):
    with pytest.raises(ValueError, match=re.escape("the model has no layer to mask") + ".*" + re.escape(found)):
        find_candidates(model)


def test_weights_that_are_tied_by_their_storage_are_shared():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[1].weight.data = model[0].weight.data.t()
    found = {c.name: c.why for c in find_candidates(model)}
    shared = "its weight is shared with another module"
    assert found == {"0": shared, "1": shared, "2": "", "3": "output head"}


def test_a_lazy_layer_is_refused_by_name():
    with pytest.raises(ValueError, match="layer '0' is lazy and has no weight yet"):
        find_candidates(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2)))


@pytest.mark.parametrize(
    ("name", "module", "parts"),
    [
        ("qkv", nn.Linear(16, 48), 3),
        ("kv", nn.Linear(16, 32), 2),
        ("c_attn", nn.Linear(16, 48), 3),
        ("qkv", nn.Linear(16, 40), 1),  # grouped-query attention: no stack of square matrices
        ("fc", nn.Linear(16, 48), 1),
        ("attention", nn.MultiheadAttention(16, 2), 3),
    ],
)
def test_fused_projections_are_recognised(name, module, parts):
    model = nn.ModuleDict({name: module, "last": nn.Linear(8, 4)})
    candidate = find_candidates(model)[0]
    assert candidate.parts == parts
    out, inner = candidate.shape
    assert candidate.part_shape == (out // parts, inner)


def test_complex_weights_stay_dense():
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64), nn.Linear(8, 8), nn.Linear(8, 2))
    assert verdicts(model)["0"] == (False, "its weight is complex")


def test_a_tensor_subclass_that_can_hold_zeros_is_masked():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    values = torch.randn(8, 8)
    model[0].weight = nn.Parameter(TwoTensor(values, values.clone()))
    assert verdicts(model)["0"] == (True, "")
    assert torch.equal(model[0].weight.a, values)
    assert torch.equal(model[0].weight.b, values)
