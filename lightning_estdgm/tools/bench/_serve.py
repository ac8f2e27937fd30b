"""``estdgm bench serve``: one sparse network in every runtime that is here: tokens a second, memory, size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_estdgm.export import ExportError, export_model, packed
from lightning_estdgm.recipes.gpt import ByteGPT
from lightning_estdgm.tools.bench._output import Columns, terminal_table
from lightning_estdgm.tools.bench._serve_process import ServeTask, example, make_network

_OPENVINO = {"openvino": ("openvino",), "openvino-int8": ("openvino", "nncf")}
TWICE = "packed-twice"
TARGETS = {
    "packed": ("packed", "fp32"), "packed-bf16": ("packed", "bf16"), "packed-int8": ("packed", "int8"),
    TWICE: ("packed", "fp32"), "aoti": ("aoti", "fp32"), "aoti-bf16": ("aoti", "bf16"),
    "torch-csr": ("torch-csr", "fp32"), "onnx": ("onnx", "fp32"),
    "mnn": ("mnn", "fp32"), **dict.fromkeys(_OPENVINO, ("onnx", "fp32")),
}  # fmt: skip
"""Target and type of values of the file that each runtime serves; `TWICE` has twice the threads. 2:4 needs a GPU."""
RUNTIMES = ("torch", *TARGETS)
"""Names of what is measured: dense PyTorch, the targets, and OpenVINO on the file of ``onnx``."""
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
"""glibc's allocator as servers set it: else PyTorch's large outputs come from the system anew at each call."""


@dataclass(frozen=True)
class ServeConfig:
    """What is served.

    Attributes:
        network: "mlp" (width, four times the width, width) or "gpt" (a decoder block).
        width: its width, a multiple of 64.
        density: active share of its matrices.
        block_size: side of the square units that are active or not.
        tokens: tokens of a call, one measurement each.
        runtimes: some of `RUNTIMES`.
        generated: tokens that a GPT of two such blocks generates from its packed form; 0 for none.
        sequence: tokens of one sequence at most; more tokens are a batch of such.
        threads: threads of all but ``packed-twice``; 0: as many as PyTorch has.

    """

    network: str = "mlp"
    width: int = 1024
    density: float = 0.1
    block_size: int = 16
    tokens: tuple[int, ...] = (1, 16, 256, 2048)
    runtimes: tuple[str, ...] = RUNTIMES
    generated: int = 100
    sequence: int = 2048
    threads: int = 0

    def __post_init__(self) -> None:
        if self.network not in ("mlp", "gpt"):
            raise ValueError(f"network: got {self.network!r}, expected mlp or gpt")
        if self.width < 64 or self.width % 64 or self.width % self.block_size:
            raise ValueError(f"width: got {self.width}, expected a multiple of 64 and of block_size={self.block_size}")
        if unknown := sorted(set(self.runtimes) - set(RUNTIMES)):
            raise ValueError(f"runtimes: got {', '.join(unknown)}, expected some of {', '.join(RUNTIMES)}")
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens: got {self.tokens}, expected positive numbers")
        if self.sequence < 1 or any(n % min(n, self.sequence) for n in self.tokens):
            raise ValueError(f"sequence: got {self.sequence}, expected a divisor of each of tokens={self.tokens}")
        if self.threads < 0:
            raise ValueError(f"threads: got {self.threads}, expected a number, or 0 for as many as PyTorch has")


def measure_serving(config: ServeConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Export the network to each target and time each runtime in a process of its own.

    Returns:
        The configuration; "rows": runtime, seconds by tokens, peak, file and weight bytes (None where the runtime does
        not tell); "left_out": what was not measured and why; "generation": tokens a second of a GPT with a key-value
        cache, dense and packed; "cache_bytes": the largest cache of the CPU, None if it is not known.

    """
    torch.manual_seed(0)
    model = keep_units_(make_network(config.network, config.width), config).eval()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "torch.pt")
        for runtime in config.runtimes:
            say(f"{runtime} ...")
            try:
                file = _written(runtime, model, config, Path(folder))
                rows.append({"runtime": runtime, "file_bytes": file.stat().st_size, **_served(runtime, file, config)})
            except (ExportError, ModuleNotFoundError, RuntimeError) as e:
                left_out.append(f"{runtime}: {e}")
    return {
        "config": {**asdict(config), "threads": config.threads or torch.get_num_threads()},
        "rows": rows,
        "left_out": left_out,
        "generation": measure_generation(config) if config.generated else None,
        "cache_bytes": cache_bytes(),
    }


