"""DDP: every way to start it, ranks that agree, ranks that do not, and runs that go on from a checkpoint."""

from __future__ import annotations

import csv
import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from helpers import distributed_jobs as jobs
from helpers import distributed_matrix as matrix
from helpers.distributed_train import train
from helpers.models import MLP, Batches, ResumableLoader, TinyMLP, make_trainer
from helpers.models import SCHEDULE as SHORT
from helpers.runs import EPOCH_STEPS, SCHEDULE, STEPS, differences, end_of, load
from lightning_estdgm import DGMCallback, DGMConfig, EnergyMonitor, Units
from lightning_estdgm.method._masks import unpack_bits
from lightning_estdgm.modules._swap import set_observing, sparsify_
from lightning_estdgm.sparse.autotune._choice import BackendSelector

HELPERS = Path(__file__).parents[1] / "helpers"


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


# --------------------------------------------------------------------------- ways to start


def started(how: str, folder: Path) -> list[dict[str, Any]]:
    """What each process that a user sees returns."""
    if how.startswith("ddp_"):
        return jobs.run(train, 1, how)
    launcher = [sys.executable]
    if how == "torchrun":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(HELPERS / "distributed_train.py"), "ddp", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=jobs.TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [load(path) for path in sorted(folder.glob("*.pt"))]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """The same run in processes of the tests' own."""
    return jobs.run(train, 2, "ddp")[0]


@pytest.mark.parametrize("how", matrix.LAUNCHERS)
def test_however_the_ranks_are_started_the_run_is_the_same(how: str, reference: dict[str, Any], tmp_path: Path) -> None:
    """After ddp_spawn and its like the process that called fit knows masks, decisions and state as well."""
    processes = started(how, tmp_path)
    assert len(processes) == (1 if how.startswith("ddp_") else 2)
    for index, found in enumerate(processes):
        assert (found["rank"], found["world_size"]) == (index, 2)
        assert [differences(found[key], reference[key], key) for key in reference if key != "rank"] == [[]] * 6


def forget(_: str) -> str:
    callback = DGMCallback(DGMConfig(schedule=SHORT))
    trainer = make_trainer(callback, devices=2, strategy="ddp_fork", max_epochs=1)
    with pytest.raises(RuntimeError, match="knows its model only from the start of"):
        callback.masks()
    trainer.fit(TinyMLP(), TinyMLP.batches(20))
    path = callback._spawned._path
    assert path.exists()
    assert callback.density == callback.schedule(19).density or callback.masks()
    return str(path)


def test_what_a_forked_fit_leaves_is_gone_once_read() -> None:
    (path,) = jobs.run(forget, 1, "")
    assert not Path(path).exists()


# --------------------------------------------------------------------------- ranks that do not agree


class Disturb(pl.Callback):
    """Makes one rank different, in a way of the test's choice, once the run is at a step."""

    def __init__(self, kind: str, who: int) -> None:
        self.kind, self.who = kind, who

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.kind == "gradient" and rank() == self.who:
            pl_module.net[2].weight.grad.neg_()[:8] *= 100.0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        callback = next(c for c in trainer.callbacks if isinstance(c, DGMCallback))
        if self.kind == "mask" and rank() == self.who and callback.controller.steps == 7:
            layer = callback.controller.masked_weights[0]
            layer.set_mask(layer.whole_mask().roll(1, 0))
        if self.kind == "counter" and rank() == self.who and callback.controller.steps == 7:
            callback.controller.position += 1


def disturbed(kind: str, who: int) -> tuple[str, int]:
    """The error that this rank ends with, and after how many steps."""
    pl.seed_everything(0, verbose=False)
    seed = rank() == who if kind == "seed" else 0
    callback = DGMCallback(DGMConfig(schedule=SHORT, seed=int(seed)))
    trainer = make_trainer(Disturb(kind, who), callback, devices=ranks(), strategy="ddp", max_epochs=1)
    try:
        trainer.fit(TinyMLP(), TinyMLP.batches(20))
    except Exception as error:
        return f"{type(error).__name__}: {error}", callback.controller.steps if callback.controller else 0
    return "", 20


