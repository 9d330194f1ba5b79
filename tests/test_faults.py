"""Faults of every kind: damaged files, two programs in one folder, half an environment, text as it comes."""
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import tracemalloc

import filelock
import numpy as np
import pytest
import torch

import train_gpt2
from common import ROOT, TINY, command, environment, run, run_here, short_text
from train_gpt2 import GPT, GPTConfig, UserError, get_tokenizer, load_checkpoint, open_data, read_tokens

RUN = [*TINY, "--sample_every", "0", "--save_every", "2", "--eval_every", "2", "--keep", "9"]
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    here = short_text(tmp_path_factory.mktemp("here"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, here, *RUN, "--log_dir", "whole")
    return here


@pytest.fixture
def log_dir(here, tmp_path):
    """A copy of a run of 6 steps, with checkpoints of the steps 2, 4, 6."""
    return shutil.copytree(here / "whole", tmp_path / "log")


@pytest.fixture
def refused(here, monkeypatch, capfd):
    """The one line with which the program, in this process, exits with 2 (or another code)."""
    def refused(*flags, code=2):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_here(monkeypatch, here, *flags)
        line = capfd.readouterr().err
        if isinstance(stop.value.code, str):  # Python prints it, and exits with 1
            line, stop.value.code = stop.value.code + "\n", 1
        assert stop.value.code == code and line.count("\n") == 1, (stop.value.code, line)
        return line
    return refused


@pytest.fixture
def train(here, monkeypatch, capfd):
    """Run in this process; return stdout, stderr."""
    def train(*flags):
        capfd.readouterr()
        run_here(monkeypatch, here, *flags)
        return capfd.readouterr()
    return train


# Checkpoints ----------------------------------------------------------------------------------------------------------

def equal(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("how", ["zeroed", "flipped", "cut"])
def test_no_damaged_checkpoint_is_believed(here, tmp_path, how):
    good = (here / "whole" / "model_00006.pt").read_bytes()
    state = load_checkpoint(here / "whole" / "model_00006.pt")
    rng = np.random.default_rng(0)
    refused = 0
    for start in rng.integers(0, len(good), 30):
        bad = bytearray(good)
        if how == "cut":
            bad = bad[:start]
        elif how == "flipped":
            bad[start] ^= 1 << int(rng.integers(8))
        else:
            bad[start:start + 64] = bytes(len(bad[start:start + 64]))
        (tmp_path / "bad.pt").write_bytes(bad)
        try:
            loaded = load_checkpoint(tmp_path / "bad.pt")
        except UserError as e:
            refused += "\n" not in str(e) and "bad.pt" in str(e)
        else:
            # Between the parts of a zip file are bytes that mean nothing.
            assert equal(loaded, state), start
    assert refused > 15


def test_a_part_that_calls_itself_a_folder_is_damaged(here, tmp_path):
    """PyTorch reads nothing for it, and takes what the memory happens to hold; zipfile finds nothing wrong."""
    good = (here / "whole" / "model_00006.pt").read_bytes()
    places = [m.start() + 38 for m in re.finditer(rb"PK\x01\x02", good)]
    assert len(places) > 20
    for place in places[::5]:
        bad = bytearray(good)
        bad[place] ^= 16
        (tmp_path / "bad.pt").write_bytes(bad)
        with pytest.raises(UserError, match="bad.pt"):
            load_checkpoint(tmp_path / "bad.pt")


def other_shape(state):
    state["model"]["transformer.ln_f.weight"] = torch.ones(7)


def other_moment(state):
    state["optimizer"]["state"]["transformer.ln_f.weight"]["exp_avg"] = torch.ones(7)


def no_numbers(state):
    state["model"]["transformer.ln_f.weight"][3] = math.nan


@pytest.mark.parametrize("damage", [
    lambda state: [state.pop(key) for key in list(state) if key != "format"], lambda state: state.pop("optimizer"),
    lambda state: state["config"].update(n_wings=2), lambda state: state["model"].pop("transformer.ln_f.bias"),
    lambda state: state.update(step="six"), other_shape, other_moment, no_numbers])
def test_a_newest_checkpoint_that_does_not_fit_together_is_passed_over_with_a_warning(train, here, log_dir, damage):
    state = torch.load(log_dir / "model_00006.pt", weights_only=True)
    damage(state)
    torch.save(state, log_dir / "model_00006.pt")
    out, err = train("--resume", "--log_dir", log_dir)
    assert "resumed from step 4" in out
    assert err.count("\n") == 1 and "model_00006.pt" in err and "going on from" in err and "model_00004.pt" in err
    assert equal(load_checkpoint(log_dir / "model_00006.pt"), load_checkpoint(here / "whole" / "model_00006.pt"))


@pytest.mark.parametrize("name", ["model_².pt", "model_.pt", "model_x.pt", pytest.param("model_00099.pt", marks=posix)])
def test_what_is_no_file_of_a_checkpoint_is_left_alone(train, log_dir, name):
    os.mkfifo(log_dir / name) if name == "model_00099.pt" else (log_dir / name).write_bytes(b"mine")
    out, err = train("--resume", "--log_dir", log_dir, "--max_steps", "8")
    assert "resumed from step 6" in out and "warning: with these flags" in err and (log_dir / name).exists()


@posix
def test_a_pipe_as_a_checkpoint_is_refused_and_not_waited_for(refused, log_dir):
    os.mkfifo(log_dir / "pipe.pt")
    assert "no such file" in refused("--init_from", log_dir / "pipe.pt", "--prompt", "x")


@pytest.mark.parametrize("look", [["--prompt", "x"], ["--eval_only"], ["--export", "never"]])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_no_numbers_are_not_looked_at(refused, here, log_dir, look, value):
    for step in (2, 4):
        (log_dir / f"model_{step:05d}.pt").unlink()
    state = torch.load(log_dir / "model_00006.pt", weights_only=True)
    state["model"]["transformer.wpe.weight"][0, 0] = value
    torch.save(state, log_dir / "model_00006.pt")
    assert "model_00006.pt" in refused(*look, "--log_dir", log_dir)
    assert not (here / "never").exists()


def test_a_hugging_face_folder_whose_weights_are_no_numbers_is_refused(refused, train, here, log_dir, tmp_path):
    train("--export", tmp_path / "hf", "--log_dir", log_dir)
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    model.transformer.wpe.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path / "hf")
    assert "no numbers" in refused("--init_from", tmp_path / "hf", "--prompt", "x")


# The best -------------------------------------------------------------------------------------------------------------

def test_a_new_best_is_saved_when_it_is_seen(train, here, monkeypatch):
    seen = {0: 9.0, 4: 3.0, 8: 1.0, 12: 2.0, 16: 4.0, 20: 4.5}  # by step: only 12 is a multiple of save_every, too
    steps = iter(seen)
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args: (seen[next(steps)], ""))
    flags = [*RUN, "--max_steps", "20", "--eval_every", "4", "--save_every", "6", "--keep", "1"]
    train(*flags, "--log_dir", "best")
    assert sorted(p.name for p in (here / "best").glob("*.pt")) == ["model_00008.pt", "model_00020.pt"]
    assert load_checkpoint(here / "best" / "model_00020.pt")["best"] == (1.0, 8)
    steps = iter(seen)
    train(*flags, "--log_dir", "none", "--save_every", "0")
    assert not [*(here / "none").glob("*.pt")]


