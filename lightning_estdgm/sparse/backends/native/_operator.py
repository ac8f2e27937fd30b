"""The compiled operator of packed layers, `estdgm::packed_linear`: built once a machine, loaded once a process."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from lightning_estdgm.sparse._flop_formulas import counts_multiplications
from lightning_estdgm.sparse.backends.native._build import CannotBuild, built

_FOLDER = Path(__file__).parent


def _torch_flags() -> list[str]:
    root = Path(torch.__file__).parent
    libraries = root / "lib"
    threads = [str(path) for path in sorted(libraries.glob("libgomp*"))]  # torch's own: one pool of threads, not two
    return [
        "-std=c++20",  # what torch's headers ask for; the last of such flags counts
        *(f"-isystem{root / 'include' / part}" for part in ("", "torch/csrc/api/include")),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-L{libraries}",
        f"-Wl,-rpath,{libraries}",  # so that a C++ program finds them too
        *(["-Wl,--as-needed", *threads] if threads else []),
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]


def operator_library() -> Path:
    """Build the operator of packed layers for this CPU and this PyTorch, load it, and return its file.

    Python needs the call before ``torch.export.load`` or an AOTInductor package with packed layers; a C++ program that
    runs such a package loads the file by ``dlopen``. It takes a minute the first time on a machine, and is kept in the
    user's cache.

    Raises:
        RuntimeError: if it cannot be built or loaded, such as without a C++ compiler.

    Example:
        >>> operator_library().suffix
        '.so'
    """
    loaded = _loaded()
    if isinstance(loaded, str):
        raise RuntimeError(f"packed layers need their operator, which could not be built: {loaded}")
    return loaded


@functools.lru_cache(maxsize=1)
def _loaded() -> Path | str:
    """Return the loaded library, or the reason why there is none."""
    try:
        path = built(
            "packed", (_FOLDER / "packed", _FOLDER), _torch_flags(), key=f"{torch.__version__} {torch.__file__}"
        )
        torch.ops.load_library(path)
    except (CannotBuild, OSError) as e:
        return str(e)
    torch.library.register_fake("estdgm::packed_linear", _fake)
    counts_multiplications("packed_linear")(_multiplications)
    return path


def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-1])  # type: ignore[call-overload]


def _multiplications(x: Tensor, values: Tensor, *_: object, **__: object) -> int:
    return x.shape[:-1].numel() * values.numel()
