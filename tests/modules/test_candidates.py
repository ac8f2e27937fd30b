"""Which layers are masked and why, their units, and the swapped forward."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from lightning_estdgm.modules.candidates import (
    ForwardProbe,
    Image,
    auto_block_size,
    find_candidates,
    fitting_block_sizes,
    restore_dense_,
    set_observing,
    sparsify_,
    unit_of,
)


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
    ],
)
def test_a_model_without_a_layer_to_mask_is_refused(model, found):
    with pytest.raises(ValueError, match=re.escape("the model has no layer to mask") + ".*" + re.escape(found)):
        find_candidates(model)


def test_a_lazy_layer_is_refused_by_name():
    with pytest.raises(ValueError, match="layer '0' is lazy and has no weight yet"):
        find_candidates(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2)))


def candidate(module):
    return find_candidates(nn.Sequential(module, nn.Linear(8, 2)))[0]


@pytest.mark.parametrize(
    ("module", "size", "why"),
    [
        (nn.Linear(1024, 2048), 128, ""),
        (nn.Linear(1024, 1000), 1, "no block of 16, 32, 64, 128 divides both dimensions"),
        (nn.Linear(384, 1152), 32, ""),
        (nn.Linear(128, 144), 16, ""),
        (nn.Linear(64, 64), 1, "fewer than 8 blocks of 16 a side"),
        (nn.Conv2d(256, 512, 3), 32, ""),
        (nn.Conv1d(128, 128, 5, padding="same"), 16, ""),
        (nn.Conv2d(128, 128, (2, 3), dilation=(2, 1), padding="same"), 16, ""),
        (nn.Conv2d(3, 64, 7), 1, "no block of 16, 32, 64, 128 divides both dimensions"),
        (nn.Conv2d(64, 64, 3), 1, "fewer than 8 blocks of 16 a side"),
        (nn.Conv2d(256, 256, 3, groups=2), 1, "grouped convolution: no sparse operator"),
        (nn.Conv1d(256, 256, 3, groups=256), 1, "grouped convolution: no sparse operator"),
        (nn.Conv2d(256, 256, 3, padding_mode="reflect"), 1, "no sparse operator for padding_mode='reflect'"),
        (nn.Conv2d(256, 256, (2, 3), padding="same"), 1, "no sparse operator for padding='same' with a kernel of 2x3"),
        (nn.Conv3d(256, 256, 3), 1, "no sparse operator for Conv3d"),
        (type("MyConv2d", (nn.Conv2d,), {})(256, 256, 3), 1, "no sparse operator for MyConv2d"),
        (nn.ConvTranspose2d(256, 256, 3), 1, "no sparse operator for transposed convolutions"),
        (nn.MultiheadAttention(256, 2), 1, "no sparse operator for attention projections"),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(256, 256), 1, "no sparse operator for NonDynamically"),
    ],
)
def test_automatic_blocks_are_the_largest_that_fit_and_say_why_not(module, size, why):
    got, said = auto_block_size(candidate(module))
    assert got == size
    assert said.startswith(why)
    assert bool(said) == (got == 1)


def test_a_block_size_that_is_asked_for_does_not_hide_why_a_layer_is_dense():
    assert unit_of(candidate(nn.Conv2d(64, 64, 3)), 16) == (16, "")
    assert unit_of(candidate(nn.Conv2d(64, 64, 3, groups=2)), 16) == (16, "grouped convolution: no sparse operator")
    assert unit_of(candidate(nn.Conv3d(64, 64, 3)), 16) == (16, "no sparse operator for Conv3d")


def test_fitting_block_sizes():
    assert fitting_block_sizes((128, 64)) == (16, 32, 64)
    assert fitting_block_sizes((100, 64)) == ()


# ---- the swapped forward


def swapped(backend="reference", frozen=False, module=None):
    torch.manual_seed(0)
    c = candidate(module or nn.Linear(32, 48))
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    sparsify_(c, mask, 16, backend, frozen)
    return c, mask.repeat_interleave(16, 0).repeat_interleave(16, 1)


def run(module, x):
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return y.detach(), x.grad, module.weight.grad.clone()


def test_a_swapped_layer_computes_on_active_blocks_only_and_comes_back():
    c, full = swapped()
    x = torch.randn(4, 32)
    dense = nn.Linear(32, 48)
    dense.load_state_dict(c.module.state_dict())
    with torch.no_grad():
        dense.weight.mul_(full)
        c.module.weight.masked_fill_(~full, float("nan"))
    y, dx, dw = run(c.module, x)
    y0, dx0, dw0 = run(dense, x)
    torch.testing.assert_close(y, y0)
    torch.testing.assert_close(dx, dx0)
    torch.testing.assert_close(dw, dw0 * full)
    set_observing(c, True)
    torch.testing.assert_close(run(c.module, x)[2], dw0)
    set_observing(c, False)
    assert torch.count_nonzero(run(c.module, x)[2][~full]) == 0


def test_swapping_changes_the_class_alone_and_is_undone():
    c, _ = swapped()
    plain = nn.Linear(32, 48)
    assert isinstance(c.module, nn.Linear)
    assert type(c.module) is not nn.Linear
    assert list(c.module.state_dict()) == list(plain.state_dict())
    other, _ = swapped()
    assert type(other.module) is type(c.module)
    restore_dense_(c)
    assert type(c.module) is nn.Linear
    assert vars(c.module).keys() == vars(plain).keys()
    assert not list(c.module.buffers())
    restore_dense_(c)
    set_observing(c, True)
    assert vars(c.module).keys() == vars(plain).keys()


def topology_of(module):
    return {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}


def test_the_topology_follows_the_module_but_is_no_buffer_of_it():
    """As a buffer it would be in reach of DDP's broadcast, which would hide masks that differ from rank to rank."""
    c, _ = swapped()
    assert list(c.module.buffers()) == []
    c.module.to("meta")
    assert {x.device.type for x in topology_of(c.module).values()} == {"meta"}
    assert c.module.weight.device.type == "meta"