# Two programs in one folder -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [OSError(38, "ENOSYS"), OSError(37, "ENOLCK"), RuntimeError("no flock")])
def test_a_disk_without_locks_has_runs_all_the_same(train, monkeypatch, tmp_path, error):
    def acquire(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert "Done" in train(*RUN, "--log_dir", tmp_path / "log").out


@pytest.mark.parametrize("flags", [RUN, ["--resume", "--max_steps", "9"]])
def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(refused, train, log_dir, flags):
    before = {p.name: p.read_bytes() for p in log_dir.iterdir()}
    with filelock.FileLock(log_dir / ".lock"):
        assert "another run" in refused(*flags, "--log_dir", log_dir)
        assert {p.name: p.read_bytes() for p in log_dir.iterdir()} == before
        # To look at a run while it trains is no second run.
        train("--eval_only", "--log_dir", log_dir)
    train(*flags, "--log_dir", log_dir)


def test_a_run_holds_its_folder_until_it_is_dead_and_no_longer(refused, train, here, tmp_path):
    flags = [*RUN, "--max_steps", "100000", "--log_dir", str(tmp_path / "log")]
    first = subprocess.Popen(command(*flags), cwd=here, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        for line in first.stdout:
            if line.startswith("step     3"):
                break
        assert "another run" in refused(*flags)
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    (tmp_path / "log" / "model.tmp").unlink(missing_ok=True)
    steps = [int(p.stem[6:]) for p in (tmp_path / "log").glob("*.pt")]
    train(*(["--resume"] if steps else RUN), "--log_dir", tmp_path / "log", "--max_steps", str(max(steps, default=4) + 2),
          "--warmup_steps", "0")


# What input is this? --------------------------------------------------------------------------------------------------

def test_a_run_that_goes_on_with_another_text_says_so(train, here, log_dir, tmp_path):
    text = (here / "input.txt").read_bytes()
    (tmp_path / "other.txt").write_bytes(text[:5000] + b"!" + text[5001:])  # one letter, and as long as before
    (tmp_path / "same.txt").write_bytes(text)
    for name, said in {"other.txt": True, "same.txt": False}.items():
        log = shutil.copytree(log_dir, tmp_path / name.removesuffix(".txt"))
        err = train("--resume", "--log_dir", log, "--data", tmp_path / name).err
        assert ("is not what this run has been trained on" in err) == said and err.count("\n") == said


def test_a_run_that_goes_on_with_other_shards_says_so(train, tmp_path):
    tokens = np.arange(5000, dtype=np.uint16) % 256
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name, n in {"train_1": 3000, "train_2": 5000, "val": 2000}.items():
            np.save(tmp_path / folder / name, tokens[:n])
    flags = [*RUN, "--tokenizer", "byte", "--hellaswag_every", "0", "--log_dir", tmp_path / "log"]
    train(*flags, "--data", tmp_path / "a")
    assert train(*flags, "--resume", "--data", tmp_path / "b").err == ""  # a copy
    np.save(tmp_path / "b" / "train_2", tokens[:5000][::-1])
    assert "is not what this run" in train(*flags, "--resume", "--data", tmp_path / "b").err


# What torchrun sets ---------------------------------------------------------------------------------------------------

WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}


@pytest.mark.parametrize("env", [
    {"WORLD_SIZE": "2"}, {"RANK": "0"}, {"LOCAL_RANK": "1"}, {**WHOLE, "WORLD_SIZE": "abc"},
    {**WHOLE, "WORLD_SIZE": "0"}, {**WHOLE, "WORLD_SIZE": "-1"}, {**WHOLE, "RANK": "1"}, {**WHOLE, "RANK": ""},
    {**WHOLE, "MASTER_PORT": "x"}, {**WHOLE, "RANK": "1" * 5000, "WORLD_SIZE": "2" * 5000}, {key: WHOLE[key] for key in list(WHOLE)[:3]}], ids=str)
def test_half_of_torchruns_variables_is_refused(refused, monkeypatch, here, env):
    for key in WHOLE:
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert "torchrun" in refused(*RUN, "--log_dir", "half")
    assert not (here / "half").exists()


def test_an_address_without_a_rank_is_of_no_interest(train, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "somewhere")  # as a cluster may set it for every job
    assert "Done" in train(*RUN, "--log_dir", "alone").out


def test_an_address_that_is_none_is_not_waited_for(refused, monkeypatch):
    for key, value in {**WHOLE, "MASTER_ADDR": "no.such.host.invalid"}.items():
        monkeypatch.setenv(key, value)
    assert "MASTER_ADDR" in refused(*RUN, "--log_dir", "address")


def test_a_port_in_use_is_said_in_one_line(refused, monkeypatch):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as server:
        for key, value in {**WHOLE, "MASTER_PORT": str(server.getsockname()[1])}.items():
            monkeypatch.setenv(key, value)
        assert "MASTER_PORT" in refused(*RUN, "--log_dir", "port")


# Text as it comes -----------------------------------------------------------------------------------------------------

def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc\xef\xbb\xbf" * 10)
    (train_split,), (val_split,) = open_data(tmp_path / "a.txt", get_tokenizer("byte"))
    # Only the first one is a mark.
    assert bytes([*train_split, *val_split]) == (b"\xef\xbb\xbfabc\xef\xbb\xbf" * 10)[3:]


def test_a_run_of_blanks_that_tiktoken_cannot_cut_is_named(tmp_path):
    try:
        enc = get_tokenizer("gpt2")
    except UserError as e:
        pytest.skip(str(e))
    path = tmp_path / "blanks.txt"
    path.write_text("one  two\nthree\n" + "x" + " " * 1_300_000 + "y\n")
    with pytest.raises(UserError, match="^[^U]*blanks.txt: from line 3 .*1,300,000 blanks"):
        read_tokens(path, enc)
    assert len(read_tokens(path, get_tokenizer("byte"))) == path.stat().st_size


@pytest.mark.parametrize("name", ["byte", "gpt2"])
def test_a_separator_becomes_the_token_between_documents(tmp_path, name):
    try:
        enc = get_tokenizer(name)
    except UserError as e:
        pytest.skip(str(e))
    text = "one two<|endoftext|>three<|endoftext|><|endoftext|>fünf 🙂<|endoftext|>"
    path = tmp_path / "docs.txt"
    path.write_text("\ufeff" + text, "utf-8")
    eot = enc.eot_token
    expected = [eot, *enc.encode_ordinary("one two"), eot, *enc.encode_ordinary("three"),
                eot, *enc.encode_ordinary("fünf 🙂")]
    assert read_tokens(path, enc, "<|endoftext|>").tolist() == expected
    # Without one, it is text like other text.
    assert read_tokens(path, enc).tolist() == enc.encode_ordinary(text)


def test_the_separator_is_used_for_both_splits_and_kept_by_a_checkpoint(train, here, tmp_path):
    text = (here / "input.txt").read_text()
    (tmp_path / "docs.txt").write_text("\n---\n".join(text[i:i + 500] for i in range(0, len(text), 500)))
    flags = ["--data", tmp_path / "docs.txt", "--log_dir", tmp_path / "log"]
    train(*RUN, *flags, "--separator", "\n---\n")
    state = load_checkpoint(tmp_path / "log" / "model_00006.pt")
    assert state["config"]["separator"] == "\n---\n"
    assert train("--resume", *flags, "--max_steps", "6").err == ""
    assert "is not what this run" in train("--resume", *flags, "--separator", "").err


@pytest.mark.parametrize("line", ["It is a long text.\n", "It’s a ‘longer’ one.\r\n", "With a 🙂.\n"])
def test_a_long_text_takes_little_memory(tmp_path, line):
    (tmp_path / "long.txt").write_text(line * 200_000, "utf-8", newline="")
    size = (tmp_path / "long.txt").stat().st_size
    enc = get_tokenizer("byte")
    tracemalloc.start()
    train_split, val_split = open_data(tmp_path / "long.txt", enc)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 4 * size
    assert bytes([*train_split[0], *val_split[0]]) == (line * 200_000).replace("\r\n", "\n").encode()


@posix
def test_what_is_written_is_utf8_whatever_the_locale(here, tmp_path):
    done = run(*RUN, "--log_dir", "größe", cwd=here, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0",
               PYTHONIOENCODING="")
    assert "Done" in done.stdout and (here / "größe" / "log.txt").read_text("utf-8").startswith("0 val")


# Shards and log -------------------------------------------------------------------------------------------------------

def npy(header):
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4000)


