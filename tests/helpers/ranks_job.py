"""Real process groups for test_energy_ranks.py: each world's ranks are forked here, train, and leave JSON behind.

Two pretended hosts are two values of ESTDGM_HOSTNAME. All worlds run in one program, so that torch and lightning are
imported once.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from helpers.energy_parts import ConstantPower
from helpers.energy_runs import Net, data, trainer
from lightning_estdgm.callbacks.energy import EnergyMonitor
from lightning_estdgm.energy._reading import HOSTNAME_ENVIRONMENT, DeviceId, Reading, hostname


@dataclass
class Rail(ConstantPower):
    """A device of this host that writes down which process opens and reads it."""

    record: str = ""

    @property
    def device(self) -> DeviceId:
        uid = self.uid if self.scope == "host" else f"{self.uid}-{os.getpid()}"
        return DeviceId(hostname(), self.kind, uid)  # type: ignore[arg-type]

    def _note(self, event: str) -> None:
        with open(self.record, "a") as file:  # one short line: appended whole, whoever else writes
            file.write(f"{hostname()} {self.name} {event} {os.getpid()}\n")

    def open(self) -> None:
        super().open()
        self._note("open")

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        self._note("read")
        return super().read()


def rails(out: Path, *, own: str) -> list[Rail]:
    """What a rank sees: both GPUs of the host ("seen"), one only it sees, CPU, memory, and its own process."""
    record = str(out / "reads.txt")
    return [
        Rail(watts=100.0, name="seen-a", uid="gpu-a", record=record),
        Rail(watts=200.0, name="seen-b", uid="gpu-b", record=record),
        Rail(watts=50.0, name="own", uid=own, record=record),
        Rail(watts=30.0, name="package", kind="cpu", uid="package-0", record=record),
        Rail(watts=5.0, name="memory", kind="dram", uid="package-0/dram", record=record),
        Rail(watts=1.0, name="process", kind="cpu", uid="process", scope="process", record=record),
    ]


def four(out: Path, rank: int) -> dict[str, Any]:
    """Two hosts of two ranks: train, save, resume in a new Trainer; then tensor parallelism over two ranks."""
    ranks: dict[str, Any] = {"devices": 2, "num_nodes": 2}

    def run(mon: EnergyMonitor, name: str, epochs: int, **kwargs: Any) -> Trainer:
        strategy = DDPStrategy(process_group_backend="gloo")
        return trainer(
            out, mon, strategy=strategy, logger=CSVLogger(out, name, ""), max_epochs=epochs, **ranks, **kwargs
        )

    first = EnergyMonitor(rails(out, own=f"gpu-own-{rank % 2}"))
    fit = run(first, "first", 1)
    fit.fit(Net(), data())
    fit.save_checkpoint(out / "a.ckpt")

    second = EnergyMonitor([Rail(watts=7.0, name="other", uid="gpu-other", record=str(out / "second.txt"))])
    run(second, "second", 2).fit(Net(), data(), ckpt_path=out / "a.ckpt")

    third = EnergyMonitor([Rail(name="third", record=str(out / "third.txt"))])
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2, process_group_backend="gloo")
    trainer(out, third, strategy=strategy, **ranks).fit(Whole(), data())
    return {
        "first": first.summary(),
        "second": second.summary(),
        "third": third.summary(),
        "state": torch.load(out / "a.ckpt", weights_only=True)["callbacks"]["EnergyMonitor"]["totals"]["counts"],
    }


class Whole(Net):
    """Needs no sharding to run under a strategy that expects a model to shard itself."""

    def configure_model(self) -> None:
        pass


def two(out: Path, rank: int) -> dict[str, Any]:
    """One host, both ranks on the same GPU, with an idle baseline; and an exception in mid-run."""
    mon = EnergyMonitor(rails(out, own="gpu-shared"), idle_s=0.05)
    trainer(
        out, mon, strategy=DDPStrategy(process_group_backend="gloo"), devices=2, logger=CSVLogger(out, "fit", "")
    ).fit(Net(), data())

    failing = EnergyMonitor(rails(out / "failing", own="gpu-shared"))
    run = trainer(
        out,
        failing,
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=2,
        logger=CSVLogger(out, "failing", ""),
        log_every_n_steps=1,
    )
    try:
        run.fit(Net(fail_at=2), data())
    except RuntimeError as e:
        if "out of luck" not in str(e):
            raise
    return {"fit": mon.summary(), "failing": failing.summary()}


class Leave(Callback):
    """Ends the process group before the interpreter ends: gloo's threads may abort a process that exits over them."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        atexit.register(torch.distributed.destroy_process_group)


def launched(out: Path, strategy: str) -> None:
    """A Trainer that starts its own ranks, whose callbacks do not come back."""
    out.mkdir()
    mon = EnergyMonitor(rails(out, own="gpu-shared"))
    trainer(out, mon, Leave(), strategy=strategy, devices=2, logger=CSVLogger(out, "fit", "")).fit(Net(), data())
    (out / "parent.json").write_text(json.dumps({"pid": os.getpid(), "joules": mon.total_joules}))


def world(out: Path, ranks: int, per_host: int, job: Callable[[Path, int], dict[str, Any]]) -> None:
    """Fork the ranks of a process group and wait for them."""
    out.mkdir()
    (out / "failing").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        try:
            os.environ.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                NODE_RANK=str(rank // per_host),
                LOCAL_RANK=str(rank % per_host),
            )
            os.environ[HOSTNAME_ENVIRONMENT] = f"node-{rank // per_host}"
            (out / f"{rank}.json").write_text(json.dumps(job(out, rank)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed = [rank for rank, pid in enumerate(children) if os.waitpid(pid, 0)[1] != 0]
    if failed:
        raise SystemExit(f"{out.name}: rank(s) {failed} failed")


def main() -> None:
    out = Path(sys.argv[1])
    world(out / "four", 4, 2, four)
    world(out / "two", 2, 2, two)
    launched(out / "ddp_fork", "ddp_fork")
    launched(out / "ddp_spawn", "ddp_spawn")


if __name__ == "__main__":
    main()
