"""Masked layers under torch's own machinery: torch.compile, activation checkpointing, functional calls, CUDA graphs."""

import contextlib
import gc

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers.swapped_layers import index_lists
from lightning_estdgm.config import DGMConfig, Selection, Units
from lightning_estdgm.engine._controller import DGMController
from lightning_estdgm.method._schedules import EstDgm
from lightning_estdgm.modules._candidates import find_candidates
from lightning_estdgm.modules._swap import restore_dense_, set_observing, sparsify_
from lightning_estdgm.recipes._decoder_block import DecoderBlock
from lightning_estdgm.sparse._linear import masked_linear
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends._protocol import backends

STEPS = 24
SCHEDULE = EstDgm(update_every=4, observe_steps=2)


class Net(nn.Module):
    """A GPT block and a head; `around` is called with the block and its input."""

    def __init__(self, around=lambda block, x: block(x)):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.block, self.head = DecoderBlock(64, 4), nn.Linear(64, 8)
        self.around = around

    def forward(self, x):
        return self.head(self.around(self.block, x))


def backend_or_skip(name, dtype=torch.float32):
    topology = BlockTopology.from_mask(torch.ones(2, 2, dtype=torch.bool), 16)
    if reason := backends()[name].unsupported(torch.device("cpu"), dtype, topology):
        pytest.skip(f"{name} {reason}")


