"""Which process reads which device, so that each is read once whatever the processes; pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_estdgm.energy.reading import DeviceId, DeviceInfo, Method, Scope

__all__ = ["Opened", "claim", "gpu_names"]


@dataclass(frozen=True)
class Opened:
    """A source in use by one process.

    Attributes:
        name: of the source.
        method: "counter", "integrated" or "estimated".
        scope: "host" or "process".
        driver: its version; empty where unknown.
        update_period_s: how often the hardware renews the value.
        devices: what the process reads by it.
    """

    name: str
    method: Method
    scope: Scope
    driver: str
    update_period_s: float
    devices: dict[DeviceId, DeviceInfo]


def claim(offers: Sequence[Sequence[Opened]]) -> list[list[Opened]]:
    """Give each device to the lowest rank that can read it; what covers one process only stays with it.

    Args:
        offers: by rank, the sources that the process could read. Devices of two hosts differ in their id.

    Returns:
        By rank, the sources that the process reads, without those that have no device left.
    """
    taken: set[DeviceId] = set()
    claims = []
    for sources in offers:
        mine = []
        for source in sources:
            devices = source.devices
            if source.scope == "host":
                devices = {device: info for device, info in devices.items() if device not in taken}
                taken.update(devices)
            if devices:
                mine.append(replace(source, devices=devices))
        claims.append(mine)
    return claims


def gpu_names(claims: Sequence[Sequence[Opened]]) -> dict[DeviceId, str]:
    """Name each GPU "{node}/{local}": hosts, and GPUs on a host, in the order of the ranks that read them.

    Example:
        >>> gpus = [DeviceId(host, "gpu", uid) for host, uid in (("a", "u"), ("b", "w"), ("a", "v"))]
        >>> by_rank = [[Opened("s", "counter", "host", "", 0.1, {gpu: DeviceInfo("")})] for gpu in gpus]
        >>> list(gpu_names(by_rank).values())
        ['0/0', '1/0', '0/1']
    """
    devices = [device for sources in claims for source in sources for device in source.devices]
    nodes = list(dict.fromkeys(device.host for device in devices))
    names: dict[DeviceId, str] = {}
    local = dict.fromkeys(nodes, 0)
    for device in devices:
        if device.kind == "gpu" and device not in names:
            names[device] = f"{nodes.index(device.host)}/{local[device.host]}"
            local[device.host] += 1
    return names