def test_a_new_mask_is_followed_in_place():
    c, _ = swapped()
    lists = topology_of(c.module)
    assert len(lists) == 4
    with torch.no_grad():
        c.module.weight.fill_(1.0)
        c.module.bias.zero_()
    only_first = torch.zeros(3, 2, dtype=torch.bool)
    only_first[0, 0] = True
    sparsify_(c, only_first, 16, "reference")
    assert all(lists[name] is tensor for name, tensor in topology_of(c.module).items())
    assert c.module(torch.ones(32)).tolist() == [16.0] * 16 + [0.0] * 32
    sparsify_(c, only_first, 16, "dense")
    assert c.module(torch.ones(32)).tolist() == [32.0] * 48


def test_frozen_layers_keep_a_dense_forward_and_a_sparse_weight_gradient():
    c, full = swapped(frozen=True)
    x = torch.randn(4, 32)
    y, dx, dw = run(c.module, x)
    dense = nn.Linear(32, 48)
    dense.load_state_dict(c.module.state_dict())
    y0, dx0, dw0 = run(dense, x)
    torch.testing.assert_close((y, dx, dw), (y0, dx0, dw0 * full))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_or_pickle_of_a_swapped_layer_is_the_plain_layer(duplicate):
    c, full = swapped()
    with torch.no_grad():
        c.module.weight.mul_(full)  # as between steps: inactive weights are zero
    x = torch.randn(4, 32)
    twin = duplicate(c.module)
    assert type(twin) is nn.Linear
    assert vars(twin).keys() == vars(nn.Linear(32, 48)).keys()
    assert list(twin.buffers()) == []
    torch.testing.assert_close(twin(x), c.module(x))
    # So it is right whatever weights it is given, and not bound to a mask that nobody would update.
    other = nn.Linear(32, 48)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x), other(x))
    assert type(c.module) is not nn.Linear


def test_sparse_input_takes_the_layers_own_forward():
    c, full = swapped()
    with torch.no_grad():
        c.module.weight.mul_(full)
    x = torch.randn(4, 32)
    torch.testing.assert_close(c.module(x.to_sparse()), c.module(x))


def test_hugging_face_conv1d_is_masked_as_out_by_in():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    c, full = swapped(module=pytorch_utils.Conv1D(48, 32))
    assert c.has_operator
    assert c.weight.shape == (32, 48)
    assert c.shape == (48, 32)
    x = torch.randn(2, 3, 32)
    expected = x @ (c.module.weight * full.t()) + c.module.bias
    torch.testing.assert_close(c.module(x), expected)
    assert torch.count_nonzero(run(c.module, x)[2].t()[~full]) == 0


def test_pyg_linear_is_masked():
    pyg = pytest.importorskip("torch_geometric.nn")
    c, full = swapped(module=pyg.Linear(32, 48))
    assert c.has_operator
    x = torch.randn(5, 32)
    torch.testing.assert_close(c.module(x), x @ (c.module.weight * full).t() + c.module.bias)
    gcn = nn.ModuleList([pyg.GCNConv(16, 16), nn.Linear(16, 2)])
    assert verdicts(gcn) == {"0.lin": (True, ""), "1": (False, "output head")}


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


def test_blocks_of_a_fused_projection_fit_its_parts():
    # 216 x 72: no block divides 72. 240 x 80: blocks of 16 divide the whole, and leave only 5 x 5 in each of the parts.
    for width in (72, 80):
        model = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "last": nn.Linear(8, 4)})
        assert auto_block_size(find_candidates(model)[0])[0] == 1
    model = nn.ModuleDict({"qkv": nn.Linear(128, 384), "last": nn.Linear(8, 4)})
    assert auto_block_size(find_candidates(model)[0]) == (16, "")


# ---- convolutions


