from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.energy_parts import rapl_zone, totals_over
from lightning_estdgm.energy._reading import SourceUnavailable, Status
from lightning_estdgm.energy.sources import rapl
from lightning_estdgm.energy.sources.rapl import ENVIRONMENT, ROOT, Rapl


def opened(root: Path) -> Rapl:
    source = Rapl(root)
    source.open()
    return source


def uids(source: Rapl) -> dict[str, str]:
    return {device.uid: device.kind for device in source.devices()}


@pytest.fixture
def desktop(tmp_path: Path) -> Path:
    """A laptop's tree: a package with core, uncore and dram, psys above it, and MMIO's copy of the package."""
    (tmp_path / "intel-rapl").mkdir()
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1_000)
    rapl_zone(tmp_path, "intel-rapl:0:0", "core", 400)
    rapl_zone(tmp_path, "intel-rapl:0:1", "uncore", 100)
    rapl_zone(tmp_path, "intel-rapl:0:2", "dram", 70)
    rapl_zone(tmp_path, "intel-rapl:1", "psys", 9_000)
    rapl_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_003)  # the same counter, renewed at other times
    rapl_zone(tmp_path, "intel-rapl-mmio:0:0", "dram", 71)
    return tmp_path


def test_package_and_dram_are_read_and_nothing_that_contains_or_copies_them(desktop: Path) -> None:
    source = opened(desktop)
    assert uids(source) == {"package-0": "cpu", "package-0/dram": "dram"}
    values = {device.uid: reading.energy_uj for device, reading in source.read().items()}
    assert values == {"package-0": 1_000, "package-0/dram": 70}
    dram = [device for device in source.devices() if device.kind == "dram"]
    assert list(source.read(dram)) == dram
    assert {source.wrap_range_uj(device) for device in source.devices()} == {262143328850}
    assert all("mmio" not in info.name for info in source.devices().values())


def test_mmio_alone_is_used(tmp_path: Path) -> None:
    rapl_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5)
    assert uids(opened(tmp_path)) == {"package-0": "cpu"}


def test_mmio_is_used_where_the_counter_of_the_same_zone_was_never_fed(tmp_path: Path) -> None:
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    rapl_zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5)
    source = opened(tmp_path)
    assert uids(source) == {"package-0": "cpu"}
    assert [reading.energy_uj for reading in source.read().values()] == [5]


def test_amd_has_packages_without_dram(tmp_path: Path) -> None:
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 11, 65532610987)
    rapl_zone(tmp_path, "intel-rapl:0:0", "core", 3, 65532610987)
    rapl_zone(tmp_path, "intel-rapl:1", "package-1", 12, 65532610987)
    assert uids(opened(tmp_path)) == {"package-0": "cpu", "package-1": "cpu"}


def test_links_alone_show_the_sub_zones(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    rapl_zone(tmp_path / "root", "intel-rapl:0", "package-0", 1)
    rapl_zone(tmp_path / "elsewhere", "intel-rapl:0:0", "dram", 2)
    (tmp_path / "root" / "intel-rapl:0:0").symlink_to(tmp_path / "elsewhere/intel-rapl:0/intel-rapl:0:0")
    assert uids(opened(tmp_path / "root")) == {"package-0": "cpu", "package-0/dram": "dram"}


def test_dies_that_show_one_counter_are_read_once(tmp_path: Path) -> None:
    rapl_zone(tmp_path, "intel-rapl:0", "package-0-die-0", 987_654_321)
    rapl_zone(tmp_path, "intel-rapl:1", "package-0-die-1", 987_654_321)
    rapl_zone(tmp_path, "intel-rapl:2", "package-1-die-0", 123_456_789)
    assert uids(opened(tmp_path)) == {"package-0-die-0": "cpu", "package-1-die-0": "cpu"}


def test_two_sockets_of_one_name_are_two_devices(tmp_path: Path) -> None:
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 10)
    rapl_zone(tmp_path, "intel-rapl:1", "package-0", 20)
    assert uids(opened(tmp_path)) == {"package-0": "cpu", "package-0@intel-rapl:1": "cpu"}


def test_a_wrap_is_counted_through(tmp_path: Path) -> None:
    zone = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 262143328850 - 600)
    totals = totals_over(opened(tmp_path), lambda: (zone / "energy_uj").write_text("400\n"))
    assert totals.joules(kind="cpu") == 1000 / 1e6
    assert totals.gaps == 0


def test_a_counter_that_vanishes_is_a_gap_and_not_0(tmp_path: Path) -> None:
    zone = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    source = opened(tmp_path)
    (zone / "energy_uj").write_text("no number\n")
    assert [(r.energy_uj, r.status) for r in source.read().values()] == [(None, Status.ERROR)]
    (zone / "energy_uj").unlink()
    assert [(r.energy_uj, r.status) for r in source.read().values()] == [(None, Status.UNAVAILABLE)]


