"""The pure CPU backend's memory."""

import pytest
import torch

from helpers.sparse_linear import make_operands, make_topology
from lightning_estdgm.sparse.backends._protocol import get_backend


@pytest.mark.parametrize("transposed", [False, True])
def test_the_cpu_backend_reads_and_writes_in_place(transposed):
    topology = make_topology(3, 5, 16)
    x, weight, _, dy = (t.float() for t in make_operands(topology, 9, torch.float32))
    if transposed:
        weight = weight.t().contiguous().t()
    backend = get_backend("cpu")
    with torch.profiler.profile() as profile:
        backend.linear(x, weight, None, topology)
        backend.grad_input(dy, weight, topology)
        backend.grad_weight(dy, x, topology)
    names = {event.name for event in profile.events()}
    assert "aten::mm" in names
    assert not names & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::cat"}
