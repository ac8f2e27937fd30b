"""Shared by all tests: a hypothesis profile without clocks or chance, and small models."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import nn

from helpers import triton_installed
from helpers.browser import browser  # noqa: F401
from helpers.compatibility_rows import pytest_collection_modifyitems, pytest_sessionfinish, record  # noqa: F401

if not triton_installed.is_installed():  # they cannot even be imported
    _KERNELS = ("triton_in_interpreter.py", "triton_conv_in_interpreter.py")
    collect_ignore = [f"sparse/backends/{name}" for name in _KERNELS]

# No deadline: no test depends on how fast a machine is. Derandomised: a failure is the same one everywhere.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture
def mlp() -> Callable[..., nn.Sequential]:
    """Return a maker of seeded multi-layer perceptrons: layers "0", "2", ..., the last of which is the head."""

    def make(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for inner, out in itertools.pairwise(widths):
                layers += [nn.Linear(inner, out, dtype=dtype), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return make
