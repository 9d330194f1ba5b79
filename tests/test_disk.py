"""A disk that is full, or that cannot be written to, or a kill in the middle of a save: no older checkpoint is lost."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import train_gpt2
from common import ROOT, TINY, environment, ranks, run, run_here, short_text

RUN = [*TINY, "--sample_every", "0", "--save_every", "2", "--eval_every", "2", "--keep", "9"]
FULL = "File too large|No space left"

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither a limit on a file's size nor kill -9")

# The program, but before or after the given call of one of its functions the disk is full: no file may have more bytes
# than limit. The last flag is the log_dir, of which a copy is made first.
DISK_FULL = """
import resource, shutil, sys
sys.path.insert(0, {root!r})
import train_gpt2
when, function, nth, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
del sys.argv[1:5]
calls, original = [], getattr(train_gpt2, function)

def fill():
    shutil.copytree(sys.argv[-1], sys.argv[-1] + "_before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def patched(*args):
    calls.append(args)
    if len(calls) == nth and when == "before":
        fill()
    result = original(*args)
    if len(calls) == nth and when == "after":
        fill()
    return result

setattr(train_gpt2, function, patched)
train_gpt2.main()
"""

# The program, but where it evaluates it has a fault.
FAULTY = """
import sys
sys.path.insert(0, {root!r})
import train_gpt2

def evaluate(*args):
    if kind == "boom":
        raise RuntimeError("boom")
    open("gone.txt")

kind = sys.argv.pop(1)
train_gpt2.evaluate = evaluate
train_gpt2.main()
"""

# The program, but in the middle of its second save it is killed.
KILLED = """
import io, os, signal, sys
sys.path.insert(0, {root!r})
import torch, train_gpt2
calls, original = [], torch.save

def save(state, f):
    calls.append(f)
    if len(calls) < 2:
        return original(state, f)
    whole = io.BytesIO()
    original(state, whole)
    f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    f.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save
train_gpt2.main()
"""


def same(a, b, where="state"):
    """Assert that two states are equal to the last bit."""
    sequences = isinstance(a, (list, tuple)) and isinstance(b, (list, tuple))  # AdamW's betas may be either
    assert sequences or type(a) is type(b), where
    if torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif sequences:
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            same(*pair, f"{where}.{i}")
    else:
        assert a == b, where


def assert_same_run(a, b):
    """The same log, the same checkpoints, and no other files."""
    assert sorted(files(a)) == sorted(files(b))
    assert (a / "log.txt").read_text() == (b / "log.txt").read_text()
    for path in a.glob("model_*.pt"):
        same(*(torch.load(d / path.name, weights_only=True) for d in (a, b)))


def files(log_dir):
    return {path.name: path.read_bytes() for path in log_dir.iterdir() if path.name != ".lock"}


def saved(log_dir):
    """The checkpoints in log_dir, name and bytes; all of them can be loaded, and nothing else is there but the log."""
    found = {name: data for name, data in files(log_dir).items() if name != "log.txt"}
    for name in found:
        assert re.fullmatch(r"model_\d{5}\.pt", name)
        train_gpt2.load_checkpoint(log_dir / name)
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    here = short_text(tmp_path_factory.mktemp("here"))
    (here / "disk_full.py").write_text(DISK_FULL.format(root=str(ROOT)))
    (here / "killed.py").write_text(KILLED.format(root=str(ROOT)))
    (here / "faulty.py").write_text(FAULTY.format(root=str(ROOT)))
    return here


@pytest.fixture(scope="module")
def whole(here):
    """The log_dir of a run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, here, *RUN, "--log_dir", "whole")
    return here / "whole"


@pytest.fixture
def cut_off(whole, tmp_path):
    """A copy of that run as it was right after its checkpoint of step 2."""
    log_dir = shutil.copytree(whole, tmp_path / "cut_off")
    for step in (4, 6):
        (log_dir / f"model_{step:05d}.pt").unlink()
    rows = (log_dir / "log.txt").read_text().splitlines(True)
    (log_dir / "log.txt").write_text("".join(r for r in rows if int(r.split()[0]) < 2) + rows[3])
    return log_dir


def script(here, name, *args):
    """A script of ours as a process of its own."""
    return run(*args, cwd=here, check=False, script=here / name)


def piped(here, name, *args):
    """The same where no file may have as many bytes as the output has, for which script() has files."""
    return subprocess.run([sys.executable, str(here / name), *map(str, args)], cwd=here, env=environment(),
                          capture_output=True, encoding="utf-8", timeout=120)


def assert_one_line(done, code):
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr


