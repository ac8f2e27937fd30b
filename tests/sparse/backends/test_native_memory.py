"""Loops around the products: zeros outside a mask, and single elements that are read and written, equal torch's."""

import pytest
import torch

from lightning_estdgm.method._masks import keep_active_, mask_shape
from lightning_estdgm.sparse.backends.native import _memory
from lightning_estdgm.sparse.backends.native._build import library
from lightning_estdgm.sparse.backends.native._memory import gather_, scatter_, zero_outside_


@pytest.fixture(autouse=True)
def operators():
    """Have the compiled operators in use, as after a layer's product."""
    if isinstance(library(), str):
        pytest.skip("no compiled operators here")


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BIG = 1 << 17  # elements, more than one thread takes


def values(*shape, dtype=torch.float32):
    """Numbers of all kinds, of which some are no numbers."""
    found = torch.randn(*shape).to(dtype)
    flat = found.view(-1)
    flat[::7], flat[3::11], flat[5::13] = float("nan"), -float("inf"), -0.0
    return found


def bits(tensor):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def check(weight, mask, unit):
    expected = keep_active_(weight.clone(), mask, unit)
    assert zero_outside_(weight, mask, unit)
    assert torch.equal(bits(weight), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", [1, (4, 1), (1, 4), 4, 8, (3, 5), 16], ids=str)
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 2)], ids=str)
def test_zeros_outside_a_mask_are_torchs_bit_for_bit(unit, dtype, kernel):
    shape = (48, 240, *kernel)
    check(values(*shape, dtype=dtype), torch.rand(mask_shape(shape, unit)) < 0.3, unit)


@pytest.mark.parametrize("unit", [1, (4, 1), (2, 8)], ids=str)
def test_a_transposed_weight_has_its_own_places(unit):
    weight = values(96, 32).t()
    assert not weight.is_contiguous()
    check(weight, torch.rand(mask_shape(weight.shape, unit)) < 0.5, unit)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_large_weights_are_shared_between_threads(threads, share):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = values(BIG // 128, 1024)
        check(weight, torch.rand(mask_shape(weight.shape, 4)) < share, 4)
    finally:
        torch.set_num_threads(before)


def test_a_view_of_a_mask_is_read_by_its_strides():
    mask = torch.rand(24, 40) < 0.5
    check(values(12, 20), mask[::2, ::2], 1)
    check(values(48, 40), mask[::2, ::2], (4, 2))


REFUSED = {
    "columns of a larger weight": lambda: (torch.ones(8, 16)[:, :8], torch.ones(8, 8, dtype=torch.bool), 1),
    "a vector": lambda: (torch.ones(8), torch.ones(8, dtype=torch.bool), 1),
    "bytes": lambda: (torch.ones(8, 8, dtype=torch.int8), torch.ones(8, 8, dtype=torch.bool), 1),
    "a mask that is too small": lambda: (torch.ones(8, 8), torch.ones(1, 2, dtype=torch.bool), 4),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_left_as_it_is(what):
    weight, mask, unit = REFUSED[what]()
    before = weight.clone()
    assert not zero_outside_(weight, ~mask, unit)
    assert torch.equal(weight, before)


def test_operators_that_no_layer_uses_are_not_built(monkeypatch):
    monkeypatch.setattr(_memory, "library_in_use", lambda: None)
    weight, vector = torch.ones(4, 4), torch.ones(2)
    places = torch.tensor([1, 3], dtype=torch.int32)
    assert not zero_outside_(weight, torch.zeros(4, 4, dtype=torch.bool), 1)
    assert not gather_(vector, places, [weight], [places])
    assert not scatter_([weight], [places], vector, places)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
@pytest.mark.parametrize("counts", [(0,), (1,), (3, 0, 500), (900, 20_000, 1, 7000)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_elements_are_read_and_written_as_torch_does(dtype, counts, threads):
    tensors = [(100 * torch.rand(160, 200)).to(dtype) for _ in counts]
    places = [torch.randperm(tensor.numel())[:count].int() for tensor, count in zip(tensors, counts, strict=True)]
    order = torch.randperm(sum(counts)).int()
    before, vector = torch.get_num_threads(), torch.zeros(sum(counts), dtype=dtype)
    new = (100 * torch.rand(sum(counts))).to(dtype)
    torch.set_num_threads(threads)
    try:
        assert gather_(vector, order, tensors, places)
        found = [tensor.view(-1)[own.long()] for tensor, own in zip(tensors, places, strict=True)]
        assert torch.equal(vector[order.long()], torch.cat(found))
        pieces = zip(tensors, places, new[order.long()].split(counts), strict=True)
        expected = [tensor.view(-1).scatter(0, own.long(), piece).view_as(tensor) for tensor, own, piece in pieces]
        assert scatter_(tensors, places, new, order)
        assert all(map(torch.equal, tensors, expected))
    finally:
        torch.set_num_threads(before)


def test_elements_of_strided_or_other_tensors_are_left_to_torch():
    places = torch.zeros(1, dtype=torch.int32)
    plain, strided = torch.ones(4, 8), torch.ones(4, 4).t()[:2]
    two = torch.tensor([0, 1], dtype=torch.int32)
    assert not gather_(torch.ones(2), two, [plain, strided], [places, places])
    assert not gather_(torch.ones(1, dtype=torch.float64), places, [plain], [places])
    assert not scatter_([plain[:, ::2]], [places], torch.ones(1), places)


def test_torch_counts_what_is_written():
    weight, places = torch.ones(8, 8), torch.tensor([1, 9], dtype=torch.int32)
    other, order = torch.ones(4, 4), torch.arange(4, dtype=torch.int32)
    before = weight._version
    assert zero_outside_(weight.view(8, 8).detach(), torch.eye(8, dtype=torch.bool), 1)
    assert weight._version == before + 1
    assert scatter_([weight, other], [places, places], torch.ones(4), order)
    assert (weight._version, other._version) == (before + 2, 1)
    assert gather_(torch.empty(4), order, [weight, other], [places, places])
    assert (weight._version, other._version) == (before + 2, 1)


def test_a_tensor_that_counts_no_writes_is_written_too():
    with torch.inference_mode():
        weight = torch.ones(4, 4)
        assert zero_outside_(weight, torch.eye(4, dtype=torch.bool), 1)
    assert weight.tolist() == torch.eye(4).tolist()
