"""The agreement on who reads which device, for any number of ranks, hosts and devices."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from helpers.energy_parts import ConstantPower
from lightning_estdgm.energy._device_assignment import ActiveSource, assign_devices, gpu_names
from lightning_estdgm.energy._reading import DeviceId, DeviceInfo

host_devices = st.builds(
    DeviceId, st.sampled_from(["a", "b"]), st.sampled_from(["gpu", "cpu", "dram"]), st.sampled_from(["0", "1", "2"])
)


def offer(device: DeviceId, source: ConstantPower) -> ActiveSource:
    return ActiveSource(source.name, "counter", source.scope, "", 0.1, {device: DeviceInfo("x")})


@given(st.lists(st.lists(host_devices, max_size=5, unique=True), min_size=1, max_size=5))
def test_every_device_has_one_reader_the_lowest_rank_that_can(ranks: list[list[DeviceId]]) -> None:
    own = ConstantPower(scope="process")
    offers = [
        [*(offer(d, ConstantPower()) for d in wanted), offer(DeviceId("a", "cpu", "process"), own)] for wanted in ranks
    ]
    assigned = assign_devices(offers)
    read = [[d for source in mine if source.scope == "host" for d in source.devices] for mine in assigned]
    assert Counter(d for mine in read for d in mine) == dict.fromkeys({d for wanted in ranks for d in wanted}, 1)
    for rank, mine in enumerate(read):
        for device in mine:
            assert device in ranks[rank]
            assert not any(device in lower for lower in ranks[:rank])
    assert all(mine[-1].scope == "process" for mine in assigned)

    names = gpu_names(assigned)
    assert set(names) == {d for wanted in ranks for d in wanted if d.kind == "gpu"}
    assert len(set(names.values())) == len(names)
    for device, name in names.items():
        node, local = map(int, name.split("/"))
        assert 0 <= local < sum(d.host == device.host for d in names)
        assert all((other.split("/")[0] == str(node)) == (d.host == device.host) for d, other in names.items())
