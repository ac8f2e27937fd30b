"""Mixtures of experts: parameters that stack the experts' matrices are masked expert by expert."""

import copy

import pytest
import torch
from torch import nn

from helpers.controller_runs import constant, equal, saved
from helpers.expert_models import HUGGING_FACE, PARTS, BmmExperts, EinsumExperts, hugging_face, tokens
from lightning_estdgm.config import DGMConfig, Selection, Units, UpdateRule
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._patterns import NofM
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.modules._candidates import find_candidates

STEPS = 12
SCHEDULE = EstDgm(update_every=4, observe_steps=2)


def language_loss(model, step):
    ids = tokens(step)
    return model(input_ids=ids, labels=ids).loss


def square(model, step):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    return (model(x).reshape(8, 16) - x.sin()).square().mean()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)


def is_linear(name, module):
    return isinstance(module, nn.Linear)


def steps(model, optimizer, dgm, loss, first=0, last=STEPS):
    for step in range(first, last):
        optimizer.zero_grad()
        loss(model, step).backward()
        dgm.mask_gradients()
        optimizer.step()
        dgm.advance()


def stacks(dgm):
    return [c for c in dgm.candidates if c.kind.experts]


def check_experts(dgm, budgets):
    """Check zeros outside the masks, and the budget of every part of every expert."""
    masks, sizes = dgm.masks(), {d.name: d.block_size for d in dgm.decisions() if d.masked}
    assert stacks(dgm)
    for c in stacks(dgm):
        mask, b = masks[c.name], sizes[c.name]
        assert [int(part.sum()) for part in mask.chunk(c.parts)] == budgets[c.name]
        whole = mask if b == 1 else mask.repeat_interleave(b, 0).repeat_interleave(b, 1)
        assert torch.count_nonzero(c.weight[~whole.view(c.weight.shape)]) == 0
        active = [int(expert.sum()) for expert in whole.view(c.weight.shape)]
        assert min(active) > 0
        assert max(active) < c.weight[0].numel()
        assert max(active) - min(active) <= 2 * b * b  # equal but for rounding in each of gate and up


