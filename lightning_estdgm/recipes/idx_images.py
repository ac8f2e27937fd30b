"""Small images in IDX files, as MNIST, Fashion-MNIST and KMNIST are published."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Generator, Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_estdgm._checks import expect_int
from lightning_estdgm.recipes._windows import ImageOrder, ResumableLoader, generator_of, ranks_of

_PARTS = {"train": "train", "test": "t10k"}
_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
_BYTES = 0x08  # code of unsigned bytes in IDX
_HELP = """expected a folder with the four IDX files of MNIST's layout, each also as .gz:
  train-images-idx3-ubyte  train-labels-idx1-ubyte  t10k-images-idx3-ubyte  t10k-labels-idx1-ubyte
in the folder itself, in raw or in FashionMNIST/raw below it, as torchvision lays them out. Debian and Ubuntu bring \
Fashion-MNIST as a package, dataset-fashion-mnist, which installs it to /usr/share/datasets/fashion-mnist; its authors \
offer the files at https://github.com/zalandoresearch/fashion-mnist."""


class IdxImages(LightningDataModule):
    """Images of MNIST's layout: Fashion-MNIST, MNIST, KMNIST; read from disk and nowhere else.

    Validation has the last `val_images` of the file for training, training the others, or the first `train_images` of
    them; the files named t10k are for testing alone. Training images are moved by up to `shift` pixels and, with
    `flip`, mirrored in every second case. What is drawn depends on ``seed``, the epoch and the image alone, and a run
    resumed in mid-epoch goes on with the next batch. Pixels are normalised by mean and deviation of the images for
    training.
    A batch is (x, y): float32 [batch_size, 1, height, width] and int64 [batch_size].

    Args:
        path: folder of the files, such as ``/usr/share/datasets/fashion-mnist``.
        batch_size: images a step, of each device.
        seed: seed of order and augmentation.
        val_images: number of images held back for validation.
        shift: largest move of a training image in each direction, in pixels; what comes in is empty.
        flip: whether training images are mirrored in every second case.
        train_images: number of images to train on, where data are to be few; ``None`` for all.

    Raises:
        FileNotFoundError: if files are missing; the message says where to get them.
        ValueError: if a size is out of range, or a file is none of images or labels in IDX.

    """

    def __init__(
        self,
        path: str,
        batch_size: int = 128,
        seed: int = 0,
        val_images: int = 5000,
        shift: int = 2,
        flip: bool = True,
        train_images: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("val_images", val_images, 1), ("shift", shift, 0)):
            expect_int(name, value, at_least=least)
        if train_images is not None:
            expect_int("train_images", train_images, at_least=batch_size)
        expect_int("seed", seed, at_least=0)
        self.batch_size, self.seed, self.val_images, self.shift, self.flip = batch_size, seed, val_images, shift, flip
        self.train_images = train_images
        self.files = find_idx(Path(path))
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and normalise the images, once."""
        if self.parts:
            return
        read = {part: read_pair(*files) for part, files in self.files.items()}
        images, labels = read["train"]
        cut = len(images) - self.val_images
        if cut < self.batch_size:
            raise ValueError(
                f"val_images: got {self.val_images}, which leaves {cut} of {len(images)} images for training; "
                f"expected at least a batch of {self.batch_size}"
            )
        if self.train_images is not None and self.train_images > cut:
            raise ValueError(f"train_images: got {self.train_images}, expected at most {cut}, which are for training")
        used = self.train_images or cut
        pixels = images[:used].double()
        mean, deviation = float(pixels.mean()), float(pixels.std())
        split = {"train": (images[:used], labels[:used]), "val": (images[cut:], labels[cut:]), "test": read["test"]}
        self.parts = {part: ((x.float() - mean) / deviation, y) for part, (x, y) in split.items()}
        self.blank = -mean / deviation

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        self.setup()
        return 1 + max(int(labels.max()) for _, labels in self.parts.values())

    def train_dataloader(self) -> DataLoader[Any]:
        """All images for training in another order each epoch, less those that are left over by whole batches."""
        images = _Moved(*self.parts["train"], self.seed, self.shift, self.flip, self.blank)
        order = ImageOrder(len(images), self.seed, *ranks_of(self))
        generator = Generator().manual_seed(self.seed)
        return ResumableLoader(images, self.batch_size, sampler=order, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        """The images held back, in one order."""
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The images of the files named t10k, in one order."""
        return self._in_order("test")

    def _in_order(self, part: str) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.parts[part]), 1000, generator=Generator())


class _Moved(Dataset[tuple[Tensor, int]]):
    """Images, each moved and mirrored as the seed and its index ``(epoch, image)`` say."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, shift: int, flip: bool, blank: float) -> None:
        self.images, self.labels = images, labels
        self.seed, self.shift, self.flip, self.blank = seed, shift, flip, blank

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, number = index
        x = self.images[number]
        generator = generator_of(self.seed, epoch, number)
        top, left = torch.randint(2 * self.shift + 1, (2,), generator=generator).tolist()
        if self.shift:
            height, width = x.shape[1:]
            x = pad(x, [self.shift] * 4, value=self.blank)[:, top : top + height, left : left + width]
        if self.flip and torch.rand((), generator=generator) < 0.5:
            x = x.flip(2)
        return x, int(self.labels[number])


def find_idx(path: Path) -> dict[str, tuple[Path, Path]]:
    """Files of images and labels for training and for testing.

    Raises:
        FileNotFoundError: if some are missing; the message says what was looked for and where to get it.
    """
    missing: list[str] = []
    for folder in (path, path / "raw", path / "FashionMNIST" / "raw"):
        found = {part: [_file(folder / f"{name}-{kind}") for kind in _KINDS] for part, name in _PARTS.items()}
        absent = [str(file) for files in found.values() for file in files if not file.is_file()]
        if not absent:
            return {part: (images, labels) for part, (images, labels) in found.items()}
        if not missing or len(absent) < len(missing):
            missing = absent
    raise FileNotFoundError(f"data: got {str(path)!r}, missing {', '.join(missing)}; {_HELP}")


def _file(path: Path) -> Path:
    """The file, or the compressed one if that is there."""
    compressed = path.with_name(f"{path.name}.gz")
    return compressed if compressed.is_file() and not path.is_file() else path


def read_pair(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """Images, uint8 [count, 1, height, width], and their classes, int64 [count].

    Raises:
        ValueError: if a file is no IDX of bytes, or the two do not have equally many.
    """
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if len(x) != len(y):
        raise ValueError(f"{images} and {labels.name}: expected a label for each image, got {len(x)} and {len(y)}")
    return x[:, None], y.long()


def read_idx(file: Path, dimensions: int) -> Tensor:
    """Tensor of unsigned bytes in an IDX file, which may be compressed by gzip.

    Source: the format's description by LeCun, Cortes and Burges, with MNIST.

    Raises:
        ValueError: if it is none of as many dimensions, or is cut off.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as e:
        raise ValueError(f"{file}: expected a whole file compressed by gzip, got: {e}") from e
    header = 4 + 4 * dimensions
    wanted = f"expected an IDX file of unsigned bytes in {dimensions} dimension(s)"
    if len(content) < header or content[:4] != bytes((0, 0, _BYTES, dimensions)):
        raise ValueError(f"{file}: {wanted}, got one that begins with {content[:4].hex(' ') or 'nothing'}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(
            f"{file}: {wanted}, by its header of shape {list(shape)}, got {len(content) - header} bytes of it"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
