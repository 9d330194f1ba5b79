"""Stop anywhere and resume to the same bits; and whatever breaks, an older checkpoint is whole."""
import os
import re
import shutil
import signal
import time
import weakref
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

import train_gpt2
from common import (ROOT, TINY, environment, machine_of, optimizer_steps, parameters, run, run_here,
                    short_text)
from processes import start
from train_gpt2 import SIZES, UserError, load_checkpoint, save_checkpoint

RUN = [*TINY, "--sample_every", "0", "--save_every", "2", "--eval_every", "2", "--keep", "9"]
LONG = [*RUN, "--max_steps", "600", "--save_every", "20", "--eval_every", "30", "--keep", "99"]


def same(a, b, where="state"):
    """Assert that two states are equal to the last bit."""
    assert type(a) is type(b) or isinstance(a, (list, tuple)), where
    if torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            same(*pair, f"{where}.{i}")
    else:
        assert a == b, where


def last(folder, step=6):
    return load_checkpoint(folder / f"model_{step:05d}.pt")


def steps_in(log_dir):
    return [int(path.stem[6:]) for path in sorted(log_dir.glob("model_*.pt"))]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return short_text(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def whole(here):
    """The log_dir of a short run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, here, *RUN, "--log_dir", "whole")
    return here / "whole"


@pytest.fixture(scope="module")
def whole_long(here):
    run(*LONG, "--log_dir", "whole_long", cwd=here)
    return here / "whole_long"


@pytest.fixture
def train(here, monkeypatch, capsys):
    """Run in this process; return stdout, stderr."""
    def train(*flags):
        run_here(monkeypatch, here, *flags)
        return capsys.readouterr()
    return train


@pytest.fixture
def cut_off(whole, tmp_path):
    """A copy of the short run as it was right after its checkpoint of step 2, and a row of step 3 besides."""
    log_dir = shutil.copytree(whole, tmp_path / "cut_off")
    for step in (4, 6):
        (log_dir / f"model_{step:05d}.pt").unlink()
    rows = (log_dir / "log.txt").read_text().splitlines(True)
    (log_dir / "log.txt").write_text("".join(r for r in rows if int(r.split()[0]) < 4))
    return log_dir


# Stop and resume ------------------------------------------------------------------------------------------------------

def interrupt(flags, here, log_dir, step, how):
    """Start a run; when it has logged step, do how(process). Returns its exit code and what it had printed."""
    streams = here / f"{log_dir}_{step}"
    streams.mkdir()
    process = start(ROOT / "train_gpt2.py", *flags, "--log_dir", log_dir, cwd=here, env=environment(), streams=streams)
    log = here / log_dir / "log.txt"
    try:
        while process.poll() is None and not (log.exists() and f"\n{step} train" in log.read_text()):
            time.sleep(0.001)
        how(process)
        process.wait(timeout=60)
    finally:
        process.kill()
    out, err = ((streams / name).read_text() for name in ("stdout", "stderr"))
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


@pytest.mark.process
def test_a_killed_run_resumes_to_the_same_bits(here, whole_long):
    for step in (47, 305):  # resumed, killed again, resumed
        flags = LONG if step == 47 else ["--resume"]
        assert interrupt(flags, here, "killed", step, lambda process: process.kill()).returncode != 0
        assert max(steps_in(here / "killed")) < 600
    run("--resume", "--log_dir", "killed", cwd=here)
    assert (here / "killed" / "log.txt").read_text() == (whole_long / "log.txt").read_text()
    rows = [tuple(row.split()[:2]) for row in (here / "killed" / "log.txt").read_text().splitlines()]
    assert len(set(rows)) == len(rows) == 600 + 21
    same(last(here / "killed", 600), last(whole_long, 600))


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_0_and_the_run_resumes_to_the_same_bits(here, whole_long, signum):
    name = signum.name
    done = interrupt(LONG, here, name, 47, lambda process: process.send_signal(signum))
    assert (done.returncode, done.stderr) == (0, "")
    stopped = int(re.search(r"stopped after (\d+) steps", done.stdout).group(1))
    assert 47 < stopped < 600 and max(steps_in(here / name)) == stopped
    run("--resume", "--log_dir", name, cwd=here)
    assert (here / name / "log.txt").read_text() == (whole_long / "log.txt").read_text()
    same(last(here / name, 600), last(whole_long, 600))


@pytest.mark.process
def test_output_to_a_file_or_a_pipe_is_there_even_if_the_run_is_killed(here):
    done = interrupt(LONG, here, "output", 9, lambda process: process.kill())
    assert f"step {9:5d} | loss" in done.stdout  # buffered, a hundred lines would be missing, and `| tee` shows nothing


def test_resume_without_a_checkpoint_starts_and_after_the_end_changes_nothing(train, here, whole):
    assert "starting from step 0" in train(*RUN, "--log_dir", "new", "--resume").out
    same(last(here / "new"), last(whole))
    train("--log_dir", "new", "--resume")
    assert (here / "new" / "log.txt").read_text() == (whole / "log.txt").read_text()
    same(last(here / "new"), last(whole))


def test_resume_holds_no_copy_of_the_checkpoint_while_it_trains(train, cut_off, monkeypatch):
    """It would be half as much again as the model and its moments."""
    read, held = [], []

    def watched(path):
        state = load_checkpoint(path)
        moments = [m for p in state["optimizer"]["state"].values() for m in p.values()]
        read.extend(map(weakref.ref, [*state["model"].values(), *moments]))
        return state

    def look(optimizer):
        used = [m for p in parameters(optimizer) for m in (p, *optimizer.state[p].values())]
        used = {t.untyped_storage().data_ptr() for t in used}
        alive = [t for t in (ref() for ref in read) if t is not None]
        held.append(sum(t.untyped_storage().data_ptr() not in used for t in alive))

    monkeypatch.setattr(train_gpt2, "load_checkpoint", watched)
    with optimizer_steps(after=look):
        train("--resume", "--log_dir", cut_off)
    assert read and held[-4:] == [0] * 4  # before them comes one that only makes the moments


def test_resume_restores_the_random_generator(train, cut_off):
    state = last(cut_off, 2)
    state["rng"] = torch.Generator().manual_seed(99).get_state()
    torch.save(state, cut_off / "model_00002.pt")
    train("--log_dir", str(cut_off), "--resume")
    assert torch.equal(last(cut_off)["rng"], state["rng"])  # nothing in training draws from it


def test_resume_keeps_a_warm_up_that_was_asked_for(train, here):
    flags = [*RUN, "--warmup_steps", "5", "--log_dir", "warm"]
    train(*flags)
    expected = last(here / "warm")
    for step in (4, 6):
        (here / "warm" / f"model_{step:05d}.pt").unlink()
    train("--log_dir", "warm", "--resume")
    same(last(here / "warm"), expected)


def test_a_run_may_always_be_started_with_resume_and_init_from(train, here, whole):
    # as a cluster's job does that is started again and again
    flags = ["--init_from", str(whole / "model_00006.pt"), "--max_steps", "2", "--sample_every", "0", "--resume"]
    train(*flags, "--log_dir", "tuned")
    assert steps_in(here / "tuned") == [2]
    train(*flags, "--log_dir", "tuned")
    assert steps_in(here / "tuned") == [2]


def test_a_checkpoint_is_a_start_for_another_run(train, here, whole):
    out = train("--init_from", str(whole / "model_00006.pt"), "--max_steps", "2", "--sample_every", "0",
                "--val_tokens", "9999", "--log_dir", "other").out
    report = re.search(r"step +6 \| (val loss .*)", train("--resume", "--log_dir", str(whole)).out).group(1)
    assert f"step     0 | {report}" in out  # begins with its weights, at step 0


def test_eval_only_prints_the_last_validation_of_the_run(train, whole):
    report = train("--eval_only", "--log_dir", str(whole)).out
    assert report.startswith("val loss") and report.count("\n") == 1
    assert f"{float((whole / 'log.txt').read_text().split()[-1]):.4f}" in report


# What may change ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, named", [
    (["--n_embd", 64], "--n_embd 64"), (["--n_layer", 2], "--n_layer 2"),
    (["--n_head", 4], "--n_head 4"), (["--block_size", 64], "--block_size 64"),
    pytest.param(["--tokenizer", "gpt2"], "the tokenizer gpt2 has 50257: see --tokenizer", marks=pytest.mark.vocabulary),
    (["--seq_len", 16], "--seq_len 16"),
    (["--model", "gpt2"], "--n_layer 12"),
    (["--model", "demo", "--n_layer", 1, "--n_head", 2], "--n_embd 128")], ids=str)
def test_resume_refuses_another_shape_and_another_tokenizer(train, capsys, cut_off, flags, named):
    before = {path.name: path.read_bytes() for path in cut_off.iterdir()}
    with pytest.raises(SystemExit) as stop:
        train("--log_dir", str(cut_off), "--resume", *flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert named in err and "model_00002.pt" in err
    assert before == {path.name: path.read_bytes() for path in cut_off.iterdir()}


@pytest.mark.parametrize("flags", [
    {}, {"max_lr": 1e-4}, {"weight_decay": 0.5},
    {"max_lr": 2e-3, "min_lr": 1e-3, "weight_decay": 0.0}, {"warmup_steps": 5},
    {"min_lr": 1e-3}, {"grad_clip": 0.01}, {"seed": 1}, {"total_batch_size": 256}], ids=str)
def test_on_resume_the_checkpoints_configuration_holds_and_flags_override_it(train, cut_off, flags):
    before = last(cut_off, 2)
    given = [word for key, value in flags.items() for word in (f"--{key}", value)]
    groups, steps = [], []

    def look(optimizer):
        if optimizer.param_groups[0]["lr"] == 0:
            return  # a resume begins with a step that changes nothing and makes the moments
        groups.append([dict(group) for group in optimizer.param_groups])
        steps.append({int(optimizer.state[p]["step"]) for p in parameters(optimizer)})

    with optimizer_steps(after=look):
        train("--log_dir", cut_off, "--resume", *given)
    config = {**before["config"], **flags}
    if "max_lr" in flags and "min_lr" not in flags:
        config["min_lr"] = flags["max_lr"] / 100  # the lowest follows the highest
    assert last(cut_off)["config"] == config
    assert steps == [{3}, {4}, {5}, {6}]  # AdamW goes on, too
    for step, (matrices, vectors) in zip(range(2, 6), groups, strict=True):
        rate = config["max_lr"] * train_gpt2.lr_factor(step, SimpleNamespace(**config))
        assert [matrices["lr"], vectors["lr"]] == pytest.approx([rate, rate], rel=1e-12)
        assert [matrices["max_lr"], vectors["max_lr"]] == [config["max_lr"]] * 2
        assert [matrices["weight_decay"], vectors["weight_decay"]] == [config["weight_decay"], 0.0]
        assert {p.dim() for p in matrices["params"]} == {2}


def test_what_was_asked_for_at_first_holds_after_a_resume_without_flags(train, here):
    asked = {"max_lr": 1e-4, "min_lr": 5e-5, "weight_decay": 0.3, "grad_clip": 0.5, "seed": 7}
    given = [word for key, value in asked.items() for word in (f"--{key}", value)]
    train(*RUN, *given, "--max_steps", "2", "--log_dir", "asked")
    seen = []

    def look(optimizer):
        seen.append([dict(group) for group in optimizer.param_groups])

    with optimizer_steps(before=look):
        train("--log_dir", "asked", "--resume", "--max_steps", "4")
    assert asked.items() <= last(here / "asked", 4)["config"].items()
    for matrices, vectors in seen[-2:]:
        assert (matrices["max_lr"], matrices["weight_decay"]) == (1e-4, 0.3)
        assert (vectors["max_lr"], vectors["weight_decay"]) == (1e-4, 0.0)


def test_resume_allows_more_steps_and_other_reports(train, cut_off):
    train("--log_dir", str(cut_off), "--resume", "--max_steps", "8", "--eval_every", "1", "--keep", "3")
    assert steps_in(cut_off)[-1] == 8
    rows = [row.split()[:2] for row in (cut_off / "log.txt").read_text().splitlines()]
    assert [step for step, stream in rows if stream == "train"] == [str(step) for step in range(8)]
    assert [step for step, stream in rows if stream == "val"] == ["0"] + [str(step) for step in range(2, 9)]


def test_resume_with_smaller_passes_takes_the_same_global_batches(train, whole, cut_off):
    train("--log_dir", str(cut_off), "--resume", "--batch_size", "1")
    assert last(cut_off)["position"] == last(whole)["position"]
    assert last(cut_off)["config"]["batch_size"] == 1
    rows, expected = ((d / "log.txt").read_text().split() for d in (cut_off, whole))
    assert rows[::3] == expected[::3] and rows[1::3] == expected[1::3]
    assert [float(v) for v in rows[2::3]] == pytest.approx([float(v) for v in expected[2::3]], abs=1e-3)


@pytest.mark.parametrize("before, after", [("float32", "float16"), ("float16", "float32"), ("float16", "float16")])
def test_resume_on_a_machine_with_another_dtype(train, here, before, after):
    log_dir = f"{before}_{after}"
    train(*RUN, "--dtype", before, "--log_dir", log_dir, "--max_steps", "2")
    assert bool(last(here / log_dir, 2)["scaler"]) == (before == "float16")  # its scale is part of the run
    train("--resume", "--dtype", after, "--log_dir", log_dir, "--max_steps", "4")
    scaler = last(here / log_dir, 4)["scaler"]
    assert bool(scaler) == (after == "float16")
    if before == after:
        assert scaler["_growth_tracker"] == 4  # good steps in a row, those before the stop too


# Files ----------------------------------------------------------------------------------------------------------------

def test_a_checkpoint_holds_plain_values_that_torch_loads_safely(whole):
    state = torch.load(whole / "model_00006.pt", weights_only=True)

    def walk(value):
        if isinstance(value, (dict, list, tuple)):
            assert type(value) in (dict, OrderedDict, list, tuple)
            for item in value.values() if isinstance(value, dict) else value:
                walk(item)
        else:
            assert type(value) in (torch.Tensor, int, float, str, bool, type(None)), type(value)

    walk(state)
    assert (state["step"], state["config"]["max_steps"]) == (6, 6)


def test_a_broken_newest_checkpoint_is_passed_over_with_a_warning(train, whole, cut_off):
    shutil.copy(whole / "model_00004.pt", cut_off)
    os.truncate(cut_off / "model_00004.pt", 5000)
    assert "model_00004.pt" in train("--log_dir", str(cut_off), "--resume").err
    assert (cut_off / "log.txt").read_text() == (whole / "log.txt").read_text()
    same(last(cut_off), last(whole))


@pytest.mark.parametrize("flags", [["--resume"], ["--prompt", "x"], ["--eval_only"]])
def test_only_broken_checkpoints_is_an_error_and_not_a_fresh_start(train, capsys, cut_off, flags):
    (cut_off / "model_00002.pt").write_bytes(b"")
    log = (cut_off / "log.txt").read_text()
    with pytest.raises(SystemExit) as stop:
        train("--log_dir", str(cut_off), *flags)
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert (cut_off / "log.txt").read_text() == log


def test_a_save_that_breaks_off_leaves_the_older_checkpoints_whole(monkeypatch, cut_off):
    path = cut_off / "model_00002.pt"
    before = path.read_bytes()

    def save_half(state, f):
        f.write(before[:len(before) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(train_gpt2.RunError, match="No space left"):
        save_checkpoint(path, {"format": 1})
    assert path.read_bytes() == before and steps_in(cut_off) == [2]


def test_the_newest_and_the_best_are_kept(train, here, monkeypatch):
    losses = iter([9.0, 3.0, 1.0, 5.0, 4.0, 6.0, 7.0])  # at the steps 0 ... 6
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args: (next(losses), ""))
    train(*RUN, "--log_dir", "keep", "--save_every", "1", "--eval_every", "1", "--keep", "2")
    assert steps_in(here / "keep") == [2, 5, 6]


def test_the_best_is_kept_also_if_the_run_was_stopped_and_resumed_there(train, here, monkeypatch):
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args: ([9.0, 3.0, 1.0, 5.0, 4.0, 6.0, 7.0][steps[0]], ""))
    steps = [0]

    def count(optimizer):
        if optimizer.param_groups[0]["lr"] == 0:
            return  # a resume begins with a step that changes nothing and makes room for the moments
        steps[0] += 1
        if steps == [2]:
            assert callable(signal.getsignal(signal.SIGTERM))  # else the next line ends the tests
            signal.raise_signal(signal.SIGTERM)

    with optimizer_steps(after=count):
        train(*RUN, "--log_dir", "best", "--save_every", "1", "--eval_every", "1", "--keep", "2")
        assert steps_in(here / "best") == [1, 2]
        train("--log_dir", "best", "--resume")
    assert steps_in(here / "best") == [2, 5, 6]


def test_a_fresh_run_moves_an_earlier_one_aside_and_loses_nothing(train, cut_off):
    before = {path.name: path.read_bytes() for path in cut_off.iterdir()}
    for n in (1, 2):
        train(*RUN, "--max_steps", "2", "--log_dir", str(cut_off))
        aside = cut_off / f"earlier_run_{n}"
        if n == 1:
            (aside / ".lock").touch()  # stays where the run is
            before.setdefault(".lock", b"")
            assert before == {path.name: path.read_bytes() for path in aside.iterdir()}
        assert steps_in(aside) == [2] and steps_in(cut_off) == [2]


def test_a_second_run_in_the_current_folder_moves_nothing_but_the_first(monkeypatch, tmp_path):
    short_text(tmp_path)
    for _ in range(2):
        run_here(monkeypatch, tmp_path, *RUN, "--max_steps", "2", "--log_dir", ".")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "earlier_run_1", "input.txt", "log.txt", "model_00002.pt"]
    assert sorted(path.name for path in (tmp_path / "earlier_run_1").iterdir()) == [
        "log.txt", "model_00002.pt"]


# What goes wrong while running ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, good", [
    (["--save_every", "2"], [2, 4]),
    (["--save_every", "1"], [1, 2, 3, 4]),                       # step 4's update was bad: no model_00005.pt
    (["--save_every", "1", "--eval_every", "0"], [1, 2, 3, 4]),
    (["--save_every", "5", "--sample_every", "5"], [2, 4]),      # the best of every other step
    (["--save_every", "5", "--sample_every", "5", "--eval_every", "0"], []),
    (["--save_every", "0", "--eval_every", "5"], []),
    (["--save_every", "0", "--max_steps", "5"], [])])            # the last step ruins it
def test_a_loss_that_is_not_finite_stops_the_run_before_it_saves_the_damage(train, here, monkeypatch, flags, good):
    log_dir = "nan_" + "_".join(flags).replace("-", "")
    with monkeypatch.context() as bad, pytest.raises(SystemExit) as stop:
        bad.setattr(train_gpt2, "lr_factor", lambda step, cfg: 1e30 if step == 4 else 0.3)
        train(*RUN, "--log_dir", log_dir, "--max_steps", "20", *flags)
    message = str(stop.value.code)  # Python prints a text, and exits with 1
    assert "nan" not in (here / log_dir / "log.txt").read_text()
    assert "step 5" in message and "--max_lr" in message
    assert steps_in(here / log_dir) == good
    if good:
        assert f"step {good[-1]} is good" in message and "--resume" in message
        train("--resume", "--log_dir", log_dir, "--max_lr", "1e-4", "--max_steps", "7")  # as it says
        rows = [row.split() for row in (here / log_dir / "log.txt").read_text().splitlines()]
        assert [int(step) for step, stream, _ in rows if stream == "train"] == list(range(7))
        assert all(float(value) < 6 for *_, value in rows)
    else:  # there is nothing to go on from
        assert not re.search(r"--init_from|--resume|\.pt|checkpoint|from there", message)


@pytest.mark.process
def test_not_finite_exits_1_with_one_line(here):
    done = run(*RUN, "--log_dir", "inf", "--max_lr", "1e18", cwd=here, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("step 1:")
    assert "model_" not in done.stdout + done.stderr  # there is no checkpoint yet


def step_of(sequences, T, size="demo", batch_size=None):
    """So many sequences a step; batch_size None: the machine chooses it."""
    return SimpleNamespace(**SIZES[size], batch_size=batch_size, seq_len=T,
                           total_batch_size=sequences * T)


def test_a_batch_size_that_was_asked_for_is_taken():
    for B in (1, 3, 100):
        assert machine_of().sequences(step_of(3 * B, 32, batch_size=B)) == B


@pytest.mark.parametrize("sequences, T, B", [(8, 32, 8), (12, 32, 4), (7, 32, 1), (1024, 32, 64),
                                             (8, 1024, 4), (8, 3000, 1), (8, 9000, 1)])
def test_on_a_cpu_a_pass_has_as_many_sequences_as_divide_the_step(sequences, T, B):
    assert machine_of().sequences(step_of(sequences, T)) == B


@pytest.mark.parametrize("size", ["gpt2", "gpt2-xl"])
def test_on_a_gpu_a_pass_has_as_many_sequences_as_fit(monkeypatch, size):
    machine = machine_of()
    machine.cuda, chosen = True, {}
    for compiles in (True, False):
        machine.compiles = compiles
        for gigabytes in (0, 8, 16, 24, 40, 80, 140, 192, 1000):
            free = gigabytes * 10**9
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
            B = chosen[compiles, gigabytes] = machine.sequences(step_of(512, 1024, size))
            assert B in (1, 2, 4, 8, 16, 32, 64)
        ordered = [B for (c, _), B in chosen.items() if c == compiles]
        assert ordered == sorted(ordered) and ordered[0] == 1 and ordered[-1] == 64
    assert all(chosen[False, gigabytes] <= chosen[True, gigabytes] for _, gigabytes in chosen)
    if size == "gpt2":
        assert chosen[True, 80] == 64  # as it was measured


def test_out_of_memory_with_a_batch_size_that_was_asked_for_says_what_to_do(train, monkeypatch):
    def forward(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(train_gpt2.GPT, "forward", forward)
    with pytest.raises(SystemExit, match="--batch_size"):
        train(*RUN, "--log_dir", "oom")


def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path):
    for name, state in {"list.pt": [1], "foreign.pt": {"model": {}}, "newer.pt": {"format": 999}}.items():
        torch.save(state, tmp_path / name)
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("flags", [
    ["--init_from", "old/model_00002.pt", "--max_steps", "2", "--log_dir", "new"],
    ["--init_from", "old/model_00002.pt", "--prompt", "x"],
    ["--resume", "--log_dir", "old"], ["--prompt", "x", "--log_dir", "old"],
    ["--eval_only", "--log_dir", "old"]], ids=" ".join)
def test_a_checkpoint_of_an_older_version_is_refused_in_one_line(cut_off, monkeypatch, capsys,
                                                                 flags):
    """It can be had all the same: the version that wrote it exports it."""
    state = last(cut_off, 2)
    state["format"] = 3
    state["model_config"]["padded_vocab_size"] = 320  # as they were
    old = cut_off.rename(cut_off.with_name("old"))
    torch.save(state, old / "model_00002.pt")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, old.parent, *flags)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert "model_00002.pt" in err and "format 3" in err and "--export" in err
    assert before == {path.name: path.read_bytes() for path in old.iterdir()}
    assert not (old.parent / "new").exists() and err.count("\n") == 1, err
