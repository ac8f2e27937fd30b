"""Assignment of devices to processes, so that each device is read once however many processes there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_estdgm.energy._reading import DeviceId, DeviceInfo, Method, Scope, Status


@dataclass(frozen=True)
class ActiveSource:
    """A source in use by one process.

    Attributes:
        name: Name of the source.
        method: "counter", "integrated" or "estimated".
        scope: "host" or "process".
        driver: Version of the driver; empty where unknown.
        update_period_s: Time between two new values of the hardware, in seconds.
        devices: Devices that the process reads with it.
    """

    name: str
    method: Method
    scope: Scope
    driver: str
    update_period_s: float
    devices: dict[DeviceId, DeviceInfo]


@dataclass(frozen=True)
class UnavailableSource:
    """A source that is not used, and why.

    Attributes:
        name: Name of the source.
        status: Reason for programs; OK where the source works and another one is used.
        reason: Reason for people.
    """

    name: str
    status: Status
    reason: str


def assign_devices(offers: Sequence[Sequence[ActiveSource]]) -> list[list[ActiveSource]]:
    """Give each device to the lowest rank that can read it; a source of scope "process" stays with its process.

    Args:
        offers: By rank, the sources that the process could read. Devices of two hosts differ in their id.

    Returns:
        By rank, the sources that the process reads, without those that have no device left.
    """
    taken: set[DeviceId] = set()
    assigned = []
    for sources in offers:
        own = []
        for source in sources:
            devices = source.devices
            if source.scope == "host":
                devices = {device: info for device, info in devices.items() if device not in taken}
                taken.update(devices)
            if devices:
                own.append(replace(source, devices=devices))
        assigned.append(own)
    return assigned


def gpu_names(assigned: Sequence[Sequence[ActiveSource]]) -> dict[DeviceId, str]:
    """Name each GPU "{node}/{local}": hosts, and GPUs on a host, in the order of the ranks that read them.

    Example:
        >>> gpus = [DeviceId(host, "gpu", uid) for host, uid in (("a", "u"), ("b", "w"), ("a", "v"))]
        >>> by_rank = [[ActiveSource("s", "counter", "host", "", 0.1, {gpu: DeviceInfo("")})] for gpu in gpus]
        >>> list(gpu_names(by_rank).values())
        ['0/0', '1/0', '0/1']
    """
    devices = [device for sources in assigned for source in sources for device in source.devices]
    nodes = list(dict.fromkeys(device.host for device in devices))
    names: dict[DeviceId, str] = {}
    local = dict.fromkeys(nodes, 0)
    for device in devices:
        if device.kind == "gpu" and device not in names:
            names[device] = f"{nodes.index(device.host)}/{local[device.host]}"
            local[device.host] += 1
    return names