# A full disk ----------------------------------------------------------------------------------------------------------

@posix
@pytest.mark.parametrize("where", ["first_byte", "header", "middle", "last_byte"])
def test_a_disk_that_fills_up_while_saving_costs_no_older_checkpoint(here, whole, tmp_path, monkeypatch, where):
    size = (whole / "model_00006.pt").stat().st_size
    room = {"first_byte": 1_000, "header": 9_000, "middle": size // 2, "last_byte": size - 1}[where]
    log_dir = tmp_path / "full"
    start = piped if where == "first_byte" else script
    done = start(here, "disk_full.py", "before", "save_checkpoint", 3, room, *RUN, "--log_dir", log_dir)
    assert_one_line(done, 1)
    assert re.search(FULL, done.stderr) and "model_00006.pt" in done.stderr  # what is wrong, and with which file
    assert "whole" in done.stderr and "--resume" in done.stderr              # what is not lost, and what to do
    before = saved(log_dir)
    assert sorted(before) == ["model_00002.pt", "model_00004.pt"]
    assert before == saved(tmp_path / "full_before")                         # byte for byte
    run_here(monkeypatch, here, "--resume", "--log_dir", log_dir)            # there is room again
    assert_same_run(log_dir, whole)


@posix
def test_a_disk_that_is_full_at_the_first_save_leaves_no_half_checkpoint(here, whole, tmp_path, monkeypatch):
    log_dir = tmp_path / "full"
    done = script(here, "disk_full.py", "before", "save_checkpoint", 1, 5_000, *RUN, "--log_dir", log_dir)
    assert_one_line(done, 1)
    assert re.search(FULL, done.stderr) and saved(log_dir) == {}
    run_here(monkeypatch, here, *RUN, "--resume", "--log_dir", log_dir)      # begins anew, and moves the log aside
    assert [path.name for path in (log_dir / "earlier_run_1").iterdir()] == ["log.txt"]
    shutil.rmtree(log_dir / "earlier_run_1")
    assert_same_run(log_dir, whole)


@posix
def test_a_full_disk_ends_all_processes_and_not_only_the_one_that_saves(here, tmp_path):
    flags = ["before", "save_checkpoint", 2, 5_000, *RUN, "--batch_size", "2", "--total_batch_size", "128", "--log_dir",
             tmp_path / "full"]
    done = ranks(2, *flags, cwd=here, check=False, script=here / "disk_full.py")
    assert done.returncode == 1
    assert re.search(f"cannot write .*model_00004.pt: .*({FULL})", done.stderr)
    assert list(saved(tmp_path / "full")) == ["model_00002.pt"]


@posix
def test_a_log_that_meets_a_full_disk_ends_the_run_with_one_line(here, whole, tmp_path, monkeypatch):
    # log.txt may have 70 bytes: the fifth row is cut short, after the checkpoint of step 2
    log_dir = tmp_path / "full"
    done = piped(here, "disk_full.py", "after", "save_checkpoint", 1, 70, *RUN, "--log_dir", log_dir)
    assert_one_line(done, 1)
    assert re.search(FULL, done.stderr) and "whole" in done.stderr
    assert list(saved(log_dir)) == ["model_00002.pt"]
    assert (whole / "log.txt").read_text().startswith((log_dir / "log.txt").read_text())
    run_here(monkeypatch, here, "--resume", "--log_dir", log_dir)
    assert_same_run(log_dir, whole)


@posix
def test_a_disk_that_is_full_when_a_run_resumes_costs_no_row_of_its_log(here, whole, cut_off, monkeypatch):
    before = files(cut_off)
    done = piped(here, "disk_full.py", "before", "open_log", 1, 20, "--resume", "--log_dir", cut_off)
    assert_one_line(done, 1)
    assert re.search(FULL, done.stderr)
    assert {name: files(cut_off).get(name) for name in before} == before
    run_here(monkeypatch, here, "--resume", "--log_dir", cut_off)
    assert_same_run(cut_off, whole)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_meets_a_full_disk_ends_the_run_with_one_line(here, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(ROOT / "train_gpt2.py"), *RUN, "--log_dir", str(tmp_path / "out")],
                              cwd=here, env=environment(), stdout=full, stderr=subprocess.PIPE, encoding="utf-8",
                              timeout=120)
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr, done.stderr
    assert done.returncode == 1


# What is no full disk -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, last_line", [
    ("missing", "FileNotFoundError: [Errno 2] No such file or directory: 'gone.txt'"),
    ("boom", "RuntimeError: boom")])
