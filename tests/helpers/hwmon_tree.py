"""hwmon trees as the kernel shows them: graphics cards, and meters of Grace sockets."""

from __future__ import annotations

from pathlib import Path


def card(root: Path, name: str, pci: str, driver: str, hwmon: str = "hwmon3", **files: object) -> Path:
    """Add a card: the device folder lies elsewhere, and the card links to it."""
    device = root / "devices" / "pci0000:00" / pci
    folder = device / "hwmon" / hwmon
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{driver}\n")
    for file, value in files.items():
        (folder / file).write_text(f"{value}\n")
    entry = root / name
    if not entry.exists():
        entry.mkdir()
        (entry / "device").symlink_to(device, target_is_directory=True)
        (root / f"{name}-DP-1").mkdir()  # a connector, no card
    return folder


def amd_card(
    root: Path, name: str, pci: str, *, unique: str | None = None, metrics: int | None = 1, **files: object
) -> Path:
    folder = card(root, name, pci, "amdgpu", **(files or {"power1_average": 180_000_000}))
    device = folder.parent.parent
    if unique is not None:
        (device / "unique_id").write_text(f"{unique}\n")
    if metrics is not None:
        (device / "gpu_metrics").write_bytes(bytes([0x60, 0, metrics, 3, 9, 9]))
    return folder


def grace(root: Path, hwmon: str, label: str, microwatts: object) -> Path:
    folder = root / hwmon / "device"
    folder.mkdir(parents=True)
    (folder / "power1_oem_info").write_text(f"{label}\n")
    (folder / "power1_average").write_text(f"{microwatts}\n")
    return folder
