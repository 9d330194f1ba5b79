"""Several processes train as one does: the same batches and losses; and if one dies, the same in the end."""
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from common import (ROOT, TINY, environment, free_port, ranks, run_here, short_text, torchrun,
                    torchrun_command)
from processes import start
from train_gpt2 import load_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_gloo_available(), reason="torchrun with gloo")

RUN = [*TINY, "--total_batch_size", "512", "--max_steps", "12", "--sample_every", "0", "--save_every", "4",
       "--eval_every", "4", "--keep", "9"]
CONSTANT = [*TINY, "--total_batch_size", "512", "--sample_every", "0", "--eval_every", "0", "--warmup_steps", "0",
            "--max_lr", "1e-3", "--min_lr", "1e-3"]

# Put around the script: what is done to it in a worker comes first.
WRAPPER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train_gpt2
rank, attempt = int(os.environ["RANK"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
{change}
train_gpt2.main()
"""

# DIE="ATTEMPT:RANK:STEP ...": there the worker is killed, when gradients are averaged and weights
# not yet changed.
DIE = """
def die(step):
    if f"{attempt}:{rank}:{step}" in os.environ["DIE"].split():
        os.kill(os.getpid(), signal.SIGKILL)
lr_factor = train_gpt2.lr_factor
train_gpt2.lr_factor = lambda step, cfg: die(step) or lr_factor(step, cfg)
"""


def wrapper(folder, change):
    """The path of a script that makes a change to train_gpt2, then runs it."""
    path = folder / "wrapper.py"
    path.write_text(WRAPPER.format(root=str(ROOT), change=change))
    return path


def without(flags, *names):
    """flags, "--name value" each, but not those of these names."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for name, value in pairs if name not in names for word in (name, value)]


def rows_of(log_dir):
    """log.txt as {(step, stream): value}. Every row is whole, and there once."""
    rows = [row.split() for row in (log_dir / "log.txt").read_text().splitlines()]
    values = {(int(step), stream): float(value) for step, stream, value in rows}
    assert len(values) == len(rows)
    return values


def steps_in(log_dir):
    return [int(path.stem[6:]) for path in sorted(log_dir.glob("model_*.pt"))]


def weights(log_dir, step=12):
    return load_checkpoint(log_dir / f"model_{step:05d}.pt")["model"]


def assert_same_run(log_dir, expected, tolerance=1e-4):
    a, b = rows_of(log_dir), rows_of(expected)
    assert a.keys() == b.keys()
    assert a == pytest.approx(b, abs=tolerance)
    (step, *_), (same_step, *_) = reversed(steps_in(log_dir)), reversed(steps_in(expected))
    assert step == same_step
    torch.testing.assert_close(weights(log_dir, step), weights(expected, step), rtol=0, atol=2e-5)


def assert_same_bits(log_dir, expected):
    """log.txt, the last weights and AdamW's moments are equal to the last bit."""
    assert (log_dir / "log.txt").read_text() == (expected / "log.txt").read_text()
    a, b = (load_checkpoint(d / "model_00012.pt") for d in (log_dir, expected))
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return short_text(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def whole(here):
    """whole(n): the log_dir of a run by n processes that nothing disturbed, and its CompletedProcess."""
    done = {}

    def whole(n):
        if n not in done:
            done[n] = ranks(n, *RUN, "--log_dir", f"whole_{n}", cwd=here)
        return here / f"whole_{n}", done[n]
    return whole


@pytest.fixture
def alone(here, monkeypatch, capsys):
    """The script as one process without torchrun, inside this one; returns its stdout, stderr."""
    def alone(*flags):
        run_here(monkeypatch, here, *flags)
        return capsys.readouterr()
    return alone


@pytest.fixture
def world_of_one(alone, monkeypatch):
    """The script inside this process, which takes itself for torchrun's only worker."""
    def world_of_one(*flags):
        env = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        for key, value in env.items():
            monkeypatch.setenv(key, str(value))
        return alone(*flags)
    return world_of_one


# The same training ----------------------------------------------------------------------------------------------------

def test_the_number_of_processes_does_not_change_the_training(here, whole, alone):
    alone(*RUN, "--log_dir", "one")
    assert "512 tokens a step = 2 x 2 x 4 x 32" in whole(2)[1].stdout  # accumulates
    assert "512 tokens a step = 1 x 4 x 4 x 32" in whole(4)[1].stdout  # does not
    for n in (2, 4):
        assert_same_run(whole(n)[0], here / "one")


def test_without_batch_flags_two_processes_share_the_step_of_one(here, alone):
    flags = without(RUN, "--batch_size", "--total_batch_size")
    out = ranks(2, *flags, "--log_dir", "unasked_2", cwd=here).stdout
    assert "256 tokens a step = 1 x 2 x 4 x 32" in out
    assert "256 tokens a step = 1 x 1 x 8 x 32" in alone(*flags, "--log_dir", "unasked_1").out
    assert_same_run(here / "unasked_2", here / "unasked_1")


def test_gradients_are_averaged_once_a_step_and_not_once_a_micro_step(world_of_one, monkeypatch):
    averaged, ddp = [], torch.nn.parallel.DistributedDataParallel
    init = ddp.__init__

    def average(state, bucket):
        averaged.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.register_comm_hook(None, average)

    monkeypatch.setattr(ddp, "__init__", watched)
    counts = {}
    for accumulate in (1, 4):
        for steps in (2, 6):
            averaged.clear()
            out = world_of_one(*RUN, "--total_batch_size", accumulate * 128, "--max_steps", steps, "--eval_every", "0",
                               "--save_every", "0", "--log_dir", "averaged").out
            assert f"= {accumulate} x 1 x 4 x 32" in out
            counts[accumulate, steps] = averaged.count(0)
        assert counts[accumulate, 6] - counts[accumulate, 2] == 4
    assert counts[1, 2] == counts[4, 2]


def test_rank_0_alone_prints_logs_and_saves(whole):
    for n in (2, 4):
        log_dir, done = whole(n)
        assert re.findall(r"^step +(\d+) \| loss", done.stdout, re.M) == [str(step) for step in range(12)]
        assert re.findall(r"^step +(\d+) \| val loss", done.stdout, re.M) == ["0", "4", "8", "12"]
        for once in ("tokens a step", "starting from step 0", "Done"):
            assert done.stdout.count(once) == 1
        rows = rows_of(log_dir)  # each once
        assert [step for step, stream in rows if stream == "train"] == list(range(12))
        assert [step for step, stream in rows if stream == "val"] == [0, 4, 8, 12]
        assert sorted(path.name for path in log_dir.iterdir()) == [".lock", "log.txt"] + [
            f"model_{step:05d}.pt" for step in (4, 8, 12)]


def test_two_nodes_train_as_one_process_does(here, alone):
    flags = [*RUN, "--log_dir", "nodes"]
    options = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=two",
               "--local-addr=127.0.0.1")
    nodes = [subprocess.Popen(torchrun_command(1, *flags, options=options), cwd=here, env=environment(),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    try:
        outputs = [node.communicate(timeout=100)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sorted(output.count("Done") for output in outputs) == [0, 1]  # one rank 0, not one for each node
    alone(*RUN, "--log_dir", "no_nodes")
    assert_same_run(here / "nodes", here / "no_nodes")


# What cannot be -------------------------------------------------------------------------------------------------------

def test_processes_that_do_not_divide_the_batch_exit_2_with_the_remedy_before_they_wait_for_each_other(here, tmp_path):
    env = environment(WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    for rank in "012":  # one after the other, so nobody can wait for another
        streams = tmp_path / rank
        streams.mkdir()
        process = start(ROOT / "train_gpt2.py", *RUN, "--log_dir", "three", cwd=here,
                        env={**env, "RANK": rank, "LOCAL_RANK": rank}, streams=streams)
        try:
            code = process.wait(timeout=30)  # a rendezvous without the others would take 30 minutes
        finally:
            process.kill()
        out, err = ((streams / name).read_text() for name in ("stdout", "stderr"))
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "must be a multiple of batch_size * seq_len * processes=384" in err
    assert not (here / "three").exists()


def test_processes_that_find_different_checkpoints_are_refused(here, whole):
    log_dir = shutil.copytree(whole(2)[0], here / "different")
    before = {path.name: path.read_bytes() for path in log_dir.iterdir()}
    script = wrapper(here, """
newest_checkpoint = train_gpt2.newest_checkpoint
train_gpt2.newest_checkpoint = lambda log_dir: (None, None) if rank else newest_checkpoint(log_dir)
""")
    done = ranks(2, *RUN, "--resume", "--log_dir", "different", cwd=here, script=script, check=False)
    assert done.returncode == 2
    assert "different checkpoints" in done.stderr and "Traceback" not in done.stderr
    assert before == {path.name: path.read_bytes() for path in log_dir.iterdir()}


def test_the_process_group_is_gone_after_every_way_out(here, world_of_one, monkeypatch):
    (here / "short.txt").write_text("too short")
    seen, destroy = [], dist.destroy_process_group

    def destroy_process_group(*args):
        seen.append(dist.is_initialized())
        destroy(*args)

    monkeypatch.setattr(dist, "destroy_process_group", destroy_process_group)
    ways_out = {0: [], 2: ["--data", "short.txt"], "step 1": ["--max_lr", "1e18"]}
    for i, (code, flags) in enumerate(ways_out.items()):
        if code == 0:
            world_of_one(*RUN, "--log_dir", "way_out", *flags)
        else:
            with pytest.raises(SystemExit) as stop:
                world_of_one(*RUN, "--log_dir", "way_out", *flags)
            assert str(stop.value.code).startswith(str(code))
        assert not dist.is_initialized()
        assert seen == [True] * (i + 1)  # there was one


# What goes wrong while running ----------------------------------------------------------------------------------------

def test_killed_workers_are_restarted_and_the_run_ends_with_the_same_bits(here, whole):
    # the first time before there is a checkpoint to go on from
    done = torchrun(2, *RUN, "--resume", "--log_dir", "killed_2", cwd=here,
                    options=("--standalone", "--max-restarts=3"), script=wrapper(here, DIE),
                    DIE="0:1:1 1:0:5 2:1:10")
    begun = re.findall(r"^resumed from step (\d+)|^step +(0) \| loss", done.stdout, re.M)
    assert [a or b for a, b in begun] == ["0", "0", "4", "8"]
    aside = here / "killed_2" / "earlier_run_1"  # what the first attempt left
    assert [path.name for path in aside.iterdir()] == ["log.txt"]
    assert set(rows_of(aside)) == {(0, "val"), (0, "train")}
    assert_same_bits(here / "killed_2", whole(2)[0])


def test_four_processes_sum_in_the_same_order_after_a_restart(here, whole):
    flags = [*RUN, "--resume", "--log_dir", "killed_4"]
    killed = ranks(4, *flags, cwd=here, check=False, script=wrapper(here, DIE), DIE="0:3:5")
    assert killed.returncode and steps_in(here / "killed_4") == [4]
    done = ranks(4, *flags, cwd=here)
    assert re.findall(r"^resumed from step (\d+)", done.stdout, re.M) == ["4"]
    assert_same_bits(here / "killed_4", whole(4)[0])


def test_sigterm_saves_and_another_number_of_processes_takes_the_same_global_batches(here, alone):
    alone(*CONSTANT, "--max_steps", "3", "--log_dir", "moves")                       # 1 process
    log_dir = here / "moves"
    with open(here / "moves.out", "w") as out:                                       # 2, preempted
        launcher = subprocess.Popen(torchrun_command(2, "--resume", "--max_steps", "100000", "--log_dir", "moves"),
                                 cwd=here, env=environment(), stdout=out, stderr=subprocess.STDOUT)
        try:
            while launcher.poll() is None and "\n20 train" not in (log_dir / "log.txt").read_text():
                time.sleep(0.001)
            launcher.send_signal(signal.SIGTERM)
            launcher.wait(timeout=25)                                                   # after 30 s, torchrun kills
        finally:
            launcher.kill()
    stopped = re.search(r"^stopped after (\d+) steps", (here / "moves.out").read_text(), re.M)
    steps = int(stopped.group(1))
    assert 20 < steps == steps_in(log_dir)[-1]
    assert [step for step, _ in rows_of(log_dir)] == list(range(steps))

    end = ["--max_steps", steps + 5]
    alone(*CONSTANT, *end, "--log_dir", "stays")
    shutil.copytree(log_dir, here / "moves_to_1")
    assert f"resumed from step {steps}" in alone("--resume", *end, "--log_dir", "moves_to_1").out
    assert_same_run(here / "moves_to_1", here / "stays")
    out = ranks(4, "--resume", *end, "--log_dir", "moves", cwd=here).stdout          # 4
    assert f"resumed from step {steps}" in out and "1 x 4 x 4 x 32" in out
    assert_same_run(log_dir, here / "stays")
