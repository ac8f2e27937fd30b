"""Tables of docs/guides/scaling.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_estdgm.tools.planner._gpt_sizes import GPT_SIZES, CountedGpt
from lightning_estdgm.tools.planner._memory import added_bytes, dense_bytes
from lightning_estdgm.tools.planner._model_plan import plan_model
from lightning_estdgm.tools.planner._setup import TrainingSetup
from lightning_estdgm.tools.planner._tables import amount

_SCALING_SETUPS = (
    ("DDP, 8 GPUs", "ddp", TrainingSetup(gpus=8)),
    ("FSDP2, 8 GPUs", "fsdp2", TrainingSetup(gpus=8)),
    ("FSDP2, 64 GPUs", "fsdp2", TrainingSetup(gpus=64)),
    ("2-D, 8 x 8 GPUs", "2d", TrainingSetup(gpus=64, tensor_parallel=8)),
)


def scaling_tables() -> str:
    """Return the tables of docs/guides/scaling.md: every published size under four set-ups, as Markdown."""
    modules = {name: CountedGpt.on_meta(*shape) for name, shape in GPT_SIZES.items()}
    plans = {
        name: [plan_model(module, setup, [s])["strategies"][s] for _, s, setup in _SCALING_SETUPS]
        for name, module in modules.items()
    }

    def held(numbers: Mapping[str, Any]) -> str:
        kinds = numbers["memory_bytes"]
        added = (added_bytes(kinds, in_window=False), added_bytes(kinds))
        return f"{amount('', dense_bytes(kinds))} + {amount('', added[0])}, + {amount('', added[1])}"

    def sent(numbers: Mapping[str, Any]) -> str:
        ring = numbers["traffic_bytes_per_step"]
        return " / ".join(amount("", ring[kind]) for kind in ("ring, dense", "ring, EST-DGM"))

    def work(numbers: Mapping[str, Any]) -> str:
        cost = numbers["mask_work"]
        moved, ratio, given = (cost[k] for k in ("mean a step", "against the optimizer", "sent, mean a step"))
        return f"{amount('', moved)} ({ratio:.2f}), {amount('', given)}"

    cells: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "Memory: dense, + between windows, + in a window": held,
        "Traffic of a step: dense / EST-DGM": sent,
        "Mask work of a step: moved (against AdamW), sent": work,
    }
    headings = [name for name, _, _ in _SCALING_SETUPS]
    lines = ["| size | blocks x width | parameters | masked |", "|---|---|---|---|"]
    for name, (layers, width) in GPT_SIZES.items():
        numbers = plans[name][0]
        share = numbers["masked_weights"] / numbers["parameters"]
        lines.append(f"| {name} | {layers} x {width} | {numbers['parameters']:,} | {share:.1%} |")
    for title, cell in cells.items():
        lines += ["", f"**{title}**", "", f"| size | {' | '.join(headings)} |", "|---|" + "---|" * len(headings)]
        lines += [f"| {name} | {' | '.join(map(cell, columns))} |" for name, columns in plans.items()]
    return "\n".join(lines)
