"""Text into shards: the tokens of every document, whatever is in it; and nothing is lost or done twice after a kill."""
import gzip
import http.server
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import fineweb
from common import ROOT, environment, run_here
from train_gpt2 import DataLoaderLite, UserError, get_tokenizer, open_data

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
DOCUMENTS = ["Once upon a time.", "", None, "a<|endoftext|>b", "你好，世界。这是第一行\n第二行", "नमस्ते 🙂\r\n\tx", "  lead",
             "it's we'll I'VE", "\n\n\n", "x" * 1000, "many words " * 400, "\x00\x1c\xa0\u3000 end ", "7" * 50, "last"]
LONELY = ["a\ud800b", "\udc00", "pair \ud83d\ude00 and half \ud83d."]


@pytest.fixture(scope="module", autouse=True)
def enc():
    try:
        return get_tokenizer("gpt2")
    except UserError as e:
        pytest.skip(str(e))


def expected(enc, documents):
    """The slow, plain way."""
    tokens = []
    for document in documents:
        tokens += [enc.eot_token] + enc.encode_ordinary(document or "")
    return np.array(tokens, dtype=np.uint16)


def write(path, documents):
    """A file of documents, of the kind that its name says."""
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": range(len(documents)), "text": documents})
        pyarrow.parquet.write_table(table, path, row_group_size=3)
        return path
    text = documents[0] if ".txt" in path.name else "".join(json.dumps({"n": 1, "text": d}) + "\n" for d in documents)
    data = text.encode()
    packed = {".gz": gzip.compress, ".zst": lambda b: pyarrow.compress(b, codec="zstd", asbytes=True)}
    path.write_bytes(packed.get(path.suffix, bytes)(data))
    return path


def command(*flags):
    return [sys.executable, str(ROOT / "fineweb.py"), "--num_proc", "2", *map(str, flags)]


