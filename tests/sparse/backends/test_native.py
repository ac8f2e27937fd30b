"""The compiled CPU operator: its loops at real sizes, for each kind of processor that it is built for; its building."""

import os
import re
import stat
import subprocess
import sys

import pytest
import torch

from lightning_estdgm.method._masks import sides
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.backends import native
from lightning_estdgm.sparse.backends._protocol import get_backend
from lightning_estdgm.sparse.backends.native import _build as build

CPU = torch.device("cpu")
TARGETS = {
    "this CPU": (),
    "without bfloat16": ("-mno-avx512bf16",),
    "8 floats a vector": ("-mno-avx512f",),
    "4 floats a vector": ("-mno-avx",),
    "this CPU, by clang": (),
}


UNITS = [1, (2, 1), (4, 1), (8, 1), (16, 1), (1, 2), (1, 4), (1, 8), (1, 16), 4, 8]


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    """Build for another processor than this one; all of them run here."""
    if os.uname().machine != "x86_64" and TARGETS[request.param]:
        pytest.skip("these are flags for x86-64")
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, *TARGETS[request.param]))
    if "clang" in request.param:
        monkeypatch.setenv("CXX", "clang++")
    build.library.cache_clear()
    try:
        if "clang" in request.param and isinstance(why := build.library(), str):
            pytest.skip(why)
        yield request.param
    finally:
        build.library.cache_clear()


