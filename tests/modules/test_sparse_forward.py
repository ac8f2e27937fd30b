"""The swapped forward: linear layers and convolutions on active blocks, against dense twins."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.swapped_layers import run, swapped
from lightning_estdgm.modules._swap import restore_dense_, set_observing, sparsify_


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


def test_frozen_layers_keep_a_dense_forward_and_a_sparse_weight_gradient():
    c, full = swapped(frozen=True)
    x = torch.randn(4, 32)
    y, dx, dw = run(c.module, x)
    dense = nn.Linear(32, 48)
    dense.load_state_dict(c.module.state_dict())
    y0, dx0, dw0 = run(dense, x)
    torch.testing.assert_close((y, dx, dw), (y0, dx0, dw0 * full))


def test_an_input_may_be_passed_by_name():
    for module, x in ((nn.Linear(32, 48), torch.randn(4, 32)), (nn.Conv2d(32, 48, 3), torch.randn(2, 32, 5, 5))):
        c, _ = swapped(module=module)
        assert torch.equal(c.module(input=x), c.module(x))


def test_sparse_input_takes_the_layers_own_forward():
    c, full = swapped()
    with torch.no_grad():
        c.module.weight.mul_(full)
    x = torch.randn(4, 32)
    torch.testing.assert_close(c.module(x.to_sparse()), c.module(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_input_takes_the_layers_own_forward():
    c, full = swapped()
    with torch.no_grad():
        c.module.weight.mul_(full)
    x = torch.randn(4, 32)
    torch.testing.assert_close(torch.cat(c.module(torch.nested.nested_tensor([x[:1], x[1:]])).unbind()), c.module(x))


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