def make(*flags, cwd, code=0, **env):
    """The script as a process of its own. What it cannot do, it says in one line."""
    done = subprocess.run(command(*flags), cwd=cwd, env=environment(**env), capture_output=True, encoding="utf-8",
                          timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def make_here(monkeypatch, capsys, tmp_path):
    """The script in this process, with threads in place of the workers. make_here(*flags) returns what it printed."""
    def make_here(*flags, cwd=tmp_path, code=0, threads=True):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", command(*flags)[1:])
        pool = (lambda n, context, start: ThreadPoolExecutor(n)) if threads else ProcessPoolExecutor
        monkeypatch.setattr(fineweb, "ProcessPoolExecutor", pool)
        handler = signal.getsignal(signal.SIGTERM)
        got = 0
        capsys.readouterr()
        try:
            fineweb.main()
        except SystemExit as stop:
            got = stop.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capsys.readouterr()
        assert got == code, out + err
        if code:
            assert err.count("\n") == 1 and err.startswith("fineweb.py: "), err
        return out + err
    return make_here


def shards(folder):
    return sorted(folder.glob("*_val_*.npy")) + sorted(folder.glob("*_train_*.npy"))


def tokens_in(folder):
    return np.concatenate([np.load(path) for path in shards(folder)])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The right tokens -----------------------------------------------------------------------------------------------------

def test_shards_hold_the_tokens_of_every_document_in_order(enc, tmp_path):
    kinds = ["a.parquet", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.json"]
    for name in kinds:
        write(tmp_path / name, DOCUMENTS + (LONELY if "json" in name else []))
    for i, name in enumerate(["f.txt", "g.txt.gz", "h.txt.zst"]):
        write(tmp_path / name, [DOCUMENTS[4 + i]])
    (tmp_path / "i.txt").write_bytes(b"")
    documents = DOCUMENTS + 4 * (DOCUMENTS + LONELY) + [DOCUMENTS[4], "नमस्ते 🙂\n\tx", "  lead", ""]  # as Python reads
    done = make("--files", "*", "--out_dir", "out", "--shard_size", "1e3", cwd=tmp_path)
    tokens, paths = expected(enc, documents), shards(tmp_path / "out")
    assert len(tokens) % 1000 and len(tokens) > 5000
    assert np.array_equal(tokens_in(tmp_path / "out"), tokens)
    assert [path.name for path in paths] == ["edufineweb_val_000000.npy"] + [
        f"edufineweb_train_{i:06d}.npy" for i in range(1, len(tokens) // 1000 + 1)]
    assert [len(np.load(path)) for path in paths] == [1000] * (len(tokens) // 1000) + [len(tokens) % 1000]
    for i in (0, -1):                                                # a full one and the short one are as numpy writes
        np.save(tmp_path / "numpy.npy", tokens[:1000] if i == 0 else tokens[-(len(tokens) % 1000):])
        assert paths[i].read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert f"{len(tokens):,} tokens" in done.stdout
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".npy", ".json"}


def test_the_training_script_reads_the_shards(enc, tmp_path, monkeypatch, make_here):
    write(tmp_path / "a.jsonl", ["word " * 100] * 40)
    make_here("--files", "a.jsonl", "--out_dir", "out", "--shard_size", "1000")
    train, val = open_data(tmp_path / "out", enc)
    assert (len(train), len(val)) == (4, 1)
    x, _ = DataLoaderLite(val, 1, 32, enc.n_vocab).next_batch()
    assert x[0].tolist() == expected(enc, ["word " * 100])[:32].tolist()
    run_here(monkeypatch, tmp_path, "--data", "out", "--model", "gpt2", "--n_layer", "1", "--n_head", "1", "--n_embd",
             "4", "--block_size", "16", "--max_steps", "1", "--total_batch_size", "64", "--sample_every", "0", "--device",
             "cpu")


TEXTS = ["it's  we'll\n\n I'VE  \r\n x" * 9, "no_space_at_all" * 9, "你好，世界。\n" * 20, " \n" * 50, "a \xa0 b\u3000 c\x1c d" * 9,
         " ".join("word" * (i % 7) for i in range(200)), "1 22 333 4444!? ...  'tis\t\t x" * 9, "", " ", "\na"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_a_long_text_in_pieces_has_the_same_tokens(enc, tmp_path, monkeypatch, size):
    monkeypatch.setattr(fineweb, "CHUNK", size)
    for text in TEXTS:
        (tmp_path / "a.txt").write_bytes(text.encode())
        chunks = list(fineweb.read_files([tmp_path / "a.txt"], "text", 0))
        tokens = np.concatenate([fineweb.tokenize("text", chunk) for chunk in chunks])
        text = text.replace("\r\n", "\n")
        assert np.array_equal(tokens, expected(enc, [text])), text
        assert "".join(chunk.records[0] for chunk in chunks) == text
    if size < 50:
        assert len(list(fineweb.read_files([write(tmp_path / "b.txt", [TEXTS[5]])], "text", 0))) > 10


def test_reading_from_the_nth_record_on_is_what_comes_after_n(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "CHUNK", 60)
    paths = [write(tmp_path / name, [f"{name} {i} " + "x y " * i for i in range(10)])
             for name in ("a.parquet", "b.jsonl", "c.parquet", "d.txt", "e.jsonl.gz")]

    def records(skip):
        return [(str(r), f"{c.where} {c.number + i if c.where[-4:] != '.txt' else ''}", c.begins)
                for c in fineweb.read_files(paths, "text", skip)
                for i, r in enumerate(c.records if isinstance(c.records, list) else c.records.to_pylist())]

    everything = records(0)
    assert len(everything) >= 41 and f"{paths[2]}, row 10" in [where for _, where, _ in everything]
    for skip in range(len(everything) + 2):
        assert records(skip) == everything[skip:]


def test_a_large_document_between_small_ones(enc, tmp_path, make_here):
    documents = ["small"] + ["".join(f"word{i} " for i in range(200_000))] + ["small"]
    write(tmp_path / "a.parquet", documents)
    write(tmp_path / "b.jsonl", documents)
    make_here("--files", "a.parquet", "b.jsonl", "--out_dir", "out", "--shard_size", "1e5")
    assert np.array_equal(tokens_in(tmp_path / "out"), expected(enc, 2 * documents))


def test_max_tokens_is_exact(enc, tmp_path, make_here):
    write(tmp_path / "a.jsonl", DOCUMENTS)
    for n in (999, 1000, 1001):
        make_here("--files", "a.jsonl", "--out_dir", n, "--shard_size", "500", "--max_tokens", n)
        assert np.array_equal(tokens_in(tmp_path / str(n)), expected(enc, DOCUMENTS)[:n])
        assert [len(np.load(path)) for path in shards(tmp_path / str(n))] == [500, min(n - 500, 500), 1][:2 + n // 1001]


def test_nothing_is_read_beyond_max_tokens(tmp_path, monkeypatch, make_here):
    write(tmp_path / "a.jsonl", ["word " * 10] * 1000)
    monkeypatch.setattr(fineweb, "CHUNK", 100)
    tokenize = fineweb.tokenize
    done = []

    def counted(key, chunk):
        done.append(chunk)
        return tokenize(key, chunk)
    monkeypatch.setattr(fineweb, "tokenize", counted)
    make_here("--files", "a.jsonl", "--out_dir", "out", "--max_tokens", "100")
    assert 0 < len(done) < 30                                        # what is read ahead; there are some 500


def test_a_run_leaves_no_worker_to_the_next_one_in_the_same_process(enc, tmp_path, make_here):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{}')
    make_here("--files", "a.jsonl", "--out_dir", "out", code=2, threads=False)
    assert multiprocessing.active_children() == []
    write(tmp_path / "a.jsonl", ["x"])
    make_here("--files", "a.jsonl", "--out_dir", "out", threads=False)
    assert np.array_equal(tokens_in(tmp_path / "out"), expected(enc, ["x"]))


@pytest.mark.parametrize("flags", [[], ["--streaming"]])
def test_a_data_set_comes_through_the_datasets_library(enc, tmp_path, monkeypatch, make_here, flags):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    (tmp_path / "mine").mkdir()
    documents = [f"{i} {DOCUMENTS[i % len(DOCUMENTS)]}" for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.table({"body": documents, "n": range(500)}), tmp_path / "mine" / "a.parquet",
                                row_group_size=100)
    flags = ["--dataset", "mine", "--text_key", "body", "--out_dir", "out", "--shard_size", "10000", *flags]
    make_here(*flags)
    assert np.array_equal(tokens_in(tmp_path / "out"), expected(enc, documents))
    before = files(tmp_path / "out")
    shards(tmp_path / "out")[3].unlink()                             # goes on in the middle
    assert "going on after 3 shards" in make_here(*flags)
    assert files(tmp_path / "out") == before
    assert "body" in make_here(*flags, "--text_key", "text", "--out_dir", "other", code=2)
    assert not (tmp_path / "other").exists()


# Never lost -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with files of some size, and the shards that a run makes of them if nothing disturbs it."""
    here = tmp_path_factory.mktemp("here")
    words = "".join(f"word{i * 7919 % 10_007} " for i in range(2000))
    write(here / "a.parquet", [words[i % 500:] for i in range(100)])
    write(here / "b.jsonl.gz", [words[i % 300:] for i in range(100)])
    (here / "c.txt").write_bytes((ROOT / "input.txt").read_bytes() * 3)
    make(*FILES, "--out_dir", "whole", cwd=here)
    return here


FILES = ["--files", "[abc].*", "--shard_size", "1e5"]


def start(here, out_dir, **kwargs):
    return subprocess.Popen(command(*FILES, "--out_dir", out_dir), cwd=here, env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=os.name != "nt")


def wait_for_shards(process, folder, n):
    while process.poll() is None and len(shards(folder)) < n:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()


def alive(group):
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


@posix
@pytest.mark.parametrize("n", [0, 1, 7, 13])
def test_killed_and_run_again_it_ends_with_the_same_bytes_and_no_worker_stays_behind(here, make_here, n):
    folder = here / f"killed_{n}"
    process = start(here, folder.name)
    wait_for_shards(process, folder, n)
    process.kill()
    process.wait()
    if n:
        assert (folder / "fineweb.lock").exists()                    # it stays behind, and locks nobody out,
        filelock.FileLock(folder / "fineweb.lock", timeout=0).acquire().lock.release()  # though workers may still live
    before = {path: path.stat().st_mtime_ns for path in shards(folder)}
    for _ in range(100):                                             # the workers notice, and end by themselves
        if not alive(process.pid):
            break
        time.sleep(0.1)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("workers stayed behind")
    found = re.search(r"going on after (\d+) shards", make_here(*FILES, "--out_dir", folder.name, cwd=here))
    kept = int(found.group(1)) if found else 0
    assert kept >= n - 1 and kept >= len(before) - 1                 # the last one may not have been in the manifest
    assert [p for p in before if p.stat().st_mtime_ns == before[p]][:kept] == shards(folder)[:kept]  # not made again
    assert files(folder) == files(here / "whole")


@posix
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_all_at_once_and_the_same_command_goes_on(here, make_here, signum):
    folder = here / f"stopped_{signum}"
    process = start(here, folder.name)
    wait_for_shards(process, folder, 2)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)                               # as the terminal does
    else:
        process.send_signal(signum)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 0 and "stopped" in out and "Traceback" not in err, err
    for _ in range(20):
        if not alive(process.pid):
            break
        time.sleep(0.1)
    assert not alive(process.pid)
    assert not {fineweb.UNFINISHED, "fineweb.lock"} & set(os.listdir(folder))
    make_here(*FILES, "--out_dir", folder.name, cwd=here)
    assert files(folder) == files(here / "whole")


@posix
def test_a_worker_that_dies_is_said_and_the_same_command_goes_on(here, make_here):
    process = start(here, "worker_died")
    wait_for_shards(process, here / "worker_died", 1)
    worker = int(subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True,
                                text=True).stdout.split()[0])
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and err.count("\n") == 1 and "--num_proc" in err
    make_here(*FILES, "--out_dir", "worker_died", cwd=here)
    assert files(here / "worker_died") == files(here / "whole")


def test_a_complete_folder_is_left_as_it_is(here, make_here):
    before = {path: path.stat().st_mtime_ns for path in (here / "whole").iterdir()}
    assert "complete" in make_here(*FILES, "--out_dir", "whole", cwd=here)
    assert before == {path: path.stat().st_mtime_ns for path in (here / "whole").iterdir()}


@pytest.mark.parametrize("flags, difference", [
    (["--shard_size", "1e6"], "shard_size was 100000, is 1000000"), (["--max_tokens", "5"], "max_tokens was None, is 5"),
    (["--files", "a.parquet"], "files was 3, is 1"), (["--text_key", "body"], "text_key was text, is body"),
    (["--files", "a.parquet", "c.txt", "b.jsonl.gz"], "b.jsonl.gz"), (["--separator", "x"], "separator was None, is x")])
def test_other_arguments_in_the_same_folder_are_refused_with_the_difference(here, make_here, flags, difference):
    before = files(here / "whole")
    assert difference in make_here(*FILES, *flags, "--out_dir", "whole", cwd=here, code=2)
    assert files(here / "whole") == before


def test_shards_of_another_origin_are_not_written_over(here, make_here):
    (here / "foreign").mkdir()
    (here / "foreign" / "edufineweb_val_000000.npy").write_bytes(b"mine")
    for manifest in [None, '{"name": "a web app"}', "[]", "7"]:
        if manifest:
            (here / "foreign" / "manifest.json").write_text(manifest)
        before = files(here / "foreign")
        make_here(*FILES, "--out_dir", "foreign", cwd=here, code=2)
        assert files(here / "foreign") == before


def test_verify_finds_one_flipped_bit_and_the_same_command_mends_it(here, make_here):
    folder = shutil.copytree(here / "whole", here / "flipped")
    assert "all as written" in make_here("--verify", "--out_dir", "flipped", cwd=here)
    bad = shards(folder)[2]
    data = bytearray(bad.read_bytes())
    data[5000] ^= 1
    bad.write_bytes(data)
    assert bad.name in make_here("--verify", "--out_dir", "flipped", cwd=here, code=1)
    bad.unlink()
    make_here("--verify", "--out_dir", "flipped", cwd=here, code=1)
    make_here(*FILES, "--out_dir", "flipped", cwd=here)
    assert files(folder) == files(here / "whole")
    make_here("--verify", "--out_dir", "nowhere", cwd=here, code=2)


def test_a_disk_that_is_too_small_is_said_at_the_start(here, monkeypatch, make_here):
    need = sum(len(np.load(path)) for path in shards(here / "whole")) * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, need // 3))
    said = make_here(*FILES, "--out_dir", "too_small", cwd=here, code=2)
    assert re.fullmatch(r".*about 0\.0\d GB more, the disk has 0\.00 GB.*\n", said)
    assert not (here / "too_small").exists()


@posix
def test_a_disk_that_fills_up_keeps_complete_shards(here, make_here):
    code = ("import resource, sys; sys.path.insert(0, %r); import fineweb\n"
            "if __name__ == '__main__':\n"
            "    finish, n = fineweb.finish, []\n"
            "    def full(*args):\n"
            "        n.append(finish(*args))\n"
            "        if len(n) == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))\n"
            "    fineweb.finish = full\n"
            "    fineweb.main()\n" % str(ROOT))
    (here / "full.py").write_text(code)
    done = subprocess.run([sys.executable, "full.py", "--num_proc", "1", *FILES, "--out_dir", "full"], cwd=here,
                          env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large" in done.stderr, done.stderr
    assert len(shards(here / "full")) == 3
    make_here(*FILES, "--out_dir", "full", cwd=here)
    assert files(here / "full") == files(here / "whole")


# What cannot be -------------------------------------------------------------------------------------------------------

BROKEN = {"not json": ("a.jsonl", b'{"text": "a"}\n\n{"text": oops}\n', "a.jsonl, line 3 is not JSON"),
          "no key": ("a.jsonl", b'{"body": "a"}\n', "line 1 has no 'text': --text_key can be body"),
          "a list": ("a.jsonl", b'["text"]\n', "line 1 is no JSON object"), "deep": ("a.jsonl", b"[" * 99999, "line 1"),
          "a number": ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2: 'text' is no text but int"),
          "not utf-8": ("a.txt", b"caf\xe9", "a.txt"), "not utf-8 json": ("a.jsonl", b'{"text": "caf\xe9"}\n', "line 1"),
          "cut short": ("a.jsonl.gz", gzip.compress(os.urandom(9999))[:-50], "a.jsonl.gz"),
          "no gzip": ("a.txt.gz", b"plain", "a.txt.gz"), "no parquet": ("a.parquet", b"PAR1", "a.parquet"),
          "newlines": ("a.\n\u2028.jsonl", b"oops", "line 1 is not JSON"),
          "unknown": ("a.csv", b"text\na\n", "a.csv is neither")}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_one_line_that_names_the_place_and_leaves_nothing(tmp_path, make_here, how):
    name, data, message = BROKEN[how]
    (tmp_path / name).write_bytes(data)
    assert message in make_here("--files", "a.*", "--out_dir", "out", code=2)
    assert os.listdir(tmp_path) == [name]                            # an empty folder would look like data


@pytest.mark.parametrize("flags, message", [
    (["--files", "nothing*"], "no such file"), (["--shard_size", "0"], "shard_size"), (["--num_proc", "x"], "num_proc"),
    (["--fils", "a"], "--fils"), (["--files", "a.parquet", "--out_dir", "a.parquet"], "--out_dir"),
    (["--files", "a.parquet", "--text_key", "body"], "--text_key can be id, text"), (["--num_proc", "1\n2"], "1 2 is not"),
    (["--files", "a.parquet", "--separator", "x"], "--separator is for .txt"), (["--files", "a\nb\r*"], "a b *: no such"),
    (["--files", "x" * 5000], "too long"), (["--files", "a.parquet", "--out_dir", "x" * 300], "too long"),
    (["--verify", "--out_dir", "x" * 300], "too long")])
def test_what_cannot_be_is_one_line_with_the_remedy(tmp_path, make_here, flags, message):
    write(tmp_path / "a.parquet", ["x"])
    said = make_here(*flags, code=2)
    assert message in said and "make room" not in said


def test_what_may_not_be_read_or_written_is_no_full_disk(tmp_path, monkeypatch, make_here):
    write(tmp_path / "a.txt", ["x"])
    denied = PermissionError(13, "Permission denied", "secret\n")

    def deny(path, *args, **kwargs):
        raise denied
    for name in ("is_file", "mkdir", "exists", "glob"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, deny)
            said = make_here("--files", "a.txt", "--out_dir", "out", code=2)
            assert "Permission denied" in said and "--out_dir" in said and "make room" not in said


def test_a_message_of_several_lines_is_one_line(tmp_path, monkeypatch, make_here):
    import datasets
    def load(name, *args):
        raise RuntimeError(f"no {name}\nin there")
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    assert "cannot load a b: no a. Are" in make_here("--dataset", "a\nb", code=2)
    assert list(tmp_path.iterdir()) == []


def test_all_text_in_the_validation_split_is_said(tmp_path, make_here):
    write(tmp_path / "a.txt", ["short"])
    assert "lower --shard_size" in make_here("--files", "a.txt")


# The network ----------------------------------------------------------------------------------------------------------

def test_without_a_network_it_points_to_local_files(tmp_path):
    done = make("--dataset", "a/b", "--out_dir", "out", cwd=tmp_path, code=2, HF_HOME=str(tmp_path / "hf"),
                HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert "--files" in done.stderr
    assert not (tmp_path / "out").exists()                           # an empty folder would look like data


def test_too_many_requests_are_retried_then_said(tmp_path):
    asked = 0

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            nonlocal asked
            asked += 1
            self.send_response(429)
            self.end_headers()
        do_HEAD = do_GET
        def log_message(self, *args):
            pass

    patient = tmp_path / "patient.py"                                # as it is, but waiting takes no time
    patient.write_text(f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import fineweb\n"
                       "time.sleep = lambda seconds: print('waited', seconds)\n"
                       "if __name__ == '__main__': fineweb.main()\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = environment(HF_HOME=str(tmp_path / "hf"), HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        done = subprocess.run([sys.executable, str(patient), "--dataset", "a/b"], cwd=tmp_path, capture_output=True,
                              env={k: v for k, v in env.items() if "HF_HUB_" not in k}, text=True, timeout=60)
        server.shutdown()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "429" in done.stderr and "--files" in done.stderr.splitlines()[-1]
    waited = [float(s) for s in re.findall(r"waited (\S+)", done.stdout)]
    assert len(waited) >= 3 and waited == sorted(waited) and waited[0] < waited[-1] and asked >= len(waited)


# What a hostile reader found -------------------------------------------------------------------------------------------

@posix
def test_stops_at_any_moment_end_in_time_and_in_peace(here):
    """A worker that is killed while it hands back its tokens leaves half of them in the pipe."""
    for i in range(12):
        process = start(here, f"any_moment_{i}")
        assert "2 processes" in process.stdout.readline()            # it has begun
        time.sleep(0.1 * i)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert "stopped" in out or "shards" in out, (i, out)         # or it was done, and Python on its way out
        assert err == "" and (process.returncode == 0 or "shards" in out), (i, err)


def test_parquet_of_other_types_of_text_and_of_none(enc, tmp_path, make_here):
    column = pyarrow.array(DOCUMENTS)
    for i, kind in enumerate([pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(),
                                                                                              pyarrow.string())]):
        texts = column.dictionary_encode() if i == 2 else column.cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
        make_here("--files", "a.parquet", "--out_dir", f"out{i}")
        assert np.array_equal(tokens_in(tmp_path / f"out{i}"), expected(enc, DOCUMENTS))
    latin1 = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"ok", b"caf\xe9"]).buffers())
    for texts, says in [(latin1, "UTF8"), (pyarrow.array([b'{"text": "x"}']), "binary"), (pyarrow.array([1]), "int64")]:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet")
        said = make_here("--files", "b.parquet", "--out_dir", "b", code=2)
        assert "b.parquet" in said and says in said, said


def test_chunks_have_a_size_in_bytes_however_the_rows_are_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "CHUNK", 10_000)
    texts = ["x" * 5] * 3000 + ["y" * 20_000] * 20 + ["z" * 100] * 500
    for name, column in [("plain", pyarrow.array(texts)), ("dict", pyarrow.array(texts).dictionary_encode())]:
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        chunks = list(fineweb.read_files([tmp_path / f"{name}.parquet"], "text", 0))
        assert [t for c in chunks for t in c.records.to_pylist()] == texts
        assert max(len(pickle.dumps(c)) for c in chunks) < 400_000      # 16 of the longest
        assert len(chunks) < 100


def test_names_with_brackets_and_files_named_twice_and_shards_among_the_files(enc, tmp_path, make_here):
    write(tmp_path / "data[1].jsonl", ["x y z"])
    flags = ["--files", "data[1].jsonl", str(tmp_path / "data[1].jsonl"), "**", "--out_dir", "out"]
    make_here(*flags)
    assert np.array_equal(tokens_in(tmp_path / "out"), expected(enc, ["x y z"]))
    assert "complete" in make_here(*flags)


# One folder, one run --------------------------------------------------------------------------------------------------

def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(here, make_here):
    process = start(here, "twice")
    wait_for_shards(process, here / "twice", 1)
    before = files(here / "whole")
    assert "another fineweb.py is at work in" in make_here(*FILES, "--out_dir", here / "twice", cwd=here, code=2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "" and files(here / "twice") == before


def test_a_lock_left_behind_does_not_block(tmp_path, make_here):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fineweb.lock").write_bytes(b"")
    write(tmp_path / "a.txt", ["x"])
    make_here("--files", "a.txt", "--out_dir", "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["edufineweb_val_000000.npy", "manifest.json"]


def test_another_file_of_the_same_name_and_size_is_another_file(enc, tmp_path, make_here):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.txt", [f"text {folder}"])
        os.utime(tmp_path / folder / "a.txt", (1e9, 1e9))
    flags = ["--files", "a.txt", "--out_dir", tmp_path / "out"]
    make_here(*flags, cwd=tmp_path / "one")
    assert "file 1 was" in make_here(*flags, cwd=tmp_path / "two", code=2)
    assert "complete" in make_here("--files", "one/a.txt", "--out_dir", "out")  # from elsewhere, the same one
    write(tmp_path / "one" / "a.txt", ["text own"])
    assert "file 1 was" in make_here(*flags, cwd=tmp_path / "one", code=2)
    assert np.array_equal(tokens_in(tmp_path / "out"), expected(enc, ["text one"]))


def test_a_try_that_was_refused_does_not_block_the_next(enc, tmp_path, make_here):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "out").mkdir()
    make_here("--files", "a.jsonl", "--out_dir", "out", code=2)
    assert list((tmp_path / "out").iterdir()) == []                  # the folder was there before, and is
    # An earlier version left this.
    (tmp_path / "out" / "manifest.json").write_text('{"text_key": "text", "complete": false, "shards": []}')
    make_here("--files", "a.jsonl", "--text_key", "body", "--out_dir", "out")
    assert np.array_equal(tokens_in(tmp_path / "out"), expected(enc, ["x"]))


def test_no_document_is_refused_each_time(enc, tmp_path, make_here):
    (tmp_path / "a.jsonl").write_text("\n")
    for _ in range(2):
        assert "no document" in make_here("--files", "a.jsonl", "--out_dir", "out", code=2)
    write(tmp_path / "a.jsonl", ["x"])
    make_here("--files", "a.jsonl", "--out_dir", "out")
    assert np.array_equal(tokens_in(tmp_path / "out"), expected(enc, ["x"]))


def test_a_kill_between_a_first_shard_and_its_manifest(tmp_path, monkeypatch, make_here):
    write(tmp_path / "a.txt", ["x " * 100])
    flags = ["--files", "a.txt", "--out_dir", "out", "--shard_size", "50"]

    class Killed(Exception):
        pass

    def killed(path):
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "sha256", killed)
        with pytest.raises(Killed):
            make_here(*flags)
    assert len(shards(tmp_path / "out")) == 1
    make_here(*flags, "--text_key", "body", code=2)                  # a shard is there: it is somebody's
    assert "going on" not in make_here(*flags)
    assert sum(map(len, map(np.load, shards(tmp_path / "out")))) > 100


def test_files_of_others_stay_in_the_folder(tmp_path, make_here):
    (tmp_path / "out").mkdir()
    for name in ("mine.tmp", "manifest.tmp", "edufineweb_notes.npy.tmp", "fineweb.py", "edufineweb_val_000000.npy.tmp"):
        (tmp_path / "out" / name).write_text("mine")
    before = files(tmp_path / "out")
    (tmp_path / "out" / fineweb.UNFINISHED).write_text("of a killed run")
    write(tmp_path / "a.txt", ["x"])
    make_here("--files", "a.txt", "--out_dir", "out")
    assert files(tmp_path / "out").items() >= before.items()
    assert set(files(tmp_path / "out")) == {*before, "edufineweb_val_000000.npy", "manifest.json"}


# Text as it comes -----------------------------------------------------------------------------------------------------

def test_a_byte_order_mark_is_not_text(enc, tmp_path, make_here):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"a. b")
    line = b'{"text": "c"}\n'
    (tmp_path / "b.jsonl").write_bytes(mark + line + mark + line + mark + b"\n" + mark)
    write(tmp_path / "c.jsonl", ["\ufeffof a text's own"])
    make_here("--files", "*.txt", "*.jsonl", "--separator", ". ", "--out_dir", "out")
    assert np.array_equal(tokens_in(tmp_path / "out"), expected(enc, ["a", "b", "c", "c", "\ufeffof a text's own"]))


