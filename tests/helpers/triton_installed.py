"""Whether the installed Triton is one that the backend takes, asked without importing it."""

from importlib import metadata

from lightning_estdgm.sparse.backends.triton._requirements import MIN_TRITON

REASON = "the triton backend needs Linux and triton>=" + ".".join(map(str, MIN_TRITON))


def is_installed() -> bool:
    try:
        return tuple(map(int, metadata.version("triton").split(".")[:2])) >= MIN_TRITON
    except metadata.PackageNotFoundError:
        return False
