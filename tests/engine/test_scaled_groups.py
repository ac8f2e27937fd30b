"""Parameter groups of an optimizer, split by the factor on their rate and given back."""

import pytest
import torch

from lightning_estdgm.engine._scaled_groups import ScaledGroups


def parameters(count):
    return [torch.nn.Parameter(torch.zeros(2)) for _ in range(count)]


def split(optimizer, **factors):
    """Return the groups' split, entered with a factor for each parameter of the first group, by its index."""
    groups = ScaledGroups(optimizer)
    enter(groups, optimizer, **factors)
    return groups


def enter(groups, optimizer, **factors):
    groups.leave()
    held = optimizer.param_groups[0]["params"]
    groups.enter({id(held[int(name[1:])]): factor for name, factor in factors.items()})


def rates(optimizer):
    return [(round(float(group["lr"]), 6), len(group["params"])) for group in optimizer.param_groups]


def test_groups_are_split_by_factor_in_order_and_come_back_as_they_were():
    first, second = parameters(5), parameters(2)
    optimizer = torch.optim.SGD([{"params": first}, {"params": second, "lr": 0.5}], 0.1)
    listed, dicts = optimizer.param_groups, list(optimizer.param_groups)
    before = [dict(group, params=list(group["params"])) for group in dicts]
    groups = split(optimizer, p1=2.0, p3=3.0, p4=2.0)
    assert groups.entered
    assert optimizer.param_groups is listed
    assert [[id(p) for p in group["params"]] for group in listed] == [
        [id(first[0]), id(first[2])],
        [id(first[1]), id(first[4])],
        [id(first[3])],
        [id(p) for p in second],
    ]
    assert rates(optimizer) == [(0.1, 2), (0.2, 2), (0.3, 1), (0.5, 2)]
    assert listed[3] is dicts[1]  # nothing to split
    for _ in range(2):
        groups.leave()
        assert optimizer.param_groups is listed
        assert all(a is b for a, b in zip(listed, dicts, strict=True))
    assert str(listed) == str(before)
    assert not groups.entered


def test_nothing_is_touched_without_a_factor():
    optimizer = torch.optim.SGD(parameters(2), 0.1)
    groups = split(optimizer, p0=1.0)
    assert not groups.entered
    assert rates(optimizer) == [(0.1, 2)]


def test_a_product_of_rate_and_decay_stays_where_decay_is_not_to_be_scaled():
    optimizer = torch.optim.SGD(parameters(3), 0.1, weight_decay=0.4)
    groups = ScaledGroups(optimizer, scales_decay=False)
    enter(groups, optimizer, p0=2.0, p2=8.0)
    shown = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert shown == [(0.2, 0.2), (0.1, 0.4), (0.8, 0.05)]
    optimizer.param_groups[1]["weight_decay"] = 0.3  # the optimizer's own doing, in the unscaled part
    groups.leave()
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.3)]
    optimizer.param_groups[0]["weight_decay"] = 0.8
    enter(groups, optimizer, p0=2.0, p1=2.0, p2=2.0)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.2, 0.4)]
    optimizer.param_groups[0]["weight_decay"] = 0.1
    groups.leave()
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert groups.own_values() == {}


