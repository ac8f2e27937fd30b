"""The measured choice for stacked experts: what is timed, that a module's stacks go together, and what is said."""

import dataclasses

import pytest
import torch

from helpers.autotune_cases import Clock
from helpers.controller_runs import SCHEDULE, constant, equal, saved, sgd
from helpers.expert_models import ADAPTERS, HUGGING_FACE, adapter, hugging_face, sorted_forward, tokens
from lightning_estdgm.config import DGMConfig, Selection, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.sparse.autotune._choice import BackendSelector

STEPS = 24


@pytest.fixture
def clock(monkeypatch):
    """Sparse takes the share of the dense time that a test sets; 0.5 to begin with."""
    clock = Clock(lambda density: 0.5)
    monkeypatch.setitem(BackendSelector.__init__.__kwdefaults__, "measure", clock)
    return clock


def is_linear(name, module):
    return isinstance(module, torch.nn.Linear)


BLOCKS = DGMConfig(constant(0.25), units=Units(size=16), selection=Selection(exclude=[is_linear]))


def adapted(name, **change):
    """Return the settings of a run with one of the adapters; a router that is a layer stays dense."""
    dense = [is_linear] if name == "sorted" else []
    return BLOCKS.merged(selection={"experts": [adapter(name, **change)], "exclude": dense})


def train(model, dgm, optimizer, last=1, width=None):
    for step in range(last):
        optimizer.zero_grad()
        if width is None:
            ids = tokens(step)
            loss = model(input_ids=ids, labels=ids).loss
        else:
            x = torch.randn(12, width, generator=torch.Generator().manual_seed(step))
            loss = (model(x).reshape(12, width) - x.sin()).square().mean()
        loss.backward()
        dgm.mask_gradients()
        optimizer.step()
        dgm.advance()


