"""`export_checkpoint`: a checkpoint of a run, sparse or ordinary, in the form of a target."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_estdgm.export._export import ExportReport, export_model, target_named
from lightning_estdgm.plugins._packing import active_share, unpack
from lightning_estdgm.plugins._sparse_file import read_sparse


def export_checkpoint(
    checkpoint: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    model: Callable[..., nn.Module],
    example: Any = None,
    weights_only: bool = True,
    values: str | None = None,
    dynamic: str = "batch",
    evaluate: Callable[[Callable[..., Any]], float] | None = None,
) -> ExportReport:
    """Write the model of a checkpoint in the form of a target, as `export_model` does.

    Args:
        checkpoint: a file that `SparseCheckpointIO`, Lightning or ``torch.save(model.state_dict())`` has saved.
        to: name of a target.
        out: where it goes; None: beside the checkpoint, with the target's suffix.
        model: class of the LightningModule, or a function without arguments that makes the module.
        example: one input of its forward; None: the module's ``example_input_array``.
        weights_only: as for ``torch.load``.
        values: type of the stored values, as of `export_model`.
        dynamic: dimensions that may vary, as of `export_model`.
        evaluate: quality of a function, as of `export_model`.

    Raises:
        ValueError: if the checkpoint is damaged or of another model, or there is no example input.

    """
    path = Path(checkpoint)
    target = target_named(to)
    content = _read(path, weights_only)
    made = _filled(model, content, path, weights_only)
    example = getattr(made, "example_input_array", None) if example is None else example
    if example is None:
        raise ValueError(f"example: {type(made).__name__} has no example_input_array; give an example input")
    out = path.with_suffix(target.suffix) if out is None else out
    report = export_model(made, example, to, out, values=values, dynamic=dynamic, evaluate=evaluate)
    return replace(report, notes=(*_masks_note(content), *report.notes))


def _read(path: Path, weights_only: bool) -> Mapping[str, Any]:
    sparse = read_sparse(path, "cpu", weights_only)
    content = torch.load(path, "cpu", weights_only=weights_only) if sparse is None else unpack(sparse)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a checkpoint or a state dict")
    return content


def _filled(model: Callable[..., nn.Module], content: Mapping[str, Any], path: Path, weights_only: bool) -> nn.Module:
    """Return the module with the checkpoint's weights: by Lightning where the class knows how, else by its state."""
    load = getattr(model, "load_from_checkpoint", None)
    try:
        if load is not None and "state_dict" in content:
            whole = io.BytesIO()
            torch.save(content, whole)
            whole.seek(0)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
                    made = load(whole, map_location="cpu", weights_only=weights_only)
            except NotImplementedError:  # its `configure_model` makes parts of it on the meta device
                made = _made(model, content)
        else:
            made = _made(model, content)
    except (TypeError, RuntimeError, KeyError) as e:
        name = getattr(model, "__name__", str(model))
        raise ValueError(
            f"{path} does not load into {name}: {e}\nIf it needs arguments that the checkpoint does not hold, give a "
            "function without arguments that makes it"
        ) from e
    if not isinstance(made, nn.Module):
        raise ValueError(f"model must make an nn.Module, got {type(made).__name__}")
    return made


def _made(model: Callable[..., nn.Module], content: Mapping[str, Any]) -> nn.Module:
    made = model()
    if isinstance(made, nn.Module):
        if (configure := getattr(made, "configure_model", None)) is not None:
            configure()
        is_meta = any(tensor.is_meta for tensor in (*made.parameters(), *made.buffers()))
        made.load_state_dict(content.get("state_dict", content), assign=is_meta)
    return made


def _masks_note(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Say it if the checkpoint has no masks, or is from the middle of its schedule: zeros decide, not masks."""
    state = content.get("callbacks", {}).get("DGMCallback") if isinstance(content.get("callbacks"), Mapping) else None
    if not state:
        return ("the checkpoint holds no masks of DGMCallback: what is zero in its weights was taken as inactive",)
    if state["position"] >= state["total_steps"]:
        return ()
    return (
        f"the checkpoint is from position {state['position']} of {state['total_steps']} of its schedule, at "
        f"density {active_share(content):.3f} of its masked weights: a later one may be sparser",
    )
