"""Images in a folder a class, as ImageNet is laid out for training, with the usual augmentation; Pillow and torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_estdgm._checks import expect_int
from lightning_estdgm.recipes._windows import ImageOrder, ResumableLoader, generator_of, ranks_of

Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge, in pixels."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's pixels in [0, 1], by channel."""

_ENDINGS = {".jpeg", ".jpg", ".png", ".webp"}
_HELP = """expected a folder with images in a folder a class:
  train/n01440764/n01440764_10026.JPEG ...
  val/n01440764/ILSVRC2012_val_00000293.JPEG ...
ImageNet (ILSVRC 2012) is at https://image-net.org/download-images, after registration: ILSVRC2012_img_train.tar holds \
one .tar a class, to be unpacked into train/CLASS; the 50,000 images of ILSVRC2012_img_val.tar have to be moved into \
val/CLASS by the labels in the development kit. Any other data set of this layout will do."""


class ImageFolders(LightningDataModule):
    """Images below ``path/train/CLASS`` and ``path/val/CLASS``; the classes are the sorted names of train's folders.

    Training: a random part of the image (`random_box`) scaled to ``size``, flipped in every second case. Validation:
    the middle, `middle_box`. Both normalised by ImageNet's mean and deviation. What is drawn for an image depends on
    ``seed``, the epoch and the image alone, however many workers and ranks there are, and a run resumed in mid-epoch
    goes on with the next batch.
    A batch is (x, y): float32 [batch_size, 3, size, size] and int64 [batch_size].

    Args:
        path: Folder with ``train`` and ``val``.
        batch_size: Images a step, of each device.
        size: Side of the images that the model gets, in pixels.
        seed: Seed of order and augmentation.
        workers: Number of processes that read and decode.

    Raises:
        FileNotFoundError: The folders or images in them are missing.
        ValueError: A size is not positive, or validation has a class that training does not have.

    """

    def __init__(self, path: str, batch_size: int = 64, size: int = 224, seed: int = 0, workers: int = 8) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("size", size, 1), ("workers", workers, 0)):
            expect_int(name, value, at_least=least)
        expect_int("seed", seed, at_least=0)
        self.path, self.batch_size, self.size, self.seed, self.workers = Path(path), batch_size, size, seed, workers
        self.classes = find_classes(self.path)
        self.num_classes = len(self.classes)
        self.images: dict[str, Images] = {}

    def setup(self, stage: str | None = None) -> None:
        """List the images, once."""
        if not self.images:
            listed = {part: list_images(self.path / part, self.classes) for part in ("train", "val")}
            self.images = {part: Images(files, self.size, self.seed, part == "train") for part, files in listed.items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """All images in another order each epoch, less those that are left over by whole batches."""
        images = self.images["train"]
        rank, ranks = ranks_of(self)
        if len(images) < self.batch_size * ranks:
            raise ValueError(f"{self.path / 'train'}: got {len(images)} images, fewer than a step of all ranks takes")
        order = ImageOrder(len(images), self.seed, rank, ranks)
        return self._loader(ResumableLoader, images, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """All images in one order."""
        return self._loader(DataLoader, self.images["val"], shuffle=False)

    def _loader(self, kind: type[DataLoader[Any]], images: Images, **settings: Any) -> DataLoader[Any]:
        # Without a generator, a DataLoader takes a number from the global one at each start.
        return kind(
            images,
            batch_size=self.batch_size,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=Generator().manual_seed(self.seed),
            **settings,
        )


class Images(Dataset[tuple[Tensor, int]]):
    """Images [3, size, size] and their classes; the index is one of `ImageOrder`, or the image alone (epoch 0)."""

    def __init__(self, files: list[tuple[Path, int]], size: int, seed: int, augment: bool) -> None:
        self.files, self.size, self.seed, self.augment = files, size, seed, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, number = index if isinstance(index, tuple) else (0, index)
        file, label = self.files[number]
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as e:
            raise OSError(f"{file}: expected an image, got {e}") from e
        if not self.augment:
            return to_tensor(image, middle_box(*image.size), self.size), label
        generator = generator_of(self.seed, epoch, number)
        x = to_tensor(image, random_box(*image.size, generator), self.size)
        return (x.flip(2) if torch.rand((), generator=generator) < 0.5 else x), label


def random_box(width: int, height: int, generator: Generator) -> Box:
    """A random part of an image: 8 to 100 % of its area, 3/4 to 4/3 as wide as high; its middle if none fits.

    Source: Szegedy et al. 2015, arXiv 1409.4842, with up to ten trials as in torchvision's RandomResizedCrop.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    for _ in range(10):
        area, ratio = width * height * uniform(0.08, 1.0), math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, (), generator=generator))
            upper = int(torch.randint(height - h + 1, (), generator=generator))
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return _centred(width, height, w, h)


def middle_box(width: int, height: int) -> Box:
    """The square in the middle of an image, 224/256 of its shorter side wide."""
    side = max(1, round(min(width, height) * 224 / 256))
    return _centred(width, height, side, side)


def _centred(width: int, height: int, w: int, h: int) -> Box:
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def to_tensor(image: Image.Image, box: Box, size: int) -> Tensor:
    """The part of an RGB image scaled to ``size`` and normalised: float32 [3, size, size]."""
    scaled = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def find_classes(path: Path) -> tuple[str, ...]:
    """Sorted names of the classes for training.

    Raises:
        FileNotFoundError: Folders are missing; the message says what was looked for and where to get it.
        ValueError: Validation has a class that training does not have.
    """
    found = {}
    for part in ("train", "val"):
        folder = path / part
        found[part] = sorted(f.name for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []
        if not found[part]:
            missing = "no folder of a class in" if folder.is_dir() else "no folder"
            raise FileNotFoundError(f"data: got {str(path)!r}, {missing} {folder}; {_HELP}")
    if strange := set(found["val"]) - set(found["train"]):
        raise ValueError(f"{path}: expected the classes of val among those of train, got {sorted(strange)[:5]}")
    return tuple(found["train"])


def list_images(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Images of all classes and the classes' numbers, sorted by name.

    Raises:
        FileNotFoundError: There is none.
    """
    files = []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            files += [(f, label) for f in sorted((folder / name).iterdir()) if f.suffix.lower() in _ENDINGS]
    if not files:
        raise FileNotFoundError(f"data: no image ({', '.join(sorted(_ENDINGS))}) in the folders of {folder}; {_HELP}")
    return files
