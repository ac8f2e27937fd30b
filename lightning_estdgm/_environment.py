"""Environment of a run on this machine: cache folder, processor, versions of packages, names that depend on them."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_DYNAMO_IN_TORCH_2_6 = {
    "recompile_limit": "cache_size_limit",
    "accumulated_recompile_limit": "accumulated_cache_size_limit",
    "fail_on_recompile_limit_hit": "fail_on_cache_limit_hit",
}


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/lightning_estdgm``, by default in ``~/.cache``; it need not exist yet.

    It holds what is dear to make and good for one machine: compiled operators, timings of layers.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lightning_estdgm"


_PROCESSORS = Path("/proc/cpuinfo")
_VECTOR_SETS = r"s?sse\w*|avx\w*|amx\w*|fma|f16c|bmi[12]|asimd\w*|sve\w*|bf16|i8mm"


def processor_name() -> str:
    """Return the processor's name, as far as the system tells it.

    Virtual machines often hide the number of a model, so that generations share a name. Then its family and model are
    added, as in ``"AMD EPYC, family 26 model 2"``.
    """
    name = _cpu_info("model name")
    hidden = name and not re.search(r"\d", name)
    if hidden and (family := _cpu_info("cpu family")) and (model := _cpu_info("model")):
        return f"{name}, family {family} model {model}"
    return name or platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Return the vector instruction sets of this CPU, sorted; none where the system does not tell (Linux does).

    >>> all(name == name.lower() for name in instruction_sets())
    True
    """
    words = (_cpu_info("flags") or _cpu_info("Features")).split()
    return tuple(sorted(word for word in words if re.fullmatch(_VECTOR_SETS, word)))


def _cpu_info(entry: str) -> str:
    """Return the first such entry of Linux's list of processors, empty if there is none."""
    try:
        lines = _PROCESSORS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    entries = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in entries if name.strip() == entry), "")


def package_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None; so too for a source tree that was never installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def dynamo_settings(config: object, **values: int) -> dict[str, int]:
    """Return values of ``torch._dynamo.config`` by their names in the installed torch: 2.6 has others for limits."""
    return {name if hasattr(config, name) else _DYNAMO_IN_TORCH_2_6[name]: value for name, value in values.items()}
