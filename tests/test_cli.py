"""What a user types: nothing happens behind his back, and what cannot be is said in one line."""
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import ROOT, TINY, command, environment, run, run_here, short_text

QUICK = [*TINY, "--max_steps", "2", "--sample_every", "0"]


def test_import_prints_nothing_writes_nothing_and_needs_no_network(tmp_path):
    code = f"import sys, socket\nsys.path.insert(0, {str(ROOT)!r})\n" \
           "def no(*args): raise SystemExit('the network')\n" \
           "socket.socket.connect = socket.getaddrinfo = no\n" \
           "import train_gpt2, torch\n" \
           "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n" \
           "assert not {'transformers', 'wandb', 'hellaswag'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env=environment(), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_flags(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert "--max_steps" in done.stdout and "--no-compile" in done.stdout and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with all kinds of files that do not do."""
    here = short_text(tmp_path_factory.mktemp("here"))
    run(*QUICK, "--save_every", "1", cwd=here)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, here, "--export", "exported")
    (here / "latin1.txt").write_bytes("Grüße".encode("latin-1") * 1000)
    (here / "empty.txt").write_bytes(b"")
    (here / "short.txt").write_bytes(b"too short")
    for name, files in {"no_shards": [], "texts": ["a.txt", "b.txt"], "only_train": ["train_0.npy"],
                        "odd_names": ["shard_0.npy", "shard_1.bin"]}.items():
        (here / name).mkdir()
        for file in files:
            (here / name / file).write_bytes(b"0" * 5000)
    (here / "short_val.txt").write_bytes(b"x" * 320)  # of the last tenth, no window of 32 + 1
    for name, text in {"not_json": "{", "a_list": "[]", "not_gpt2": json.dumps({"model_type": "bert"}),
                       "no_weights": json.dumps({"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}),
                       }.items():
        (here / name).mkdir()
        (here / name / "config.json").write_text(text)
    shutil.copytree(here / "no_weights", here / "half_the_weights")
    torch.save({"wte.weight": torch.zeros(50257, 8)}, here / "half_the_weights" / "pytorch_model.bin")
    shutil.copy(here / "log" / "model_00002.pt", here / "truncated.pt")
    os.truncate(here / "truncated.pt", 5000)
    torch.save([1, 2], here / "list.pt")
    return here


@pytest.fixture(autouse=True)
def no_progress_bars():
    """In a process of its own, the program sees to that before it imports the library."""
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


CUDA = [] if torch.cuda.is_available() else [["--device", "cuda"]]
IMPOSSIBLE = CUDA + [line.split() for line in """\
--no_such_flag
--max_step 3
surplus
--max_steps
--max_steps many
--max_steps 1.5
--tokenizer words
--dtype float8
--data missing.txt
--data latin1.txt
--data empty.txt
--data short.txt
--data short_val.txt
--data no_shards --tokenizer byte
--data texts --tokenizer byte
--data odd_names --tokenizer byte
--data only_train --tokenizer byte
--data no_shards --eval_only --init_from scratch --tokenizer byte
--seq_len 33
--n_embd 33
--n_head 0
--n_layer -1
--batch_size 0
--batch_size -4
--batch_size 1000000
--total_batch_size 100
--max_steps -1
--max_lr nan
--max_lr inf
--max_lr -1
--grad_clip -1
--weight_decay nan
--seed -1
--seed 18446744073709551616
--temperature -1
--temperature nan
--temperature inf
--top_k -1
--top_p 0
--top_p 2
--top_p nan
--num_samples 0
--keep 0
--warmup_steps 3
--log_dir input.txt
--log_dir input.txt/log
--prompt x --log_dir nothing_there
--eval_only --log_dir nothing_there
--prompt x --n_embd 64
--prompt x --tokenizer gpt2
--prompt x --eval_only
--eval_only --prompt x
--eval_only --export folder
--export folder --prompt x
--eval_only --data missing.txt
--init_from nonsense --tokenizer byte
--init_from missing.pt
--init_from truncated.pt
--init_from list.pt
--init_from log/model_00002.pt --block_size 64
--init_from not_json --tokenizer byte
--init_from a_list --tokenizer byte
--init_from no_shards --tokenizer byte
--init_from exported --n_layer 2
--init_from exported --model gpt2
""".splitlines()]


def impossible(flags):
    """The flags, after those of a quick run where these do not clash with them."""
    looks = {"--init_from", "--prompt", "--eval_only", "--export"}
    return flags if looks & set(flags) else [*QUICK, *flags]


@pytest.mark.parametrize("flags", IMPOSSIBLE, ids=" ".join)
def test_what_cannot_be_is_said_in_one_line_and_changes_nothing(monkeypatch, capfd, here, flags):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, here, *impossible(flags))
    err = capfd.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("train_gpt2.py: ") and err.count("\n") == 1, err
    said = [flag for flag in flags if len(flag) > 2 and flag.strip("-") in err]
    assert said, f"does not say what is wrong: {err}"
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()} == before


