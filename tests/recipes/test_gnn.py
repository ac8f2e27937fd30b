"""The graph nets: what their papers say of dropout and decay, and which nodes are learned from."""

import pytest
import torch

from helpers.recipe_data import ogb
from lightning_estdgm.recipes.gnn import GraphNet
from lightning_estdgm.recipes.graph_files import GraphFiles

pytest.importorskip("torch_geometric")


def net(**settings):
    torch.manual_seed(0)
    return GraphNet(**{"features": 12, "classes": 4, **settings})


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_the_loss_is_that_of_the_nodes_for_training(kind, tmp_path):
    graph = GraphFiles(str(ogb(tmp_path))).graph
    model, logged = net(kind=kind, dropout=0.0, layers=3, norm=True), {}
    model.log = lambda name, value, **_: logged.update({name: value})
    model.log_dict = lambda values, **_: logged.update(values)
    loss = model.training_step(graph, 0)
    logits = model(graph.x, graph.edge_index)
    assert logits.shape == (60, 4)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[:30], graph.y[:30]))
    model.validation_step(graph, 0)
    torch.testing.assert_close(logged["val/loss"], torch.nn.functional.cross_entropy(logits[30:45], graph.y[30:45]))
    assert logged["val/accuracy"] == (logits[30:45].argmax(1) == graph.y[30:45]).sum() / 15
    assert sum(type(layer).__name__ == "BatchNorm" for layer in model.modules()) == 2


def test_a_gcn_drops_features_too_and_its_last_layer_does_not_decay():
    x, edges = torch.ones(50, 12), torch.tensor([[0, 1], [1, 0]])
    given = {}
    for kind in ("gcn", "sage"):
        model = net(kind=kind)
        model.model.register_forward_pre_hook(lambda _, args, kind=kind: given.update({kind: args[0]}))
        model(x, edges)
    assert 0.3 < (given["gcn"] == 0).float().mean() < 0.7
    assert torch.equal(given["sage"], x)
    decayed, plain = net().configure_optimizers().param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (5e-4, 0.0)
    assert [tuple(p.shape) for p in plain["params"]] == [(4,), (4, 16)]
    assert sum(p.numel() for p in decayed["params"]) == 12 * 16 + 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 0}, "hidden: got 0, expected at least 1"),
        ({"dropout": 1.0}, r"dropout: got 1.0, expected a fraction in \[0, 1\)"),
        ({"kind": "gat"}, "kind: got 'gat', expected gcn or sage"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        net(**settings)
