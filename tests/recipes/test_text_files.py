"""A text on disk: every byte where it belongs, the same on every run."""

import os

import pytest
import torch

from helpers.recipe_data import wikitext
from lightning_estdgm.recipes._windows import Windows
from lightning_estdgm.recipes.text_files import TextFiles


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


def test_of_several_files_the_end_of_each_is_for_validation(tmp_path):
    contents = [bytes(range(100)), bytes(range(100, 140))]
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    data = TextFiles([str(path) for path in paths], context=8, val_fraction=0.25)
    data.setup()
    assert joined(data.text["train"]) == contents[0][:75] + contents[1][:30]
    assert joined(data.text["val"]) == contents[0][75:] + contents[1][30:]
    with pytest.raises(FileNotFoundError, match=r"missing .*no.such; expected a text file(.|\n)*wikitext-103"):
        TextFiles([str(paths[0]), str(tmp_path / "no such")])
    with pytest.raises(ValueError, match="got an empty list"):
        TextFiles([])


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


def test_windows_of_tokens_beyond_the_largest_signed_number():
    text = torch.tensor([0, 1, 32_767, 32_768, 65_535], dtype=torch.uint16)
    x, y = Windows(text, 3)[1]
    assert (x.tolist(), y.tolist()) == ([1, 32_767, 32_768], [32_767, 32_768, 65_535])


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