def of_experts(dgm):
    return {d.name: d for d in dgm.decisions() if d.masked}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_experts_of_transformers_are_timed_as_they_run(clock, name):
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter
    model = hugging_face(name, experts_implementation="grouped_mm" if name == "Mixtral" else "eager")
    optimizer = sgd(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
        train(model, dgm, optimizer, 3)
        decided = of_experts(dgm)
        assert len(decided) == 4
        assert {(d.backend, d.final_backend) for d in decided.values()} == {("cpu", "cpu")}
        assert all(
            "sparse 2.0x faster (4.5 against 9 ms)" in d.why or "sparse already" in d.why for d in decided.values()
        )
        assert dgm.flops["executed"] < dgm.flops["dense"]
    transposed = name == "GptOss"
    assert {(c.out_features, c.in_features, c.transposed) for c, _ in clock.asked} == {
        (96, 32, transposed),
        (32, 48, transposed),
    }
    assert {(c.tokens, c.experts, c.dense) for c, _ in clock.asked} == {
        (2 * 8 * 2, 8, "grouped" if name == "Mixtral" else "loop")
    }


def test_experts_stay_dense_where_that_is_faster(clock):
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter
    clock.sparse_share = lambda density: 2.0
    model = hugging_face("Mixtral")
    optimizer = sgd(model)
    classes = [type(m) for m in model.modules()]
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
        train(model, dgm, optimizer, 3)
        decided = of_experts(dgm)
        assert {(d.backend, d.final_backend) for d in decided.values()} == {("dense", "dense")}
        assert all("dense faster: sparse takes 2.0x the time" in d.why for d in decided.values())
        assert dgm.flops["executed"] == dgm.flops["dense"]
    assert [type(m) for m in model.modules()] == classes


def test_stacks_of_one_module_go_sparse_together_or_not_at_all(clock):
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter

    def gate_only(case, names):
        return {name: 1.0 if name == "dense" or case.out_features == 32 else 0.5 for name in names}

    BackendSelector.__init__.__kwdefaults__["measure"] = gate_only
    model = hugging_face("Mixtral")
    optimizer = sgd(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
        train(model, dgm, optimizer)
        assert {(d.backend, d.final_backend) for d in of_experts(dgm).values()} == {("dense", "dense")}
        why = of_experts(dgm)["model.layers.0.mlp.experts.gate_up_proj"].why
        assert "sparse 2.0x faster" in why
        assert why.endswith("but its module's forward is its own, since down_proj is dense")


def test_a_stack_beside_one_that_is_not_masked_stays_dense(clock):
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter
    model = hugging_face("Mixtral")
    optimizer = sgd(model)
    config = BLOCKS.merged(selection={"exclude": [is_linear, "model.layers.0.mlp.experts.down_proj"]})
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        train(model, dgm, optimizer)
        backends = {name: d.backend for name, d in of_experts(dgm).items()}
    assert backends == {
        "model.layers.0.mlp.experts.gate_up_proj": "dense",
        "model.layers.1.mlp.experts.gate_up_proj": "cpu",
        "model.layers.1.mlp.experts.down_proj": "cpu",
    }


def test_what_a_module_runs_otherwise_is_not_timed_and_said_and_may_be_forced(clock):
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter
    model = hugging_face("Mixtral", experts_implementation="batched_mm")
    optimizer = sgd(model)
    with DGMController(model, optimizer, BLOCKS, total_steps=STEPS) as dgm:
        train(model, dgm, optimizer)
        assert not clock.asked
        assert all("not timed: only backend= makes it sparse" in d.why for d in of_experts(dgm).values())
    model = hugging_face("Mixtral", experts_implementation="batched_mm")
    optimizer = sgd(model)
    with DGMController(model, optimizer, BLOCKS.merged(backend="reference"), total_steps=STEPS) as dgm:
        train(model, dgm, optimizer)
        assert {d.backend for d in of_experts(dgm).values()} == {"reference"}


def test_automatic_units_of_experts_are_timed_and_the_finest_taken_where_all_are_as_fast(clock):
    pytest.importorskip("transformers", minversion="5")  # experts in one parameter
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_local_experts": 2}
    model = hugging_face("Mixtral", **sizes)
    optimizer = sgd(model)
    config = DGMConfig(constant(0.25), selection=Selection(exclude=[is_linear]))
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        train(model, dgm, optimizer)
        assert [(d.block_size, d.backend) for d in of_experts(dgm).values()] == [(1, "native")] * 2


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapted_experts_are_timed_by_the_rows_that_they_get(clock, name):
    torch.manual_seed(0)
    model = ADAPTERS[name][0](width=32, hidden=64)
    optimizer = sgd(model)
    config = adapted(name)
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        train(model, dgm, optimizer, 3, width=32)
        assert {d.backend for d in of_experts(dgm).values()} == {"cpu"}
        assert type(model).__name__.startswith("Masked")
        rows, timed = (48, 64) if name == "einsum" else (12, 16)  # what is timed is a power of two
        router = 12 * 32 * 4 if name == "sorted" else 0  # of the others it is no layer
        assert dgm.flops["dense"] == 3 * 6 * (rows * 2 * 32 * 64 + router)
    assert {(c.tokens, c.experts, c.dense) for c, _ in clock.asked} == {
        (timed, 4, "grouped" if name == "sorted" else "batched")
    }
    assert {(c.out_features, c.in_features, c.transposed) for c, _ in clock.asked} == {
        (64, 32, name != "sorted"),
        (32, 64, name != "sorted"),
    }


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapted_experts_train_as_dense_ones_do(name):
    def trained(backend):
        torch.manual_seed(0)
        model = ADAPTERS[name][0](width=32, hidden=64).double()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # rows are dropped in another order
        optimizer = sgd(model)
        config = dataclasses.replace(adapted(name), backend=backend)
        torch.set_default_dtype(torch.float64)
        try:
            with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
                train(model, dgm, optimizer, STEPS, width=32)
                assert {d.backend for d in of_experts(dgm).values()} == {backend}
        finally:
            torch.set_default_dtype(torch.float32)
        return model

    sparse, dense = trained("cpu"), trained("dense")
    for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def forgetful(module, product, x):
    return sorted_forward(module, product, x) * 0.9


def test_a_wrong_adapter_ends_the_run_in_its_first_step():
    torch.manual_seed(0)
    model = ADAPTERS["sorted"][0](width=32, hidden=64)
    optimizer = sgd(model)
    config = adapted("sorted", forward=forgetful)
    with (
        DGMController(model, optimizer, config, total_steps=STEPS) as dgm,
        pytest.raises(ValueError, match="gives another output than the module's own forward"),
    ):
        train(model, dgm, optimizer, width=32)


@pytest.mark.parametrize("name", ["Mixtral", *ADAPTERS])
def test_a_resumed_run_chooses_what_the_straight_one_did(clock, name):
    def begin():
        torch.manual_seed(0)
        if name not in ADAPTERS:
            pytest.importorskip("transformers", minversion="5")  # experts in one parameter
            return hugging_face(name), None, dataclasses.replace(BLOCKS, schedule=SCHEDULE)
        return ADAPTERS[name][0](width=32, hidden=64), 32, dataclasses.replace(adapted(name), schedule=SCHEDULE)

    model, width, config = begin()
    optimizer = sgd(model)
    with DGMController(model, optimizer, config, total_steps=STEPS) as dgm:
        train(model, dgm, optimizer, 7, width)
        state, weights = saved(dgm.state_dict()), saved(model.state_dict())
        chosen, masks = {n: d.backend for n, d in of_experts(dgm).items()}, dgm.masks()
        train(model, dgm, optimizer, 10, width)
        assert not all(torch.equal(mask, masks[n]) for n, mask in dgm.masks().items())
    assert set(chosen.values()) == {"cpu"}
    clock.sparse_share = lambda density: 2.0
    resumed, width, config = begin()
    resumed.load_state_dict(weights)
    optimizer = sgd(resumed)
    torch.manual_seed(0)
    with DGMController(resumed, optimizer, config, total_steps=STEPS, state=state) as dgm:
        assert {n: d.backend for n, d in of_experts(dgm).items()} == chosen
        train(resumed, dgm, optimizer, 10, width)
        assert {n: d.backend for n, d in of_experts(dgm).items()} == chosen
    if name != "sorted":  # whose dropout draws anew
        assert equal(model, resumed)
