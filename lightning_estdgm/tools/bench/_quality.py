"""``estdgm bench quality``: what the types of stored values cost in perplexity, on the demo's network and text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table

from lightning_estdgm.callbacks.dgm import DGMCallback
from lightning_estdgm.export import packed
from lightning_estdgm.export.targets.packed import DTYPES
from lightning_estdgm.tools._quiet import quiet_lightning
from lightning_estdgm.tools.bench._output import terminal_table
from lightning_estdgm.tools.demo._demo_config import DemoConfig
from lightning_estdgm.tools.demo._records import DGM
from lightning_estdgm.tools.demo._session import new_trainer


def measure_quality(config: DemoConfig) -> dict[str, Any]:
    """Train the demo's network by EST-DGM, pack it with each type of values, and validate all of them.

    Returns:
        The configuration; "perplexity" a byte of the trained model and of its packed forms; "bytes" of their weights.

    """
    data = config.data(seed=0)
    data.setup()
    with torch.random.fork_rng(devices=[]), quiet_lightning():
        torch.manual_seed(0)
        model = config.model(config.lr(DGM))
        trainer = new_trainer(
            [DGMCallback(config.dgm)],
            max_steps=config.steps,
            limit_val_batches=0,
            logger=False,
            val_check_interval=None,
        )
        trainer.fit(model, datamodule=data)
        forms = {"trained": model.eval(), **{name: packed(model, dtype=dtype) for name, dtype in DTYPES.items()}}
        return {
            "config": config.as_dict(),
            "perplexity": {name: _perplexity(form, data) for name, form in forms.items()},
            "bytes": {name: _bytes(form) for name, form in forms.items()},
        }


def quality_table(result: Mapping[str, Any]) -> Table:
    """Return the perplexities as a table for the terminal, and how much larger they are than the trained model's."""
    trained, size = result["perplexity"]["trained"], result["bytes"]["trained"]
    cells = [
        [name, f"{value:.4f}", f"{value / trained - 1:+.3%}", f"{result['bytes'][name] / size:.3f}"]
        for name, value in result["perplexity"].items()
    ]
    title = f"validation perplexity a byte after {result['config']['steps']} steps"
    return terminal_table(title, (["values", "perplexity", "against trained", "bytes"], cells), left={0})


@torch.no_grad()
def _perplexity(model: Any, data: Any) -> float:
    sums = [(float(model.loss(batch)) * batch[0].numel(), batch[0].numel()) for batch in data.val_dataloader()]
    return math.exp(sum(loss for loss, _ in sums) / sum(count for _, count in sums))


def _bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