@pytest.mark.parametrize("content", [
    b"", b"PK\x03\x04" + bytes(200), b"\x93NUMPY", npy("{'descr': '<u2', 'fortran_order': False, 'shape': (2000"),
    npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-5,), }"), npy("[" * 100), npy("{'descr': 'ö'}"),
    npy("{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (2000,), }"),
    npy("{'descr': '|O', 'fortran_order': False, 'shape': (9,), }"),
    npy("{'descr': '>u2', 'fortran_order': False, 'shape': (2000,), }"),
    npy("{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999,), }")], ids=lambda c: str(c[10:60]))
def test_whatever_numpy_meets_in_a_shard_is_one_line_with_its_name(tmp_path, content):
    (tmp_path / "train.npy").write_bytes(content)
    with pytest.raises(UserError, match="train.npy") as e:
        train_gpt2.open_shard(tmp_path / "train.npy")
    assert "\n" not in train_gpt2.one_line(e.value)


def test_a_shard_that_is_longer_than_its_header_says_is_none(tmp_path):
    np.save(tmp_path / "train.npy", np.arange(400, dtype=np.uint16))
    good = (tmp_path / "train.npy").read_bytes()
    assert len(train_gpt2.open_shard(tmp_path / "train.npy")) == 400
    for place in range(10, 128):
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            (tmp_path / "train.npy").write_bytes(bad)
            try:
                tokens = train_gpt2.open_shard(tmp_path / "train.npy")
            except UserError as e:
                assert "train.npy" in str(e)
            else:
                assert tokens.tolist() == list(range(400)), (place, bit)  # a blank that became another