def keep_units_(model: nn.Module, config: ServeConfig) -> nn.Module:
    """Zero all but a share of the square units of each matrix but embeddings, drawn by torch's generator."""
    side = config.block_size
    dense = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for matrix in (parameter for parameter in model.parameters() if id(parameter) not in dense):
            if matrix.dim() == 2 and not (matrix.shape[0] % side or matrix.shape[1] % side):
                units = torch.rand(matrix.shape[0] // side, matrix.shape[1] // side) < config.density
                matrix.mul_(units.repeat_interleave(side, 0).repeat_interleave(side, 1)).add_(0.0)
    return model


def measure_generation(config: ServeConfig) -> dict[str, float]:
    """Return the tokens a second that a byte-level GPT of two blocks generates, dense and packed."""
    prompt = torch.randint(0, 256, (1, 8), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    gpt = ByteGPT(config.width, layers=2, heads=config.width // 64, context=prompt.shape[1] + config.generated)
    keep_units_(gpt, config).eval()
    found, before = {}, torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        for name, model in (("torch", gpt), ("packed", packed(gpt))):
            model.generate(prompt, 2)  # type: ignore[operator]
            start = time.perf_counter()
            model.generate(prompt, config.generated)  # type: ignore[operator]
            found[name] = config.generated / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return found


def serve_table(result: Mapping[str, Any]) -> Any:
    """Return the results as a table for the terminal: tokens a second, and how many times dense PyTorch."""
    return terminal_table(_title(result), serve_columns(result), left={0})


def serve_columns(result: Mapping[str, Any]) -> Columns:
    """Return head and cells: one row a runtime."""
    tokens: Sequence[int] = result["config"]["tokens"]
    dense = next((row["seconds"] for row in result["rows"] if row["runtime"] == "torch"), None)
    head = ["runtime", *(f"{n} token{'s' if n > 1 else ''}" for n in tokens), "peak MB", "file MB"]
    cells = []
    for row in result["rows"]:
        line = [row["runtime"]]
        for n in tokens:
            seconds = row["seconds"][str(n)]
            times = "" if dense is None else f" ({dense[str(n)] / seconds:.2f}x)"
            line.append(f"{n / seconds:,.0f}/s{times}")
        peak = row["peak_bytes"]
        cells.append([*line, "-" if peak is None else f"{peak / 1e6:.0f}", f"{row['file_bytes'] / 1e6:.1f}"])
    return head, cells


def _title(result: Mapping[str, Any]) -> str:
    c = result["config"]
    return f"{c['network']} of width {c['width']}, density {c['density']}, units of {c['block_size']}"


def cache_bytes() -> int | None:
    """Return the size of the CPU's last-level cache as Linux tells it, or None."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=None)


def _written(runtime: str, model: nn.Module, config: ServeConfig, folder: Path) -> Path:
    """Return the file that a runtime serves; it is exported once."""
    if runtime == "torch":
        return folder / "torch.pt"
    if missing := [name for name in _OPENVINO.get(runtime, ()) if find_spec(name) is None]:
        raise ModuleNotFoundError(f"{', '.join(missing)} not installed: pip install 'lightning-estdgm[openvino]'")
    target, values = TARGETS[runtime]
    if found := sorted(folder.glob(f"{target}.{values}.*")):
        return found[0]
    x = example(config.network, config.width, 16, config.sequence)
    return export_model(model, x, target, folder / f"{target}.{values}", values=values, dynamic="shape").files[0]


def _served(runtime: str, file: Path, config: ServeConfig) -> dict[str, Any]:
    threads = (config.threads or torch.get_num_threads()) * (2 if runtime == TWICE else 1)
    if threads > (cores := len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1):
        raise RuntimeError(f"{threads} threads, and {cores} cores")
    target = TARGETS.get(runtime, ("torch",))[0] if runtime not in _OPENVINO else runtime
    task = ServeTask(target, str(file), config.network, config.width, config.tokens, config.sequence, threads)
    call = [sys.executable, "-m", "lightning_estdgm.tools.bench._serve_process", json.dumps(asdict(task))]
    environment = {
        **os.environ, **_MALLOC, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError("\n".join((done.stderr or f"exit status {done.returncode}").strip().splitlines()[-6:]))
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if runtime == "mnn":
        found["peak_bytes"] = None  # MNN's memory is that of yet another process
    return found