def refused(monkeypatch, capfd, here, *flags):
    """What is said of flags that cannot be: one line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, here, *flags)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    return err


@pytest.mark.parametrize("flags", [
    ["--eval_only", "--prompt", "x"], ["--prompt", "x", "--eval_only"],
    ["--eval_only", "--export", "folder"], ["--prompt", "x", "--export", "folder"]], ids=" ".join)
def test_of_what_does_not_train_one_thing_at_a_time(monkeypatch, capfd, here, flags):
    err = refused(monkeypatch, capfd, here, *flags)
    assert all(flag in err for flag in flags if flag.startswith("--")) and "not allowed with" in err
    assert not (here / "folder").exists()


@pytest.mark.vocabulary
@pytest.mark.parametrize("data, found", [
    ("no_shards", (0, 0)), ("texts", (0, 0)), ("odd_names", (0, 0)), ("only_train", (1, 0))])
def test_a_folder_without_shards_is_refused_with_what_was_looked_for(monkeypatch, capfd, here, data,
                                                                     found):
    for tokenizer in ([], ["--tokenizer", "byte"]):
        err = refused(monkeypatch, capfd, here, *QUICK, "--data", data, *tokenizer)
        assert err.startswith(f"train_gpt2.py: --data {data}: ")
        for word in ("*train*", "*val*", ".npy", ".bin", "python fineweb.py"):
            assert word in err
        assert "found {} and {}".format(*found) in err


@pytest.mark.vocabulary
def test_the_command_that_a_folder_of_texts_is_told_makes_shards(monkeypatch, capfd, here, tmp_path):
    (tmp_path / "my texts").mkdir()
    for i in range(3):
        (tmp_path / "my texts" / f"{i}.txt").write_bytes((here / "input.txt").read_bytes()[:6000])
    err = refused(monkeypatch, capfd, tmp_path, *QUICK, "--data", "my texts")
    words = shlex.split(re.search(r"python fineweb\.py .*", err).group())
    few = ["--shard_size", "2000"]  # as fineweb.py says where there is little text
    subprocess.run([sys.executable, str(ROOT / words[1]), *words[2:], *few], cwd=tmp_path,
                   env=environment(), check=True, capture_output=True)
    made = words[words.index("--out_dir") + 1]
    run_here(monkeypatch, tmp_path, *QUICK, "--data", made)
    assert capfd.readouterr().out.count("val loss") == 2


@pytest.mark.parametrize("data, split", [
    ("short.txt", "train"), ("empty.txt", "train"), ("short_val.txt", "val")])
def test_a_text_too_short_for_one_window_names_the_flag_that_helps(monkeypatch, capfd, here, data,
                                                                   split):
    err = refused(monkeypatch, capfd, here, *QUICK, "--data", data)
    assert err.startswith(f"train_gpt2.py: {data} ({split})") and "--seq_len" in err


def test_a_shorter_seq_len_is_what_helps_a_short_text(monkeypatch, capfd, here, tmp_path):
    run_here(monkeypatch, here, *QUICK, "--data", "short_val.txt", "--seq_len", "8",
             "--total_batch_size", "32", "--log_dir", tmp_path / "log")
    assert capfd.readouterr().out.count("val loss") == 2


@pytest.mark.parametrize("start", ["log/model_00002.pt", "exported"])
@pytest.mark.parametrize("flags", [["--n_layer", "2"], ["--n_embd", "64"], ["--block_size", "64"]],
                         ids=" ".join)
def test_the_shape_of_weights_cannot_be_chosen(monkeypatch, capfd, here, start, flags):
    for look in ([], ["--prompt", "x"]):
        err = refused(monkeypatch, capfd, here, "--init_from", start, *flags, *look)
        assert err.startswith(f"train_gpt2.py: {' '.join(flags)}: {start} has ")


def test_the_process_exits_2_with_one_line(here):
    for flags in (["--max_steps", "-1"], ["--prompt", "x", "--log_dir", "nothing_there"]):
        done = run(*flags, cwd=here, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("name", ["not_gpt2", "no_weights", "half_the_weights"])
def test_a_folder_that_is_no_gpt2_is_refused_in_one_line(here, name):
    done = run("--init_from", name, "--tokenizer", "byte", "--prompt", "x", cwd=here, check=False, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and name in done.stderr and done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("vocab_size", [31, 1000])  # fewer rows than the bytes' 320, and more
def test_weights_for_another_tokenizer_are_refused_in_one_line(here, tmp_path, vocab_size):
    from transformers import GPT2Config, GPT2LMHeadModel
    GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=16, n_layer=1, n_head=2, n_embd=8)).save_pretrained(
        tmp_path / "theirs")
    done = run("--init_from", tmp_path / "theirs", "--tokenizer", "byte", "--prompt", "x", cwd=here, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"train_gpt2.py: {tmp_path / 'theirs'} knows {vocab_size} tokens, and the tokenizer byte has 257: "
        "see --tokenizer\n")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may write anywhere")
def test_a_log_dir_that_may_not_be_written_is_said_in_one_line(here, tmp_path):
    tmp_path.chmod(0o500)
    done = run(*QUICK, "--log_dir", tmp_path / "log", cwd=here, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [QUICK, [*QUICK, "--max_steps", "200"], ["--help"],
                                   ["--prompt", "x", "--max_new_tokens", "50"]],
                         ids=["short", "long", "help", "prompt"])
def test_a_reader_that_has_gone_makes_no_noise(here, flags):
    process = subprocess.Popen(command(*flags, *([] if "--prompt" in flags else ["--log_dir", "piped"])), cwd=here,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `| head` does when it has its lines
    assert process.stderr.read() == ""
    assert process.wait() in (0, 1)


def test_text_does_not_need_its_data_to_be_spoken(monkeypatch, capsys, here, tmp_path):
    shutil.copy(here / "input.txt", tmp_path / "my.txt")
    run_here(monkeypatch, tmp_path, *QUICK, "--data", "my.txt", "--save_every", "2")
    (tmp_path / "my.txt").unlink()
    capsys.readouterr()
    run_here(monkeypatch, tmp_path, "--prompt", "Once", "--max_new_tokens", "5")
    assert capsys.readouterr().out.startswith("Once")


@pytest.mark.parametrize("prompt", [b"\xff\xfe", b"", b"\0", "\u2028é".encode(), b"a\r\nb"])
def test_any_bytes_on_stdin_are_a_prompt(monkeypatch, capsys, here, prompt):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt), encoding="utf-8"))
    run_here(monkeypatch, here, "--prompt", "-", "--max_new_tokens", "3")
    assert capsys.readouterr().out.startswith(prompt.decode(errors="replace"))


def test_a_console_that_lacks_a_character_shows_another(here):
    done = subprocess.run(command("--prompt", "é 🙂", "--max_new_tokens", "3"), cwd=here, capture_output=True,
                          env=environment(PYTHONIOENCODING="ascii"))
    assert done.returncode == 0 and done.stdout.startswith(b"? ?")


def test_wrong_ids_in_the_data_do_not_push_an_earlier_run_aside(monkeypatch, capsys, here, tmp_path):
    for split in ("train", "val"):
        np.save(tmp_path / f"{split}.npy", np.full(2000, 50000, dtype=np.uint16))
    shutil.copytree(here / "log", tmp_path / "log")
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, tmp_path, *QUICK, "--data", tmp_path, "--model", "demo", "--tokenizer", "byte")
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "log" / "model_00002.pt").exists()


def test_a_text_with_one_window_to_validate_on_is_enough(monkeypatch, capsys, tmp_path):
    (tmp_path / "input.txt").write_bytes(b"x" * 330)  # 33 bytes of validation
    run_here(monkeypatch, tmp_path, *QUICK)
    assert capsys.readouterr().out.count("val loss") == 2


def test_no_steps_at_all_is_a_look_at_the_untrained_model(monkeypatch, capsys, here, tmp_path):
    run_here(monkeypatch, here, *QUICK, "--max_steps", "0", "--log_dir", tmp_path / "log")
    assert capsys.readouterr().out.count("val loss") == 1


def test_a_very_low_temperature_takes_the_likeliest_token(monkeypatch, capsys, here):
    said = []
    for temperature in ("0", "1e-6", "1e-39"):
        run_here(monkeypatch, here, "--prompt", "Once", "--max_new_tokens", "5", "--temperature", temperature)
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1


@pytest.mark.parametrize("flags", [["--prompt", "Once", "--max_new_tokens", "5"], ["--eval_only"]],
                         ids=" ".join)
def test_what_does_not_train_needs_no_steps(monkeypatch, capsys, here, flags):
    """The checkpoint's warm-up is longer than no steps, and that is no matter."""
    checkpoint = torch.load(here / "log" / "model_00002.pt", weights_only=True)
    checkpoint["config"]["warmup_steps"] = 2
    torch.save(checkpoint, here / "warm.pt")
    said = []
    for start in ([], ["--init_from", "log/model_00002.pt"], ["--init_from", "warm.pt"]):
        for steps in ([], ["--max_steps", "0"]):
            run_here(monkeypatch, here, *flags, *start, *steps)
            said.append(capsys.readouterr().out)
    assert len(set(said)) == 1 and said[0].startswith(("Once", "val loss"))