def test_an_npz_that_was_renamed_is_no_shard(tmp_path):
    np.savez(tmp_path / "a.npz", tokens=np.arange(100, dtype=np.uint16))
    (tmp_path / "a.npz").rename(tmp_path / "train.npy")
    with pytest.raises(UserError, match="train.npy"):
        train_gpt2.open_shard(tmp_path / "train.npy")


@pytest.mark.parametrize("row", [
    b"\xff\xfe\x00\n", b"1" * 5000 + b" train 1.0\n", "² train 1.0\n".encode(), b"1 train\n", b"1 train x\n",
    b"1 train 1.0 2.0\n", b"1 train .\n", b"1 train 1.2.3\n", b"x\x0c1 train 1.0\n", "x\u20281 train 1.0\n".encode(), b"\x00" * 4000 + b"\n", b"-1 train 1.0\n"], ids=lambda row: str(row[:20]))
def test_a_row_of_the_log_that_is_none_is_dropped(train, here, log_dir, row):
    log = (log_dir / "log.txt").read_bytes()
    (log_dir / "log.txt").write_bytes(log[:60] + b"\n" + row + log[60:])
    expected = (log[:60] + b"\n" + log[60:]).decode().splitlines(True)
    train("--resume", "--log_dir", log_dir)
    kept = (log_dir / "log.txt").read_text("utf-8")
    # The row that this test broke in two is no row either.
    assert set(kept.splitlines(True)) <= set(expected) | set(log.decode().splitlines(True))
    assert len(kept.splitlines()) >= len(log.splitlines()) - 1


