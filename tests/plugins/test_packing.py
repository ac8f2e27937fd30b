"""Packing takes zeros out of a checkpoint and nothing else: what comes back is the same, but for the sign of zeros."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from helpers.exact import differences
from lightning_estdgm.method._masks import mask_shape, pack_bits
from lightning_estdgm.plugins._packing import pack, unpack

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.float8_e5m2, torch.bool)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Layer:
    """A masked weight of a made-up checkpoint; its mask is drawn here, unit by unit, by plain loops."""

    def __init__(self, shape: tuple[int, ...], block_size: int, density: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.block_size = shape, block_size
        self.units = torch.rand(mask_shape(shape, block_size), generator=generator) < density
        self.over_weights = torch.zeros(shape, dtype=torch.bool)
        for index in self.units.nonzero().tolist():
            if block_size == 1:
                self.over_weights[tuple(index)] = True
            else:
                row, column = (i * block_size for i in index)
                self.over_weights[row : row + block_size, column : column + block_size] = True

    @property
    def state(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "block_size": self.block_size, "mask": pack_bits(self.units), "window": None}

    def tensor(self, dtype: torch.dtype, seed: int, transposed: bool = False) -> Tensor:
        """Random bits where active (NaN, infinities and -0.0 among them), zero bits elsewhere."""
        itemsize = torch.empty(0, dtype=dtype).element_size()
        generator = torch.Generator().manual_seed(seed)
        if dtype == torch.bool:
            bits = torch.randint(0, 2, self.shape, generator=generator).to(torch.uint8)
        else:
            size = (*self.shape, itemsize)
            raw = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
            bits = raw.view(INTEGERS[itemsize]).squeeze(-1)
        tensor = bits.masked_fill(~self.over_weights, 0).view(dtype)
        return tensor.t().contiguous() if transposed else tensor


def checkpoint_of(layers: dict[str, Layer], **rest: Any) -> dict[str, Any]:
    return rest | {"callbacks": {"DGMCallback": {"layers": {name: layer.state for name, layer in layers.items()}}}}


def through_a_file(content: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def layers_of(content: dict[str, Any]) -> dict[str, str | None]:
    """By path, which layer's mask each packed tensor uses; None: its own."""
    return {"/".join(map(str, x["path"])): x.get("layer") for x in content["packed"]}


def with_positive_zeros(tree: Any) -> Any:
    """The same with +0.0 in the place of every -0.0."""

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.itemsize == 1:
            return tensor
        return tensor.masked_fill(tensor == 0, 0.0)  # keeps other bits, strides and NaN

    return tree_map_only(Tensor, changed, tree)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    block_size = draw(st.sampled_from([1, 1, 16]))
    if block_size == 1:
        shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)), *draw(st.sampled_from([(), (3,), (3, 3)])))
    else:
        shape = (16 * draw(st.integers(1, 4)), 16 * draw(st.integers(1, 4)))
    return Layer(shape, block_size, draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), draw(st.integers(0, 999)))