BLANKS = " \n\t\r\x0b\x0c\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000"


def test_blanks_in_pieces_have_the_same_tokens(enc, monkeypatch):
    """Where tiktoken can do it unsplit: any blanks, between anything, and what is a blank to Python only."""
    def split(text):
        return sum([enc.encode_ordinary(piece) for piece in fineweb.LAST_BLANK.split(text)], [])

    rng = np.random.default_rng(0)
    for n in range(2000):
        text = "".join(rng.choice(list(BLANKS + "\x1c\x1f\u200b\ufeffab1,'s你"), size=n % 40))
        assert split(text) == enc.encode_ordinary(text), repr(text)
    for blank in BLANKS:
        for text in (blank * 1000, f"a{blank * 1000}b", f"a{blank * 999} 1 {blank * 9}\n'll"):
            assert split(text) == enc.encode_ordinary(text), repr(blank)


@pytest.mark.parametrize("blank", [" ", "\n", "\u3000"])
def test_a_million_blanks_are_text_like_any_other(enc, tmp_path, make_here, blank):
    documents = [f"a{blank * 1_300_000}b \ud800", blank * 1_300_000, "last"]
    with pytest.raises(ValueError):
        enc.encode_to_numpy(documents[0][:-1])                       # else the test tests nothing
    write(tmp_path / "a.jsonl", documents)
    write(tmp_path / "b.txt", [documents[0][:-1]])
    make_here("--files", "a.jsonl", "b.txt", "--out_dir", "out", "--max_tokens", "1e9")
    halves = enc.encode_ordinary(f"a{blank * 1_299_999}") + enc.encode_ordinary(f"{blank}b ")
    bad = enc.encode_ordinary(f"{blank}b \ud800")[len(enc.encode_ordinary(f"{blank}b")):]
    first = halves[:-1] + bad
    tokens = [enc.eot_token, *first, *expected(enc, documents[1:]), enc.eot_token, *halves]
    assert np.array_equal(tokens_in(tmp_path / "out"), tokens)