@pytest.mark.parametrize(
    ("kind", "who", "named", "when", "step"),
    [
        ("gradient", 2, "the mask of layer 'net.2'", "after mask update 1", 5),
        ("mask", 1, "the mask of layer 'net.0'", "after mask update 2", 10),
        ("seed", 3, "the mask of layer 'net.0' (and 1 more)", "where masks were drawn, at step 1", 1),
    ],
)
def test_a_rank_that_differs_stops_the_run_on_all_ranks(kind: str, who: int, named: str, when: str, step: int) -> None:
    others = [r for r in range(4) if r != who]
    sides = f"ranks {others} against rank [{who}]"
    expected = re.compile(rf"MasksDifferError: {re.escape(named)}.* differs between ranks {when}: {re.escape(sides)}")
    for error, at in jobs.run(disturbed, 4, kind, who):
        assert expected.match(error), error
        assert at == step


def test_control_nothing_is_said_of_ranks_that_agree() -> None:
    assert jobs.run(disturbed, 2, "nothing", 1) == [("", 20)] * 2


class WithBuffers(MLP):
    """Batch norm has buffers, so that DDP broadcasts buffers before each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(128))


class TakeOtherMask(pl.Callback):
    """Gives rank 1 another mask and topology, and looks at them a few steps on."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        controller = next(c for c in trainer.callbacks if isinstance(c, DGMCallback)).controller
        layer = controller.masked_weights[0]
        if controller.steps == 6 and rank() == 1:
            layer.set_mask(layer.whole_mask().roll(1, 0))
            sparsify_(layer.candidate, layer.mask, layer.block_size, "cpu")
            set_observing(layer.candidate, controller.observing)
        if controller.steps == 8:
            self.columns = layer.candidate.module._estdgm_topology.col_idx.tolist()
            self.buffers = [name for name, _ in pl_module.named_buffers()]


def other_topology() -> tuple[list[int], list[str], str]:
    pl.seed_everything(0, verbose=False)
    look, callback = TakeOtherMask(), DGMCallback(DGMConfig(schedule=SHORT, backend="cpu"))
    trainer = make_trainer(callback, look, devices=2, strategy="ddp", max_epochs=1)
    try:
        trainer.fit(WithBuffers(), MLP.batches(20))
    except Exception as error:
        return look.columns, look.buffers, str(error)
    return look.columns, look.buffers, ""


def test_a_differing_mask_is_seen_and_not_overwritten_by_the_broadcast_of_buffers() -> None:
    (mine, buffers, error), (theirs, _, _) = jobs.run(other_topology, 2)
    assert any("running_mean" in name for name in buffers)
    assert mine != theirs
    assert "the mask of layer 'net.0' differs between ranks after mask update 2" in error


# --------------------------------------------------------------------------- local facts


def measured_on_one_rank() -> list[tuple[str, str, str]]:
    """Backends chosen where rank 0 measures that sparse is faster, and the others must not measure."""

    def measure(case: Any, names: Any, **_: Any) -> dict[str, float]:
        assert rank() == 0
        return {name: 2.0 if name == "dense" else 1.0 for name in names}

    BackendSelector.__init__.__kwdefaults__["measure"] = measure
    callback = DGMCallback(DGMConfig(SHORT, Units(size=16)))
    module = MLP()
    # Ranks with batches of other sizes, as with sequences of several lengths.
    batches = Batches((x[: 8 - 4 * rank()], y[: 8 - 4 * rank()]) for x, y in MLP.batches(20))
    make_trainer(callback, devices=2, strategy="ddp", max_epochs=1).fit(module, batches)
    return [(d.backend, d.final_backend, d.why) for d in callback.decisions()], callback.flops_ratio


def test_backends_are_chosen_by_rank_0_for_all() -> None:
    first, second = jobs.run(measured_on_one_rank, 2)
    assert first == second
    assert [backend for backend, _, _ in first[0]] == ["cpu", "cpu", "dense"]


class SkewedTimer(Timer):
    """A clock that runs at half the speed on rank 1, in steps instead of seconds."""

    def __init__(self) -> None:
        super().__init__({"seconds": 40}, interval="step")
        self.steps = 0

    def time_elapsed(self, stage: Any = None) -> float:
        return float(self.steps) / (1 + rank())

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        super().on_train_batch_end(trainer, *args, **kwargs)