CONVOLUTIONS = {
    "2d": (lambda: nn.Conv2d(32, 48, 3, stride=2, padding=1), (3, 32, 7, 6)),
    "2d pointwise": (lambda: nn.Conv2d(32, 48, 1, stride=2, bias=False), (3, 32, 7, 6)),
    "2d same": (lambda: nn.Conv2d(32, 48, (3, 2), padding="same", dilation=(1, 2)), (3, 32, 7, 6)),
    "2d valid": (lambda: nn.Conv2d(32, 48, (1, 3), padding="valid"), (3, 32, 7, 6)),
    "2d unbatched": (lambda: nn.Conv2d(32, 48, 3), (32, 7, 6)),
    "1d": (lambda: nn.Conv1d(32, 48, 5, stride=2, padding=3, dilation=2), (3, 32, 17)),
    "1d unbatched": (lambda: nn.Conv1d(32, 48, 3), (32, 17)),
}


@pytest.fixture(params=CONVOLUTIONS)
def convolution(request):
    """A swapped convolution, its mask over the weight, a dense twin with masked weights, and an input.

    In float64: float32 rounds a weight gradient, a sum over all places, by more than the tolerance on some processors.
    """
    make, shape = CONVOLUTIONS[request.param]
    c, full = swapped(module=make().double())
    full = full[(..., *[None] * (c.weight.dim() - 2))].expand_as(c.weight)
    dense = make().double()
    dense.load_state_dict(c.module.state_dict())
    with torch.no_grad():
        dense.weight.mul_(full)
    return c, full, dense, torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_swapped_convolution_computes_on_active_blocks_only_and_comes_back(convolution):
    c, full, dense, x = convolution
    own = type(dense)
    with torch.no_grad():
        c.module.weight.masked_fill_(~full, float("nan"))
    y0, dx0, dw0 = run(dense, x)
    y, dx, dw = run(c.module, x)
    torch.testing.assert_close((y, dx, dw), (y0, dx0, dw0 * full))
    set_observing(c, True)
    torch.testing.assert_close(run(c.module, x)[2], dw0)
    restore_dense_(c)
    assert type(c.module) is own
    assert vars(c.module).keys() == vars(dense).keys()


def test_a_frozen_convolution_keeps_a_dense_forward(convolution):
    c, full, dense, x = convolution
    dense.load_state_dict(c.module.state_dict())
    restore_dense_(c)
    sparsify_(c, full[::16, ::16].flatten(2)[..., 0], 16, "reference", frozen=True)
    y0, dx0, dw0 = run(dense, x)
    torch.testing.assert_close(run(c.module, x), (y0, dx0, dw0 * full))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_or_pickle_of_a_swapped_convolution_is_the_plain_layer(convolution, duplicate):
    c, _, dense, x = convolution
    twin = duplicate(c.module)
    assert type(twin) is type(dense)
    assert vars(twin).keys() == vars(dense).keys()
    assert list(c.module.state_dict()) == list(dense.state_dict())
    twin.load_state_dict(dense.state_dict())
    assert torch.equal(twin(x), dense(x))


def test_a_swapped_convolution_compiles_whole(convolution):
    c, _, dense, x = convolution
    torch._dynamo.reset()
    compiled = torch.compile(c.module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), dense(x))


def test_a_swapped_convolution_gives_the_memory_format_of_the_plain_one(convolution):
    c, _, dense, x = convolution
    if x.dim() != 4:
        return
    for inputs, weights in ((x, dense), (x.contiguous(memory_format=torch.channels_last), dense)):
        assert c.module(inputs).stride() == weights(inputs).stride()
    c.module.to(memory_format=torch.channels_last)
    dense.to(memory_format=torch.channels_last)
    assert c.module(x).stride() == dense(x).stride()
    assert c.module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("module", "x", "positions", "image"),
    [
        (nn.Conv2d(4, 8, 3, stride=2), torch.randn(5, 4, 9, 7), 5 * 4 * 3, Image(5, 9, 7, False)),
        (
            nn.Conv2d(4, 8, 3),
            torch.randn(5, 4, 9, 7).contiguous(memory_format=torch.channels_last),
            5 * 7 * 5,
            Image(5, 9, 7, True),
        ),
        (nn.Conv2d(4, 8, 3), torch.randn(4, 9, 7), 7 * 5, Image(1, 9, 7, False)),
        (nn.Conv1d(4, 8, 3), torch.randn(5, 4, 9), 5 * 7, Image(5, 1, 9, False)),
        (nn.Conv2d(4, 8, 3, groups=2), torch.randn(5, 4, 9, 7), 5 * 7 * 5, None),
        (nn.Linear(4, 8), torch.randn(5, 3, 4), 15, None),
    ],
)
def test_a_probe_sees_what_a_layer_is_given(module, x, positions, image):
    probe = ForwardProbe(candidate(module))
    module.register_forward_hook(probe)
    module(x)
    assert (probe.positions, probe.dtype, probe.image) == (positions, torch.float32, image)