def budgets_of(dgm):
    weights = dgm._masked.weights
    return dict(zip([w.name for w in weights], dgm._masked.budgets(dgm.schedule(STEPS).density), strict=True))


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.parametrize("size", [1, 16])
def test_experts_of_transformers_are_masked_expert_by_expert(name, size):
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter
    model = hugging_face(name)
    keys, trainable = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    optimizer = adamw(model)
    config = DGMConfig(SCHEDULE, units=Units(size="auto" if size == 1 else 16), seed=1)
    if size == 16:
        config = config.merged(selection={"exclude": [lambda name, module: isinstance(module, nn.Linear)]})
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        steps(model, optimizer, dgm, language_loss)
        check_experts(dgm, budgets_of(dgm))
        found = {c.name: c.parts for c in stacks(dgm)}
        interleaved = name == "GptOss"
        assert found == {
            f"model.layers.{i}.mlp.experts.{w}": 8 if interleaved else n for i in range(2) for w, n in PARTS.items()
        }
        masked = sum(c.weight.numel() for c in dgm.candidates if c.masked)
        assert masked > 0.75 * trainable
        assert all(c.stored_shape == tuple(c.weight.shape) for c in dgm.candidates)
        average = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in average.parameters():
                parameter.add_(1.0)
        dgm.mask_copy_(average)
        for c in stacks(dgm):
            gone = c.weight == 0
            assert torch.equal(average.get_parameter(c.name) == 0, gone)
        masked_loss = language_loss(model, 0)
    assert list(model.state_dict()) == keys
    dense = hugging_face(name)
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(language_loss(dense, 0), masked_loss)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_resumed_experts_equal_straight_ones(name, backend):
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter

    def begin():
        model = hugging_face(name)
        return model, adamw(model)

    config = DGMConfig(SCHEDULE, units=Units(size=1))
    if backend == "cpu":
        config = DGMConfig(
            SCHEDULE, units=Units(size=16), backend=backend, selection=Selection(exclude=[is_linear]), seed=1
        )
    straight, optimizer = begin()
    with DGMController(straight, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        steps(straight, optimizer, dgm, language_loss, last=7)
        states = saved([straight.state_dict(), optimizer.state_dict(), dgm.state_dict()])
        steps(straight, optimizer, dgm, language_loss, first=7)
    resumed, optimizer = begin()
    resumed.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    with DGMController(resumed, optimizer, config, total_steps=STEPS, state=states[2], audit=False) as dgm:
        assert not equal(straight, resumed)
        steps(resumed, optimizer, dgm, language_loss, first=7)
    assert equal(straight, resumed)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_forced_backend_computes_experts_and_trains_as_dense(name):
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter

    def train(backend):
        model = hugging_face(name)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        config = DGMConfig(
            SCHEDULE, units=Units(size=16), backend=backend, selection=Selection(exclude=[is_linear]), seed=1
        )
        classes = [type(m) for m in model.modules()]
        with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
            steps(model, optimizer, dgm, language_loss)
            decided = [d for d in dgm.decisions() if d.masked]
            check_experts(dgm, budgets_of(dgm))
            ratio = dgm.flops["executed"] / dgm.flops["dense"]
        assert [type(m) for m in model.modules()] == classes
        return model, decided, ratio

    sparse, decided, ratio = train("cpu")
    assert len(decided) == 4
    assert {d.backend for d in decided} == {d.final_backend for d in decided} == {"cpu"}
    assert ratio < 1
    dense, decided, ratio = train("dense")
    assert {d.backend for d in decided} == {"dense"}
    assert ratio == 1
    for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_flops_of_experts_by_hand():
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter
    model = hugging_face("Mixtral")
    optimizer = adamw(model)
    config = DGMConfig(constant(0.25), units=Units(size=1, distribution="uniform"))
    with DGMController(model, optimizer, config, total_steps=40, audit=False) as dgm:
        assert not dgm.schedule(0).observe
        steps(model, optimizer, dgm, language_loss, last=1)
        tokens_seen, chosen = 16, 2
        attention = 32 * (32 + 16 + 16 + 32)
        expert = 3 * 32 * 48
        head = 32 * 32
        masked = 2 * (attention + chosen * expert)
        assert dgm.flops["dense"] == 3 * 2 * tokens_seen * (masked + head)
        assert dgm.flops["analytic"] == pytest.approx(3 * 2 * tokens_seen * (0.25 * masked + head))


@pytest.mark.parametrize(
    ("module", "selection"), [(BmmExperts, {}), (EinsumExperts, {"experts": ["w?"]})], ids=["bmm", "einsum"]
)
def test_experts_of_ones_own_are_masked(module, selection):
    torch.manual_seed(0)
    model = module()
    optimizer = adamw(model)
    config = DGMConfig(SCHEDULE, units=Units(size=1), selection=Selection(**selection))
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        steps(model, optimizer, dgm, square)
        assert [c.name for c in dgm.candidates] == ["w1", "w2"]
        check_experts(dgm, budgets_of(dgm))


def test_three_dimensions_alone_make_no_experts():
    model = nn.Sequential(nn.Linear(16, 16), EinsumExperts(), nn.Linear(16, 2))
    model.register_parameter("positions", nn.Parameter(torch.zeros(1, 9, 16)))
    assert [c.name for c in find_candidates(model)] == ["0", "2"]
    with pytest.raises(ValueError, match=r"experts='\*\.w3' matches no parameter .*'1\.w1': \(4, 16, 32\)"):
        find_candidates(model, experts=["*.w3"])


def test_a_stack_that_is_not_contiguous_stays_dense():
    model = BmmExperts()
    model.w1 = nn.Parameter(torch.randn(4, 32, 16).transpose(1, 2))
    assert {c.name: c.masked for c in find_candidates(model)} == {"w1": False, "w2": True}


def test_patterns_are_refused_where_the_inputs_are_not_last():
    model = BmmExperts()
    config = DGMConfig(
        constant(0.5), units=Units(size=1, distribution="uniform"), update_rule=UpdateRule(pattern=NofM(4), regrow=True)
    )
    with pytest.raises(ValueError, match=r"'w1' stacks experts .* selection\.exclude"):
        DGMController(model, adamw(model), config, total_steps=STEPS, audit=False)


def test_experts_take_names_only():
    with pytest.raises(TypeError, match="globs over names of parameters and ExpertAdapters"):
        Selection(experts=[lambda name, module: True])


def test_experts_without_tokens_keep_exact_budgets():
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter
    model = hugging_face("Mixtral")
    for layer in model.model.layers:
        with torch.no_grad():  # ties: the same two experts are chosen for every token
            layer.mlp.gate.weight.zero_()
        layer.mlp.gate.weight.requires_grad_(False)
    optimizer = adamw(model)
    with DGMController(
        model, optimizer, DGMConfig(SCHEDULE, units=Units(size=1)), total_steps=STEPS, audit=False
    ) as dgm:
        steps(model, optimizer, dgm, language_loss)
        hit = [bool(e.any()) for e in model.model.layers[0].mlp.experts.gate_up_proj.grad]
        assert hit.count(True) == 2
        check_experts(dgm, budgets_of(dgm))
