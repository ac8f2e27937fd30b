"""Images on disk: every pixel where it belongs, the same on every run."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.recipe_data import images
from lightning_estdgm.recipes.image_folders import MEAN, STD, ImageFolders, middle_box, random_box, to_tensor


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
