"""`export_model`: a trained model in a form that another runtime reads, written whole or not at all, and checked."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_estdgm.export._copies import copied
from lightning_estdgm.export.targets._protocol import ExportError, ExportInput, ExportTarget, discover, missing_runtime
from lightning_estdgm.plugins._whole_file import whole_folder

DYNAMIC = ("batch", "shape", "none")
_CALLS, _LONGEST_S = 15, 1.0
_OF_STORED = 1e-3  # of the largest output: another order of sums, of the same weights
_NOT_FINITE = (
    ". Some outputs are infinite or NaN in one of the two only: zeros of a weight hide such inputs in sparse forms"
)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the PyTorch model on the example input.

    Attributes:
        target: name of the target.
        files: files that were written, the main one first.
        size_bytes: their bytes together.
        dense_bytes: bytes of the model's parameters and buffers.
        difference: largest absolute difference of an output.
        largest: largest absolute output of the PyTorch model.
        call_s: seconds of a call, median; None where the target's device is not here.
        dense_s: seconds of a call of the PyTorch model, median, in turns with it.
        threads: threads that both had.
        quality: what `evaluate` said of the PyTorch model and of what was written, if it was given.
        notes: what a user has to know.

    """

    target: str
    files: tuple[Path, ...]
    size_bytes: int
    dense_bytes: int
    difference: float
    largest: float
    call_s: float | None
    dense_s: float
    threads: int
    quality: tuple[float, float] | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Say it in a few lines."""
        lines = [
            f"{', '.join(map(str, self.files))}: {self.size_bytes:,} bytes, "
            f"{self.size_bytes / self.dense_bytes:.3f} of the dense weights ({self.dense_bytes:,})",
            f"largest difference on the example input: {self.difference:.2e}, of outputs up to {self.largest:.2e}",
        ]
        if self.call_s is not None:
            lines.append(
                f"{self.call_s * 1e3:.3g} ms a call, dense PyTorch {self.dense_s * 1e3:.3g} ms: "
                f"{self.dense_s / self.call_s:.2f} times as fast, on the example input, {self.threads} thread(s)"
            )
        if self.quality is not None:
            lines.append(f"evaluated: {self.quality[1]:.6g}, PyTorch {self.quality[0]:.6g}")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])


def export_model(
    model: nn.Module,
    example: Any,
    to: str,
    out: str | Path,
    *,
    values: str | None = None,
    dynamic: str = "batch",
    evaluate: Callable[[Callable[..., Any]], float] | None = None,
) -> ExportReport:
    """Write a model in the form of a target, then run what was written against the model on an example input.

    The model is left alone; its copy on the CPU in evaluation mode is written. Files appear under their names when they
    are complete and checked.

    Args:
        model: a trained model; zeros in its weights are what is saved, no masks are asked for.
        example: one input of its forward: a tensor, a tuple of positional inputs, or a dict of named ones.
        to: name of a target, such as ``"onnx"``; an unknown one is refused with all names.
        out: the file; the target's suffix is added where it has none.
        values: type of the stored values, such as ``"int8"``; None: the target's default.
        dynamic: which dimensions of the inputs may vary later: ``"batch"``: the first of each; ``"shape"``: every one
            that the model lets vary, as for text of any length, or graphs; ``"none"``.
        evaluate: returns a number, such as an accuracy, of a function that computes the outputs of inputs.

    Returns:
        The sizes, times and differences that were found.

    Raises:
        ExportError: if the target cannot hold the model, its converter fails, or what it computes differs.
        FileExistsError: if there is something at `out`.
        ModuleNotFoundError: if the target's runtime is not installed; the message names the extra.
        ValueError: for a name, type or input that there is not.

    """
    target = target_named(to)
    values = target.values[0] if values is None else values
    if values not in target.values:
        raise ValueError(f"values: got {values!r}, expected {', '.join(target.values)} for {to}")
    if dynamic not in DYNAMIC:
        raise ValueError(f"dynamic: got {dynamic!r}, expected {', '.join(DYNAMIC)}")
    path = Path(out)
    path = path if path.suffix == target.suffix else path.with_name(path.name + target.suffix)
    if path.exists():
        raise FileExistsError(f"{path} is there already; expected a new file name")
    if (lack := missing_runtime(target)) is not None:
        raise ModuleNotFoundError(lack)
    args, kwargs = inputs_of(example)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model's parameters are on the meta device: load its weights first")
    dense = copied(model)
    given = ExportInput(copy.deepcopy(dense), args, kwargs, dynamic, values)
    with torch.no_grad(), whole_folder(path.parent) as (folder, publish):
        expected = _forward(dense, given)
        notes = target.write(given, folder / path.name)
        with _told_as_export_error(to, dense):
            run = target.load(folder / path.name, given)
            found = run(*args, **kwargs)
        difference, largest = _difference(found, expected)
        tolerance = target.tolerance(values)
        if tolerance is not None:
            _check(target, tolerance, difference, largest, "the model")
        elif (stored := target.stored(replace(given, model=copied(dense)))) is not None:
            compared = _difference(found, stored(*args, **kwargs))
            _check(target, _OF_STORED, *compared, "the model with the weights that it stores")
        call_s, dense_s = _take_turns(lambda: run(*args, **kwargs), lambda: dense(*args, **kwargs))
        run = _returning_as(expected, run)
        quality = None if evaluate is None else (float(evaluate(dense)), float(evaluate(run)))
        files = publish(path.name)
    return ExportReport(
        target=target.name,
        files=files,
        size_bytes=sum(file.stat().st_size for file in files),
        dense_bytes=sum(t.numel() * t.itemsize for t in _unique(dense)),
        difference=difference,
        largest=largest,
        call_s=call_s if target.runs_here else None,
        dense_s=dense_s,
        threads=torch.get_num_threads(),
        quality=quality,
        notes=tuple(notes),
    )


def target_named(name: str) -> ExportTarget:
    """Return a target; ValueError with all names if there is none of this name."""
    targets = discover()
    if name not in targets:
        raise ValueError(f"to: got {name!r}, expected {', '.join(targets)}")
    return targets[name]


def inputs_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and named inputs of an example, as Lightning takes ``example_input_array``.

    Raises:
        ValueError: if it is neither a tensor nor a tuple or dict with one.

    """
    args: tuple[Any, ...] = tuple(example) if isinstance(example, (tuple, list)) else ()
    kwargs = {str(key): value for key, value in example.items()} if isinstance(example, Mapping) else {}
    if isinstance(example, Tensor):
        args = (example,)
    if not any(isinstance(value, Tensor) for value in pytree.tree_leaves((args, kwargs))):
        raise ValueError(f"example: got {type(example).__name__}, expected a tensor, or a tuple or dict with tensors")
    moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.detach().cpu(), (args, kwargs)
    )
    return moved