# Numbers --------------------------------------------------------------------------------------------------------------

def test_float16_that_leaves_out_every_step_ends_the_run(refused, monkeypatch, here):
    configure_optimizers = train_gpt2.configure_optimizers

    def ruined(model, *args):
        model.transformer.ln_f.weight.register_hook(lambda g: g * math.nan)
        return configure_optimizers(model, *args)

    monkeypatch.setattr(train_gpt2, "configure_optimizers", ruined)
    flags = [*RUN, "--dtype", "float16", "--max_steps", "40", "--save_every", "0", "--eval_every", "0"]
    line = refused(*flags, "--log_dir", "skipped", code=1)
    assert line.startswith("step 9:") and "--dtype" in line  # the tenth step
    rows = (here / "skipped" / "log.txt").read_text().splitlines()
    assert len(rows) == 9


def test_float16_may_leave_out_a_step_now_and_then(train, monkeypatch):
    configure_optimizers = train_gpt2.configure_optimizers
    steps = iter([1.0, *[math.nan] * 9, 1.0, *[math.nan] * 9, *[1.0] * 20])

    def ruined(model, *args):
        model.transformer.ln_f.weight.register_hook(lambda g: g * next(steps))
        return configure_optimizers(model, *args)

    monkeypatch.setattr(train_gpt2, "configure_optimizers", ruined)
    flags = [*RUN, "--dtype", "float16", "--max_steps", "40", "--save_every", "0", "--eval_every", "0"]
    assert "Done" in train(*flags, "--log_dir", "sometimes").out


