"""The swap: a layer's class changes and comes back, its masks are followed, its copies are plain."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.swapped_layers import index_lists, swapped
from lightning_estdgm.modules._swap import restore_dense_, set_observing, sparsify_


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


def test_the_topology_follows_the_module_but_is_no_buffer_of_it():
    """As a buffer it would be in reach of DDP's broadcast, which would hide masks that differ from rank to rank."""
    c, _ = swapped()
    assert list(c.module.buffers()) == []
    c.module.to("meta")
    assert {x.device.type for x in index_lists(c.module)} == {"meta"}
    assert c.module.weight.device.type == "meta"


def test_a_new_mask_is_followed_in_place():
    c, _ = swapped()
    topology, lists = c.module._estdgm_topology, index_lists(c.module)
    assert len(lists) == 4
    with torch.no_grad():
        c.module.weight.fill_(1.0)
        c.module.bias.zero_()
    only_first = torch.zeros(3, 2, dtype=torch.bool)
    only_first[0, 0] = True
    sparsify_(c, only_first, 16, "reference")
    assert c.module._estdgm_topology is topology
    assert all(was is tensor for was, tensor in zip(lists, index_lists(c.module), strict=True))
    assert c.module(torch.ones(32)).tolist() == [16.0] * 16 + [0.0] * 32
    sparsify_(c, only_first, 16, "dense")
    assert c.module(torch.ones(32)).tolist() == [32.0] * 48


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
