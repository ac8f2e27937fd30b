"""Ids of devices, and the devices of torch."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

from lightning_estdgm.energy._reading import DeviceId, DeviceInfo, SourceUnavailable, Status, own_gpus, torch_ids


def gpu(uid: str) -> DeviceId:
    return DeviceId("host", "gpu", uid)


def test_a_torch_device_finds_the_reading_that_holds_its_energy() -> None:
    infos = {
        gpu("GPU-0f0f"): DeviceInfo("parent", shared=True, pci="0000:01:00.0", ids=("MIG-1a1a", "MIG-2b2b")),
        gpu("GPU-3c3c"): DeviceInfo("whole", pci="0000:02:00.0"),
        gpu("0000:c1:00.0"): DeviceInfo("pair", pci="0000:c1:00.0", ids=("GPU-4d4d", "0000:c6:00.0")),
        DeviceId("host", "cpu", "GPU-3c3c"): DeviceInfo("no GPU"),
    }
    for uuid, pci, expected in [
        ("3C3C", None, ["GPU-3c3c"]),
        ("GPU-3c3c", "0000:01:00.0", ["GPU-3c3c"]),  # a UUID says more than an address
        ("2b2b", None, ["GPU-0f0f"]),
        ("4d4d", None, ["0000:c1:00.0"]),
        ("unknown", "0000:C6:00.0", ["0000:c1:00.0"]),
        ("unknown", "0000:09:00.0", []),
        (None, None, []),
    ]:
        assert [device.uid for device in own_gpus(infos, uuid, pci)] == expected


def test_ids_of_torch_devices() -> None:
    whole = "3c3c3c3c-0000-1111-2222-333333333333"
    assert torch_ids(SimpleNamespace(uuid=whole)) == (whole, None)
    address = SimpleNamespace(pci_domain_id=1, pci_bus_id=0xC1, pci_device_id=2)
    assert torch_ids(address) == (None, "0001:c1:02.0")
    assert torch_ids(SimpleNamespace(pci_bus_id=3)) == (None, None)
    letters = "33643062-3030-3030-6666-666666666666"  # HIP: the letters of its UUID as bytes
    assert torch_ids(SimpleNamespace(uuid=letters)) == ("3d0b0000ffffffff", None)


def test_the_reason_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(SourceUnavailable(Status.NO_PERMISSION, "why")))
    assert (copy.status, copy.reason, str(copy)) == (Status.NO_PERMISSION, "why", "why")
