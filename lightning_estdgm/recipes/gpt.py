"""A byte-level GPT and the text it learns: the source code of Python's own standard library."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_estdgm.recipes.rates import run_steps, warmup_cosine

VOCABULARY = 256  # a token is a byte
Batch = tuple[Tensor, Tensor]

# Not code that a person wrote to be read: tests, generated tables, installed packages, applications.
_SKIPPED = {"__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3"}
_SKIPPED |= {"pydoc_data", "site-packages", "test", "tests", "turtledemo"}
_GENERATED = ("_sysconfigdata", "sitecustomize")  # written by the build or by the distributor


class Block(nn.Module):
    """One pre-norm decoder block: x + attention(norm(x)), then x + mlp(norm(x)); [batch, time, width] throughout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.gelu = nn.GELU()
        self.out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions by causal attention, then channels by the two-layer perceptron."""
        batch, time, width = x.shape
        h = self.norm_attention(x)
        q, k, v = (
            project(h).view(batch, time, self.heads, -1).transpose(1, 2)  # each [batch, heads, time, width / heads]
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.out(self.gelu(self.fc(self.norm_mlp(x))))


class ByteGPT(LightningModule):
    """A GPT over bytes, trained by AdamW with warm-up and a cosine to 10 % of ``lr`` over the run's steps.

    Input: int64 bytes [batch, time], time <= context. Output: logits [batch, time, 256].
    Weights start as N(0, 0.02^2), the two that write to the residual stream divided by sqrt(2 * layers).
    Weight decay reaches matrices only. The head is not tied to the embedding.
    Source: Radford et al. 2019 (GPT-2); the optimizer's settings are those of nanoGPT.

    Raises ValueError for a width that ``heads`` does not divide, and for sizes and rates not positive.

    >>> ByteGPT(width=32, layers=1, heads=2, context=16)(torch.zeros(1, 16, dtype=torch.long)).shape
    torch.Size([1, 16, 256])
    """

    def __init__(
        self,
        width: int = 512,
        layers: int = 2,
        heads: int = 8,
        context: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("layers", layers), ("heads", heads), ("context", context)):
            _at_least(name, value, 1)
        if width % heads:
            raise ValueError(f"width: got {width}, expected a multiple of heads={heads}")
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr: got {lr}, expected a positive number")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup: got {warmup}, expected a fraction of the run in [0, 1)")
        self.save_hyperparameters()
        self.context, self.lr, self.weight_decay, self.warmup = context, lr, weight_decay, warmup
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes_residual = name.endswith(("proj.weight", "out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if writes_residual else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next byte at each position."""
        h = self.bytes(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(h)))

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy of the next byte, in nats a byte, mean over all positions."""
        x, y = batch
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step's loss."""
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean validation loss as ``val/loss``."""
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only; the learning rate moves every step."""
        groups = [
            {"params": [p for p in self.parameters() if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=fused)
        factor = partial(warmup_cosine, steps=run_steps(self), warmup=self.warmup)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }


class Windows(Dataset[Batch]):
    """Windows of a text; the index is the byte where one starts. Indexed in whole batches: one gather, no collation."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.span = text, torch.arange(context + 1)

    def __len__(self) -> int:
        return len(self.text) - len(self.span) + 1

    def __getitem__(self, start: int) -> Batch:
        x, y = self.__getitems__([start])
        return x[0], y[0]

    def __getitems__(self, starts: Sequence[int]) -> Batch:
        """Inputs and targets (inputs one byte on), int64 [len(starts), context] each."""
        window = self.text[torch.tensor(starts)[:, None] + self.span].long()
        return window[:, :-1], window[:, 1:]


class RandomStarts(Sampler[int]):
    """``count`` window starts an epoch from a generator of its own, so that nothing else that is random moves them."""

    def __init__(self, high: int, count: int, seed: int) -> None:
        self.high, self.count, self.seed, self.epoch = high, count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch: every epoch draws other windows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randint(self.high, (self.count,), generator=generator).tolist())


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader that goes on in mid-epoch: Lightning keeps what `state_dict` returns in its checkpoints.

    The position counts the batches that were handed out, so workers may read ahead. It belongs to one epoch of the
    sampler: the iteration after `load_state_dict` skips that many batches of this epoch, and none of any other.
    """

    _handed_out: dict[str, int] | None = None
    _resumed: dict[str, int] | None = None

    def __iter__(self) -> Any:
        """Yield the batches of the sampler's present epoch that are still to come."""
        # A generator starts at its first batch: Lightning makes iterators ahead of time, and only then sets the epoch.
        epoch, resumed = int(getattr(self.sampler, "epoch", 0)), self._resumed
        self._resumed = None
        position = resumed["position"] if resumed and resumed["epoch"] == epoch else 0
        for batch in islice(super().__iter__(), position, None):
            position += 1
            self._handed_out = {"epoch": epoch, "position": position}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch of the last iteration and how many of its batches were handed out."""
        return self._resumed or self._handed_out or {"epoch": 0, "position": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Have the next iteration go on from what `state_dict` returned."""
        self._resumed = dict(state)


class StdlibText(LightningDataModule):
    """Windows of Python source for next-byte prediction: the running Python's standard library, or any file.

    Without ``path``: the ``*.py`` files below ``sysconfig.get_path("stdlib")`` in the order of their relative paths,
    each followed by a zero byte, less tests, generated tables and installed packages. A file is for validation if
    the SHA-256 of its relative path says so: about 5 % of the files. With ``path``: the bytes of that file, the last
    ``val_fraction`` of them for validation.

    Training batches are random windows drawn from ``seed`` alone: the same on every run, whatever else uses random
    numbers, and a run resumed in mid-epoch goes on with the next one. Validation is a fixed set of ``val_windows``
    evenly spaced windows, not overlapping as long as they fit.
    A batch is (x, y), int64 [batch_size, context], y one byte ahead of x.

    Raises ValueError for sizes that are not positive, a path that is no file, and text too short for one window.

    >>> data = StdlibText(context=32, batch_size=4)
    >>> data.setup()
    >>> x, y = next(iter(data.train_dataloader()))
    >>> x.shape, bool((x[:, 1:] == y[:, :-1]).all())
    (torch.Size([4, 32]), True)
    """

    def __init__(
        self,
        context: int = 128,
        batch_size: int = 16,
        seed: int = 0,
        val_windows: int = 256,
        val_fraction: float = 0.05,
        path: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("context", context), ("batch_size", batch_size), ("val_windows", val_windows)):
            _at_least(name, value, 1)
        _at_least("seed", seed, 0)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: got {val_fraction}, expected a fraction in (0, 1)")
        if path is not None and not Path(path).is_file():
            raise ValueError(f"path: got {str(path)!r}, expected an existing text file")
        self.context, self.batch_size, self.seed = context, batch_size, seed
        self.val_windows, self.val_fraction, self.path = val_windows, val_fraction, path
        self.files: dict[str, tuple[str, ...]] = {}
        self.text: dict[str, Tensor] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and split the text, once."""
        if self.text:
            return
        if self.path is None:
            root = Path(sysconfig.get_path("stdlib"))
            self.files = split_files(source_files(root), self.val_fraction)
            raw = {part: b"".join((root / f).read_bytes() + b"\0" for f in fs) for part, fs in self.files.items()}
        else:
            whole = Path(self.path).read_bytes()
            cut = len(whole) - round(len(whole) * self.val_fraction)
            raw = {"train": whole[:cut], "val": whole[cut:]}
        for part, text in raw.items():
            if len(text) <= self.context:
                raise ValueError(
                    f"{part} text of {self.path or 'the standard library'}: got {len(text)} bytes, "
                    f"expected more than context={self.context}"
                )
        self.text = {part: torch.frombuffer(bytearray(text), dtype=torch.uint8) for part, text in raw.items()}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Random windows; an epoch is as many as would cover the text once."""
        windows = Windows(self.text["train"], self.context)
        count = max(self.batch_size, len(self.text["train"]) // self.context)
        return self._loader(ResumableLoader, windows, RandomStarts(len(windows), count, self.seed), drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same windows each time."""
        windows = Windows(self.text["val"], self.context)
        count = min(self.val_windows, len(windows))
        starts = [i * (len(windows) - 1) // max(1, count - 1) for i in range(count)]
        return self._loader(DataLoader, windows, starts, drop_last=False)

    def describe(self) -> dict[str, Any]:
        """What was read, to tell whether two machines trained on the same text."""
        return {
            "source": "standard library" if self.path is None else str(self.path),
            "files": {part: len(files) for part, files in self.files.items()} or None,
            "bytes": {part: len(text) for part, text in self.text.items()},
            "sha256": {part: hashlib.sha256(text.numpy().tobytes()).hexdigest() for part, text in self.text.items()},
        }

    def _loader(
        self, kind: type[DataLoader[Batch]], windows: Windows, starts: Any, drop_last: bool
    ) -> DataLoader[Batch]:
        # Without a generator, a DataLoader takes a number from the global one at each start.
        return kind(
            windows,
            batch_size=self.batch_size,
            sampler=starts,
            drop_last=drop_last,
            collate_fn=_as_is,
            generator=torch.Generator().manual_seed(self.seed),
        )


def source_files(root: Path) -> tuple[str, ...]:
    """Relative POSIX paths of the ``*.py`` files below ``root`` that are source text to learn from, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]  # never enter them: they are large
        here = Path(folder).relative_to(root)
        found += [
            (here / name).as_posix() for name in names if name.endswith(".py") and not name.startswith(_GENERATED)
        ]
    return tuple(sorted(found))


def split_files(files: Sequence[str], val_fraction: float) -> dict[str, tuple[str, ...]]:
    """Files for training and for validation, by a hash of their names: adding a file moves no other.

    >>> split_files(["abc.py", "ast.py"], 0.05)
    {'train': ('abc.py', 'ast.py'), 'val': ()}
    """
    held_out = {
        f for f in files if int.from_bytes(hashlib.sha256(f.encode()).digest()[:8], "big") < val_fraction * 2**64
    }
    return {
        "train": tuple(f for f in files if f not in held_out),
        "val": tuple(f for f in files if f in held_out),
    }


def _as_is(batch: Any) -> Any:
    return batch  # Windows.__getitems__ has made the batch


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