def text_with(separator):
    return separator.join(["", "one two", "", "three\n\n", " four " * 30, separator[:-1] + "five", "  ", "last " * 9, ""])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10**6])
@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n\n", "#", " \n "])
def test_a_separator_makes_documents(enc, tmp_path, monkeypatch, size, separator):
    monkeypatch.setattr(fineweb, "CHUNK", size)
    text = text_with(separator)
    write(tmp_path / "a.txt.gz", [text])
    documents = [document for document in text.split(separator) if document]
    chunks = list(fineweb.read_files([tmp_path / "a.txt.gz"], "text", 0, separator))
    tokens = np.concatenate([fineweb.tokenize("text", chunk) for chunk in chunks])
    assert np.array_equal(tokens, expected(enc, documents))
    if size < 50:                                                    # what is long comes in pieces
        assert max(len(record) for chunk in chunks for record in chunk.records) < 50
    records = [(record, chunk.begins or n > 0) for chunk in chunks for n, record in enumerate(chunk.records)]
    for skip in range(len(records) + 1):
        rest = fineweb.read_files([tmp_path / "a.txt.gz"], "text", skip, separator)
        assert [(r, c.begins or n > 0) for c in rest for n, r in enumerate(c.records)] == records[skip:]


def test_separated_documents_go_on_after_any_shard(enc, tmp_path, monkeypatch, make_here):
    monkeypatch.setattr(fineweb, "CHUNK", 50)
    text = text_with("<|endoftext|>") * 5
    write(tmp_path / "a.txt", [text])
    flags = ["--files", "a.txt", "--separator", "<|endoftext|>", "--shard_size", "20", "--out_dir", "out"]
    make_here(*flags)
    assert np.array_equal(tokens_in(tmp_path / "out"), expected(enc, [d for d in text.split("<|endoftext|>") if d]))
    before = files(tmp_path / "out")
    for path in shards(tmp_path / "out"):
        path.unlink()
        make_here(*flags)
        assert files(tmp_path / "out") == before


def test_a_console_of_ascii_and_a_locale_without_utf8(enc, tmp_path):
    write(tmp_path / "你好.jsonl", ["x"])
    env = dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0", PYTHONWARNDEFAULTENCODING="1")
    done = make("--files", "*.jsonl", "--out_dir", "данные", cwd=tmp_path, **env)
    assert "??????: 1 shards" in done.stdout
    done.stderr += make("--files", "*.jsonl", "--out_dir", "данные", cwd=tmp_path, **env).stderr  # reads the manifest
    assert not re.search(r"fineweb\.py:\d+: EncodingWarning", done.stderr), done.stderr
    assert "你好.jsonl" in json.loads((tmp_path / "данные" / "manifest.json").read_text(encoding="utf-8"))["file 1"][0]


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_traceback(tmp_path, closed):
    (tmp_path / "a.txt").write_text("one two three")
    words = " ".join(f"'{word}'" for word in command("--files", "a.txt", "--out_dir", "out", "--num_proc", "1"))
    done = subprocess.run(f"{words} {closed}", shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr
    assert len(tokens_in(tmp_path / "out")) == 4