@pytest.fixture
def rebuilt(monkeypatch, tmp_path):
    """A machine on which nothing was built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "lightning_estdgm"
    build.library.cache_clear()


def _case(tokens, rows, cols, block_size, dtype, density=0.4):
    generator = torch.Generator().manual_seed(tokens + sum(sides(block_size)))

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    mask = torch.rand(rows, cols, generator=generator) < density
    mask[0], mask[:, 0] = False, False  # a block row and a column without anything
    mask[-1] = True
    topology = BlockTopology.from_mask(mask, block_size)
    out, inner = topology.shape
    return (
        topology,
        normal(tokens, inner),
        normal(out, inner),
        normal(out),
        normal(tokens, out),
    )


def _products(backend, topology, x, weight, bias, dy):
    return (
        backend.linear(x, weight, bias, topology),
        backend.linear(x, weight, None, topology),
        backend.grad_input(dy, weight, topology),
        backend.grad_weight(dy, x, topology),
    )


def _assert_right(topology, *operands):
    dtype = operands[0].dtype
    if native.BACKEND.unsupported(CPU, dtype, topology) is not None:
        assert dtype is torch.bfloat16
        pytest.skip("this build has no bfloat16")
    right = _products(get_backend("reference"), topology, *(t.double() for t in operands))
    for got, want in zip(_products(native.BACKEND, topology, *operands), right, strict=True):
        assert got.dtype == dtype
        error = (got.double() - want).norm() / want.norm()
        assert error < (2e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 80, 128])
def test_every_loop_of_every_target(target, block_size, dtype):
    # 403 tokens: several tiles of tokens, a last one that is short, rows left over in each, an odd number for pairs.
    _assert_right(*_case(403, 3, 4, block_size, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_every_loop_of_fine_units_of_every_target(target, unit, dtype):
    # 403 tokens: several tiles and a short last one. 21 x 19 units: columns left over of a vector; 500: many a row.
    _assert_right(*_case(403, 21, 19, unit, dtype))
    _assert_right(*_case(150, 6, 500, unit, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", [1, (4, 1), (1, 4), 8], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 128, 129, 2048])
def test_any_number_of_tokens_with_fine_units(tokens, unit, dtype):
    _assert_right(*_case(tokens, 30, 17, unit, dtype))


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_what_inactive_weights_hold_reaches_nothing(unit):
    topology, x, weight, bias, dy = _case(50, 9, 11, unit, torch.float32)
    inactive = ~topology.weight_mask()
    for got, want in zip(
        _products(native.BACKEND, topology, x, weight.masked_fill(inactive, torch.nan), bias, dy),
        _products(native.BACKEND, topology, x, weight.masked_fill(inactive, 0.0), bias, dy),
        strict=True,
    ):
        assert torch.equal(got, want)
    assert not native.BACKEND.grad_weight(dy, x, topology)[inactive].any()


@pytest.mark.parametrize("unit", [1, (2, 1)], ids=str)
def test_an_infinite_input_reaches_only_the_outputs_that_use_it(unit):
    # Outputs are taken in fours of equal length: what fills up the shorter ones must be no input.
    topology, x, weight, _, _ = _case(20, 16, 40, unit, torch.float32)
    x[3, 5] = torch.inf
    used = topology.weight_mask()[:, 5]
    assert used.any()
    assert not used.all()
    y = native.BACKEND.linear(x, weight, None, topology)
    assert torch.equal(y[3].isfinite(), ~used)
    assert y[torch.arange(20) != 3].isfinite().all()


def test_a_mask_is_ordered_once_and_again_when_it_changes():
    topology, x, weight, bias, dy = _case(30, 40, 50, 1, torch.float32)
    plan = native.BACKEND._plans.linear(topology)
    _assert_right(topology, x, weight, bias, dy)
    assert native.BACKEND._plans.linear(topology) is plan
    topology.update_(topology.mask().logical_not())
    _assert_right(topology, x, weight, bias, dy)
    assert native.BACKEND._plans.linear(topology) is not plan


def test_masks_made_in_inference_mode_are_ordered_at_each_call():
    with torch.inference_mode():
        _assert_right(*_case(30, 40, 50, 1, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 11, 12, 13, 64, 129, 2048])
def test_any_number_of_tokens(tokens, dtype):
    _assert_right(*_case(tokens, 9, 5, 32, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_operands(dtype):
    topology, x, weight, bias, dy = _case(70, 4, 6, 16, dtype)
    wide = torch.cat([x, x + 1], 1)[:, : x.shape[1]]  # rows further apart than they are long
    column_major = dy.t().contiguous().t()
    in_out = weight.t().contiguous().t()
    every_other = bias.repeat_interleave(2)[::2]
    _assert_right(topology, wide, in_out, every_other, column_major)
    _assert_right(topology, x.t().contiguous().t(), weight.repeat_interleave(2, 1)[:, ::2], bias, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "cols", "block_size"),
    [(8, 8, 32), (2, 3, 128), *[(24, 40, unit) for unit in UNITS]],  # few blocks: several threads each
    ids=str,
)
def test_results_do_not_depend_on_the_number_of_threads(rows, cols, block_size, dtype):
    topology, *operands = _case(500, rows, cols, block_size, dtype)
    _assert_right(topology, *operands)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5, 65):  # more than have a stretch of tasks of their own
            torch.set_num_threads(n)
            results.append(_products(native.BACKEND, topology, *operands))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_fewer_threads_than_asked_for_do_all_the_work():
    code = (
        "import torch\n"
        "from lightning_estdgm.sparse.backends._protocol import get_backend\n"
        "from lightning_estdgm.sparse._topology import BlockTopology\n"
        "torch.set_num_threads(4)\n"
        "topology = BlockTopology.from_mask(torch.ones(4, 4, dtype=torch.bool), 16)\n"
        "x, weight, dy = torch.ones(300, 64), torch.ones(64, 64), torch.ones(300, 64)\n"
        "native = get_backend('native')\n"
        "assert native.unsupported(x.device, x.dtype, topology) is None\n"
        "assert native.linear(x, weight, None, topology).eq(64).all()\n"
        "assert native.grad_weight(dy, x, topology).eq(300).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_THREAD_LIMIT": "1"}, check=True, timeout=300)


def test_it_is_built_once_and_kept(rebuilt):
    topology = BlockTopology.from_mask(torch.ones(1, 1, dtype=torch.bool), 16)
    assert native.BACKEND.unsupported(CPU, torch.float32, topology) is None
    (library,) = rebuilt.iterdir()
    before = library.stat().st_mtime_ns
    build.library.cache_clear()
    assert native.BACKEND.unsupported(CPU, torch.float32, topology) is None
    assert [p.stat().st_mtime_ns for p in rebuilt.iterdir()] == [before]


def _fails(code):
    def write(folder):
        compiler = folder / "broken-c++"
        compiler.write_text(code)
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
        return str(compiler)

    return write


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (lambda folder: str(folder / "none"), "no C\\+\\+ compiler was found"),
        (_fails("#!/bin/sh\necho a fatal error >&2; exit 1\n"), "broken-c\\+\\+ failed: a fatal error"),
        (_fails("#!/bin/sh\necho nothing > /dev/null\n"), "could not be compiled"),
    ],
    ids=["none there", "it fails", "it writes nothing"],
)
def test_without_a_compiler_it_says_why(rebuilt, tmp_path, monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler(tmp_path))
    topology = BlockTopology.from_mask(torch.ones(1, 1, dtype=torch.bool), 16)
    refusal = native.BACKEND.unsupported(CPU, torch.float32, topology)
    assert refusal is not None
    assert re.search(reason, refusal)


def test_without_a_compiler_training_goes_on_by_the_pure_backend(tmp_path):
    code = (
        "import torch\n"
        "from lightning_estdgm.sparse.autotune._cases import Case, refusals\n"
        "said = refusals(Case(64, 128, 128, 16, 0.25, torch.float32, torch.device('cpu')))\n"
        "assert 'no C++ compiler' in said['native'], said\n"
        "assert said['cpu'] is None\n"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
