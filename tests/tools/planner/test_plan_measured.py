"""The formulas of `lightning_estdgm.tools.planner` against what two processes really hold, move and send."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import distributed_jobs as jobs
from helpers.swapped_layers import index_lists
from lightning_estdgm import DGMConfig, DGMController, EstDgm, Phase
from lightning_estdgm.config import Units
from lightning_estdgm.distributed._comm_hook import ActiveUnits, active_units_hook
from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.recipes import ByteGPT
from lightning_estdgm.tools.planner._mask_work import update_cost
from lightning_estdgm.tools.planner._memory import memory_bytes
from lightning_estdgm.tools.planner._planned_model import PlannedModel, inspect_model
from lightning_estdgm.tools.planner._setup import TrainingSetup
from lightning_estdgm.tools.planner._traffic import traffic_bytes

# Density 0.25 throughout; the steps 2 and 3 of every four are observed.
SCHEDULE = EstDgm(
    exploration=Phase(0.25, 0.25, 8),
    consolidation=Phase(0.25, 0.25, 8),
    refinement=Phase(0.25, 0.25, 8),
    update_every=4,
    observe_steps=2,
    freeze=0.0,
)
STEPS = 10
COLLECTIVES = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Moved(TorchDispatchMode):
    """Bytes that operators read and write, and that collectives are handed (of an all-gather: give back)."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = 0
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what it does with its local tensors comes by here
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if "c10d" in func.namespace:
            if name not in ("wait_tensor", "_wrap_tensor_autograd"):
                # Whole is what comes first: the sum, what is gathered, or (scattered) what comes second.
                whole = args[1] if name == "_reduce_scatter_base_" else (args or [kwargs])[0]
                kind = COLLECTIVES.get(name, name)
                self.sent[kind] = self.sent.get(kind, 0) + sum(map(size, tensors(whole)))
        elif not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            read = args[1:] if name == "copy_" else (args, kwargs)
            self.memory += sum(map(size, tensors(read))) + sum(map(size, tensors(result)))
        return result