# Export ---------------------------------------------------------------------------------------------------------------

def test_an_export_is_readable_for_all_and_takes_nobodys_folder(train, log_dir, tmp_path):
    (tmp_path / "hf.tmp").mkdir()
    (tmp_path / "hf.tmp" / "mine").write_text("mine")
    train("--export", tmp_path / "hf", "--log_dir", log_dir)
    assert (tmp_path / "hf.tmp" / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "hf.tmp", "log"]
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    # A class that versions 4 and 5 of transformers have.
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["padding_side"] == "left"
    if os.name != "nt":
        assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "hf").iterdir()} == {0o644}
        assert stat.S_IMODE((tmp_path / "hf").stat().st_mode) & 0o500 == 0o500


def test_prompts_of_unequal_length_go_on_as_each_does_alone(train, log_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    train("--export", tmp_path / "hf", "--log_dir", log_dir)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5, generator=torch.Generator().manual_seed(p.numel()))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")

    def said(prompts):
        ids = tokenizer(prompts, padding=True, return_tensors="pt")
        return tokenizer.batch_decode(model.generate(**ids, do_sample=False, max_new_tokens=9)[:, -9:])

    prompts = ["MIRA: who", "a"]
    assert said(prompts) == [said([prompts[0]])[0], said([prompts[1]])[0]]


@pytest.mark.parametrize("full", ["model", "tokenizer"])
def test_an_export_that_breaks_off_is_one_line_and_leaves_nothing(refused, monkeypatch, log_dir, tmp_path, full):
    import transformers
    broken = transformers.GPT2LMHeadModel if full == "model" else transformers.PreTrainedTokenizerFast

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, "save_pretrained", save_pretrained)
    assert "No space left" in refused("--export", tmp_path / "hf", "--log_dir", log_dir)
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_an_export_may_have_any_name(train, log_dir, tmp_path):
    train("--export", tmp_path / "größe 你好", "--log_dir", log_dir)
    from transformers import AutoTokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / "größe 你好")("a")["input_ids"] == [97]


# Names ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["openai-community/gpt2", "openai-community/gpt2-xl", "distilgpt2"])
def test_names_that_people_use_are_looked_for(monkeypatch, name):
    from transformers import GPT2Config, GPT2LMHeadModel
    asked = []

    def from_pretrained(name, **how):
        asked.append(name)
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32)), {"missing_keys": []}

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", from_pretrained)
    assert train_gpt2.from_pretrained(name).config.vocab_size == 50257 and asked == [name]


