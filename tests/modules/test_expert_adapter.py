"""Adapters of experts of one's own: what they may say, and the comparison with the module's own forward."""

import dataclasses
import pickle

import pytest
import torch
from torch import nn

from helpers.expert_models import ADAPTERS, BmmExperts, EinsumExperts, adapter, bmm_forward
from lightning_estdgm import ExpertAdapter
from lightning_estdgm.method._masks import expand_mask
from lightning_estdgm.modules._adapter_check import adapter_checks
from lightning_estdgm.modules._candidates import find_candidates
from lightning_estdgm.modules._swap import restore_dense_, sparsify_

BLOCK = 16


def candidates(module, *adapters):
    return [c for c in find_candidates(module, experts=adapters) if c.kind.experts]


def checked(module, found, *args, **kwargs):
    """Run a forward with the check hooked up; return its output and the check."""
    ((owner, check),) = adapter_checks(found)
    handle = owner.register_forward_hook(check, with_kwargs=True)
    y = module(*args, **kwargs)
    handle.remove()
    return y, check


def rows(width=16):
    return torch.randn(12, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ADAPTERS)
def test_masked_products_take_the_place_of_the_modules_own(name):
    torch.manual_seed(0)
    module = ADAPTERS[name][0](width=32, hidden=64).double().eval()
    found = candidates(module, adapter(name))
    assert [c.why_dense for c in found] == ["", ""]
    masks = {c.name: torch.rand(c.shape[0] // BLOCK, c.shape[1] // BLOCK) < 0.7 for c in found}
    whole = {c.name: expand_mask(masks[c.name], BLOCK).view(c.weight.shape) for c in found}
    with torch.no_grad():
        for c in found:
            c.weight.mul_(whole[c.name])
    x = rows(32).double().requires_grad_()
    leaves = [x, *module.parameters()]
    y = module(x)
    wanted = torch.autograd.grad(y.sin().sum(), leaves)
    for c in found:
        sparsify_(c, masks[c.name], BLOCK, "cpu")
    assert type(module).__name__.startswith("Masked")
    sparse_y = module(x)
    torch.testing.assert_close(sparse_y, y)
    on = {id(c.weight): whole[c.name] for c in found}
    got = torch.autograd.grad(sparse_y.sin().sum(), leaves)
    for leaf, ours, theirs in zip(leaves, got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs * on.get(id(leaf), 1))
        if id(leaf) in on:
            assert torch.count_nonzero(theirs[~on[id(leaf)]]) > 0
    restore_dense_(found[0])
    assert type(module) is ADAPTERS[name][0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_check_passes_and_counts_rows_and_touches_nothing(name):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), ADAPTERS[name][0]())
    found = candidates(module, adapter(name))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    torch.manual_seed(1)
    y = module(rows())
    drawn = torch.get_rng_state()
    after_one = module.state_dict()["1.norm.running_mean"].clone() if name == "sorted" else None
    module.load_state_dict(before)
    torch.manual_seed(1)
    same, check = checked(module, found, rows())
    assert torch.equal(same, y)
    assert torch.equal(torch.get_rng_state(), drawn)
    if after_one is not None:
        assert torch.equal(module.state_dict()["1.norm.running_mean"], after_one)
    first, second = (c.name for c in found)
    assert check.rows == dict.fromkeys((first, second), 48 if name == "einsum" else 12)
    assert set(check.forms.values()) == {"grouped" if name == "sorted" else "batched"}
    assert module.training


def test_the_check_runs_once_and_takes_arguments_by_name():
    module = BmmExperts()
    calls = []

    def forward(module, product, x):
        calls.append(module)
        return bmm_forward(module, product, x)

    found = candidates(module, adapter("bmm", forward=forward))
    ((_, check),) = adapter_checks(found)
    module.register_forward_hook(check, with_kwargs=True)
    module(x=rows())
    module(x=rows())
    assert len(calls) == 1
    assert calls[0] is not module
    assert not calls[0].training


class Counting(BmmExperts):
    """Counts its forwards in a buffer, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_the_check_writes_to_no_buffer():
    module = Counting()
    found = candidates(module, adapter("bmm", module=Counting))
    checked(module, found, rows())
    assert module.calls == 1


class Once(BmmExperts):
    """Cannot be computed again."""

    def forward(self, x):
        if not self.training:
            raise RuntimeError("gone")
        return super().forward(x)


@pytest.mark.parametrize(
    ("cls", "called", "said"),
    [
        (Once, True, r"'1' cannot be computed again .* \(RuntimeError: gone\), so nothing compares"),
        (BmmExperts, False, "'1' have run no forward in the first step but compiled ones, so nothing compares"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_said(cls, called, said):
    module = nn.Sequential(nn.Linear(16, 16), cls())
    ((owner, check),) = adapter_checks(candidates(module, adapter("bmm", module=cls)))
    owner.register_forward_hook(check, with_kwargs=True)
    if called:
        module(rows())
    with pytest.warns(RuntimeWarning, match=said):
        check.warn_if_not_made()
    assert not check.rows


def without_bias(module, product, x):
    return product("w2", product("w1", x.view(4, -1, 16)).relu())


def of_another_shape(module, product, x):
    return bmm_forward(module, product, x)[:2]


def with_own_product(module, product, x):
    return torch.bmm((product("w1", x.view(4, -1, 16)) + module.b1).relu(), module.w2)


def with_another_name(module, product, x):
    return product("w3", x)


def without_experts(module, product, x):
    return product("w1", x)


def of_another_signature(module, product):
    return product("w1", module.w1)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (without_bias, r"of BmmExperts \('1'\) gives another output than the module's own forward: .* apart"),
        (of_another_shape, r"tensors of shapes \[\(2, 3, 16\)\] in the place of \[\(4, 3, 16\)\]"),
        (with_own_product, r"asks for no product with \['w2'\]"),
        (
            with_another_name,
            r"fails on the inputs of '1': ValueError: product\('w3', ...\) names none .*\['w1', 'w2'\]",
        ),
        (without_experts, r"takes x of shape \(4, rows, 16\), got \(12, 16\); .* x.expand\(4, -1, -1\)"),
        (of_another_signature, r"fails on the inputs of '1': TypeError"),
    ],
)
def test_a_forward_that_is_not_the_modules_is_refused(forward, said):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), BmmExperts())
    nn.init.normal_(module[1].b1)
    found = candidates(module, adapter("bmm", forward=forward))
    with pytest.raises(ValueError, match=said):
        checked(module, found, rows())


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"module": BmmExperts()}, TypeError, "must be a class of nn.Module"),
        ({"module": dict}, TypeError, "must be a class of nn.Module"),
        ({"layouts": {}}, ValueError, "must map names of parameters to layouts"),
        ({"layouts": ["w1"]}, ValueError, "must map names of parameters to layouts"),
        ({"layouts": {"w1": "eoi", "w2": "oie"}}, ValueError, r"layouts\['w2'\] must be 'eoi' .*got 'oie'"),
        ({"forward": "bmm"}, TypeError, "forward must be a function"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(change, error, said):
    with pytest.raises(error, match=said):
        adapter("bmm", **change)


def test_an_adapter_has_to_fit_the_model():
    with pytest.raises(
        ValueError, match=r"adapter for EinsumExperts, and the model has no such module .*'w1': \(4, 16"
    ):
        candidates(BmmExperts(), adapter("einsum"))
    with pytest.raises(ValueError, match=r"names the parameter 'w9', .* got none in 'the model'"):
        candidates(BmmExperts(), adapter("bmm", layouts={"w9": "eoi"}))
    with pytest.raises(ValueError, match=r"names the parameter 'router', .* got shape \(4, 16\)"):
        candidates(EinsumExperts(), adapter("einsum", layouts={"router": "eoi"}))
    with pytest.raises(ValueError, match="two adapters for one class"):
        candidates(BmmExperts(), adapter("bmm"), adapter("bmm"))
    subclass = type("MyExperts", (BmmExperts,), {})
    with pytest.raises(ValueError, match="adapter for BmmExperts, and the model has no such module"):
        candidates(subclass(), adapter("bmm"))


def test_adapters_are_compared_and_pickled():
    assert adapter("bmm") == adapter("bmm") == pickle.loads(pickle.dumps(adapter("bmm")))
    assert adapter("bmm") != adapter("bmm", forward=without_bias)
    assert {field.name for field in dataclasses.fields(ExpertAdapter)} == {"module", "layouts", "forward"}
