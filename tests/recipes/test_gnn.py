"""The graph nets: what their papers say of dropout and decay, and which nodes are learned from."""

import pytest
import torch

from helpers.recipe_data import ogb
from lightning_estdgm.recipes.gnn import GraphNet, drop_features
from lightning_estdgm.recipes.graph_files import GraphFiles

pytest.importorskip("torch_geometric")


def net(**settings):
    torch.manual_seed(0)
    return GraphNet(**{"features": 12, "classes": 4, **settings})


@pytest.mark.parametrize("kind", ["gcn", "gat", "sage"])
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
    model.test_step(graph, 0)
    assert logged["test/accuracy"] == (logits[45:].argmax(1) == graph.y[45:]).sum() / 15
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


def test_a_gat_has_one_head_at_the_end_and_drops_features_and_decays_throughout():
    model = net(kind="gat", hidden=24, heads=4, layers=3)
    assert [conv.heads for conv in model.model.convs] == [4, 4, 1]
    assert [conv.dropout for conv in model.model.convs] == [0.5] * 3
    assert [type(model.model.act).__name__, model.input_dropout] == ["ELU", 0.5]
    (group,) = model.configure_optimizers().param_groups
    assert group["weight_decay"] == 5e-4
    assert len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 0}, "hidden: got 0, expected at least 1"),
        ({"dropout": 1.0}, r"dropout: got 1.0, expected a fraction in \[0, 1\)"),
        ({"kind": "gin"}, "kind: got 'gin', expected one of gcn, gat, sage"),
        ({"kind": "gat", "hidden": 20}, "hidden: got 20, expected a multiple of heads, which is 8"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        net(**settings)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_features_are_dropped_one_by_one_and_the_others_scaled(share):
    torch.manual_seed(0)
    x = (torch.rand(100, 200) < share) * torch.rand(100, 200)
    x.requires_grad_()
    dropped = drop_features(x, 0.6)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], x[kept] / 0.4)
    assert float(kept.sum() / (x != 0).sum()) == pytest.approx(0.4, abs=0.03)
    assert not torch.equal(kept, drop_features(x, 0.6) != 0)
    dropped.sum().backward()
    assert torch.equal(x.grad[kept], torch.full_like(x.grad[kept], 2.5))
    assert not x.grad[~kept & (x != 0)].any()
    assert drop_features(x, 0.0) is x
