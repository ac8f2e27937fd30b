"""Images in IDX files: every pixel where it belongs, the same on every run, and files that are none named."""

import gzip

import numpy as np
import pytest
import torch

from helpers.recipe_data import idx, idx_images
from lightning_estdgm.recipes import IdxImages


def classes(first: int, end: int) -> list[int]:
    return [i * i // 7 % 5 for i in range(first, end)]


def loaded(data: IdxImages, part: str = "train", epoch: int = 0) -> list[torch.Tensor]:
    data.setup()
    loader = getattr(data, f"{part}_dataloader")()
    if part == "train":
        loader.sampler.set_epoch(epoch)
    return [torch.cat(tensors) for tensors in zip(*loader, strict=True)]


def bright(x: torch.Tensor) -> torch.Tensor:
    """Row and column of each image's bright pixel, [count, 2]; every image has one."""
    found = (x[:, 0] > x.mean() + x.std()).nonzero()
    assert found[:, 0].tolist() == list(range(len(x)))
    return found[:, 1:]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_images_are_read_from_each_layout(ending, below, tmp_path):
    idx_images(tmp_path / below, ending)
    data = IdxImages(str(tmp_path), batch_size=4, val_images=10, shift=0, flip=False)
    x, y = loaded(data, "val")
    assert (x.shape, x.dtype, y.dtype) == ((10, 1, 8, 10), torch.float32, torch.int64)
    assert y.tolist() == classes(30, 40), "the last ones of the file for training"
    assert bright(x).tolist() == [[c + 1, 3] for c in classes(30, 40)]
    assert loaded(data, "test")[1].tolist() == classes(0, 12)
    assert data.num_classes == 5
    x, y = loaded(data)
    assert len(x) == 28, "whole batches"
    assert torch.equal(bright(x)[:, 0], y + 1)


def test_pixels_are_normalised_by_the_images_for_training(tmp_path):
    data = IdxImages(str(idx_images(tmp_path)), batch_size=5, val_images=10)
    data.setup()
    x = data.parts["train"][0]
    assert abs(float(x.mean())) < 1e-5
    assert float(x.std()) == pytest.approx(1.0, abs=1e-5)


def test_training_may_use_the_first_images_alone(tmp_path):
    data = IdxImages(str(idx_images(tmp_path)), batch_size=4, val_images=10, shift=0, flip=False, train_images=8)
    assert sorted(loaded(data)[1].tolist()) == sorted(classes(0, 8))
    assert abs(float(data.parts["train"][0].mean())) < 1e-5, "normalised by what is used"
    assert loaded(data, "val")[1].tolist() == classes(30, 40)
    with pytest.raises(ValueError, match="train_images: got 31, expected at most 30"):
        IdxImages(str(tmp_path), batch_size=4, val_images=10, train_images=31).setup()


def test_training_images_are_moved_and_mirrored_and_nothing_else_is(tmp_path):
    data = IdxImages(str(idx_images(tmp_path, train=1010)), batch_size=50, val_images=10, shift=1)
    x, y = loaded(data)
    rows, columns = bright(x).T
    assert {*(rows - y - 1).tolist()} == {-1, 0, 1}
    assert {*columns.tolist()} == {2, 3, 4, 5, 6, 7}, "3, or 6 if mirrored, and one to both sides"
    assert 0.4 < (columns > 4).float().mean() < 0.6
    counts = x[:, 0].flatten(1).sort(1).values[:, -2]
    assert counts.unique().numel() == 1, "what comes in is what was at the edge: empty"
    x, y = loaded(data, "val")
    assert bright(x).tolist() == [[c + 1, 3] for c in y.tolist()]


def test_what_is_drawn_depends_on_seed_and_epoch_alone(tmp_path):
    path = str(idx_images(tmp_path))
    first = loaded(IdxImages(path, batch_size=4, val_images=8, seed=1))
    torch.manual_seed(9)
    again = loaded(IdxImages(path, batch_size=4, val_images=8, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (loaded(IdxImages(path, batch_size=4, val_images=8, seed=2)),
                  loaded(IdxImages(path, batch_size=4, val_images=8, seed=1), epoch=1)):  # fmt: skip
        assert not torch.equal(first[1], other[1])
    data = IdxImages(path, batch_size=4, val_images=8)
    data.setup()
    images = data.train_dataloader().dataset
    assert any(not torch.equal(images[0, i][0], images[1, i][0]) for i in range(32)), "drawn anew each epoch"


def test_missing_files_are_named_with_where_to_get_them(tmp_path):
    (idx_images(tmp_path / "raw") / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"(?s)missing \S*raw/t10k-labels-idx1-ubyte; .*dataset-fashion-mnist"
    ) as e:
        IdxImages(str(tmp_path))
    assert "train-images-idx3-ubyte;" not in str(e.value)


def test_files_that_are_none_of_images_are_named(tmp_path):
    folder = idx_images(tmp_path, "")
    file = folder / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for content, message in (
        (whole[:-1], r"by its header of shape \[40, 8, 10\], got 3199 bytes of it"),
        (b"", "begins with nothing"),
        (b"\x00\x00\x0d\x03" + whole[4:], "expected an IDX file of unsigned bytes in 3 .*begins with 00 00 0d 03"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            IdxImages(str(folder), val_images=10).setup()
    idx(file, np.zeros((39, 8, 10)))
    with pytest.raises(ValueError, match="a label for each image, got 39 and 40"):
        IdxImages(str(folder), val_images=10).setup()
    file.unlink()
    (folder / f"{file.name}.gz").write_bytes(gzip.compress(whole)[:50])
    with pytest.raises(ValueError, match=r"images-idx3-ubyte.gz: expected a whole file compressed by gzip"):
        IdxImages(str(folder), val_images=10).setup()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_images": 0}, "val_images: got 0, expected at least 1"),
        ({"shift": -1}, "shift: got -1, expected at least 0"),
        ({"val_images": 38, "batch_size": 4}, "got 38, which leaves 2 of 40 images for training"),
    ],
)
def test_bad_settings_are_named(settings, message, tmp_path):
    idx_images(tmp_path)
    with pytest.raises(ValueError, match=message):
        IdxImages(str(tmp_path), **settings).setup()
