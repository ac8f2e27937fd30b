"""One runtime of ``estdgm bench serve`` in a process of its own: seconds and peak memory as JSON on the last line.

Run as a module with one argument, the JSON of a `ServeTask`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_estdgm.export.targets._protocol import ExportInput, discover
from lightning_estdgm.recipes._decoder_block import DecoderBlock
from lightning_estdgm.tools.bench._peak_memory import peak_resident

_TURN_S = 0.5


@dataclass(frozen=True)
class ServeTask:
    """What a process serves.

    Attributes:
        runtime: "torch", "openvino", "openvino-int8", or the name of a target.
        file: file to serve; for "torch" the state dict of the dense model.
        network: "mlp" or "gpt".
        width: width of the network.
        tokens: tokens of a call, one measurement each.
        sequence: tokens of a sequence at most.
        threads: threads.

    """

    runtime: str
    file: str
    network: str
    width: int
    tokens: tuple[int, ...]
    sequence: int
    threads: int


def make_network(network: str, width: int) -> nn.Module:
    """Return an MLP, width to four times the width and back, or a decoder block of that width."""
    if network == "gpt":
        return nn.Sequential(DecoderBlock(width, width // 64))
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def example(network: str, width: int, tokens: int, sequence: int) -> Tensor:
    """Return so many tokens: rows for an MLP, sequences of at most `sequence` for a block."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
    return x if network == "mlp" else x.view(-1, min(tokens, sequence), width)


def serve(task: ServeTask) -> dict[str, Any]:
    """Load the file and time it.

    Returns:
        "seconds" a call by tokens; "peak_bytes" that loading and running added at most, None where the system does not
        tell; "weight_bytes" of parameters and buffers, None where the runtime holds them by itself.

    """
    torch.set_num_threads(task.threads)
    before = _start_of_peak()
    with torch.no_grad():
        run = _load(task)
        inputs = {tokens: example(task.network, task.width, tokens, task.sequence) for tokens in task.tokens}
        seconds = {tokens: _seconds(run, x) for tokens, x in inputs.items()}
    held = [*run.parameters(), *run.buffers()] if isinstance(run, nn.Module) else []
    is_told = bool(held) and all(tensor.layout is torch.strided for tensor in held)
    return {
        "seconds": seconds,
        "peak_bytes": None if before is None else peak_resident() - before,
        "weight_bytes": sum(tensor.nbytes for tensor in held) if is_told else None,
    }


def _load(task: ServeTask) -> Callable[[Tensor], Any]:
    with torch.device("meta"):
        model = make_network(task.network, task.width).eval()
    if task.runtime == "torch":
        model.load_state_dict(torch.load(task.file, weights_only=True), assign=True)
        return model
    if task.runtime.startswith("openvino"):
        return _openvino(task)
    target = discover()[task.runtime]
    run: Callable[[Tensor], Any] = target.load(Path(task.file), ExportInput(model, (), {}, "shape", target.values[0]))
    return run


def _openvino(task: ServeTask) -> Callable[[Tensor], Any]:
    import openvino

    core = openvino.Core()
    model = core.read_model(task.file)
    if task.runtime == "openvino-int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": task.threads, "INFERENCE_PRECISION_HINT": "f32"}
    )
    request = compiled.create_infer_request()
    return lambda x: request.infer([x.numpy()], share_inputs=True, share_outputs=True)


def _seconds(run: Callable[[Tensor], Any], x: Tensor) -> float:
    """Return the median seconds of a call: turns for half a second, at least three."""
    run(x)
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - began < _TURN_S:
        start = time.perf_counter()
        run(x)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _start_of_peak() -> int | None:
    """Return the bytes that are resident now, from which on the peak counts; None where Linux does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far, that of imports, is forgotten
        return peak_resident()
    except OSError:
        return None


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(serve(ServeTask(**{**given, "tokens": tuple(given["tokens"])}))))
