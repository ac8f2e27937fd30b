"""A text in windows: batches depend on the seed alone, and the standard library is one."""

import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from helpers.recipe_data import small_text
from lightning_estdgm.recipes import StdlibText
from lightning_estdgm.recipes.stdlib_text import source_files, split_files


def first_batches(count=3, **settings):
    data = StdlibText(**{"context": 16, "batch_size": 4, **settings})
    data.setup()
    loader = data.train_dataloader()
    return [batch for _, batch in zip(range(count), loader, strict=False)]


def same(a, b):
    return all(torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def test_batches_depend_on_the_seed_alone(tmp_path):
    path = small_text(tmp_path)
    torch.manual_seed(1)
    once = first_batches(path=path, seed=5)
    torch.manual_seed(2)
    torch.rand(7)
    assert same(once, first_batches(path=path, seed=5))
    assert not same(once, first_batches(path=path, seed=6))


def test_drawing_batches_leaves_the_global_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    first_batches(path=small_text(tmp_path))
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_epoch_draws_other_windows(tmp_path):
    data = StdlibText(context=16, batch_size=4, path=small_text(tmp_path))
    data.setup()
    loader = data.train_dataloader()
    first = list(loader)
    assert same(first, list(loader))
    loader.sampler.set_epoch(1)
    assert not same(first, list(loader))


@pytest.mark.parametrize("stop", [0, 3, 7])
def test_a_loader_goes_on_in_mid_epoch_and_the_next_epoch_is_whole(stop, tmp_path):
    def loader():
        data = StdlibText(context=16, batch_size=128, path=small_text(tmp_path))
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        return loader

    whole, stopped, resumed = loader(), loader(), loader()
    for _ in zip(range(stop), stopped, strict=False):
        pass
    state = stopped.state_dict()
    assert state == {"epoch": 2, "position": stop} if stop else {"epoch": 0, "position": 0}
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert len(resumed) == len(whole) == 9
    assert same(list(whole)[stop:], list(resumed))
    for loader in (whole, resumed):
        loader.sampler.set_epoch(3)
    assert same(list(whole), list(resumed))


def test_a_loader_stopped_early_starts_the_next_epoch_at_its_first_batch(tmp_path):
    """As under `limit_train_batches`, where an epoch ends before the loader does."""
    data = StdlibText(context=16, batch_size=128, path=small_text(tmp_path))
    data.setup()
    loader, fresh = data.train_dataloader(), data.train_dataloader()
    next(iter(loader))
    fresh.load_state_dict(loader.state_dict())
    for each in (loader, fresh):
        each.sampler.set_epoch(1)
    assert same(list(loader), list(fresh))
    assert len(list(loader)) == 9


def test_targets_are_the_next_bytes_of_the_text(tmp_path):
    path = small_text(tmp_path)
    text = path.read_bytes()
    for x, y in first_batches(path=path):
        assert x.shape == y.shape == (4, 16)
        assert x.dtype == y.dtype == torch.int64
        for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
            assert bytes([*inputs, targets[-1]]) in text
            assert inputs[1:] == targets[:-1]


def test_a_file_is_split_at_its_end(tmp_path):
    path = small_text(tmp_path)
    data = StdlibText(context=16, path=path)
    data.setup()
    parts = [bytes(data.text[part].tolist()) for part in ("train", "val")]
    assert b"".join(parts) == path.read_bytes()
    assert len(parts[1]) == 1000
    assert data.describe()["bytes"] == {"train": 19_000, "val": 1000}


def test_validation_windows_are_fixed_evenly_spaced_and_reach_both_ends(tmp_path):
    data = StdlibText(context=16, batch_size=4, val_windows=10, path=small_text(tmp_path))
    data.setup()
    starts = data.val_dataloader().sampler
    assert starts[0] == 0
    assert starts[-1] == 1000 - 17
    gaps = {b - a for a, b in pairwise(starts)}
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 17
    assert sum(len(x) for x, _ in data.val_dataloader()) == 10
    assert same(data.val_dataloader(), data.val_dataloader())


def test_the_standard_library_is_read_without_tests_and_packages():
    data = StdlibText()
    data.setup()
    files = data.files["train"] + data.files["val"]
    assert len(files) == len(set(files)) > 200
    assert not set(data.files["train"]) & set(data.files["val"])
    assert {"ast.py", "json/decoder.py"} <= set(files)
    for skipped in ("test", "site-packages", "idlelib", "__pycache__"):
        assert not any(skipped in Path(name).parts for name in files)
    root = Path(sysconfig.get_path("stdlib"))
    assert data.files["train"] == tuple(sorted(data.files["train"]))
    first = (root / data.files["train"][0]).read_bytes() + b"\0"
    assert bytes(data.text["train"][: len(first)].tolist()) == first
    share = len(data.text["val"]) / sum(map(len, data.text.values()))
    assert 0.01 < share < 0.12


def test_a_new_file_moves_no_other_between_the_splits():
    names = [f"m{i}.py" for i in range(500)]
    before, after = split_files(names, 0.05), split_files([*names, "new.py", "more.py"], 0.05)
    for part, files in before.items():
        assert set(files) <= set(after[part])
    assert 10 <= len(before["val"]) <= 40


def test_source_files_are_sorted_and_sieved(tmp_path):
    for name in ("b.py", "a/c.py", "a/test/t.py", "a/data.txt", "_sysconfigdata_x.py", "a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    assert source_files(tmp_path) == ("a.py", "a/c.py", "b.py")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"context": 0}, ValueError, "context: got 0, expected at least 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size: got 2.0, expected an int"),
        ({"val_windows": -1}, ValueError, "val_windows: got -1, expected at least 1"),
        ({"seed": -1}, ValueError, "seed: got -1, expected at least 0"),
        ({"val_fraction": 1.0}, ValueError, r"val_fraction: got 1.0, expected a fraction in \(0, 1\)"),
        ({"path": "no/such/file"}, ValueError, "path: got 'no/such/file', expected an existing text file"),
    ],
)
def test_bad_settings_of_the_text_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        StdlibText(**settings)


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    data = StdlibText(context=64, path=small_text(tmp_path, size=1000))
    with pytest.raises(ValueError, match=r"val text of .*: got 50 bytes, expected more than context=64"):
        data.setup()
