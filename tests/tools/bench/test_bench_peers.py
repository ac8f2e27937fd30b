"""PyTorch's sparse layouts and oneDNN's dense product are measured, or left out with a reason."""

from dataclasses import replace

import pytest
import torch

from helpers.bench_cases import TINY_KERNELS
from lightning_estdgm.sparse._topology import BlockTopology
from lightning_estdgm.tools.bench.kernels import _peers as peers
from lightning_estdgm.tools.bench.kernels._linear import linear_rows


def test_every_peer_is_measured_or_left_out_with_a_reason_once():
    said = []
    rows = list(linear_rows(TINY_KERNELS, said.append))
    for peer in peers.PEERS:
        mine = [r for r in rows if r["backend"] == peer.name]
        reasons = [text for text in said if text.startswith(f"{peer.name} left out: ")]
        assert bool(mine) != bool(reasons)
        for found in mine:  # what a peer does not offer, it says
            assert all(found["products"][p] or p in found["notes"] for p in ("Y", "dX", "dW"))
    assert len(said) == len(set(said))
    assert any(text.startswith("torch 2:4 left out: ") for text in said) == (not torch.cuda.is_available())
    assert not [r for r in linear_rows(replace(TINY_KERNELS, peers=False)) if r["backend"].startswith("torch")]


def test_two_four_keeps_the_two_larger_of_four(monkeypatch):
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: dense)
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0], [0.1, 0.2, -0.4, 0.3]])
    topology = BlockTopology.from_mask(torch.ones(1, 2, dtype=torch.bool), 2)
    _, pruned = peers.torch_two_four(peers.Weights(weight, topology))
    assert pruned.tolist() == torch.tensor([[0.0, -4.0, 3.0, 0.0], [0.0, 0.0, -0.4, 0.3]]).tolist()
    x, dy = torch.randn(3, 4), torch.randn(3, 2)
    found = peers.measure_peer(peers.PEERS[2], x, peers.Weights(weight, topology), dy, rounds=1)
    assert found.density == 0.5
    assert set(found.products) == {"Y", "dX", "dW"}


def test_onednn_multiplies_dense_right_in_all_three_products():
    (row,) = [r for r in linear_rows(TINY_KERNELS) if r["backend"] == "oneDNN dense"]
    assert (row["density"], row["block_size"], row["wrong"]) == (1.0, None, False)
    for product in row["products"].values():
        assert product["relative_error"] < 1e-5
        assert product["efficiency"] == pytest.approx(product["speedup"])
    assert row["speedup"] == row["efficiency"] > 0


def test_a_wrong_dense_product_is_marked(monkeypatch):
    monkeypatch.setattr(peers, "_onednn", lambda a, b: 1.01 * (a @ b.t()))
    (row,) = [r for r in linear_rows(TINY_KERNELS) if r["backend"] == "oneDNN dense"]
    assert row["wrong"]
    assert row["speedup"] is None
