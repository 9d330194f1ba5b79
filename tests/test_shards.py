"""Shards on disk: every window of each once an epoch, whoever shares them, and no broken file is trained on."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import ROOT, environment
from train_gpt2 import DataLoaderLite, UserError, find_shards

T, V = 8, 50257


def write(path, tokens):
    """A shard of the kind that its name says."""
    tokens = np.asarray(tokens)
    if path.suffix == ".npy":
        np.save(path, tokens.astype(np.uint16))
    else:
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(tokens)
        path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return path


@pytest.fixture(params=[".npy", ".bin"])
def shards(request, tmp_path):
    """Shards of unequal lengths, one shorter than a window and one empty. Each id is there once."""
    lengths, first = [5 * T + 3, T - 2, 9 * T + 1, 0 if request.param == ".npy" else 1, 7 * T], 0
    paths = []
    for i, n in enumerate(lengths):
        paths.append(write(tmp_path / f"train_{i}{request.param}", np.arange(first, first + n)))
        first += n
    windows, first = [], 0
    for n in lengths:
        windows += range(first, first + (n - 1) // T * T, T)
        first += n
    return paths, windows


def rows(loader, batches):
    """So many batches as one list of rows."""
    return torch.cat([loader.next_batch()[0] for _ in range(batches)]).tolist()


def starts(loader, batches):
    return [row[0] for row in rows(loader, batches)]


@pytest.mark.parametrize("seed", [None, 7])
def test_an_epoch_has_every_window_of_every_shard_once(shards, seed):
    paths, windows = shards
    loader = DataLoaderLite(paths, 1, T, V, seed=seed)
    assert loader.windows.total == len(windows) == 20
    epochs = [starts(loader, 20) for _ in range(3)]
    assert all(sorted(epoch) == windows for epoch in epochs)
    if seed is None:
        assert epochs == [windows] * 3
    else:
        assert epochs[0] != epochs[1] != epochs[2] and windows not in epochs


def test_x_and_y_are_one_apart_in_every_window(shards):
    loader = DataLoaderLite(shards[0], 4, T, V, seed=7)
    for _ in range(5):
        x, y = loader.next_batch()
        assert torch.equal(y, x + 1) and (x.diff() == 1).all()


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_global_batches_do_not_depend_on_the_number_of_processes(shards, ranks, seed):
    alone = DataLoaderLite(shards[0], 8, T, V, seed=seed)  # 8 does not divide 20: batches run over the end of epochs
    shared = [DataLoaderLite(shards[0], 8 // ranks, T, V, rank=r, world_size=ranks, seed=seed) for r in range(ranks)]
    for _ in range(10):
        assert [row for loader in shared for row in rows(loader, 1)] == rows(alone, 1)
        assert all(loader.position == alone.position for loader in shared)


@pytest.mark.parametrize("B", [4, 2, 1])
def test_a_restored_loader_goes_on_at_the_same_window_also_with_another_batch_size(shards, B):
    loader = DataLoaderLite(shards[0], 4, T, V, seed=7)
    starts(loader, 7)  # in the second epoch
    restored = DataLoaderLite(shards[0], B, T, V, seed=7)
    restored.position = loader.position
    assert starts(restored, 40 // B) == starts(loader, 10)


def break_it(how, path):
    tokens = np.arange(100)
    if how == "truncated":
        path.write_bytes(write(path, tokens).read_bytes()[:-20])
    elif how == "truncated in a token":
        path.write_bytes(write(path, tokens).read_bytes()[:-1])
    elif how == "truncated in the header":
        path.write_bytes(write(path, tokens).read_bytes()[:50])
    elif how == "wrong magic":
        path.write_bytes(b"\0\1\2\3" + write(path, tokens).read_bytes()[4:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "id outside":
        write(path, np.full(100, V))
    elif how == "int32":
        np.save(path, tokens.astype(np.int32))
    elif how == "2-D":
        np.save(path, tokens.astype(np.uint16).reshape(10, 10))
    elif how == "pickled objects":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)


ANY = ["truncated", "truncated in a token", "truncated in the header", "wrong magic", "empty", "id outside"]


@pytest.mark.parametrize("how, suffix", [(how, suffix) for how in ANY for suffix in (".npy", ".bin")]
                         + [(how, ".npy") for how in ("int32", "2-D", "pickled objects")])
def test_a_bad_shard_is_an_error_that_names_it(tmp_path, how, suffix):
    good, bad = write(tmp_path / f"train_0{suffix}", np.arange(100)), tmp_path / f"train_1{suffix}"
    break_it(how, bad)
    with pytest.raises(UserError, match=bad.name) as error:
        loader = DataLoaderLite([good, bad], 1, T, V)
        starts(loader, loader.windows.total)
    assert "\n" not in str(error.value)


def test_no_shards_and_too_few_tokens_are_errors(tmp_path):
    for paths in ([], [write(tmp_path / "train.npy", np.arange(T))]):
        with pytest.raises(UserError, match=r"0 windows of 8 \+ 1 tokens.*--seq_len"):
            DataLoaderLite(paths, 1, T, V)


@pytest.mark.parametrize("names", [
    [], ["a.txt", "b.txt"], ["train.txt", "val.txt"], ["a.npy", "b.bin"], ["train_0.npy"],
    ["val_0.bin"]], ids=",".join)
def test_a_folder_without_both_splits_is_an_error_that_says_what_was_looked_for(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        find_shards(tmp_path)
    message = str(error.value)
    assert message.startswith(f"--data {tmp_path}: ") and "\n" not in message
    assert all(word in message for word in ("*train*", "*val*", ".npy", ".bin", "fineweb.py"))


def test_shards_are_told_apart_by_the_later_word_in_their_name_and_other_files_left_alone(tmp_path):
    names = ["edu_train_0.npy", "edu_train_1.npy", "interval_train_2.npy", "train_val.npy", "val.bin"]
    for name in (*reversed(names), "notes_train.txt", "shard.npy"):
        (tmp_path / name).touch()
    train, val = find_shards(tmp_path)
    assert [path.name for path in train] == names[:3]
    assert [path.name for path in val] == names[3:]


def python(code, *args):
    """Run code in a process of its own, since it changes or measures the process."""
    pytest.importorskip("resource")  # not on Windows
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" \
           f"import resource\nfrom pathlib import Path\nfrom train_gpt2 import DataLoaderLite\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=environment(), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shards_are_not_read_into_memory(tmp_path):
    path, n = tmp_path / "train.npy", 2**30
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(n,))  # 2 GB of nothing
    if not hasattr(os.stat(path), "st_blocks") or os.stat(path).st_blocks * 512 > n:
        pytest.skip("this file system has no sparse files")
    grown = python("peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
                   "before = peak()\n"
                   "loader = DataLoaderLite([Path(sys.argv[1])], 8, 1024, 50257, seed=1)\n"
                   "for _ in range(20): loader.next_batch()\n"
                   "print((peak() - before) * (1 if sys.platform == 'darwin' else 1024))\n", path)
    assert int(grown) < n / 4


def test_more_shards_than_files_may_be_open(tmp_path):
    for i in range(200):
        write(tmp_path / f"train_{i:03d}.npy", np.arange(2 * T + 1))
    drawn = python("resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
                   "loader = DataLoaderLite(sorted(Path(sys.argv[1]).iterdir()), 1, 8, 50257, seed=1)\n"
                   "print(len([loader.next_batch() for _ in range(loader.windows.total)]))\n", tmp_path)
    assert int(drawn) == 400
