"""Description of a run for its `energy.json`: model, Trainer, method, versions."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_estdgm._environment import package_version
from lightning_estdgm.energy._reading import hostname
from lightning_estdgm.modules._candidates import clean_name


def describe_model(module: nn.Module) -> dict[str, Any]:
    """Return class, number of parameters, and a fingerprint that models of the same names and shapes share.

    Returns:
        "class", "parameters" (int) and "fingerprint" (SHA-256, hex); the last two None while parameters are lazy.
    """
    parameters = dict(module.named_parameters())
    name = type(module).__name__
    if any(is_lazy(p) for p in parameters.values()):
        return {"class": name, "parameters": None, "fingerprint": None}
    shapes = sorted((clean_name(key), tuple(p.shape)) for key, p in parameters.items())
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    return {"class": name, "parameters": sum(p.numel() for p in parameters.values()), "fingerprint": digest}


def describe_run(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Return the description of a run at its start: name, host, Trainer settings, seed, versions."""
    logger = trainer.logger
    name = "/".join(str(part) for part in (logger.name, logger.version) if part not in (None, "")) if logger else ""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return {
        "name": name or Path(run_folder(trainer)).name,
        "host": hostname(),
        "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "compiled": _is_compiled(pl_module),
        "seed": int(seed) if seed.lstrip("-").isdecimal() else None,
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in ("torch", "lightning")},
            "lightning_estdgm": package_version("lightning-estdgm"),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        },
    }


def phase_of(callbacks: Iterable[Callback]) -> str | None:
    """Return the first `phase` of type str among the callbacks, "setup" for an empty one; None where there is none."""
    phases = (_phase(callback) for callback in callbacks)
    return next((phase or "setup" for phase in phases if phase is not None), None)


def describe_method(callbacks: Iterable[Callback]) -> dict[str, Any] | None:
    """Return the `run_summary` of the first callback that has one and a `phase`; None where there is none."""
    for callback in callbacks:
        if _phase(callback) is not None and hasattr(callback, "run_summary"):
            return dict(callback.run_summary())
    return None


def _phase(callback: Callback) -> str | None:
    try:
        phase = getattr(callback, "phase", None)
    except Exception:  # another's property, which may mean something else and not be ready yet
        return None
    # A str-Enum's own text, as its members would be in checkpoints, which load with ``weights_only=True``.
    return str.__str__(phase) if isinstance(phase, str) else None


def run_folder(trainer: Trainer) -> str:
    """Return the folder of a run, a path or a URL: the first logger's own, else the one in which its checkpoints lie.

    A logger without a `log_dir` of its own for each run (W&B, MLflow, Comet, Neptune, SwanLab) has checkpoints in
    ``save_dir/name/version``, as Lightning's `ModelCheckpoint` resolves its `dirpath`. Without a logger it is the
    Trainer's root.
    """
    # Not trainer.log_dir: it broadcasts, and after an exception the other ranks may be gone.
    logger = trainer.logger
    if logger is None:
        return str(trainer.default_root_dir)
    folder = getattr(logger, "log_dir", None)
    # Where it is `save_dir` itself (SwanLab), all runs share it.
    if isinstance(folder, str) and folder and Path(folder) != Path(logger.save_dir or ""):
        return folder
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


def _is_compiled(module: LightningModule) -> bool:
    """Return whether the module, or a part of it, is compiled."""
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    dynamo = sys.modules.get("torch._dynamo")  # not imported: nothing was compiled
    return dynamo is not None and any(isinstance(m, dynamo.OptimizedModule) for m in module.modules())