@given(st.lists(layers(), min_size=1, max_size=3), st.sampled_from(DTYPES), st.booleans(), st.data())
def test_round_trip_is_exact(found: list[Layer], dtype: torch.dtype, transposed: bool, data: st.DataObject) -> None:
    """Also with values outside the mask, tensors of other shapes, strides of all sorts, and the layers in any order."""
    by_name = {f"net.{i}": layer for i, layer in enumerate(found)}
    tensors = {f"net.{i}.weight": x.tensor(dtype, i, transposed and len(x.shape) == 2) for i, x in enumerate(found)}
    moments = [{"step": torch.tensor(3.0), "exp_avg": x.tensor(dtype, 9 + i)} for i, x in enumerate(found)]
    moments = data.draw(st.permutations(moments))
    for tensor in [*tensors.values(), *(m["exp_avg"] for m in moments)]:
        for _ in range(data.draw(st.integers(0, 2))):  # somewhere, active or not
            at = tuple(data.draw(st.integers(0, n - 1)) for n in tensor.shape)
            value = data.draw(st.sampled_from([0, 1] if dtype in (torch.bool, torch.int64) else [-0.0, 1.0, 1e-5]))
            tensor[at] = value
    if data.draw(st.booleans()):
        tensors = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in tensors.items()}
    state = {"state": dict(enumerate(moments)), "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}]}
    checkpoint = checkpoint_of(
        by_name, state_dict=OrderedDict(tensors), optimizer_states=[state], other=[None, {"x": torch.ones(20, 20)}]
    )
    before = copy.deepcopy(checkpoint)

    content = pack(checkpoint)
    assert differences(checkpoint, before) == []  # what Lightning goes on with is left alone
    unpacked = unpack(through_a_file(content))
    assert differences(with_positive_zeros(unpacked), with_positive_zeros(before)) == []


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_negative_zeros_of_a_product_with_the_mask_are_not_stored(dtype: torch.dtype, has_mask: bool) -> None:
    layer = Layer((64, 96), 1, 0.1, seed=0)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype) * layer.over_weights
    active = tuple(layer.over_weights.nonzero()[3])
    weight[active] = -0.0
    content = pack(checkpoint_of({"a": layer} if has_mask else {}, state_dict={"a.weight": weight}))
    (entry,) = content["packed"]
    assert entry["values"].numel() == int(layer.over_weights.sum()) - (not has_mask)
    back = unpack(content)["state_dict"]["a.weight"]
    assert torch.equal(back, weight)
    assert not torch.signbit(back[~layer.over_weights]).any()
    assert bool(torch.signbit(back[active])) is has_mask  # an active value is kept to the bit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 16])
def test_active_values_are_all_that_is_stored(dtype: torch.dtype, block_size: int) -> None:
    layer = Layer((64, 96), block_size, 0.1, seed=0)
    checkpoint = checkpoint_of({"a": layer}, state_dict={"a.weight": layer.tensor(dtype, 1)})
    content = pack(checkpoint)
    assert content["checkpoint"]["state_dict"] == {"a.weight": None}
    (entry,) = content["packed"]
    assert entry["layer"] == "a"
    assert "mask" not in entry  # it is DGMCallback's
    assert entry["values"].numel() == int(layer.over_weights.sum()) < 0.2 * 64 * 96


@pytest.mark.parametrize("value", [1e-30, float("nan"), float("inf")])
def test_value_outside_the_mask_keeps_its_tensor_off_the_mask(value: float) -> None:
    layer = Layer((64, 64), 1, 0.5, seed=0)
    regular, spoiled = layer.tensor(torch.float32, 1), layer.tensor(torch.float32, 2)
    spoiled[tuple((~layer.over_weights).nonzero()[7])] = value
    checkpoint = checkpoint_of({"a": layer}, state_dict={"a.weight": regular, "a.momentum": spoiled})
    content = pack(checkpoint)
    assert layers_of(content)["state_dict/a.weight"] == "a"
    assert layers_of(content).get("state_dict/a.momentum") is None
    assert differences(unpack(content), checkpoint) == []


def test_another_default_device_changes_nothing() -> None:
    layer = Layer((64, 96), 16, 0.5, seed=0)
    content = checkpoint_of({"a": layer}, state_dict={"a.weight": layer.tensor(torch.float32, 1)})
    plain = pack(content)
    with torch.device("meta"):
        packed = pack(content)
        assert differences(packed, plain) == []
        assert differences(unpack(packed), content) == []


def test_frozen_weights_are_stored_as_they_are_and_their_optimizer_state_packed() -> None:
    layer = Layer((64, 64), 16, 0.25, seed=0)
    weight = torch.randn(64, 64)
    state = {0: {"step": torch.tensor(1.0), "exp_avg": layer.tensor(torch.float32, 1)}}
    content = pack(checkpoint_of({"a": layer}, state_dict={"a.weight": weight}, optimizer_states=[{"state": state}]))
    assert content["checkpoint"]["state_dict"]["a.weight"] is weight
    assert layers_of(content) == {"optimizer_states/0/state/0/exp_avg": "a"}


