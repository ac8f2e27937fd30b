"""Tiny data sets in the layouts in which the real ones are published."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def small_text(folder: Path, size: int = 20_000) -> Path:
    """A file of bytes without a short period."""
    path = folder / "text.txt"
    path.write_bytes(bytes(i * i % 251 for i in range(size)))
    return path


def wikitext(folder: Path, ending: str = "tokens") -> Path:
    """As wikitext-103-v1.zip unpacks; `ending` "raw" as wikitext-103-raw-v1.zip does."""
    folder.mkdir(parents=True)
    for part, articles in (("train", 40), ("valid", 8), ("test", 8)):
        text = "".join(
            f" \n = Article {part} {i} = \n \n The {i} th one of {articles} , about <unk> and naïve @-@ things . \n"
            for i in range(articles)
        )
        (folder / f"wiki.{part}.{ending}").write_text(text, encoding="utf-8")
    return folder


def images(folder: Path, train: int = 8, val: int = 3) -> Path:
    """Two classes that differ in colour, as JPEG; odd ones are grey or upright."""
    drawn = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(("n01440764", "n01443537")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = drawn.integers(0, 100, (40, 60, 3) if i % 2 else (60, 40, 3)).astype(np.uint8)
                pixels[..., label] += 120
                image = Image.fromarray(pixels)
                image = image.convert("L") if i == 3 else image
                image.save(folder / part / name / f"{name}_{i}.JPEG")
    return folder


def idx(file: Path, content: np.ndarray) -> Path:
    """An array of bytes as an IDX file; compressed where the name says so."""
    data = bytes((0, 0, 8, content.ndim)) + struct.pack(f">{content.ndim}I", *content.shape)
    data += content.astype(np.uint8).tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def idx_images(folder: Path, ending: str = ".gz", train: int = 40, test: int = 12) -> Path:
    """As Fashion-MNIST is published: each image has a bright pixel in the row of its class, at column 3."""
    for part, count in (("train", train), ("t10k", test)):
        classes = np.arange(count) ** 2 // 7 % 5
        images = np.full((count, 8, 10), 20)
        images[np.arange(count), classes + 1, 3] = 250
        idx(folder / f"{part}-images-idx3-ubyte{ending}", images)
        idx(folder / f"{part}-labels-idx1-ubyte{ending}", classes)
    return folder


def graph(nodes: int, features: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features that tell the class, classes, and edges [count, 2] mostly within a class."""
    drawn = np.random.default_rng(0)
    y = drawn.integers(0, classes, nodes)
    x = (drawn.random((nodes, features)) < 0.1).astype(np.float32)
    x[np.arange(nodes), y] = 1.0
    source = np.arange(nodes)
    target = np.array([drawn.choice(np.flatnonzero(y == c)) for c in y])
    edges = np.stack([source, target], 1)[source != target]
    return x, y, edges


def planetoid(folder: Path, name: str = "cora") -> Path:
    """Pickles of 6 nodes for training, 520 known ones and 40 for testing, which are not in order."""
    import scipy.sparse

    x, y, edges = graph(560, 30, 3)
    onehot = np.eye(3, dtype=np.int32)[y]
    order = np.random.default_rng(1).permutation(np.arange(520, 560))
    sparse = scipy.sparse.csr_matrix
    neighbours: dict[int, list[int]] = {i: [] for i in range(560)}
    for a, b in edges.tolist():
        neighbours[a].append(b)
        neighbours[b].append(a)
    parts = {
        "x": sparse(x[:6]), "y": onehot[:6], "allx": sparse(x[:520]), "ally": onehot[:520],
        "tx": sparse(x[order]), "ty": onehot[order], "graph": neighbours,
    }  # fmt: skip
    (folder / "raw").mkdir(parents=True)
    for part, content in parts.items():
        (folder / "raw" / f"ind.{name}.{part}").write_bytes(pickle.dumps(content))
    (folder / "raw" / f"ind.{name}.test.index").write_text("".join(f"{i}\n" for i in order))
    return folder


def ogb(folder: Path, nodes: int = 60) -> Path:
    """As arxiv.zip unpacks, less the files that nothing here reads."""
    x, y, edges = graph(nodes, 12, 4)
    rows = {
        "raw/edge": edges,
        "raw/node-feat": x,
        "raw/node-label": y[:, None],
        "split/time/train": np.arange(0, nodes // 2)[:, None],
        "split/time/valid": np.arange(nodes // 2, nodes * 3 // 4)[:, None],
        "split/time/test": np.arange(nodes * 3 // 4, nodes)[:, None],
    }
    for name, content in rows.items():
        file = folder / f"{name}.csv.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(file, "wt") as out:
            np.savetxt(out, content, delimiter=",", fmt="%.6g")
    return folder