def test_an_adapter_is_to_be_merged_first(refused, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge" in refused("--init_from", tmp_path, "--prompt", "x")


@pytest.mark.vocabulary
def test_a_data_set_folder_is_told_how_it_becomes_shards(refused, tmp_path):
    import datasets
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    line = refused("--data", tmp_path / "saved")
    assert "fineweb.py" in line and "to_json" in line


@pytest.mark.vocabulary
def test_a_vocabulary_that_no_tokenizer_has_is_not_blamed_on_a_flag_that_nobody_gave(refused, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=300)).save_pretrained(tmp_path / "hf")
    line = refused("--init_from", tmp_path / "hf", "--prompt", "x")
    assert "300 tokens" in line and re.search("tokenizer gpt2 has 50257", line)


# Words that help ------------------------------------------------------------------------------------------------------

def test_more_steps_that_change_the_rate_say_so(train, log_dir):
    assert train("--resume", "--log_dir", log_dir).err == ""
    err = train("--resume", "--log_dir", log_dir, "--max_steps", "12").err
    assert err.count("\n") == 1 and "learning rate" in err


@pytest.mark.vocabulary
def test_an_empty_path_is_not_the_default_one(refused):
    assert "--data" in refused(*RUN, "--data", "", "--log_dir", "empty")


@pytest.mark.parametrize("name", [".lock", "log.tmp", "model.tmp"])
def test_a_folder_where_a_file_should_be_is_one_line(refused, log_dir, name):
    (log_dir / name).unlink(missing_ok=True)
    (log_dir / name).mkdir()
    code = 1 if name == "model.tmp" else 2
    refused("--resume", "--log_dir", log_dir, code=code)


@pytest.mark.parametrize("flags, warned", [(["--seq_len", "16"], True), ([], False)])
def test_positions_that_are_never_trained_are_named(train, flags, warned):
    err = train(*RUN, *flags, "--log_dir", "positions").err
    assert ("seq_len=16" in err and "block_size=32" in err and err.count("\n") == 1) == warned


@pytest.mark.parametrize("flags", [
    ["--data", "a\nb"], ["--init_from", "a\nb"], ["--log_dir", "input.txt/a\nb"], ["--model", "a\nb"],
    ["--data", "x" * 5000], ["--log_dir", "x" * 5000], ["--init_from", "x" * 5000], ["--export", "x" * 5000]],
    ids=lambda flags: f"{flags[0]} {flags[1][:3]!r}")
def test_one_line_is_one_line_and_no_name_is_too_long(refused, log_dir, flags):
    more = ["--log_dir", log_dir] if "--export" in flags else RUN[:-2]
    line = refused(*more, *flags)
    assert "make room" not in line


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_no_full_disk(refused, tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "make room" not in refused(*RUN, "--data", tmp_path / "closed" / "a.txt")


# Devices --------------------------------------------------------------------------------------------------------------

def test_8_bits_are_for_nvidias_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))  # an MI300
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    cfg = train_gpt2.TrainConfig(n_embd=128, fp8=True)
    train_gpt2.Machine(cfg)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(UserError, match="--fp8 needs"):
        train_gpt2.Machine(cfg)


@posix
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_no_traceback(here, tmp_path, closed):
    words = {"<&-": "--prompt - --log_dir whole", ">&-": " ".join(RUN), "2>&-": " ".join(RUN)}[closed]
    log = "" if "--prompt" in words else f"--log_dir {tmp_path / 'log'}"
    done = subprocess.run(f"'{sys.executable}' '{ROOT / 'train_gpt2.py'}' {words} {log} {closed}", shell=True, cwd=here,
                          env=environment(), capture_output=True, text=True)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == (2 if "--prompt" in words else 0)
    assert "stdin" in done.stderr if "--prompt" in words else (tmp_path / "log" / "model_00006.pt").exists()


@posix
def test_a_compiler_that_is_missing_is_one_line(here, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    done = run(*RUN, "--compile", "--log_dir", tmp_path / "log", cwd=here, check=False, PATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("--no-compile")
    assert "Traceback" not in done.stderr
