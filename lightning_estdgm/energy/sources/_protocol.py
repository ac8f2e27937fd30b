"""Protocol of energy sources, and their discovery.

A source is one module of this folder that exposes ``SOURCE`` (a class or factory that takes no arguments),
or an entry point of the group ``lightning_estdgm.energy_sources``. Adding a vendor is adding a file: nothing
here changes.

Sources return raw integers and a status; they never interpret the difference between two readings.
That is the accumulator's work (`lightning_estdgm.energy._accumulator`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from lightning_estdgm._checks import is_number
from lightning_estdgm._registry import offers
from lightning_estdgm.energy import sources as sources_folder
from lightning_estdgm.energy._reading import (
    METHODS,
    DeviceId,
    DeviceInfo,
    Method,
    Reading,
    Scope,
    SourceUnavailable,
    Status,
)

ENTRY_POINT_GROUP = "lightning_estdgm.energy_sources"


@runtime_checkable
class EnergySource(Protocol):
    """Interface of an energy source.

    Attributes:
        name: Unique name in lower case, as users write it: "nvml".
        method: "counter" (the hardware adds up the joules), "integrated" (power samples are integrated here)
            or "estimated" (nothing was measured); of several devices the weakest.
        scope: "host" if the devices are shared by all processes of a machine, so that one process must read
            them for all; "process" if a reading covers the reading process only.
        update_period_s: Time between two new values of the hardware, in seconds; a shorter window may read zero.
        driver: Driver and version behind the readings, known after `open`; "" where unknown.
    """

    name: str
    method: Method
    scope: Scope
    update_period_s: float
    driver: str

    def open(self) -> None:
        """Make the source ready, or raise `SourceUnavailable`. Imports vendor libraries here, not earlier."""

    def devices(self) -> Mapping[DeviceId, DeviceInfo]:
        """Return the devices that `read` reports."""

    def wrap_range_uj(self, device: DeviceId) -> int | None:
        """Return the range of the counter in microjoules; None takes a counter that goes back for a reset."""

    def read(self, devices: Collection[DeviceId] | None = None) -> Mapping[DeviceId, Reading]:
        """Read these devices now, all for None. Never raises for a device that fails: its reading says so."""

    def close(self) -> None:
        """Release what `open` took. May be called twice."""


def check_source(source: object) -> EnergySource:
    """Return `source` if it follows the `EnergySource` protocol.

    Raises:
        TypeError: A member is missing, or the class was given in place of an instance.
        ValueError: `name`, `method`, `scope` or `update_period_s` is not valid.
    """
    if isinstance(source, type):
        raise TypeError(
            f"expected an instance of an energy source, got the class {source.__name__}: pass {source.__name__}()"
        )
    members = (
        "name",
        "method",
        "scope",
        "update_period_s",
        "driver",
        "open",
        "devices",
        "wrap_range_uj",
        "read",
        "close",
    )
    missing = [m for m in members if not hasattr(source, m)]
    if missing or not isinstance(source, EnergySource):
        raise TypeError(
            f"expected an energy source with {', '.join(members)}; {type(source).__name__} lacks {', '.join(missing)}"
        )
    if not isinstance(source.name, str) or not source.name:
        raise ValueError(f"an energy source's name must be a non-empty string, got {source.name!r}")
    if source.method not in METHODS:
        raise ValueError(f"source {source.name!r}: method must be one of {METHODS}, got {source.method!r}")
    if source.scope not in ("host", "process"):
        raise ValueError(f"source {source.name!r}: scope must be 'host' or 'process', got {source.scope!r}")
    period_s = source.update_period_s
    if not (is_number(period_s) and 0 <= period_s < math.inf):
        raise ValueError(
            f"source {source.name!r}: update_period_s must be >= 0, got {period_s!r}, expected finite seconds"
        )
    return source


def discover() -> list[tuple[str, EnergySource | SourceUnavailable]]:
    """Return every known source by name, not opened yet; in place of one that cannot be made, the reason.

    Counters come before integrated power, and estimates last, so that the first source that offers a device is
    the better one.

    Example:
        >>> from lightning_estdgm.energy import discover
        >>> names = [name for name, _ in discover()]
        >>> names.index("nvml") < names.index("cpu-estimate")
        True
    """
    found: dict[str, EnergySource | SourceUnavailable] = {}

    def add(label: str, make: object) -> None:
        try:
            # A source of another project may fail in any way; that must cost its joules, never the training
            # run.
            source = check_source(make() if callable(make) else make)
        except Exception as e:
            found.setdefault(label, SourceUnavailable(Status.ERROR, f"{type(e).__name__}: {e}"))
        else:
            found.setdefault(source.name, source)

    for offer in offers(sources_folder, "SOURCE", ENTRY_POINT_GROUP):
        try:
            made = offer.load()
        except Exception as e:
            found.setdefault(offer.name, SourceUnavailable(Status.ERROR, f"import failed: {type(e).__name__}: {e}"))
        else:
            add(offer.name, made)

    def rank(item: tuple[str, EnergySource | SourceUnavailable]) -> tuple[int, str]:
        name, source = item
        return 0 if isinstance(source, SourceUnavailable) else METHODS.index(source.method), name

    return sorted(found.items(), key=rank)


def listed(sources: Any) -> Any:
    """Return sources as a list, which can be read again and again; what `resolve` refuses as it is."""
    return list(sources) if isinstance(sources, Iterable) and not isinstance(sources, str) else sources


def resolve(
    sources: Iterable[str | EnergySource] | None,
) -> list[tuple[str, EnergySource | SourceUnavailable]]:
    """Return the sources that a user named, in that order.

    Args:
        sources: Names or sources; None for all that are known.

    Raises:
        TypeError: It is no iterable of names and sources, or an object does not follow the protocol.
        ValueError: No source has that name, or a name is given twice.
    """
    if sources is None:
        return discover()
    if isinstance(sources, str) or not isinstance(sources, Iterable):
        one = f"[{sources!r}]" if isinstance(sources, str) else "sources=[...] for a single one"
        raise TypeError(f"sources must be None or a list of names and energy sources, got {sources!r}: write {one}")
    known: dict[str, EnergySource | SourceUnavailable] | None = None
    chosen: list[tuple[str, EnergySource | SourceUnavailable]] = []
    for item in sources:
        if isinstance(item, str):
            known = dict(discover()) if known is None else known
            if item not in known:
                raise ValueError(
                    f"unknown energy source {item!r}; known are {', '.join(sorted(known))}; None takes all that "
                    "work here, which `estdgm doctor` shows"
                )
            chosen.append((item, known[item]))
        else:
            source = check_source(item)
            chosen.append((source.name, source))
    names = [name for name, _ in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"energy sources given twice: {', '.join(twice)}; name each once, or joules would count twice")
    return chosen
