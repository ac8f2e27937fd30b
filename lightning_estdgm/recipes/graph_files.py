"""One graph from disk, in the layout of Planetoid (Cora, CiteSeer, PubMed) or of OGB's node data sets."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

_PLANETOID = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_OGB = ("edge", "node-feat", "node-label")
_HELP = """expected a folder of one of two layouts:
  Planetoid:  raw/ind.cora.x  .tx  .allx  .y  .ty  .ally  .graph  .test.index  (or the files without the folder raw)
  OGB:        raw/edge.csv.gz  raw/node-feat.csv.gz  raw/node-label.csv.gz
              split/time/train.csv.gz  valid.csv.gz  test.csv.gz  (or another name than time)
The first are in the folder data of https://github.com/kimiyoung/planetoid; the second come as \
http://snap.stanford.edu/ogb/data/nodeproppred/arxiv.zip (see https://ogb.stanford.edu/docs/nodeprop/)."""


class GraphFiles(LightningDataModule):
    """One graph, read from disk and nowhere else; every batch is the whole of it.

    Planetoid's pickles are opened as such: take them from a source that you trust. Edges of OGB's graphs are taken in
    both directions unless ``directed``; Planetoid's are stored so.

    Args:
        path: Folder of the data set, with ``raw`` in it; Planetoid's files may also be in the folder itself.
        normalize: Whether each node's features are divided by their sum, as is usual for Planetoid.
        directed: Whether edges keep their one direction.
        name: Which of several of Planetoid's data sets in the folder, such as ``"cora"``.

    Raises:
        FileNotFoundError: Files of the layout are missing.
        ValueError: They do not fit together, or there are several data sets and no name.
        ModuleNotFoundError: The package torch_geometric is not installed.

    """

    def __init__(self, path: str, normalize: bool = False, directed: bool = False, name: str | None = None) -> None:
        super().__init__()
        self.path, self.normalize, self.directed = Path(path), normalize, directed
        self.name = find_graph(self.path, name)
        self._graph: Any = None

    @property
    def graph(self) -> Any:
        """The PyG ``Data``, with ``train_mask``, ``val_mask`` and ``test_mask``."""
        if self._graph is None:
            graph = read_ogb(self.path, self.directed) if self.name is None else read_planetoid(self.path, self.name)
            if self.normalize:
                graph.x = graph.x / graph.x.sum(1, keepdim=True).clamp(min=1.0)
            self._graph = graph
        return self._graph

    @property
    def features(self) -> int:
        """Number of features of a node."""
        return self.graph.x.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.graph.y.max()) + 1

    def train_dataloader(self) -> DataLoader[Any]:
        """The graph, once an epoch."""
        return DataLoader([self.graph], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """The graph."""
        return DataLoader([self.graph], batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any]:
        """The graph."""
        return self.val_dataloader()


def find_graph(path: Path, wanted_name: str | None = None) -> str | None:
    """Name in Planetoid's files, or ``None`` for OGB's layout.

    Raises:
        FileNotFoundError: Files are missing; the message says what was looked for and where to get it.
        ValueError: There are files of several data sets, or none of the wanted name.
    """
    raw = _planetoid_folder(path)
    names = sorted({m[1] for f in raw.glob("ind.*") if (m := re.fullmatch(r"ind\.(.+)\.allx", f.name))})
    if wanted_name is not None:
        if names and wanted_name not in names:
            raise ValueError(f"name: got {wanted_name!r}, expected one of {', '.join(names)}, whose files are in {raw}")
        names = [wanted_name]
    if len(names) > 1:
        raise ValueError(
            f"{raw}: got the files of {', '.join(names)}, expected those of one data set, or name= to say which"
        )
    if names:
        wanted, name = [raw / f"ind.{names[0]}.{part}" for part in _PLANETOID], names[0]
    else:
        wanted, name = [raw / f"{part}.csv.gz" for part in _OGB], None
    missing = [str(f) for f in wanted if not f.is_file()]
    if name is None and not missing:
        splits = sorted(path.glob("split/*/train.csv.gz"))
        if len(splits) != 1:
            missing = [f"{path / 'split'} with one folder that holds train.csv.gz"]
        else:
            parts = [splits[0].with_name(f"{part}.csv.gz") for part in ("valid", "test")]
            missing = [str(f) for f in parts if not f.is_file()]
    if missing:
        raise FileNotFoundError(f"data: got {str(path)!r}, missing {', '.join(missing)}; {_HELP}")
    return name


def read_planetoid(path: Path, name: str) -> Any:
    """PyG ``Data`` of ``path/raw/ind.NAME.*``, or of these files in the folder itself, with its public split."""
    from torch_geometric.io import read_planetoid_data

    return read_planetoid_data(str(_planetoid_folder(path)), name)


def _planetoid_folder(path: Path) -> Path:
    raw = path / "raw"
    return path if not raw.is_dir() and any(path.glob("ind.*")) else raw


def read_ogb(path: Path, directed: bool) -> Any:
    """PyG ``Data`` of OGB's files ``path/raw/*.csv.gz``, split by the one folder in ``path/split``."""
    from torch_geometric.data import Data
    from torch_geometric.utils import to_undirected

    edges = _read(path / "raw/edge.csv.gz", np.int64).reshape(-1, 2)
    x = _read(path / "raw/node-feat.csv.gz", np.float32)
    y = _read(path / "raw/node-label.csv.gz", np.int64).flatten()
    if len(x) != len(y) or (len(edges) and int(edges.max()) >= len(x)):
        most = int(edges.max()) if len(edges) else -1
        raise ValueError(
            f"{path / 'raw'}: expected as many labels as nodes, and edges between them, "
            f"got {len(x)} nodes, {len(y)} labels and a node {most} in an edge"
        )
    edge_index = edges.T.contiguous()
    data = Data(x=x, y=y, edge_index=edge_index if directed else to_undirected(edge_index, num_nodes=len(x)))
    split = next(path.glob("split/*/train.csv.gz")).parent
    for part, mask in (("train", "train_mask"), ("valid", "val_mask"), ("test", "test_mask")):
        nodes = _read(split / f"{part}.csv.gz", np.int64).flatten()
        data[mask] = torch.zeros(len(x), dtype=torch.bool).index_fill_(0, nodes, True)
    return data


def _read(file: Path, dtype: Any) -> Tensor:
    with gzip.open(file, "rt") as rows:
        try:
            return torch.from_numpy(np.loadtxt(rows, dtype=dtype, delimiter=",", ndmin=2))
        except ValueError as e:
            raise ValueError(f"{file}: expected numbers with commas between them, got: {e}") from e
