"""The watch on a module's forward: direct calls, copies, pickles, class swaps, compiled modules, what it leaves."""

import copy
import io

import pytest
import torch
from torch import nn

from helpers.swapped_layers import candidate
from lightning_estdgm.method._masks import expand_mask
from lightning_estdgm.modules._forward_watch import replaced_forward, watch_forward
from lightning_estdgm.modules._swap import restore_dense_, sparsify_


def watched(module):
    """Watch a module; return the outputs that were seen and the handle."""
    seen = []

    def watch(forward, *args, **kwargs):
        seen.append(forward(*args, **kwargs))
        return seen[-1]

    return seen, watch_forward(module, watch)


X = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))


def test_calls_of_the_module_and_of_its_forward_are_seen_within_all_hooks():
    layer = nn.Linear(32, 32)
    plain = layer(X)
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layer.register_forward_hook(lambda module, args, y: y + 1)
    seen, handle = watched(layer)
    assert torch.equal(layer.forward(X), plain)
    y = layer(X)
    assert torch.equal(seen[0], plain)
    assert torch.equal(seen[1] + 1, y)
    handle.remove()
    assert "forward" not in vars(layer)
    layer(X)
    assert len(seen) == 2


def test_several_watches_leave_in_any_order_and_a_forward_of_the_modules_own_stays():
    layer = nn.Linear(32, 32)
    layer.forward = own = lambda x: x + 1
    (first, one), (second, other) = watched(layer), watched(layer)
    assert replaced_forward(layer) is own
    assert torch.equal(layer(X), X + 1)
    one.remove()
    layer(X)
    assert (len(first), len(second)) == (1, 2)
    other.remove()
    assert vars(layer)["forward"] is own


def test_an_error_in_the_forward_passes_through():
    layer = nn.Linear(4, 4)
    _, handle = watched(layer)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(X)
    handle.remove()
    assert "forward" not in vars(layer)


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_not_watched_compute_with_their_own_weight_and_become_plain(copied):
    model = nn.Sequential(nn.Linear(32, 32))
    seen, _ = watched(model[0])
    other = copied(model)
    nn.init.zeros_(other[0].weight)
    assert torch.equal(other(X), other[0].bias.expand(2, 32))
    assert not seen
    assert "forward" not in vars(other[0])
    assert torch.equal(model(X), seen[0])


def test_a_class_that_is_swapped_meanwhile_computes_with_its_own_forward():
    layer = nn.Linear(32, 32)
    seen, handle = watched(layer)
    mask = torch.eye(2, dtype=torch.bool)
    sparsify_(found := candidate(layer), mask, 16, "cpu")
    expected = nn.functional.linear(X, layer.weight * expand_mask(mask, 16), layer.bias)
    torch.testing.assert_close(layer(X), expected)  # its inactive weights are not 0
    assert len(seen) == 1
    handle.remove()
    torch.testing.assert_close(layer(X), expected)
    restore_dense_(found)
    torch.testing.assert_close(layer(X), nn.functional.linear(X, layer.weight, layer.bias))


def test_compiled_modules_are_not_seen_and_follow_the_class_afterwards():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    plain = model(X)
    seen, handle = watched(model[0])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), plain)
    assert not seen
    model.forward(X)
    assert len(seen) == 1
    handle.remove()
    model[0].__class__ = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    torch.testing.assert_close(compiled(X), model(X))
    assert not torch.equal(compiled(X), plain)
