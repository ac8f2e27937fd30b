"""Discovery of backends: those of this package, those of entry points, and what is refused."""

import importlib
import sys

import pytest
import torch

from helpers.sparse_linear import make_arguments
from lightning_estdgm.sparse._linear import masked_linear
from lightning_estdgm.sparse.backends import _protocol as protocol
from lightning_estdgm.sparse.backends._protocol import Backend, backends, get_backend


def test_discovered_backends_are_backends():
    found = backends()
    assert {"cpu", "reference"} <= set(found)
    for name, backend in found.items():
        assert isinstance(backend, Backend)
        assert backend.name == name
        assert get_backend(name) is backend


def test_the_list_of_backends_is_a_copy():
    backends().clear()
    assert backends()


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Installs a distribution with one entry point, whose module holds the given source."""

    def install(source: str):
        (tmp_path / "estdgm_plugin.py").write_text(source)
        info = tmp_path / "estdgm_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: estdgm-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{protocol.ENTRY_POINT_GROUP}]\nmine = estdgm_plugin:BACKEND\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        protocol._discover.cache_clear()

    yield install
    sys.modules.pop("estdgm_plugin", None)
    protocol._discover.cache_clear()


_PLUGIN = """
from lightning_estdgm.sparse.backends.reference import ReferenceBackend
class Mine(ReferenceBackend):
    name = {name!r}
BACKEND = Mine()
"""


def test_a_backend_may_come_from_an_entry_point(plugin):
    plugin(_PLUGIN.format(name="mine"))
    assert "mine" in backends()
    args, kwargs = make_arguments(backend="mine")
    torch.testing.assert_close(masked_linear(*args, **kwargs), masked_linear(*args, backend="reference"))


@pytest.mark.parametrize("name", ["cpu", "dense", "auto"])
def test_a_taken_name_raises(plugin, name):
    plugin(_PLUGIN.format(name=name))
    with pytest.raises(ValueError, match=rf"entry point 'mine' .* backend name '{name}' is already taken"):
        backends()


def test_an_entry_point_that_is_no_backend_raises(plugin):
    plugin("BACKEND = object()")
    with pytest.raises(TypeError, match=r"entry point 'mine' .* must be a Backend"):
        backends()
