"""Vendor libraries built from C with the real interface, loaded by the real Python packages."""

from __future__ import annotations

import _ctypes
import ctypes
import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from helpers.energy_parts import AmdMachine, Machine, compile_library, forget_amdsmi

LIBRARIES = Path(__file__).parents[1] / "energy"  # the stand-ins, in C


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in under the real library's name."""
    folder = tmp_path_factory.mktemp("nvml")
    compile_library(LIBRARIES / "fake_nvml.c", folder / "libnvidia-ml.so.1", "-Wl,-soname,libnvidia-ml.so.1")
    return folder


@pytest.fixture(scope="module")
def nvml_library(nvml_folder: Path) -> Iterator[None]:
    """The stand-in loaded in this process; the real pynvml then finds it."""
    import pynvml

    if pynvml.nvmlLib is not None:
        pytest.skip("the real NVML is already loaded in this process")
    # dlopen("libnvidia-ml.so.1") matches a loaded library by its soname
    held = ctypes.CDLL(str(nvml_folder / "libnvidia-ml.so.1"))
    yield
    if pynvml.nvmlLib is not None:
        _ctypes.dlclose(pynvml.nvmlLib._handle)
    _ctypes.dlclose(held._handle)
    pynvml.nvmlLib = None
    pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.fixture
def machine(nvml_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "machine.txt"))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    return Machine(tmp_path / "machine.txt")


@pytest.fixture(scope="session")
def rocm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ROCM_PATH points to: lib/ with both of AMD's libraries."""
    spec = find_spec("amdsmi")
    assert spec is not None
    assert spec.origin is not None
    wrapper = (Path(spec.origin).parent / "amdsmi_wrapper.py").read_text()
    wanted = set(re.findall(r"_libraries\['libamd_smi.so'\]\.(\w+)", wrapper))
    text = (LIBRARIES / "fake_amd.c").read_text()
    stubs = [f"int {name}(void) {{ return 2; }}" for name in sorted(wanted) if f" {name}(" not in text]
    folder = tmp_path_factory.mktemp("rocm")
    (folder / "lib").mkdir()
    source = folder / "fake_amd.c"
    source.write_text("\n".join([text, *stubs, ""]))
    for name in ("libamd_smi.so", "librocm_smi64.so"):
        compile_library(source, folder / "lib" / name)
    for other in ("old", "bare"):
        (folder / other / "lib").mkdir(parents=True)
    compile_library(LIBRARIES / "fake_amd.c", folder / "bare" / "lib" / "libamd_smi.so")
    compile_library(source, folder / "old" / "lib" / "librocm_smi64.so", "-DOLD_ROCM")
    return folder


@pytest.fixture(scope="session")
def amdsmi_modules(rocm_folder: Path) -> dict[str, ModuleType]:
    """The real amdsmi, imported with the stand-in as its library; put away again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROCM_PATH", str(rocm_folder))
        patch.delenv("ROCM_HOME", raising=False)
        before = forget_amdsmi()
        importlib.import_module("amdsmi")
        loaded = forget_amdsmi()
        sys.modules.update(before)
    return loaded


@pytest.fixture
def amd_machine(
    rocm_folder: Path, amdsmi_modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AmdMachine]:
    monkeypatch.setenv("FAKE_AMD", str(tmp_path / "machine.txt"))
    monkeypatch.setenv("ROCM_PATH", str(rocm_folder))
    for name in ("ROCM_HOME", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    before = forget_amdsmi()
    sys.modules.update(amdsmi_modules)
    yield AmdMachine(tmp_path / "machine.txt")
    forget_amdsmi()
    sys.modules.update(before)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def forbid(open_folder: Path) -> Iterator[Callable[[Path], None]]:
    """Take the right to read a file away, and root's rights too: file modes do not hold root back."""
    user = os.geteuid()
    taken: list[Path] = []

    def take(path: Path) -> None:
        path.chmod(0)
        taken.append(path)
        if user == 0:
            os.seteuid(65534)

    yield take
    if user == 0:
        os.seteuid(user)
    for path in taken:
        path.chmod(0o700)  # so that it can be removed