def train(net, backend, context=contextlib.nullcontext, each_step=lambda dgm: None, **config):
    """Train through all phases; return the masks."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    settings = DGMConfig(SCHEDULE, units=Units(size=16), backend=backend).merged(**config)
    with DGMController(net, optimizer, settings, total_steps=STEPS, audit=False) as dgm:
        for step in range(STEPS):
            x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(step)).requires_grad_()
            optimizer.zero_grad()
            with context():
                loss = F.mse_loss(net(x), x[..., :8].sin())
            loss.backward()
            optimizer.step()
            dgm.advance()
            each_step(dgm)
        assert dgm.phase == "refinement"
        assert dgm.updates >= 5
        return dgm.masks()


def assert_same(net, masks, other, other_masks, **tolerance):
    for name, mask in masks.items():
        assert torch.equal(mask, other_masks[name]), name
    torch.testing.assert_close(dict(net.named_parameters()), dict(other.named_parameters()), **tolerance)


# ------------------------------------------------------------------ torch.compile


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()  # it counts recompilations of one function over all tests
    yield
    torch.compiler.reset()


# Dynamo warns about itself under some versions of Python and torch.
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@QUIET
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["cpu", "native", "reference"])
def test_a_compiled_block_trains_as_the_plain_one_and_masks_never_recompile_it(backend):
    backend_or_skip(backend)
    counter = CompileCounterWithBackend("aot_eager")
    plain = Net()
    masks = train(plain, backend)

    compiled = []

    def around(block, x):
        if not compiled:
            compiled.append(torch.compile(block, fullgraph=True, backend=counter))
        return compiled[0](x)

    seen = []
    net = Net(around)
    its_masks = train(net, backend, each_step=lambda dgm: seen.append((dgm.updates, dgm.phase, counter.frame_count)))
    assert_same(net, its_masks, plain, masks)
    # One graph for steps outside windows, one for inside, one for the first step, in which the controller looks on.
    assert [count for updates, _, count in seen if updates >= 1] == [3] * sum(updates >= 1 for updates, *_ in seen)
    assert {phase for updates, phase, _ in seen if updates >= 1} == {"consolidation", "refinement"}


COMPILED = {
    "model": lambda net, step: (torch.compile(net, backend="aot_eager"), step),
    "in place": lambda net, step: (net.compile(backend="aot_eager") or net, step),
    "layers": lambda net, step: ([layer.compile(backend="aot_eager") for layer in net] and net, step),
    "loss": lambda net, step: (net, torch.compile(step, backend="aot_eager")),
}


@QUIET
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at them
@pytest.mark.parametrize("how", COMPILED)
def test_what_is_compiled_in_a_plain_loop_is_masked_as_the_plain_model(how):
    ends = []
    for made in (lambda net, step: (net, step), COMPILED[how]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
        model, loss_of = made(net, lambda model, x: F.mse_loss(model(x), x[:, :4].sin()))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        net[2].requires_grad_(False)
        settings = DGMConfig(SCHEDULE, units=Units(size=16), backend="dense")
        with DGMController(model, optimizer, settings, total_steps=STEPS) as dgm:
            if how == "loss" or made is not COMPILED[how]:
                dgm.probe_uncompiled()
            for step in range(STEPS):
                net[2].requires_grad_(step >= 3)  # it is audited in mid-run
                if step == 3:
                    torch._dynamo.reset()  # torch 2.6 would not look again at what takes a gradient
                optimizer.zero_grad()
                loss_of(model, torch.randn(16, 32, generator=torch.Generator().manual_seed(step))).backward()
                optimizer.step()
                dgm.advance()
                assert runs_compiled() != dgm.probing
            ends.append((dgm.masks(), dict(net.named_parameters()), dgm.flops, dgm.density))
    (masks, weights, *counts), (its_masks, its_weights, *its_counts) = ends
    assert list(masks) == ["0", "2"]
    torch.testing.assert_close((its_masks, its_weights), (masks, weights))
    assert its_counts == counts


def runs_compiled():
    return bool(torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")(torch.zeros(1)))


@QUIET
@pytest.mark.usefixtures("fresh_compiler")
def test_a_controller_of_a_model_that_is_not_compiled_leaves_others_compiled():
    net = Net()
    dgm = DGMController(net, torch.optim.SGD(net.parameters(), 0.1), DGMConfig(SCHEDULE), total_steps=STEPS)
    assert dgm.probing
    assert runs_compiled()
    dgm.close()


@QUIET
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_loss_whose_first_step_was_not_seen_leaves_layers_dense_and_the_reason_names_the_way_out():
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with DGMController(net, optimizer, DGMConfig(SCHEDULE, units=Units(size=1)), total_steps=STEPS) as dgm:
        torch.compile(lambda x: net(x).square().mean(), backend="aot_eager")(torch.randn(16, 32)).backward()
        optimizer.step()
        with pytest.warns(RuntimeWarning, match="probe_uncompiled"):
            dgm.advance()
        assert {d.why.partition("call DGMController.")[2][:18] for d in dgm.decisions()} == {"probe_uncompiled()"}


@QUIET
@pytest.mark.usefixtures("fresh_compiler")
def test_the_first_step_alone_is_uncompiled_however_it_ends():
    def begun(net):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        dgm = DGMController(net, optimizer, DGMConfig(SCHEDULE), total_steps=STEPS)
        dgm.probe_uncompiled()
        return dgm, optimizer

    def go_on(net, dgm, optimizer):
        net(torch.randn(2, 16, 64)).square().mean().backward()
        optimizer.step()
        dgm.advance()

    nets = Net(), Net()
    (one, its), (two, others) = map(begun, nets)
    assert not runs_compiled()
    go_on(nets[0], one, its)  # began first, ends first
    assert not runs_compiled()
    go_on(nets[1], two, others)
    assert runs_compiled()
    one.close()
    two.close()

    with pytest.raises(KeyError), begun(Net())[0] as dgm:
        dgm.masks()["not there"]
    assert runs_compiled()

    with pytest.raises(ValueError, match="matches none"):
        DGMController(nets[0], its, DGMConfig(SCHEDULE, selection=Selection(include=["none"])), total_steps=STEPS)
    assert runs_compiled()

    left = begun(Net())
    assert not runs_compiled()
    del left
    gc.collect()
    assert runs_compiled()

    failed = begun(Net())  # kept by the traceback of its first forward, say
    net = Net()
    dgm, optimizer = begun(net)
    go_on(net, dgm, optimizer)
    assert runs_compiled()
    failed[0].close()
    dgm.close()
    assert runs_compiled()

    net = Net()
    dgm, optimizer = begun(net)
    with torch.compiler.set_stance("eager_on_recompile"):  # of the user's own, around the loop
        go_on(net, dgm, optimizer)
    dgm.close()
    assert runs_compiled()


@QUIET
@pytest.mark.usefixtures("fresh_compiler")
def test_another_backend_is_one_graph_more_and_the_way_back_none():
    net, counter = Net(), CompileCounterWithBackend("aot_eager")
    layers = [candidate for candidate in find_candidates(net.block, include=["*"]) if candidate.masked]
    assert len(layers) == 6
    compiled = torch.compile(net.block, fullgraph=True, backend=counter)
    x = torch.randn(2, 16, 64)
    frames = []
    # (backend, observing), as phases and windows follow each other; a phase may choose another backend.
    for number, (backend, observing) in enumerate(
        [("dense", False), ("dense", True), ("cpu", False), ("cpu", True), ("cpu", False), ("cpu", True)]
        + [("dense", False), ("dense", True), ("cpu", False), ("cpu", True)]
    ):
        torch.manual_seed(number)
        for layer in layers:
            mask = torch.rand(layer.shape[0] // 16, layer.shape[1] // 16) < 0.5
            with torch.no_grad():
                layer.weight.normal_(std=0.1).mul_(mask.repeat_interleave(16, 0).repeat_interleave(16, 1))
            sparsify_(layer, mask, 16, backend, frozen=False)
            set_observing(layer, observing)
        results = []
        for call in (compiled, net.block):
            net.zero_grad()
            call(x).square().mean().backward()
            results.append([p.grad for p in net.block.parameters()])
        torch.testing.assert_close(*results)
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    for layer in layers:
        restore_dense_(layer)


def test_what_a_captured_graph_reads_stays_in_its_place():
    net = Net()
    layers = [candidate for candidate in find_candidates(net.block, include=["*"]) if candidate.masked]

    def places():
        return [value.data_ptr() for layer in layers for value in (layer.weight, *index_lists(layer.module))]

    seen = []
    for backend, density in (("cpu", 0.5), ("cpu", 0.9), ("dense", 1.0), ("reference", 0.0), ("cpu", 0.1)):
        for layer in layers:
            mask = torch.rand(layer.shape[0] // 16, layer.shape[1] // 16) < density
            sparsify_(layer, mask, 16, backend, frozen=False)
        seen.append(places())
    assert len(seen[0]) == len(layers) * 5  # a weight and four lists
    assert all(now == seen[0] for now in seen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("block_size", [32, 64, (8, 1), (32, 1)], ids=str)
def test_a_cuda_graph_follows_masks_that_change_in_place(block_size):
    torch.manual_seed(0)
    topology = BlockTopology.from_mask(torch.rand(8, 4, device="cuda") < 0.5, block_size)
    out, inner = topology.shape
    x = torch.randn(256, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(out, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(out, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(256, out, device="cuda", dtype=torch.bfloat16)
    leaves = (x, weight, bias)

    def step(backend):
        y = masked_linear(*leaves, topology, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step("triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step("triton")
    for density in (0.5, 0.1, 0.9, 0.0):
        topology.update_(torch.rand(8, 4, device="cuda") < density)
        with torch.no_grad():
            x.normal_()
        graph.replay()
        expected = step("reference")
        for got, wanted in zip(captured, expected, strict=True):
            torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-2, atol=0.5)


# ------------------------------------------------------------------ activation checkpointing


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inactive", ["zero", "frozen"])
def test_recomputed_activations_give_the_same_run_to_the_last_bit(use_reentrant, inactive, precision):
    def context():
        return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()

    plain = Net()
    masks = train(plain, "cpu", context, inactive=inactive)
    calls = []

    def around(block, x):
        calls.append(x)
        return checkpoint(block, x, use_reentrant=use_reentrant)

    net = Net(around)
    assert_same(net, train(net, "cpu", context, inactive=inactive), plain, masks, rtol=0.0, atol=0.0)
    assert len(calls) == STEPS


def test_the_wrapper_that_strategies_checkpoint_with_changes_no_layers_name():
    plain, net = Net(), Net()
    masks = train(plain, "cpu")
    apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, DecoderBlock))
    its_masks = train(net, "cpu")
    assert list(its_masks) == list(masks)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(its_masks[name], mask) for name, mask in masks.items())


# ------------------------------------------------------------------ functional calls


def test_functional_calls_and_gradients_of_a_masked_model():
    net = Net()
    x = torch.randn(2, 16, 64)
    found = []

    def compare(dgm):
        given = {name: p.detach().clone() for name, p in net.named_parameters()}
        net.zero_grad()
        net(x).square().mean().backward()
        gradients = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).square().mean())(given)
        torch.testing.assert_close(gradients, {name: p.grad for name, p in net.named_parameters()})
        off = ~dgm.masks()["block.fc"].repeat_interleave(16, 0).repeat_interleave(16, 1)
        found.append((dgm.observing, bool(gradients["block.fc.weight"][off].any())))
        net.zero_grad()

    train(net, "cpu", each_step=compare)
    assert set(found) == {(False, False), (True, True)}  # whole in a window, masked elsewhere
