"""Tables of docs/guides/scaling.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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


_Tables = Mapping[str, Callable[[Mapping[str, Any]], str]]
"""What makes a cell of each table out of the numbers of a set-up, by the table's title."""


def _laid_out(tables: _Tables, headings: Sequence[str], plans: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Lines of the tables: one size a row, one set-up a column, one number a cell."""
    lines = []
    for title, cell in tables.items():
        lines += ["", f"**{title}**", "", f"| size | {' | '.join(headings)} |", "|---|" + "---|" * len(headings)]
        lines += [f"| {name} | {' | '.join(map(cell, columns))} |" for name, columns in plans.items()]
    return lines


def scaling_tables() -> str:
    """Return the tables of docs/guides/scaling.md: every published size under four set-ups, as Markdown."""
    modules = {name: CountedGpt.on_meta(*shape) for name, shape in GPT_SIZES.items()}
    plans = {
        name: [plan_model(module, setup, [s])["strategies"][s] for _, s, setup in _SCALING_SETUPS]
        for name, module in modules.items()
    }

    def memory(numbers: Mapping[str, Any]) -> str:
        return amount("", dense_bytes(numbers["memory_bytes"]))

    def added(numbers: Mapping[str, Any], in_window: bool) -> str:
        return amount("", added_bytes(numbers["memory_bytes"], in_window=in_window))

    def traffic(numbers: Mapping[str, Any], kind: str) -> str:
        return amount("", numbers["traffic_bytes_per_step"][f"ring, {kind}"])

    def work(numbers: Mapping[str, Any], kind: str) -> str:
        cost = numbers["mask_work"][kind]
        return f"{cost:.2f}" if kind == "against the optimizer" else amount("", cost)

    answers: _Tables = {
        "Memory of a dense step": memory,
        "Memory that EST-DGM adds in an observation window": partial(added, in_window=True),
        "Traffic of a dense step": partial(traffic, kind="dense"),
        "Traffic of a step of EST-DGM": partial(traffic, kind="EST-DGM"),
    }
    details: _Tables = {
        "Memory that EST-DGM adds between windows": partial(added, in_window=False),
        "Memory traffic of masks in a step": partial(work, kind="mean a step"),
        "The same, over that of AdamW": partial(work, kind="against the optimizer"),
        "What masks send in a step": partial(work, kind="sent, mean a step"),
    }
    headings = [name for name, _, _ in _SCALING_SETUPS]
    lines = ["| size | blocks x width | parameters | masked |", "|---|---|---|---|"]
    for name, (layers, width) in GPT_SIZES.items():
        numbers = plans[name][0]
        share = numbers["masked_weights"] / numbers["parameters"]
        lines.append(f"| {name} | {layers} x {width} | {numbers['parameters']:,} | {share:.1%} |")
    lines += _laid_out(answers, headings, plans)
    lines += ["", "<details>", "<summary>Between windows, and the work on masks</summary>"]
    lines += [*_laid_out(details, headings, plans), "", "</details>"]
    return "\n".join(lines)