def test_each_of_many_equal_layers_finds_its_own_mask() -> None:
    found = {f"blocks.{i}.fc": Layer((32, 32), 1, 0.2, seed=i) for i in range(12)}
    weights = {f"{name}.weight": x.tensor(torch.float32, i) for i, (name, x) in enumerate(found.items())}
    states = {
        i: {key: x.tensor(torch.float32, 50 + i) for key in ("exp_avg", "exp_avg_sq")}
        for i, x in enumerate(found.values())
    }
    checkpoint = checkpoint_of(found, state_dict=weights, optimizer_states=[{"state": states}])
    content = pack(checkpoint)
    used = layers_of(content)
    assert [used[f"state_dict/{name}.weight"] for name in found] == list(found)
    for i, name in enumerate(found):
        assert used[f"optimizer_states/0/state/{i}/exp_avg"] == used[f"optimizer_states/0/state/{i}/exp_avg_sq"] == name
    assert differences(unpack(content), checkpoint) == []


def test_square_weight_stored_transposed_is_told_from_one_that_is_not() -> None:
    layer = Layer((48, 48), 1, 0.2, seed=3)
    checkpoint = checkpoint_of(
        {"a": layer},
        state_dict={"a.weight": layer.tensor(torch.float32, 0, transposed=True), "b": layer.tensor(torch.float32, 1)},
    )
    content = pack(checkpoint)
    assert [x["transposed"] for x in content["packed"]] == [True, False]
    assert differences(unpack(content), checkpoint) == []


def test_without_a_mask_to_share_a_tensor_brings_its_own() -> None:
    """Weights saved alone, and averaged weights, which are no longer zero where the mask is inactive."""
    layer = Layer((64, 64), 1, 0.1, seed=0)
    average = layer.tensor(torch.float32, 1)
    average[0] = 0.5
    alone = {"state_dict": {"a.weight": average, "dense": torch.randn(64, 64)}}
    for checkpoint in (alone, checkpoint_of({"a": layer}, **alone)):
        content = pack(checkpoint)
        assert layers_of(content) == {"state_dict/a.weight": None}
        (entry,) = content["packed"]
        assert entry["mask"].numel() == 64 * 64 // 8
        assert entry["values"].numel() == int((average != 0).sum())
        assert differences(unpack(content), checkpoint) == []


def test_module_state_dict_alone_keeps_its_order_and_metadata() -> None:
    """What `ddp_spawn` sends from its first process goes through the plugin, too."""
    module = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    with torch.no_grad():
        module[0].weight[3:] = 0.0
    state = module.state_dict()
    content = pack(state)
    assert layers_of(content) == {"0.weight": None}
    assert state["0.weight"] is not None
    restored = unpack(through_a_file(content))
    assert differences(restored, state) == []
    assert restored._metadata == state._metadata


class Labelled(Tensor):
    """A tensor of a class of its own."""


def _labelled() -> Tensor:
    tensor = torch.zeros(32, 32)
    tensor.label = "mine"  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(15, 15),
        nn.Parameter(torch.zeros(32, 32)),
        torch.zeros(32, 32).as_subclass(Labelled),
        _labelled(),
        torch.zeros(1, 32).expand(32, 32),
        torch.zeros(64, 64)[::2, ::2],
        torch.zeros(32, 32).to_sparse(),
        torch.zeros(32, 32, dtype=torch.complex128),
        torch.zeros(32, 32, dtype=torch.complex64).conj().imag,
        torch.zeros(32, 32, device="meta"),
    ],
    ids=["small", "parameter", "subclass", "attribute", "expanded", "gaps", "sparse", "wide", "negative", "meta"],
)
def test_unusual_tensor_is_left_alone(tensor: Tensor) -> None:
    content = pack({"x": [tensor]})
    assert content["checkpoint"]["x"][0] is tensor
    assert content["packed"] == []


def test_values_that_do_not_fit_their_mask_are_refused() -> None:
    layer = Layer((32, 32), 1, 0.2, seed=0)
    content = pack(checkpoint_of({"a": layer}, state_dict={"a.weight": layer.tensor(torch.float32, 0)}))
    content["packed"][0]["values"] = content["packed"][0]["values"][1:]
    with pytest.raises(ValueError, match=rf"should hold {int(layer.over_weights.sum())} active values, got "):
        unpack(content)