def test_a_counter_that_stands_still_is_a_gap_and_not_0_j(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    source = opened(tmp_path)
    clock = 10**9
    monkeypatch.setattr(rapl.time, "monotonic_ns", lambda: clock)
    statuses = []
    for seconds, energy_uj in ((0, 5), (0.1, 5), (1, 5), (1, 6_000_000), (1, 10**13), (1, 10**13 + 7)):
        clock += round(seconds * 1e9)
        (zone / "energy_uj").write_text(f"{energy_uj}\n")
        statuses += [r.status for r in source.read().values()]
    # A renewal may take a moment; a second without one, or 10 MJ in a second, is no reading.
    assert statuses == [Status.OK, Status.OK, Status.UNAVAILABLE, Status.OK, Status.UNAVAILABLE, Status.OK]


def test_a_zone_that_was_never_fed_is_left_out(tmp_path: Path) -> None:
    package = rapl_zone(tmp_path, "intel-rapl:0", "package-0", 5)
    rapl_zone(tmp_path, "intel-rapl:0:0", "dram", 0)
    assert uids(opened(tmp_path)) == {"package-0": "cpu"}
    (package / "energy_uj").write_text("0\n")
    with pytest.raises(SourceUnavailable, match="read 0: a virtual machine does not feed them") as caught:
        Rapl(tmp_path).open()
    assert caught.value.status is Status.UNSUPPORTED


def test_a_bind_mounted_device_folder_is_understood(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl").mkdir()
    (tmp_path / "intel-rapl-mmio").mkdir()
    rapl_zone(tmp_path / "intel-rapl", "intel-rapl:0", "package-0", 1_000)
    rapl_zone(tmp_path / "intel-rapl", "intel-rapl:0:0", "core", 400)
    rapl_zone(tmp_path / "intel-rapl", "intel-rapl:0:2", "dram", 70)
    rapl_zone(tmp_path / "intel-rapl", "intel-rapl:1", "psys", 9_000)
    rapl_zone(tmp_path / "intel-rapl-mmio", "intel-rapl-mmio:0", "package-0", 1_003)
    assert uids(opened(tmp_path)) == {"package-0": "cpu", "package-0/dram": "dram"}


def test_a_masked_link_beside_the_real_folder_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").symlink_to(tmp_path / "masked")
    rapl_zone(tmp_path / "intel-rapl", "intel-rapl:0", "package-0", 5)
    assert uids(opened(tmp_path)) == {"package-0": "cpu"}


def test_no_powercap(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="does not exist") as caught:
        Rapl(tmp_path / "none").open()
    assert caught.value.status is Status.UNAVAILABLE


def test_no_zones(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="no intel-rapl zones"):
        Rapl(tmp_path).open()


def test_only_psys_is_not_used(tmp_path: Path) -> None:
    rapl_zone(tmp_path, "intel-rapl:0", "psys", 5)
    with pytest.raises(SourceUnavailable, match="no package zone"):
        Rapl(tmp_path).open()


def test_masked_by_a_container(tmp_path: Path) -> None:
    (tmp_path / "intel-rapl:0").symlink_to(tmp_path / "masked")
    with pytest.raises(SourceUnavailable, match=r"container runtime masks them; mount .* set ESTDGM_POWERCAP to it"):
        Rapl(tmp_path).open()


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "")
    assert Rapl()._root == Path(ROOT)


def test_the_environment_tells_where_the_host_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rapl_zone(tmp_path / "intel-rapl", "intel-rapl:0", "package-7", 5)
    monkeypatch.setenv(rapl.ENVIRONMENT, str(tmp_path))
    source = Rapl()
    source.open()
    assert uids(source) == {"package-7": "cpu"}


def test_permission_denied_comes_with_the_fix(open_folder: Path, forbid: Callable[[Path], None]) -> None:
    zone = rapl_zone(open_folder, "intel-rapl:0", "package-0", 5)
    forbid(zone / "energy_uj")
    with pytest.raises(SourceUnavailable, match=r"no permission to read .*chmod -R a\+r .*udev rule") as caught:
        Rapl(open_folder).open()
    assert caught.value.status is Status.NO_PERMISSION
    assert "power" in caught.value.reason


def test_one_package_that_may_be_read_beside_one_that_may_not(
    open_folder: Path, forbid: Callable[[Path], None]
) -> None:
    rapl_zone(open_folder, "intel-rapl:0", "package-0", 5)
    forbid(rapl_zone(open_folder, "intel-rapl:0:0", "dram", 7) / "energy_uj")
    source = opened(open_folder)
    assert [(r.energy_uj, r.status) for r in source.read().values()] == [(5, Status.OK), (None, Status.NO_PERMISSION)]


def test_a_folder_that_may_not_be_listed(open_folder: Path, forbid: Callable[[Path], None]) -> None:
    forbid(open_folder)
    with pytest.raises(SourceUnavailable, match="cannot be listed") as caught:
        Rapl(open_folder).open()
    assert caught.value.status is Status.NO_PERMISSION
