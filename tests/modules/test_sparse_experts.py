"""Experts of transformers on active blocks: the dense module's outputs and gradients, without its products."""

import copy
import pickle

import pytest
import torch
from torch.profiler import profile

from helpers.expert_models import HUGGING_FACE, hugging_face
from lightning_estdgm.method._masks import expand_mask
from lightning_estdgm.modules._candidates import find_candidates
from lightning_estdgm.modules._swap import restore_dense_, set_observing, sparsify_

pytest.importorskip("transformers", minversion="5")  # experts in one parameter
BLOCK, TOKENS, CHOSEN = 16, 12, 2


def masked_experts(name, dtype=torch.float32):
    """Return the first layer's experts, their candidates and block masks; inactive weights are zero."""
    # Eager: the grouped product takes no float64.
    model = hugging_face(name, experts_implementation="eager").to(dtype)
    found = [c for c in find_candidates(model) if c.kind.experts and ".layers.0." in c.name]
    masks = {}
    generator = torch.Generator().manual_seed(1)
    for c in found:
        masks[c.name] = torch.rand(c.shape[0] // BLOCK, c.shape[1] // BLOCK, generator=generator) < 0.5
        with torch.no_grad():
            c.weight.normal_(std=0.3, generator=generator)
            c.weight.mul_(expand_mask(masks[c.name], BLOCK).view(c.weight.shape))
    for own, bias in found[0].module.named_parameters():
        if own.endswith("_bias"):
            torch.nn.init.normal_(bias, generator=generator)
    return found[0].module, found, masks


def swap(found, masks, backends=("cpu", "cpu")):
    for c, backend in zip(found, backends, strict=True):
        sparsify_(c, masks[c.name], BLOCK, backend)


def routed(experts=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, 32, generator=generator, dtype=dtype, requires_grad=True)
    index = torch.rand(TOKENS, experts, generator=generator).topk(CHOSEN).indices
    weights = torch.rand(TOKENS, CHOSEN, generator=generator, dtype=dtype, requires_grad=True)
    return x, index, weights


def outcome(module, x, index, weights):
    """Return the output, and the gradients of input, routing weights and parameters."""
    y = module(x, index, weights)
    leaves = [x, weights, *module.parameters()]
    return y.detach(), torch.autograd.grad(y.sin().sum(), leaves)


def masked_gradients(module, found, masks, gradients):
    """Return gradients with those of the masked weights zero outside the masks."""
    by_id = {id(c.weight): expand_mask(masks[c.name], BLOCK).view(c.weight.shape) for c in found}
    on = [1, 1, *(by_id.get(id(p), 1) for p in module.parameters())]
    return [g * m for g, m in zip(gradients, on, strict=True)]


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.parametrize("backends", [("cpu", "cpu"), ("cpu", "dense"), ("dense", "cpu")])
@pytest.mark.parametrize("experts", [8, 3], ids=["all", "some without tokens"])
def test_outputs_and_gradients_are_those_of_the_dense_module(name, backends, experts):
    module, found, masks = masked_experts(name, torch.float64)
    given = routed(experts, torch.float64)
    y, gradients = outcome(module, *given)
    swap(found, masks, backends)
    sparse_y, sparse = outcome(module, *given)
    torch.testing.assert_close(sparse_y, y)
    wanted = masked_gradients(module, found, masks, gradients)
    for c, backend in zip(found, backends, strict=True):
        if backend == "dense":
            place = 2 + [id(p) for p in module.parameters()].index(id(c.weight))
            wanted[place] = gradients[place]
    torch.testing.assert_close(list(sparse), wanted)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_observing_yields_whole_gradients(name):
    module, found, masks = masked_experts(name, torch.float64)
    given = routed(dtype=torch.float64)
    _, gradients = outcome(module, *given)
    swap(found, masks)
    for c in found:
        set_observing(c, True)
    torch.testing.assert_close(outcome(module, *given)[1], gradients)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_new_masks_are_followed(name):
    module, found, masks = masked_experts(name)
    swap(found, masks)
    later = {name: mask & (torch.arange(mask.shape[1]) % 2 == 0) for name, mask in masks.items()}
    swap(found, later)
    y, _ = outcome(module, *routed())
    for c in found:
        restore_dense_(c)
        with torch.no_grad():
            c.weight.mul_(expand_mask(later[c.name], BLOCK).view(c.weight.shape))
    torch.testing.assert_close(y, outcome(module, *routed())[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_no_dense_product_runs(name):
    module, found, masks = masked_experts(name)
    shapes = {tuple(c.weight.shape[1:]) for c in found}
    shapes |= {shape[::-1] for shape in shapes}

    def dense_products():
        with profile(record_shapes=True) as seen:
            outcome(module, *routed())
        operands = [tuple(s) for e in seen.events() if e.name in ("aten::mm", "aten::addmm") for s in e.input_shapes]
        return [s for s in operands if s in shapes]

    assert dense_products()
    swap(found, masks)
    assert not dense_products()


def test_copies_and_closed_modules_are_plain():
    module, found, masks = masked_experts("GptOss")
    cls, keys = type(module), list(module.state_dict())
    attributes = set(vars(module))
    y = module(*routed())
    swap(found, masks)
    assert type(module) is not cls
    assert isinstance(module, cls)
    assert list(module.state_dict()) == keys
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is cls
        torch.testing.assert_close(twin(*routed()), y)
    for c in found:
        restore_dense_(c)
    assert type(module) is cls
    assert set(vars(module)) == attributes


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_autocast(name):
    module, found, masks = masked_experts(name)
    given = routed()
    y, _ = outcome(module, *given)
    swap(found, masks)
    with torch.autocast("cpu", torch.bfloat16):
        sparse_y, gradients = outcome(module, *given)
    assert sparse_y.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(sparse_y, y, atol=0.1, rtol=0.05)


def test_experts_of_other_ranks_add_nothing():
    module, found, masks = masked_experts("Mixtral")
    swap(found, masks)
    x, index, weights = routed()
    elsewhere = index.clone()
    elsewhere[:, 1] = 8
    y = module(x, elsewhere, weights)
    alone = module(x, index, weights * torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(y, alone)
    assert torch.count_nonzero(module(x, torch.full_like(index, 8), weights)) == 0


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_a_gradient_penalty_is_that_of_the_dense_module(name):
    module, found, masks = masked_experts(name, torch.float64)
    x, index, weights = routed(dtype=torch.float64)

    def penalty_gradients():
        (slope,) = torch.autograd.grad(module(x, index, weights).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, weights, *module.parameters()], materialize_grads=True)

    gradients = penalty_gradients()
    assert all(g.norm() > 0 for g in (*gradients[:2], *(g for g in gradients[2:] if g.dim() == 3)))
    swap(found, masks)
    torch.testing.assert_close(list(penalty_gradients()), masked_gradients(module, found, masks, gradients))
