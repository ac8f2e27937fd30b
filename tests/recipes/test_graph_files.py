"""A graph on disk: every node and edge where it belongs."""

import gzip

import pytest
import torch

from helpers.recipe_data import graph, ogb, planetoid
from lightning_estdgm.recipes.graph_files import GraphFiles


def both_ways(edges):
    return sorted({(a, b) for edge in edges.tolist() for a, b in (edge, edge[::-1])})


@pytest.mark.parametrize("name", ["cora", "pubmed"])
def test_planetoid_is_read_with_its_public_split(name, tmp_path):
    pytest.importorskip("torch_geometric")
    x, y, edges = graph(560, 30, 3)
    data = GraphFiles(str(planetoid(tmp_path, name)), normalize=True)
    assert (data.features, data.classes) == (30, 3)
    (batch,) = data.train_dataloader()
    torch.testing.assert_close(batch.x, torch.from_numpy(x / x.sum(1, keepdims=True)))
    assert batch.y.tolist() == y.tolist()
    assert sorted(map(tuple, batch.edge_index.T.tolist())) == both_ways(edges)
    masks = [batch[part].nonzero().flatten().tolist() for part in ("train_mask", "val_mask", "test_mask")]
    assert masks == [list(range(6)), list(range(6, 506)), list(range(520, 560))]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["raw"], "nothing is written"


def test_one_of_several_data_sets_in_one_folder_without_raw(tmp_path):
    pytest.importorskip("torch_geometric")
    for name in ("cora", "citeseer"):
        for file in (planetoid(tmp_path / name, name) / "raw").iterdir():
            file.rename(tmp_path / file.name)
    with pytest.raises(ValueError, match=r"got the files of citeseer, cora, expected .* or name= to say which"):
        GraphFiles(str(tmp_path))
    with pytest.raises(ValueError, match="name: got 'pubmed', expected one of citeseer, cora, whose files are in"):
        GraphFiles(str(tmp_path), name="pubmed")
    data = GraphFiles(str(tmp_path), name="citeseer")
    (batch,) = data.test_dataloader()
    assert batch.y.tolist() == graph(560, 30, 3)[1].tolist()


@pytest.mark.parametrize("directed", [False, True])
def test_ogb_is_read_with_its_split(directed, tmp_path):
    pytest.importorskip("torch_geometric")
    x, y, edges = graph(60, 12, 4)
    data = GraphFiles(str(ogb(tmp_path)), directed=directed)
    assert (data.features, data.classes) == (12, 4)
    (batch,) = data.val_dataloader()
    assert batch.x.tolist() == x.tolist()
    assert batch.y.tolist() == y.tolist()
    read = list(map(tuple, batch.edge_index.T.tolist()))
    assert read == [tuple(e) for e in edges.tolist()] if directed else sorted(read) == both_ways(edges)
    masks = [batch[part].nonzero().flatten().tolist() for part in ("train_mask", "val_mask", "test_mask")]
    assert masks == [list(range(30)), list(range(30, 45)), list(range(45, 60))]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("raw/edge", "1,2\n3,60\n", "got 60 nodes, 60 labels and a node 60 in an edge"),
        ("raw/node-label", "1\n2\n", "got 60 nodes, 2 labels and a node 59 in an edge"),
        ("raw/node-feat", "1,2\nx,y\n", "node-feat.csv.gz: expected numbers with commas between them, got: .*'x'"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(file, content, message, tmp_path):
    pytest.importorskip("torch_geometric")
    folder = ogb(tmp_path)
    with gzip.open(folder / f"{file}.csv.gz", "wt") as out:
        out.write(content)
    with pytest.raises(ValueError, match=message):
        GraphFiles(str(folder)).graph  # noqa: B018