class Positions(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen.append(next(c for c in trainer.callbacks if isinstance(c, DGMCallback)).controller.position)


def timed() -> list[int]:
    positions = Positions()
    trainer = make_trainer(SkewedTimer(), DGMCallback(), positions, devices=2, strategy="ddp", max_epochs=-1)
    trainer.fit(TinyMLP(), TinyMLP.batches(10))
    return positions.seen


def test_time_is_that_of_rank_0() -> None:
    first, second = jobs.run(timed, 2)
    assert first == second
    assert len(set(first)) > 30
    assert first[-1] > 9000  # of 10,000: rank 0's time was over, rank 1's would have been half over


def uneven() -> int:
    class Stop(Exception):
        pass

    class StopAtStart(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            raise Stop

    callback = DGMCallback()
    trainer = make_trainer(callback, StopAtStart(), devices=2, strategy="ddp", max_epochs=2)
    with pytest.raises(Stop):
        trainer.fit(TinyMLP(), TinyMLP.batches(30 - 4 * rank()))
    return callback.schedule.total_steps


def test_length_is_that_of_the_shortest_loader() -> None:
    assert jobs.run(uneven, 2) == [52, 52]


# --------------------------------------------------------------------------- resuming


class Save(pl.Callback):
    """Saves a checkpoint in each step of a list."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.left = folder, set(STOPS.values())

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step in self.left:
            self.left.remove(trainer.global_step)
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Shared(TinyMLP):
    """Each rank has its own batches; the optimizer may be sharded."""

    def __init__(self, zero: bool = False) -> None:
        super().__init__(scheduler="onecycle")
        self.zero = zero

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        if self.zero:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            optimizer = ZeroRedundancyOptimizer(self.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-3)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS + 1, cycle_momentum=False)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return configured


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation, active units only, bucket views": {
        "accumulate": 2,
        "compress": True,
        "gradient_as_bucket_view": True,
    },
    "ZeRO": {"zero": True},
}
STOPS = {"inside a window": 6, "phase border": 12, "mid-epoch": 21}


def fit(kind: str, folder: Path, *callbacks: pl.Callback, ckpt: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """One run on the ranks of this job, and all that must be equal at its end."""
    settings = dict(KINDS[kind])
    accumulate = settings.pop("accumulate", 1)
    compress, zero = settings.pop("compress", False), settings.pop("zero", False)
    pl.seed_everything(seed, verbose=False)
    module, callback = Shared(zero), DGMCallback(DGMConfig(schedule=SCHEDULE), compress_gradients=compress)
    logger = CSVLogger(folder, name="", version=f"seed{seed}", flush_logs_every_n_steps=1)
    trainer = make_trainer(
        callback,
        *callbacks,
        devices=ranks(),
        strategy=DDPStrategy(**settings) if ranks() > 1 else "auto",
        max_steps=STEPS,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        logger=logger,
        log_every_n_steps=1,
    )
    batches = TinyMLP.batches(EPOCH_STEPS * accumulate * 4)[rank() :: 4]
    trainer.fit(module, ResumableLoader(batches), ckpt_path=ckpt)
    if zero:
        trainer.optimizers[0].consolidate_state_dict()
        if rank() != 0:
            trainer.optimizers.clear()  # only rank 0 has the whole state
    return end_of(module, callback, trainer) | {"curves": curves(Path(logger.log_dir) / "metrics.csv")}


def curves(path: Path) -> dict[int, dict[str, str]]:
    """What was logged in each step."""
    torch.distributed.barrier() if ranks() > 1 else None
    found: dict[int, dict[str, str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(int(row["step"]), {}).update({k: v for k, v in row.items() if v and k != "step"})
    return found


def moments() -> tuple[dict[str, int], list[str]]:
    """First moments that are not 0 at inactive weights, of the layers whose state this rank has; and warnings."""
    pl.seed_everything(0, verbose=False)
    module, callback = Shared(zero=True), DGMCallback(DGMConfig(schedule=SCHEDULE))
    trainer = make_trainer(callback, devices=ranks(), strategy="ddp", max_steps=STEPS, max_epochs=-1, logger=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, ResumableLoader(TinyMLP.batches(EPOCH_STEPS * 2)[rank() :: 2]))
    state = trainer.optimizers[0].optim.state
    weights = {name: module.get_submodule(name).weight for name in callback.masks()}
    kept = {name: state[weight]["exp_avg"] for name, weight in weights.items() if weight in state}
    left = {name: int(torch.count_nonzero(kept[name][~callback.masks()[name]])) for name in kept}
    return left, [text for entry in caught if "dropped or grown" in (text := str(entry.message))]


def test_zero_resets_the_state_of_each_layer_on_the_rank_that_has_it() -> None:
    (first, warned), (second, also_warned) = jobs.run(moments, 2)
    assert first | second == {"net.0": 0, "net.2": 0}
    assert len(first) == len(second) == 1
    assert warned == also_warned == []


def resumed(folder: Path) -> dict[tuple[str, str], tuple[list[str], list[str]]]:
    """Differences of ends and of curves, between a straight run and runs that go on from its checkpoints."""
    found = {}
    for kind in KINDS:
        here = folder / re.sub(r"\W", "-", kind)
        straight = fit(kind, here, Save(here))
        for stop, step in STOPS.items():
            end = fit(kind, here / stop, ckpt=here / f"{step}.ckpt", seed=step)
            after = {s: row for s, row in straight["curves"].items() if s >= step}
            found[kind, stop] = (
                differences({**straight, "curves": None}, {**end, "curves": None}),
                differences(after, end["curves"]),
            )
        if kind == "plain":
            checkpoint = load(here / "6.ckpt")
            checkpoint["callbacks"]["DGMCallback"]["layers"]["net.0"]["window"]["gradient"].zero_()
            if rank() == 0:
                torch.save(checkpoint, here / "spoiled.ckpt")
            torch.distributed.barrier()
            end = fit(kind, here / "spoiled", ckpt=here / "spoiled.ckpt", seed=1)
            found[kind, "spoiled"] = (differences(straight["weights"], end["weights"]), [])
    return found


@pytest.fixture(scope="module")
def resumptions(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return jobs.run(resumed, 2, tmp_path_factory.mktemp("resumed"))


@pytest.mark.parametrize(("kind", "stop"), list(itertools.product(KINDS, STOPS)))
def test_resumed_equals_straight_to_the_bit(resumptions: list[dict[Any, Any]], kind: str, stop: str) -> None:
    for of_rank in resumptions:
        ends, logged = of_rank[kind, stop]
        assert ends == []
        assert logged == []


def test_control_a_spoiled_checkpoint_is_seen(resumptions: list[dict[Any, Any]]) -> None:
    assert all(of_rank["plain", "spoiled"][0] for of_rank in resumptions)


def joules(folder: Path) -> tuple[list[float], list[float]]:
    """The energy counter of a run, and of one that goes on from its checkpoint after step 12."""
    curves = [
        fit("plain", folder, EnergyMonitor(), Save(folder))["curves"],
        fit("plain", folder / "on", EnergyMonitor(), ckpt=folder / "12.ckpt", seed=1)["curves"],
    ]
    first, second = ([row for _, row in sorted(curve.items())] for curve in curves)
    name = next(key for key in first[-1] if key.startswith("energy/total_joules"))
    return [float(row[name]) for row in first], [float(row[name]) for row in second]


def test_joules_go_on_where_they_were(tmp_path: Path) -> None:
    for straight, resumed in jobs.run(joules, 2, tmp_path):
        assert len(straight) - len(resumed) == 12
        counted = [*straight[:12], *resumed]
        assert counted == sorted(counted)
        assert counted[0] > 0.0


def saved(folder: Path) -> None:
    fit("plain", folder, Save(folder))


class LookAtStart(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.masks = next(c for c in trainer.callbacks if isinstance(c, DGMCallback)).masks()


def gone_on(folder: Path, step: int) -> dict[str, Any]:
    look = LookAtStart()
    end = fit("plain", folder / f"{ranks()}-{step}", look, ckpt=folder / f"{step}.ckpt")
    return {"at_start": look.masks, "masks": end["masks"], "weights": end["weights"], "density": end["numbers"][1]}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_ranks_on_resume(before: int, after: int, tmp_path: Path) -> None:
    jobs.run(saved, before, tmp_path)
    for step in STOPS.values():
        layers = load(tmp_path / f"{step}.ckpt")["callbacks"]["DGMCallback"]["layers"]
        ends = jobs.run(gone_on, after, tmp_path, step)
        for end in ends:
            for name, layer in layers.items():
                assert torch.equal(end["at_start"][name], unpack_bits(layer["mask"], (16, 16)))
                assert torch.equal(end["masks"][name], ends[0]["masks"][name])
                weight = end["weights"][f"{name}.weight"]
                assert torch.count_nonzero(weight[~end["masks"][name]]) == 0
            assert sum(int(mask.sum()) for mask in end["masks"].values()) == round(0.1 * 2 * 16 * 16)