def _forward(model: nn.Module, given: ExportInput) -> Any:
    try:
        return model(*given.args, **given.kwargs)
    except Exception as e:
        raise ValueError(f"example: the model fails on it: {type(e).__name__}: {e}") from e


@contextlib.contextmanager
def _told_as_export_error(target: str, model: nn.Module) -> Iterator[None]:
    try:
        yield
    except ExportError:
        raise
    except Exception as e:
        halves = sorted({str(t.dtype) for t in _unique(model) if t.dtype in (torch.float16, torch.bfloat16)})
        hint = f". The model is in {', '.join(halves)}: model.float() may run" if halves else ""
        raise ExportError(f"what {target} has written fails on the example: {type(e).__name__}: {e}{hint}") from e


def _unique(model: nn.Module) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())


def _tensors(outputs: Any) -> list[Tensor]:
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def _returning_as(expected: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with outputs in the form of the model's: some runtimes return them as a list."""
    leaves, form = pytree.tree_flatten(expected)

    def in_form(*args: Any, **kwargs: Any) -> Any:
        found = iter(leaf for leaf in pytree.tree_leaves(run(*args, **kwargs)) if isinstance(leaf, Tensor))
        return pytree.tree_unflatten([_next_as(leaf, found) for leaf in leaves], form)

    return in_form


def _next_as(leaf: Any, found: Iterator[Tensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    tensor = next(found)
    return torch.view_as_complex(tensor) if leaf.is_complex() and not tensor.is_complex() else tensor


def _difference(found: Any, expected: Any) -> tuple[float, float]:
    """Return the largest absolute difference, and the largest absolute value that was expected.

    NaN and infinities are no difference where both have them; they count for nothing else.
    """
    one, other = _tensors(found), _tensors(expected)
    if [tuple(t.shape) for t in one] != [tuple(t.shape) for t in other]:
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (one, other)]
        raise ExportError(f"what was written returns tensors of shapes {shapes[0]}, the model {shapes[1]}")
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if b.numel()]
    same = [(a == b) | (a.isnan() & b.isnan()) for a, b in pairs]
    differences = [
        float((a - b).abs().nan_to_num(nan=float("inf")).masked_fill(equal, 0.0).max())
        for (a, b), equal in zip(pairs, same, strict=True)
    ]
    sizes = [float(b.abs().nan_to_num(nan=0.0, posinf=0.0).max()) for _, b in pairs]
    return max(differences, default=0.0), max(sizes, default=0.0)


def _check(target: ExportTarget, tolerance: float, difference: float, largest: float, other: str) -> None:
    if not difference <= tolerance * max(largest, 1e-6):
        raise ExportError(
            f"what {target.name} computes differs from {other} by {difference:.2e}, of outputs up to {largest:.2e}; "
            f"nothing was written{_NOT_FINITE if difference == float('inf') else ''}"
        )


def _take_turns(*calls: Callable[[], object]) -> list[float]:
    """Return the median seconds of each call; they take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    began = time.perf_counter()
    for _ in range(_CALLS):
        for taken, call in zip(seconds, calls, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        if time.perf_counter() - began > _LONGEST_S:
            break
    return [statistics.median(taken) for taken in seconds]