# What next? -----------------------------------------------------------------------------------------------------------

def next_command(out):
    """The command that a run names at its end, or None. Else it says where the log is."""
    assert out.count("Done: ") == 1
    found = re.search(r"What next\?\n  (.*)\n$", out)
    assert found or not re.search("What next|python|--", out[out.index("Done: "):])
    return found and found.group(1)


@pytest.mark.skipif(os.name == "nt", reason="a command for a POSIX shell")
def test_the_command_that_is_named_at_the_end_works_as_it_stands(here, tmp_path):
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o700)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # The script lies in a folder whose name has a space, too.
    scripts = tmp_path / "the scripts"
    scripts.mkdir()
    for name in ("train_gpt2.py", "input.txt"):
        shutil.copy(ROOT / name, scripts)
    how = {"cwd": here, "env": environment(PATH=path), "capture_output": True, "encoding": "utf-8"}
    trained = subprocess.run(
        ["python", str(scripts / "train_gpt2.py"), *QUICK, "--log_dir", "it's a run"], **how)
    words = shlex.split(next_command(trained.stdout))
    assert words[0] == "python" and words[-2:] == ["--prompt", "Once"]
    done = subprocess.run(words, **how)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Once") and len(done.stdout) > 10


def test_the_command_speaks_with_the_best_checkpoint(monkeypatch, capsys, here, tmp_path):
    losses = iter([9.0, 3.0, 1.0, 5.0])  # at the steps 0 ... 3
    monkeypatch.setattr("train_gpt2.evaluate", lambda *args: (next(losses), ""))
    run_here(monkeypatch, here, *QUICK, "--max_steps", "3", "--save_every", "1", "--eval_every",
             "1", "--log_dir", tmp_path / "my run")
    words = shlex.split(next_command(capsys.readouterr().out))
    assert words[words.index("--init_from") + 1] == str(tmp_path / "my run" / "model_00002.pt")


@pytest.mark.parametrize("flags", [["--save_every", "0"], ["--max_steps", "0"]], ids=" ".join)
def test_no_command_is_named_where_there_is_no_checkpoint(monkeypatch, capsys, here, tmp_path,
                                                          flags):
    shutil.copytree(here / "log", tmp_path / "log")  # nor is that of an earlier run
    run_here(monkeypatch, here, *QUICK, *flags, "--log_dir", tmp_path / "log")
    assert next_command(capsys.readouterr().out) is None
    assert not list((tmp_path / "log").glob("*.pt"))
