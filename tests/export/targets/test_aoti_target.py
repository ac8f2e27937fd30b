"""``aoti``: packages with packed layers, run by PyTorch and by a C++ program without Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from helpers import exported
from lightning_estdgm._environment import instruction_sets
from lightning_estdgm.export import ExportError, export_model, load_aoti
from lightning_estdgm.export.targets import aoti
from lightning_estdgm.sparse.backends.native._operator import _torch_flags

pytest.importorskip("torch_geometric")

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")
X = torch.randn(1, 128, generator=torch.Generator().manual_seed(3))


def run(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    loaded = torch._inductor.aoti_load_package(str(path))
    found = loaded(*inputs)
    assert isinstance(found, torch.Tensor)
    return found


def test_a_c_program_runs_it_without_python(tmp_path: Path) -> None:
    """At another batch than the example's; the process has no Python and finds the operator in the library beside."""
    net = exported.mlp(unit=16)
    report = export_model(net, X, "aoti", tmp_path / "net")
    assert [path.name for path in report.files] == ["net.pt2", "net.operator.so"]
    assert "input [any, 128]" in str(report)
    program = tmp_path / "serve"
    flags = [*_torch_flags(), "-O0", "-ldl"]
    source = str(Path(__file__).with_name("serve.cpp"))
    compiled = subprocess.run(
        [str(COMPILER), source, "-o", str(program), *flags], capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr[-2000:]
    x = torch.randn(7, 128)
    x.numpy().tofile(tmp_path / "x.bin")
    call = [
        str(program), str(tmp_path / "net.operator.so"), str(tmp_path / "net.pt2"), str(tmp_path / "x.bin"), "128",
        str(tmp_path / "y.bin"),
    ]  # fmt: skip
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    y = torch.from_numpy(numpy.fromfile(tmp_path / "y.bin", dtype=numpy.float32)).view(7, 128)
    assert exported.relative_difference(y, net(x)) < 1e-5
    linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in linked
    assert "libpython" not in linked
    without = subprocess.run([*call[:1], "/dev/null", *call[2:]], capture_output=True, env=environment, check=False)
    assert without.returncode == 3, "the control: without the library there is no operator"


@pytest.mark.parametrize("kind", ["gpt", "conv", "gcn"])
def test_networks(kind: str, tmp_path: Path) -> None:
    net, example, dynamic = exported.network(kind)
    if kind == "gcn" and torch.__version__ < "2.7":
        with pytest.raises(ExportError, match=r"what aoti computes differs from the model.*nothing was written"):
            export_model(net, example, "aoti", tmp_path / "net", dynamic=dynamic)
        pytest.skip("AOTInductor of torch 2.6 computes index_add wrong, as of dense networks")
    report = export_model(net, example, "aoti", tmp_path / "net", dynamic=dynamic)
    assert "any" in report.notes[0]
    inputs = exported.other_size(kind)
    assert exported.relative_difference(run(tmp_path / "net.pt2", *inputs), net(*inputs)) < 1e-4


def test_no_dense_weight_is_inside(tmp_path: Path) -> None:
    net = exported.mlp(unit=16, width=1024)
    report = export_model(net, torch.randn(2, 1024), "aoti", tmp_path / "net")
    assert (tmp_path / "net.pt2").stat().st_size < 0.35 * report.dense_bytes
    metadata = torch._inductor.aoti_load_package(str(tmp_path / "net.pt2")).get_metadata()
    known = metadata.get("AOTI_CPU_ISA", "")  # not in torch 2.6
    assert re.search(rf"compiled for {known or '[A-Z0-9]+'} by torch {re.escape(torch.__version__)}", str(report))
    assert ("its metadata say so" in str(report)) == bool(known)


def with_metadata(package: Path, changes: dict[str, str]) -> Path:
    """A copy of a package whose metadata say something else."""
    changed = package.with_name("changed.pt2")
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(changed, "w") as copy:
        for entry in source.infolist():
            content = source.read(entry)
            for old, new in changes.items() if entry.filename.endswith("_metadata.json") else ():
                assert old in content.decode()
                content = content.replace(old.encode(), new.encode())
            copy.writestr(entry, content)
    return changed


def test_a_package_for_another_cpu_is_refused(tmp_path: Path) -> None:
    net = exported.mlp(unit=16)
    export_model(net, X, "aoti", tmp_path / "net")
    package = tmp_path / "net.pt2"
    assert exported.relative_difference(load_aoti(package)(X), net(X)) < 1e-5
    if sets := instruction_sets():
        recorded = " ".join(sets)
        better = with_metadata(package, {recorded: f"{recorded} avx9000"})
        with pytest.raises(
            RuntimeError, match=r"changed.pt2 was built on a CPU with avx9000, which this one lacks: exp"
        ):
            load_aoti(better)
        assert load_aoti(with_metadata(package, {recorded: sets[0]})) is not None, "a lesser one will do"
    other = with_metadata(package, {f'"ESTDGM_MACHINE": "{os.uname().machine}"': '"ESTDGM_MACHINE": "vax"'})
    with pytest.raises(RuntimeError, match=f"was built for vax, and this CPU is {os.uname().machine}"):
        load_aoti(other)
    (tmp_path / "no.pt2").write_text("nothing")
    with pytest.raises(ValueError, match=r"no\.pt2 is no AOTInductor package"):
        load_aoti(tmp_path / "no.pt2")


class Scaled(nn.Module):
    """Inputs by name, outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = exported.mlp(unit=16)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scaled": self.net(x) * scale, "plain": self.net(x)}


def test_calls_take_inputs_and_return_outputs_as_the_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, scale = exported.mlp(unit=16), torch.tensor(3.0)
    export_model(net, X, "aoti", tmp_path / "plain")
    export_model(Scaled(), {"x": X, "scale": scale}, "aoti", tmp_path / "named")
    named, plain = load_aoti(tmp_path / "named.pt2"), load_aoti(tmp_path / "plain.pt2")
    found = named(scale=scale, x=X)
    assert exported.relative_difference(found["scaled"], 3 * net(X)) < 1e-5
    assert exported.relative_difference(found["plain"], net(X)) < 1e-5

    def parse(*args: object) -> None:
        raise AssertionError("a call of tensors alone parses nothing")

    monkeypatch.setattr(torch.utils._pytree, "treespec_loads", parse)
    assert exported.relative_difference(plain(X), net(X)) < 1e-5
    with pytest.raises(AssertionError, match="parses nothing"):
        named(scale=scale, x=X)


def test_without_this_package_torch_names_the_operator_and_the_library_is_enough(tmp_path: Path) -> None:
    export_model(exported.mlp(unit=16), X, "aoti", tmp_path / "net")
    lines = "import torch\n{}print(torch._inductor.aoti_load_package({!r})(torch.ones(1, 128)).shape)"
    for first, said in (("", "Could not find schema for estdgm::packed_linear"), ("load", "torch.Size([1, 128])")):
        load = f"torch.ops.load_library({str(tmp_path / 'net.operator.so')!r})\n" if first else ""
        program = lines.format(load, str(tmp_path / "net.pt2"))
        environment = {**os.environ, "PYTHONPATH": ""}
        call = [sys.executable, "-c", program]
        done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert said in done.stdout + done.stderr
        assert (done.returncode == 0) == bool(first)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("line\n" * 30 + "error: no such instruction")

    monkeypatch.setattr(aoti.torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(ExportError, match=r"AOTInductor failed: RuntimeError\n(.|\n)*error: no such instruction"):
        export_model(nn.Sequential(exported.mlp()), X, "aoti", tmp_path / "out" / "net")
    assert os.listdir(tmp_path / "out") == []