def held(layer: MaskedWeight) -> dict[str, int]:
    """Bytes of the tensors that one masked layer holds, each storage once."""

    def bytes_of(*names: str) -> int:
        storages = [vars(layer)[name].untyped_storage() for name in names if vars(layer)[name] is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    window = layer.window
    return {
        "masks": bytes_of("mask", "explored", "addressed_mask"),
        "block index lists": sum(map(size, index_lists(layer.candidate.module))),
        "observation window": 0 if window is None else size(window.gradient) + size(window.norm),
    }


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def small_gpt() -> ByteGPT:
    return ByteGPT(width=128, layers=2, heads=2, context=16)


def sharded(strategy: str, model: ByteGPT) -> nn.Module:
    """Lay the model over two processes."""
    if strategy == "ddp":
        return DistributedDataParallel(model)
    if strategy == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:  # the perceptron alone: the recipe's attention has its number of heads written in
        parallelize_module(block, mesh, {"fc": ColwiseParallel(), "out": RowwiseParallel()})
    return model


def run(strategy: str, block_size: int | str, compress: bool = False) -> dict[str, Any]:
    """Train a little, and return what this rank held, moved and sent."""
    torch.manual_seed(0)
    model = small_gpt()
    trained = sharded(strategy, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    gathered: list[int] = []

    def look(*args: Any) -> None:
        gathered.append(sum(size(p) for p in model.parameters() if not hasattr(p, "to_local")))

    for block in model.blocks:
        block.gelu.register_forward_hook(look)
    config = DGMConfig(schedule=SCHEDULE, units=Units(size=block_size), backend="dense")
    steps: list[dict[str, Any]] = []
    with DGMController(model, optimizer, config, total_steps=24, group=dist.group.WORLD, audit=False) as dgm:
        if compress:
            state = ActiveUnits(dgm.masked_weights, lambda: dgm.observing)
            trained.register_comm_hook(state, active_units_hook)
        before = next(iter(optimizer._optimizer_step_pre_hooks.values()))
        after = [*optimizer._optimizer_step_post_hooks.values()][-1]  # the first gives parameter groups back
        for step in range(STEPS):
            training, work, update = Moved(), Moved(), Moved()
            x, y = torch.randint(256, (2, 4, 16), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            with training:
                nn.functional.cross_entropy(trained(x).flatten(0, 1), y.flatten()).backward()
            observing = dgm.observing
            with work:
                dgm.mask_gradients()
            optimizer.step()
            dgm.mask_gradients()
            with work, torch.no_grad():  # once more, and counted
                before(optimizer, (), {})
                after(optimizer, (), {})
            layers = {layer.name: held(layer) for layer in dgm.masked_weights}
            with update:
                updated = dgm.advance()
            steps.append(
                {
                    "observing": observing,
                    "updated": updated,
                    "held": layers,
                    "moved": work.memory,
                    "moved in the update": update.memory,
                    "sent": training.sent,
                    "sent by masks": {"step": work.sent, "update": update.sent},
                }
            )
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    return {
        "steps": steps,
        "held": {
            "weights": sum(size(local(p)) for p in model.parameters()),
            "gradients": sum(size(local(p.grad)) for p in model.parameters()),
            "optimizer state": sum(size(local(state)) for state in states),
        },
        "gathered": max(gathered),
    }


CASES: dict[str, tuple[str, Any, bool]] = {
    "DDP, blocks": ("ddp", "auto", False),
    "DDP, units of 4 x 1": ("ddp", (4, 1), False),
    "DDP, units of 8": ("ddp", 8, False),
    "DDP, single weights": ("ddp", 1, False),
    "DDP, active units": ("ddp", "auto", True),
    "FSDP2, blocks": ("fsdp2", "auto", False),
    "FSDP2, units of 4": ("fsdp2", 4, False),
    "FSDP2, single weights": ("fsdp2", 1, False),
    "tensor parallel": ("2d", "auto", False),
}


def run_all() -> dict[str, Any]:
    return {name: run(*case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Return what each rank recorded; one job for all tests."""
    return jobs.run(run_all, 2)


def planned(name: str) -> tuple[PlannedModel, TrainingSetup, str]:
    strategy, block_size, _ = CASES[name]
    setup = TrainingSetup(
        gpus=2, density=0.25, tensor_parallel=2, block_size=block_size, tokens=4 * 16, update_every=4, observe_steps=2
    )
    model = replace(inspect_model(small_gpt(), setup, strategy), width=128)
    if strategy == "2d":
        model = replace(model, layers=tuple(x for x in model.layers if x.name.endswith(("fc", "out"))))
    return model, setup, strategy


OBSERVED, UPDATED, PLAIN = 2, 3, 5  # steps of which the first opens a window, the second ends it, the third has none


def test_the_steps_looked_at_are_what_they_should_be(measured: list[dict[str, Any]]) -> None:
    for ranks in measured:
        for record in ranks.values():
            kinds = [(step["observing"], step["updated"]) for step in record["steps"]]
            assert kinds[:6] == [(False, False)] * 2 + [(True, False), (True, True)] + [(False, False)] * 2


@pytest.mark.parametrize("name", CASES)
def test_bytes_held(measured: list[dict[str, Any]], name: str) -> None:
    expected = memory_bytes(*planned(name))
    wanted = {layer.name for layer in planned(name)[0].masked}
    for rank in measured:
        record = rank[name]
        if name != "tensor parallel":  # there the rest of the model is whole
            for kind, held_bytes in record["held"].items():
                assert held_bytes == expected[kind], kind
        for step in (OBSERVED, PLAIN):
            layers = [x for n, x in record["steps"][step]["held"].items() if n in wanted]
            for kind in ("masks", "block index lists", "observation window"):
                here = 0.0 if kind == "observation window" and step == PLAIN else expected[kind]
                assert sum(x[kind] for x in layers) == here, (kind, step)


def test_the_root_and_one_unit_are_whole_in_the_forward_of_fsdp2(measured: list[dict[str, Any]]) -> None:
    model, setup, strategy = planned("FSDP2, blocks")
    for rank in measured:
        assert rank["FSDP2, blocks"]["gathered"] == 4 * (model.root + max(model.sharding_units))
    assert memory_bytes(model, setup, strategy)["gathered"] == 4 * (2 * model.root + 3 * max(model.sharding_units))


@pytest.mark.parametrize("name", ["DDP, blocks", "DDP, single weights", "DDP, active units"])
def test_bytes_that_ddp_all_reduces(measured: list[dict[str, Any]], name: str) -> None:
    expected = traffic_bytes(*planned(name))
    kind = "all-reduce, active units" if name == "DDP, active units" else "all-reduce, dense"
    for rank in measured:
        steps = rank[name]["steps"]
        assert steps[PLAIN]["sent"] == {"all-reduce": expected[kind]}
        assert steps[OBSERVED]["sent"] == {"all-reduce": expected["all-reduce, dense"]}
    assert expected["all-reduce, mean"] == (expected["all-reduce, dense"] + expected["all-reduce, active units"]) / 2
    assert expected["all-reduce, active units"] < 0.4 * expected["all-reduce, dense"]


@pytest.mark.parametrize("name", ["FSDP2, blocks", "FSDP2, single weights"])
def test_bytes_that_fsdp2_gathers_and_scatters(measured: list[dict[str, Any]], name: str) -> None:
    expected = traffic_bytes(*planned(name))
    for rank, step in itertools.product(measured, (OBSERVED, PLAIN)):
        sent = rank[name]["steps"][step]["sent"]
        assert sent == {kind: expected[kind] for kind in ("all-gather", "reduce-scatter")}


def test_bytes_of_activations_under_tensor_parallelism(measured: list[dict[str, Any]]) -> None:
    """One of the two pairs of products in a block is split here."""
    expected = traffic_bytes(*planned("tensor parallel"))
    for rank in measured:
        sent = rank["tensor parallel"]["steps"][PLAIN]["sent"]
        assert sum(sent.values()) == expected["all-reduce of activations"] / 2


@pytest.mark.parametrize("name", CASES)
def test_bytes_that_masks_send(measured: list[dict[str, Any]], name: str) -> None:
    expected = update_cost(*planned(name))
    for rank in measured:
        steps = rank[name]["steps"]
        assert steps[PLAIN]["sent by masks"] == {"step": {}, "update": {}}
        sent = [sum(steps[UPDATED]["sent by masks"][when].values()) for when in ("step", "update")]
        # Eight layers are whole under our tensor parallelism: one more flag, and their digests.
        more = (4, 8 * 8 * 2) if name == "tensor parallel" else (0, 0)
        assert sent[0] == expected["sent in an observed step"] + more[0]
        assert sent[1] == expected["sent in an update"] + more[1]


@pytest.mark.parametrize("name", [name for name in CASES if name != "tensor parallel"])
def test_bytes_that_mask_work_moves_in_memory(measured: list[dict[str, Any]], name: str) -> None:
    expected = update_cost(*planned(name))
    for rank in measured:
        steps = rank[name]["steps"]
        assert steps[PLAIN]["moved"] == pytest.approx(expected["every step"], rel=0.01)
        observed = steps[UPDATED]["moved"] - steps[PLAIN]["moved"]
        assert observed == pytest.approx(expected["more in an observed step"], rel=0.05)
        assert steps[UPDATED]["moved in the update"] == pytest.approx(expected["in an update"], rel=0.05)