def test_a_fault_of_the_programs_own_keeps_its_traceback(here, tmp_path, kind, last_line):
    done = script(here, "faulty.py", kind, *RUN, "--log_dir", tmp_path / "log")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.splitlines()[-1] == last_line
    assert "in evaluate" in done.stderr  # where it was
    assert "train_gpt2.py:" not in done.stderr and "whole" not in done.stderr
    assert not re.search(f"{FULL}|out of memory", done.stdout + done.stderr)


@pytest.mark.parametrize("fault", [
    FileNotFoundError(2, "No such file or directory", "gone.txt"), RuntimeError("boom"),
    KeyError("boom"), ValueError("boom")], ids=repr)
def test_no_fault_is_caught_and_called_something_else(here, tmp_path, monkeypatch, fault):
    def evaluate(*args):
        raise fault

    monkeypatch.setattr(train_gpt2, "evaluate", evaluate)
    with pytest.raises(type(fault)) as raised:
        run_here(monkeypatch, here, *RUN, "--log_dir", tmp_path / "log")
    assert raised.value is fault


def test_a_fault_while_saving_is_no_full_disk_and_costs_no_older_checkpoint(cut_off, monkeypatch):
    before = files(cut_off)

    def save(state, f):
        raise RuntimeError("boom")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="boom"):
        train_gpt2.save_checkpoint(cut_off / "model_00002.pt", {})
    assert {name: files(cut_off)[name] for name in before} == before


# A folder that cannot be written to -----------------------------------------------------------------------------------

def unusable(kind, folder):
    """A log_dir that cannot be one."""
    (folder / "file").write_text("mine")
    if kind == "read_only":
        if os.name == "nt" or os.geteuid() == 0:
            pytest.skip("nothing is read-only for root, nor a folder on Windows")
        (folder / "read_only").mkdir(mode=0o500)
    if kind == "log_is_a_folder":
        (folder / "log_is_a_folder" / "log.txt").mkdir(parents=True)
    return folder / {"below_a_file": "file/log", "a_file": "file"}.get(kind, kind)


@pytest.mark.parametrize("kind", ["below_a_file", "a_file", "log_is_a_folder", "read_only"])
def test_a_log_dir_that_cannot_be_written_is_refused_before_anything_slow(here, tmp_path, monkeypatch, capsys, kind):
    def too_late(*args):
        raise AssertionError("it has begun to work")

    for slow in ("Machine", "get_tokenizer", "open_data", "GPT"):
        monkeypatch.setattr(train_gpt2, slow, too_late)
    log_dir = unusable(kind, tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, here, *RUN, "--log_dir", log_dir)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and "--log_dir" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_log_dir_that_cannot_be_written_exits_2_with_one_line(here, tmp_path):
    assert_one_line(run(*RUN, "--log_dir", unusable("below_a_file", tmp_path), cwd=here, check=False), 2)


# A kill in the middle of a save ---------------------------------------------------------------------------------------

@posix
def test_a_run_killed_in_the_middle_of_a_save_resumes_to_the_same_bits(here, whole, tmp_path, monkeypatch):
    log_dir = tmp_path / "killed"
    assert script(here, "killed.py", *RUN, "--log_dir", log_dir).returncode == -9
    assert sorted(files(log_dir)) == ["log.txt", "model.tmp", "model_00002.pt"]
    run_here(monkeypatch, here, "--resume", "--log_dir", log_dir)
    assert_same_run(log_dir, whole)


@pytest.mark.parametrize("left, size", [("model.tmp", 0), ("model.tmp", 5000), ("model.tmp", 10**9), ("log.tmp", 5000)])
def test_what_a_kill_left_behind_is_overwritten_and_disturbs_nothing(here, whole, cut_off, monkeypatch, left, size):
    (cut_off / left).write_bytes(((cut_off / "model_00002.pt").read_bytes() * 2)[:size])  # at most twice as long
    run_here(monkeypatch, here, "--resume", "--log_dir", cut_off)
    assert_same_run(cut_off, whole)


def test_a_checkpoint_that_a_kill_cut_short_is_not_what_speaks(here, cut_off, monkeypatch, capsys):
    said = []
    for left in ([], ["model.tmp"]):
        for name in left:
            (cut_off / name).write_bytes(b"half")
        run_here(monkeypatch, here, "--prompt", "MIRA:", "--max_new_tokens", "9", "--log_dir", cut_off)
        said.append(tuple(capsys.readouterr()))
    assert said[0] == said[1] and said[0][1] == ""
    assert (cut_off / "model.tmp").exists()  # a run that goes on may be writing it
