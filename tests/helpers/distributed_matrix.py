"""Which strategies work with which precisions and with gradient accumulation: the table that the tests run.

``PYTHONPATH=tests python -m helpers.distributed_matrix > docs/guides/strategies.md`` prints it for people.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")
ACCUMULATE = (1, 2)

_STATIC = "static_graph=True does not work with accumulate_grad_batches=2"
_LIKE = "expected a strategy out of"


@dataclass(frozen=True)
class Row:
    """One strategy, with its settings.

    Attributes:
        name: key of the row, and its title.
        settings: what a user writes.
        refuses: for each precision that cannot work, or "accumulation", what the error says; ``"*"``: for all cells.
        ranks: processes that the test runs.
        like: name of the row whose weights it must come to, to the bit; ``""``: none.

    """

    name: str
    settings: str
    refuses: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    ranks: int = 2
    like: str = ""

    def refusal(self, precision: str, accumulate: int) -> str | None:
        """What the error of a cell says, or None where it works."""
        causes = ("*", precision, *(["accumulation"] if accumulate > 1 else []))
        return next((self.refuses[cause] for cause in causes if cause in self.refuses), None)


ROWS = {
    row.name: row
    for row in (
        Row("one device", "Trainer()", ranks=1),
        Row("DDP", 'strategy="ddp"'),
        Row("DDP, static graph", "DDPStrategy(static_graph=True)", {"accumulation": _STATIC}, like="DDP"),
        Row("DDP, bucket views", "DDPStrategy(gradient_as_bucket_view=True)", like="DDP"),
        Row("DDP, unused parameters", 'strategy="ddp_find_unused_parameters_true"', like="DDP"),
        Row("DDP, ZeRO", 'strategy="ddp", optimizer: ZeroRedundancyOptimizer'),
        Row("DDP, active units only", 'strategy="ddp", DGMCallback(compress_gradients=True)', like="DDP"),
        Row(
            "DDP, active units only, static graph, bucket views",
            "DDPStrategy(static_graph=True, gradient_as_bucket_view=True), DGMCallback(compress_gradients=True)",
            {"accumulation": _STATIC},
            like="DDP",
        ),
        Row(
            "DDP, active units only, in bf16",
            "DDPStrategy(ddp_comm_hook=bf16_compress_hook), DGMCallback(compress_gradients=True)",
        ),
        Row(
            "DDP, PowerSGD and active units only",
            "DDPStrategy(ddp_comm_hook=powerSGD_hook), DGMCallback(compress_gradients=True)",
            {"*": "compress_gradients=True cannot be combined with ddp_comm_hook=powerSGD_hook"},
        ),
        Row(
            "DDP, post-local SGD",
            "DDPStrategy(ddp_comm_hook=post_localSGD_hook)",
            {"*": "averages gradients over all ranks in every step, got post-local SGD"},
        ),
        Row(
            "FSDP",
            "FSDPStrategy(use_orig_params=True)",
            {"64-true": "is not supported in FSDP"},
        ),
        Row(
            "FSDP2",
            "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)",
            dict.fromkeys(("64-true", "16-mixed"), "The `ModelParallelStrategy` does not support"),
        ),
        Row(
            "FSDP2 and tensor parallel",
            "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)",
            dict.fromkeys(("64-true", "16-mixed"), "The `ModelParallelStrategy` does not support"),
            ranks=4,
        ),
        Row("DeepSpeed", 'strategy="deepspeed"', {"*": f"{_LIKE} .* got DeepSpeedStrategy"}, ranks=1),
        Row("XLA", 'strategy="xla"', {"*": f"{_LIKE} .* got XLAStrategy"}, ranks=1),
    )
}  # fmt: skip

LAUNCHERS = {
    "script": 'strategy="ddp" in a script, which Lightning starts once more for each further rank',
    "torchrun": '`torchrun --nproc-per-node 2 train.py`, strategy="ddp"',
    "ddp_spawn": 'strategy="ddp_spawn"',
    "ddp_fork": 'strategy="ddp_fork"',
    "ddp_notebook": 'strategy="ddp_notebook"',
}
"""Ways to start the same two DDP ranks; each is run once."""


_PREFACE = """\
# Strategies

<!-- Printed by `PYTHONPATH=tests python -m helpers.distributed_matrix`; a test fails when it is out of date. -->

Each cell is a real run on the CPU, in gloo processes: 20 optimizer steps with three mask updates, once with
`accumulate_grad_batches=1` and once with 2 (`tests/distributed/`). *yes / no*: with 1 / with 2.

- *yes*: all ranks end with the same masks, with exactly the units that the budget gives, with weights that are zero
  elsewhere, and with the same weights.
- A row *like DDP* ends with DDP's weights, to the bit. At 64-true DDP ends with the weights of one device that is given
  the whole batch; at 32-true FSDP and FSDP2 end with DDP's, but for rounding.
- ZeRO does not end as DDP does: there, grown weights share their parameter's count of steps
  ([optimizers](optimizers.md)).
- *no (1)*: the run stops before its first step, with the error of that number.

16-mixed runs on the CPU through `MixedPrecision(..., GradScaler())`, and FSDP by a subclass, as Lightning refuses the
CPU for `FSDPStrategy` itself. None of these cells was run on a GPU. How to use each strategy:
[many ranks](distributed.md).
"""


def cells() -> Iterator[tuple[str, str, int]]:
    """Row, precision and accumulation of every cell."""
    return itertools.product(ROWS, PRECISIONS, ACCUMULATE)


def markdown() -> str:
    """Lay the table out for docs/guides/strategies.md."""
    errors: dict[str, int] = {}
    lines = [
        *_PREFACE.splitlines(),
        "",
        f"| strategy | settings | ranks | like DDP | {' | '.join(PRECISIONS)} |",
        f"|---|---|---|---|{'---|' * len(PRECISIONS)}",
    ]
    for row in ROWS.values():
        shown = []
        for precision in PRECISIONS:
            answers = []
            for accumulate in ACCUMULATE:
                error = row.refusal(precision, accumulate)
                answers.append("yes" if error is None else f"no ({errors.setdefault(error, len(errors) + 1)})")
            shown.append(" / ".join(dict.fromkeys(answers)))
        lines.append(
            f"| {row.name} | `{row.settings}` | {row.ranks} | {'yes' if row.like else ''} | {' | '.join(shown)} |"
        )
    lines += ["", "Errors:", ""]
    lines += [f"{number}. {error.replace('.*', '...')}" for error, number in errors.items()]
    lines += [
        "",
        "Ways to start DDP's ranks, each run once with two ranks (32-true), to the same weights:",
        "",
        "| launcher | how |",
        "|---|---|",
        *(f"| {name} | {how} |" for name, how in LAUNCHERS.items()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