def test_a_group_without_decay_is_split_all_the_same():
    optimizer = torch.optim.Rprop(parameters(2), 0.1)
    groups = ScaledGroups(optimizer, scales_decay=False)
    enter(groups, optimizer, p0=2.0)
    assert rates(optimizer) == [(0.2, 1), (0.1, 1)]
    assert all("weight_decay" not in group for group in optimizer.param_groups)
    groups.leave()
    optimizer.param_groups[0]["weight_decay"] = None  # as some say that there is none
    enter(groups, optimizer, p0=2.0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [None, None]


def test_what_the_optimizer_counts_in_a_part_goes_on_and_is_shown_in_the_group():
    optimizer = torch.optim.SGD(parameters(2), 0.1)
    (group,) = optimizer.param_groups
    group["sum"] = 0.0
    groups = ScaledGroups(optimizer)
    for step in range(3):
        enter(groups, optimizer, p1=4.0)
        for part in optimizer.param_groups:
            part["sum"] += part["lr"]
            part["steps"] = step + 1
        groups.leave()
        assert group["sum"] == pytest.approx(0.1 * (step + 1))  # of the part that is not scaled
        assert group["steps"] == step + 1
    enter(groups, optimizer, p1=4.0)
    assert [part["sum"] for part in optimizer.param_groups] == pytest.approx([0.3, 1.2])
    enter(groups, optimizer, p1=8.0)  # the density changed, and the rate with it, as under a scheduler
    assert [part["sum"] for part in optimizer.param_groups] == pytest.approx([0.3, 1.2])
    enter(groups, optimizer, p0=2.0, p1=2.0)
    assert [part["sum"] for part in optimizer.param_groups] == pytest.approx([0.3])


def test_what_the_user_changes_reaches_every_part_and_nothing_else_is_reset():
    optimizer = torch.optim.SGD(parameters(2), 0.1, weight_decay=0.1)
    (group,) = optimizer.param_groups
    group["own"], group["gone"] = 1, 1
    groups = split(optimizer, p1=2.0)
    optimizer.param_groups[1]["own"] = 5
    groups.leave()
    group["lr"], group["weight_decay"], group["new"] = 0.4, 0.3, [7]
    del group["gone"]
    enter(groups, optimizer, p1=2.0)
    plain, scaled = optimizer.param_groups
    assert [(part["lr"], part["weight_decay"], part["new"]) for part in (plain, scaled)] == [
        (0.4, 0.3, [7]),
        (0.8, 0.3, [7]),
    ]
    assert (plain["own"], scaled["own"]) == (1, 5)
    assert "gone" not in plain | scaled
    assert plain["new"] is not scaled["new"]


def test_a_rate_that_the_optimizer_writes_is_the_groups_after_the_step():
    optimizer = torch.optim.SGD(parameters(2), 0.1)
    groups = split(optimizer, p0=2.0, p1=4.0)
    for part in optimizer.param_groups:
        part["lr"] *= 0.5
    groups.leave()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    enter(groups, optimizer, p0=2.0, p1=4.0)
    assert rates(optimizer) == [(0.1, 1), (0.2, 1)]


def test_a_rate_that_is_a_tensor_is_read_and_never_written():
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam(parameters(2), rate, capturable=True)
    groups = split(optimizer, p0=2.0, p1=4.0)
    assert rates(optimizer) == [(0.2, 1), (0.4, 1)]
    groups.leave()
    assert optimizer.param_groups[0]["lr"] is rate
    assert (float(rate), rate._version) == (pytest.approx(0.1), 0)
    rate.fill_(0.3)  # as schedulers do
    enter(groups, optimizer, p0=2.0, p1=4.0)
    assert rates(optimizer) == [(0.6, 1), (1.2, 1)]


def test_a_tensor_that_each_part_counts_in_is_counted_once():
    """As a capturable optimizer counts its group's steps."""
    optimizer = torch.optim.SGD(parameters(2), 0.1)
    (group,) = optimizer.param_groups
    group["step"] = counter = torch.tensor(0)
    groups = ScaledGroups(optimizer)
    for _ in range(3):
        enter(groups, optimizer, p1=2.0)
        for part in optimizer.param_groups:
            part["step"] += 1
        groups.leave()
    assert group["step"] is counter
    assert int(counter) == 3
    counter.fill_(10)
    enter(groups, optimizer, p1=2.0)
    assert [int(part["step"]) for part in optimizer.param_groups] == [10, 10]


def test_names_of_parameters_go_with_them():
    one, two, three = parameters(3)
    optimizer = torch.optim.SGD([("a", one), ("b", two), ("c", three)], 0.1)
    groups = split(optimizer, p1=2.0)
    assert [part["param_names"] for part in optimizer.param_groups] == [["a", "c"], ["b"]]
    groups.leave()
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c"]


def test_a_group_that_is_added_meanwhile_stays_and_one_of_loaded_groups_begins_anew():
    optimizer = torch.optim.SGD(parameters(2), 0.1)
    groups = split(optimizer, p1=2.0)
    optimizer.param_groups[0]["own"] = optimizer.param_groups[1]["own"] = 1
    optimizer.add_param_group({"params": parameters(1), "lr": 0.7})
    groups.leave()
    assert rates(optimizer) == [(0.1, 2), (0.7, 1)]
    saved = optimizer.state_dict()
    saved["param_groups"][0]["own"] = 9
    optimizer.load_state_dict(saved)
    enter(groups, optimizer, p1=2.0)
    assert [part.get("own") for part in optimizer.param_groups] == [9, 9, None]


def test_values_of_a_part_are_told_from_what_the_user_has_changed_since():
    optimizer = torch.optim.SGD(parameters(3), 0.1, weight_decay=0.1)
    (group,) = optimizer.param_groups
    groups = split(optimizer, p1=2.0)
    optimizer.param_groups[1]["sum"] = 3.0
    groups.leave()
    group["weight_decay"] = 0.5
    key = id(group["params"][1])
    assert groups.own_values() == {key: {"sum": 3.0}}
    resumed = ScaledGroups(optimizer)
    resumed.resumed = groups.own_values()
    assert resumed.own_values() == {key: {"sum": 3.0}}
    enter(resumed, optimizer, p1=2.0)
    assert [part.get("sum") for part in optimizer.param_groups] == [None, 3.0]
    resumed.leave()
    assert resumed.own_values() == {key: {"sum": 3.0}}
    assert not resumed.resumed
