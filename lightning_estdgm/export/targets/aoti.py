"""``aoti``: the whole network compiled by AOTInductor, packed layers inside; C++ programs run it without Python."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_estdgm.export._aoti_package import cpu_metadata, load_aoti
from lightning_estdgm.export._joined_layers import with_joined_layers
from lightning_estdgm.export._program import exported_program
from lightning_estdgm.export.targets._protocol import ExportError, ExportInput, ExportTarget
from lightning_estdgm.export.targets.packed import DTYPES, packed_model, rounded_model
from lightning_estdgm.sparse.backends.native._operator import operator_library


class AOTI(ExportTarget):
    """An AOTInductor package (``.pt2``) with the library of the operator beside it."""

    name = "aoti"
    suffix = ".pt2"
    values: Sequence[str] = tuple(DTYPES)

    def write(self, given: ExportInput, path: Path) -> list[str]:
        """Compile the model with its layers packed; the operator's library goes beside it."""
        model, notes = packed_model(given)
        given = dataclasses.replace(given, model=model)
        program, varying = exported_program(given)
        program = with_joined_layers(program, given)
        isa = str(torch._inductor.cpu_vec_isa.pick_vec_isa()).upper()
        logger = logging.getLogger("torch._inductor")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=str(path),
                    inductor_configs={"aot_inductor.metadata": cpu_metadata()},
                )
        except Exception as e:
            lines = str(e).strip().splitlines()[-12:]
            raise ExportError("\n".join([f"AOTInductor failed: {type(e).__name__}", *lines])) from e
        finally:
            logger.setLevel(level)
        library = path.with_name(f"{path.stem}.operator.so")
        shutil.copyfile(operator_library(), library)
        written: Any = self.load(path, given)
        noted = " (its metadata say so as AOTI_CPU_ISA)" if "AOTI_CPU_ISA" in written.get_metadata() else ""
        return [
            varying,
            *notes,
            f"compiled for {isa} by torch {torch.__version__}: serve it with that version on CPUs with {isa}{noted}, "
            "and export anew for others",
            "export.load_aoti(path) loads it in Python and refuses a CPU that lacks instructions; without this package "
            f"load {library.name} first: torch.ops.load_library in Python, dlopen in C++",
        ]

    def load(self, path: Path, given: ExportInput) -> Callable[..., Any]:
        """Return the package as a function."""
        return load_aoti(path)

    def stored(self, given: ExportInput) -> Callable[..., Any] | None:
        """Return the model with rounded weights."""
        return rounded_model(given)


TARGET = AOTI()
