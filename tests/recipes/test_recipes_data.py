"""What the recipes read from disk: every byte, pixel, node and edge where it belongs, the same on every run."""

import gzip
import os

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image

from helpers.recipe_data import graph, images, ogb, planetoid, wikitext
from lightning_estdgm.recipes.graph_files import GraphFiles
from lightning_estdgm.recipes.image_folders import MEAN, STD, ImageFolders, middle_box, random_box, to_tensor
from lightning_estdgm.recipes.text_files import TextFiles
from lightning_estdgm.recipes.windows import EpochSampler, RandomStarts

# Ranks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [EpochSampler, lambda *given, **more: RandomStarts(50, *given, **more)])
def test_ranks_share_an_epoch_and_the_left_over_is_dropped(make):
    whole = list(make(11, seed=4))
    parts = [list(make(11, seed=4, rank=rank, ranks=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3] == [len(make(11, seed=4, rank=1, ranks=3))] * 3
    assert [parts[i % 3][i // 3] for i in range(9)] == whole[:9]
    other = make(11, seed=4)
    other.set_epoch(1)
    assert list(other) != whole
    assert list(make(11, seed=5)) != whole


def test_lightning_leaves_the_ranks_to_the_sampler(tmp_path):
    """With several ranks it would otherwise put a sampler around it that draws the same windows in every epoch."""
    data = TextFiles(str(wikitext(tmp_path / "text")), context=16, batch_size=2)
    data.setup()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    connector, loader = trainer._data_connector, data.train_dataloader()
    assert not connector._requires_distributed_sampler(loader)
    assert connector._requires_distributed_sampler(data.val_dataloader())


# Text ---------------------------------------------------------------------------------------------------------------


def joined(part):
    return part.numpy().tobytes()


@pytest.mark.parametrize("ending", ["tokens", "raw"])
def test_wikitext_is_mapped_as_it_is(ending, tmp_path):
    folder = wikitext(tmp_path / "wikitext-103", ending)
    data = TextFiles(str(folder), context=16)
    data.prepare_data()
    data.setup()
    assert joined(data.text["train"]) == (folder / f"wiki.train.{ending}").read_bytes()
    assert joined(data.text["val"]) == (folder / f"wiki.valid.{ending}").read_bytes()
    assert sorted(f.name for f in folder.iterdir()) == [f"wiki.{part}.{ending}" for part in ("test", "train", "valid")]


def test_any_file_is_split_at_its_end_without_being_read(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(b"begin")
        file.truncate(2**40)  # a terabyte, of which the disk holds one block
    data = TextFiles(str(path), context=16, val_fraction=0.25)
    data.setup()
    assert {part: len(text) for part, text in data.text.items()} == {"train": 3 * 2**38, "val": 2**38}
    assert joined(data.text["train"][:6]) == b"begin\0"
    x, y = next(iter(data.val_dataloader()))
    assert x.shape == y.shape == (16, 16)


@pytest.fixture
def tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train([str(wikitext(tmp_path / "learned") / "wiki.train.tokens")], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    return made


def test_tokens_are_written_once_and_read_back(tokenizer, tmp_path):
    folder, cache = wikitext(tmp_path / "wikitext-103"), tmp_path / "cache"
    data = TextFiles(str(folder), context=8, tokenizer=str(tmp_path / "tokenizer.json"), cache=str(cache))
    assert data.vocabulary == tokenizer.get_vocab_size() == 300
    data.prepare_data()
    files = {f.name: f.stat().st_mtime_ns for f in cache.iterdir()}
    assert len(files) == 2
    data.setup()
    for part, name in (("train", "train"), ("val", "valid")):
        text = (folder / f"wiki.{name}.tokens").read_text(encoding="utf-8")
        assert data.text[part].dtype == torch.uint16
        assert tokenizer.decode(data.text[part].tolist()) == text
        assert len(data.text[part]) < len(text) / 2
    x, y = next(iter(data.train_dataloader()))
    assert x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert int(x.max()) > 255
    data.prepare_data()
    assert {f.name: f.stat().st_mtime_ns for f in cache.iterdir()} == files
    (folder / "wiki.valid.tokens").write_text("another text " * 40)
    data.prepare_data()
    assert len(list(cache.iterdir())) == 3, "tokens of another text are other tokens"


def test_tokens_go_beside_the_text_and_half_of_them_never(tokenizer, tmp_path):
    (tmp_path / "one").mkdir()
    text = tmp_path / "one/text.txt"
    text.write_bytes(b"good " * 1_000_000 + b"\n" + b"bad \xff\n")
    data = TextFiles(str(text), context=8, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"text.txt: expected UTF-8 text for the tokenizer"):
        data.prepare_data()
    assert os.listdir(tmp_path / "one") == ["text.txt"]
    text.write_bytes(b"good " * 1000)
    data.setup()
    (made,) = set(os.listdir(tmp_path / "one")) - {"text.txt"}
    assert made.startswith("text.txt.")
    assert made.endswith(".tokens.bin")


def test_a_folder_that_cannot_be_written_to_and_a_broken_tokenizer_are_named(tokenizer, tmp_path):
    (tmp_path / "text").write_text("some text " * 100)
    (tmp_path / "taken").touch()
    given = {"tokenizer": str(tmp_path / "tokenizer.json"), "cache": str(tmp_path / "taken")}
    with pytest.raises(OSError, match=r"the tokens of .*text cannot be written to .*taken .*name another folder"):
        TextFiles(str(tmp_path / "text"), **given).prepare_data()
    with pytest.raises(ValueError, match=r"tokenizer: .*text is no tokenizer.json"):
        TextFiles(str(tmp_path / "text"), tokenizer=str(tmp_path / "text"))


def test_an_empty_text_is_refused(tmp_path):
    (tmp_path / "text").touch()
    data = TextFiles(str(tmp_path / "text"), context=8)
    with pytest.raises(ValueError, match=r"train text of .*: got 0 bytes, expected more than context=8"):
        data.setup()


# Images -------------------------------------------------------------------------------------------------------------


def loaded(data, epoch=0, part="train"):
    data.setup()
    loader = data.train_dataloader() if part == "train" else data.val_dataloader()
    if part == "train":
        loader.sampler.set_epoch(epoch)
    return [torch.cat(tensors) for tensors in zip(*loader, strict=True)]


def test_images_have_the_classes_of_their_folders(tmp_path):
    data = ImageFolders(str(images(tmp_path / "data")), batch_size=4, size=32, workers=0)
    assert (data.classes, data.num_classes) == (("n01440764", "n01443537"), 2)
    for part, count in (("train", 16), ("val", 6)):
        x, y = loaded(data, part=part)
        assert (x.shape, x.dtype, y.dtype) == ((count, 3, 32, 32), torch.float32, torch.int64)
        assert y.bincount().tolist() == [count // 2] * 2
        colour = (x.mean((2, 3)) * torch.tensor(STD) + torch.tensor(MEAN))[:, :2]
        coloured = (colour[:, 0] - colour[:, 1]).abs() > 0.2  # the rest are grey
        assert coloured.sum() == count - 2 * (part == "train")
        assert torch.equal(colour.argmax(1)[coloured], y[coloured])


def test_images_depend_on_seed_and_epoch_and_not_on_workers(tmp_path):
    path = str(images(tmp_path / "data"))
    first = loaded(ImageFolders(path, batch_size=4, size=24, seed=1, workers=0))
    torch.manual_seed(9)
    again = loaded(ImageFolders(path, batch_size=4, size=24, seed=1, workers=2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    data = ImageFolders(path, batch_size=4, size=24, seed=1, workers=0)
    later = loaded(data, epoch=1)
    assert later[1].tolist() != first[1].tolist()
    assert sorted(later[1].tolist()) == sorted(first[1].tolist())
    other = ImageFolders(path, batch_size=4, size=24, seed=2, workers=0)
    other.setup()
    one = data.images["train"][0, 5][0]
    assert torch.equal(one, data.images["train"][5][0])
    assert not torch.equal(one, data.images["train"][1, 5][0])
    assert not torch.equal(one, other.images["train"][0, 5][0])


def test_random_boxes_are_inside_and_as_large_and_wide_as_they_should_be():
    generator = torch.Generator().manual_seed(0)
    boxes = np.array([random_box(640, 480, generator) for _ in range(2000)])
    left, upper, right, lower = boxes.T
    assert left.min() >= 0
    assert upper.min() >= 0
    assert right.max() <= 640
    assert lower.max() <= 480
    area, ratio = (right - left) * (lower - upper) / (640 * 480), (right - left) / (lower - upper)
    assert 0.078 < area.min() < 0.1
    assert 0.9 < area.max() <= 1.0
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.35
    assert 0.4 < area.mean() < 0.55
    assert left.std() > 50
    assert random_box(1000, 10, generator)[1::2] == (0, 10), "no part fits: the middle, 4/3 as wide as high"
    assert random_box(1000, 10, generator) == (493, 0, 506, 10)


def test_the_middle_is_a_square_of_seven_eighths_scaled_and_normalised():
    assert middle_box(512, 256) == (144, 16, 368, 240)
    image = Image.new("RGB", (512, 256))
    image.paste((255, 0, 51), (144, 16, 368, 240))
    x = to_tensor(image, middle_box(512, 256), 8)
    colour = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(x, colour[:, None, None].expand(3, 8, 8))


def test_half_of_the_images_are_flipped(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "val/a").mkdir(parents=True)
    ramp = np.broadcast_to(np.linspace(0, 255, 64)[None, :, None], (64, 64, 3)).astype(np.uint8)
    for part in ("train", "val"):
        for i in range(40):
            Image.fromarray(ramp).save(tmp_path / part / "a" / f"{i}.png")
    data = ImageFolders(str(tmp_path), batch_size=8, size=16, workers=0)
    rises = {part: (x[:, 0, 8, -1] > x[:, 0, 8, 0]) for part in ("train", "val") for x, _ in [loaded(data, part=part)]}
    assert rises["val"].all()
    assert 8 < rises["train"].sum() < 32


def test_too_few_images_and_broken_ones_are_named(tmp_path):
    folder = images(tmp_path / "data")
    data = ImageFolders(str(folder), batch_size=17, workers=0)
    data.setup()
    with pytest.raises(ValueError, match=r"train: got 16 images, fewer than a step of all ranks takes"):
        data.train_dataloader()
    (folder / "val/n01440764/n01440764_0.JPEG").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"n01440764_0.JPEG: expected an image"):
        loaded(ImageFolders(str(folder), batch_size=2, workers=0), part="val")
    for file in folder.glob("val/*/*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no image \(.jpeg, .jpg, .png, .webp\) in the folders of .*val"):
        ImageFolders(str(folder)).setup()


# Graphs -------------------------------------------------------------------------------------------------------------


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
