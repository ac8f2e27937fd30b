"""The Triton backend where there is no GPU: when it is refused and why, which tiles it tries, what it imports."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from helpers import triton_installed
from lightning_estdgm.sparse._conv_geometry import ConvGeometry
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.sparse.autotune._cases import Case, refusals
from lightning_estdgm.sparse.autotune._choice import BackendSelector
from lightning_estdgm.sparse.backends._protocol import conv_refusal, get_backend
from lightning_estdgm.sparse.backends.triton import _requirements as requirements
from lightning_estdgm.sparse.backends.triton._requirements import BLOCK_SIZES, DTYPES, UNIT_LENGTHS
from lightning_estdgm.sparse.backends.triton._tiles import GROUPS, Tiles, Tuner, candidates, unit_candidates

CUDA = torch.device("cuda", 0)
SIZES = "needs blocks of 16, 32, 64 or 128, or units of 8, 16 or 32 outputs that share an input"
UNITS = [sides for length in UNIT_LENGTHS for sides in ((length, 1), (1, length))]
needs_triton = pytest.mark.skipif(not triton_installed.is_installed(), reason=triton_installed.REASON)


def _topology(block_size=16):
    return BlockTopology.from_mask(torch.ones(2, 3, dtype=torch.bool), block_size)


@pytest.fixture
def ask(monkeypatch):
    """Ask why a case is refused, on a machine that has an NVIDIA GPU of some capability."""
    caches = (requirements.triton_refusal, requirements.device_refusal)

    def unsupported(device=CUDA, dtype=torch.bfloat16, block_size=16, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for cached in caches:
            cached.cache_clear()
        return get_backend("triton").unsupported(device, dtype, _topology(block_size))

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield unsupported
    for cached in caches:
        cached.cache_clear()


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [*BLOCK_SIZES, *UNITS], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
def test_what_is_supported(ask, dtype, block_size, capability):
    assert ask(dtype=dtype, block_size=block_size, capability=capability) is None


@needs_triton
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "needs float16, bfloat16 or float32, got torch.float64"),
        ({"block_size": 8}, f"{SIZES}, got 8 x 8"),
        ({"block_size": 48}, f"{SIZES}, got 48 x 48"),
        ({"block_size": 1}, f"{SIZES}, got 1 x 1"),
        ({"block_size": (4, 1)}, f"{SIZES}, got 4 x 1"),
        ({"block_size": (1, 64)}, f"{SIZES}, got 1 x 64"),
        ({"block_size": (16, 8)}, f"{SIZES}, got 16 x 8"),
        ({"capability": (7, 5)}, "needs CUDA capability 8.0, got 7.5"),
        ({"device": torch.device("meta")}, "runs on NVIDIA and AMD GPUs, got device meta"),
    ],
)
def test_what_is_refused(ask, change, reason):
    assert ask(**change) == reason


@needs_triton
@pytest.mark.parametrize("length", UNIT_LENGTHS)
def test_units_of_several_outputs_are_of_linear_layers_alone(ask, length):
    assert ask(block_size=(length, 1)) is None
    reasons = [
        conv_refusal("triton", CUDA, torch.bfloat16, _topology((length, 1)), ConvGeometry(kernel, (1, 1), (0, 0)))
        for kernel in ((1, 1), (3, 3))
    ]
    assert reasons == [None, f"needs blocks of 16, 32, 64 or 128, got {length} x 1"]


def test_the_cpu_is_refused(ask):
    assert ask(torch.device("cpu")) == (
        "runs on NVIDIA and AMD GPUs (on the CPU only for tests, with TRITON_INTERPRET=1), got device cpu"
    )


def test_a_triton_that_is_missing_is_named(ask, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert ask() == "needs triton>=3.6, which is not installed"


@needs_triton
@pytest.mark.parametrize("version", ["3.5.1", "2.1.0", "unknown"])
def test_a_triton_that_is_too_old_is_named(ask, monkeypatch, version):
    monkeypatch.setattr("triton.__version__", version)
    assert ask() == f"needs triton>=3.6, found {version}"


@needs_triton
@pytest.mark.parametrize("version", ["3.6.0", "3.10.1", "4.0.0+git12ab"])
def test_newer_tritons_are_taken(ask, monkeypatch, version):
    monkeypatch.setattr("triton.__version__", version)
    assert ask() is None


@needs_triton
def test_the_interpreter_must_be_asked_for_before_triton_is_imported():
    script = (
        "import os, torch, triton\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "from lightning_estdgm.sparse.backends._protocol import get_backend\n"
        "from lightning_estdgm.sparse._topology import BlockTopology\n"
        "topology = BlockTopology.from_mask(torch.ones(1, 1, dtype=torch.bool), 16)\n"
        # Triton reads the variable anew at each decorator: kernels must have been made without it.
        "del os.environ['TRITON_INTERPRET']\n"
        "import lightning_estdgm.sparse.backends.triton._launch\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "print(get_backend('triton').unsupported(torch.device('cpu'), torch.float32, topology))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "needs TRITON_INTERPRET=1 to be set before triton is imported to run on the CPU"


def test_a_machine_without_triton_imports_and_lists_it():
    script = (
        "import sys\n"
        "sys.modules['triton'] = None\n"  # what an import then finds: nothing
        "import torch\n"
        "from lightning_estdgm.sparse.backends._protocol import backends\n"
        "from lightning_estdgm.sparse._topology import BlockTopology\n"
        "topology = BlockTopology.from_mask(torch.ones(1, 1, dtype=torch.bool), 16)\n"
        "print(backends()['triton'].unsupported(torch.device('cuda'), torch.float32, topology))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "needs triton>=3.6, which is not installed"


@needs_triton
@pytest.mark.parametrize("block_size", [16, (8, 1), (16, 1), (32, 1)], ids=str)
def test_the_choice_of_backends_considers_it_on_a_gpu_and_says_that_it_was_never_timed(ask, monkeypatch, block_size):
    assert ask() is None
    monkeypatch.setattr(Case, "topology", lambda self: _topology(self.block_size))  # there is no GPU to put it on
    asked = []

    def measure(case, names):
        asked.append(list(names))
        return {name: 1.0 if name == "dense" else 0.25 for name in names}

    layer = {"tokens": 64, "out_features": 32, "in_features": 48, "block_size": block_size, "density": 0.25}
    on_gpu = Case(**layer, dtype=torch.bfloat16, device=CUDA)
    selector = BackendSelector(measure=measure)
    choice = selector.choose(on_gpu)
    assert "triton" in asked[0]
    assert choice.backend == "triton"
    never_timed = "; triton's kernels were never timed on a GPU before their release"
    assert choice.why == "sparse 4.0x faster (250 against 1e+03 ms)" + never_timed
    assert selector.choose(replace(on_gpu, density=0.1)).why == "sparse already faster at density 0.25" + never_timed
    assert BackendSelector("triton").choose(on_gpu).why == "forced" + never_timed
    assert refusals(Case(**layer, dtype=torch.bfloat16, device=torch.device("cpu")))["triton"] is not None


# ------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shared", [64 * 1024, 99 * 1024, 227 * 1024])
def test_candidates_fit_the_device_and_each_other(block_size, itemsize, amd, exact, shared):
    found = candidates(block_size, itemsize, amd=amd, exact_float32=exact, shared_bytes=shared)
    assert 1 <= len(found) == len(set(found)) <= 2
    for tiles in found:
        assert tiles.shared_bytes(block_size, itemsize) <= shared
        assert tiles.rows % block_size == 0
        assert tiles.depth % block_size == 0 or block_size % tiles.depth == 0
        assert tiles.depth >= 16
        assert 1 <= tiles.resident(block_size) <= 4


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shared", [64 * 1024, 227 * 1024])
def test_candidates_of_units_of_several_outputs_join_whole_units(itemsize, amd, exact, shared):
    for length in UNIT_LENGTHS:
        of_groups, of_units = (
            unit_candidates(length, itemsize, in_groups=in_groups, amd=amd, exact_float32=exact, shared_bytes=shared)
            for in_groups in (True, False)
        )
        assert [tiles.columns for tiles in of_groups] == list(GROUPS)
        assert {tiles.columns for tiles in of_units} == {max(length, 16) if amd else length}
        for tiles in of_groups + of_units:
            assert tiles.shared_bytes(tiles.columns, itemsize) <= shared
            assert tiles.depth % length == 0 or length % tiles.depth == 0


SMALL, TALL = Tiles(128, 64, 4, 3), Tiles(256, 64, 8, 3)


def test_the_fastest_is_found_once_per_key():
    timed = []

    def seconds(run):
        timed.append(run())
        return {SMALL: 2.0, TALL: 1.0}[timed[-1]]

    tuner = Tuner()
    assert [tuner.best(key, (SMALL, TALL), lambda tiles: tiles, seconds) for key in "aab"] == [TALL] * 3
    assert timed == [SMALL, TALL] * 2


def test_untimed_the_first_serves_and_nothing_is_remembered():
    tuner = Tuner()
    assert tuner.best("a", (SMALL, TALL), lambda tiles: pytest.fail("run"), None) == SMALL
    assert tuner.best("a", (SMALL, TALL), lambda tiles: tiles, lambda run: -run().rows) == TALL
    assert tuner.best("a", (SMALL, TALL), lambda tiles: pytest.fail("run"), None) == TALL


def test_a_candidate_too_big_for_the_device_is_left_out():
    def run(tiles):
        if tiles == TALL:
            raise MemoryError("shared memory")

    def seconds(call):
        call()
        return 1.0

    assert Tuner((MemoryError,)).best("a", (TALL, SMALL), run, seconds) == SMALL
    with pytest.raises(MemoryError, match="shared memory"):
        Tuner().best("a", (TALL, SMALL), run, seconds)
