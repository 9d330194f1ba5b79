"""What several tests need."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import train_gpt2
from processes import start

ROOT = Path(train_gpt2.__file__).resolve().parent

torch.set_num_threads(1)  # with models this small, threads mostly wait for each other


def machine_of(**flags):
    """This process on a CPU, as the program sees it."""
    return train_gpt2.Machine(train_gpt2.TrainConfig(**{"device": "cpu", **flags}))


def randomise(module, std=0.3, seed=0):
    """Give every parameter, biases and LayerNorms too, random values, so that a mix-up shows. Returns the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=std, generator=generator)
    return module


def talkative(model, seed=0):
    """Give a GPT large random matrices and no biases: its likeliest text goes on changing. Returns the model."""
    randomise(model, std=1.0, seed=seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.fill_(name.endswith("weight"))  # LayerNorm: weights 1, biases 0
    return model


def generate(model, prompts, max_new_tokens, cache=True, **how):
    """The new tokens of each row, a list of lists; prompts are as long as each other."""
    idx = torch.tensor(prompts, device=model.lm_head.weight.device)
    speaker = train_gpt2.cached(model) if cache else model
    return torch.cat(list(train_gpt2.generate(speaker, idx, max_new_tokens, **how)), dim=1).tolist()


@torch.no_grad()
def naive(model, prompt, n):
    """The n likeliest tokens after a prompt, one at a time, computing the whole context each time."""
    idx = torch.tensor([prompt])
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size:])[:, -1]
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), dim=1)
    return idx[0, len(prompt):].tolist()


def loader_of(tokens, B, T, **kwargs):
    """A loader of one row of ids."""
    return train_gpt2.DataLoaderLite([np.asarray(tokens)], B, T, vocab_size=2**16, **kwargs)


def optimizer_of(model, lr):
    (optimizer,) = train_gpt2.configure_optimizers(model, lr, weight_decay=0.1)
    return optimizer


TINY = ["--n_layer", "1", "--n_head", "2", "--n_embd", "32", "--block_size", "32", "--batch_size", "4",
        "--total_batch_size", "128", "--max_steps", "6", "--device", "cpu", "--log_every", "1"]


def short_text(folder):
    """A short input.txt in folder: the script looks for it there first, and one evaluation takes no time."""
    (folder / "input.txt").write_bytes((ROOT / "input.txt").read_bytes()[:20_000])
    return folder


def command(*flags):
    return [sys.executable, str(ROOT / "train_gpt2.py"), *map(str, flags)]


def environment(**env):
    """What a user has: output to a pipe is buffered. And UTF-8 on every platform."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "", **env}


def run(*flags, cwd, check=True, input="", script=ROOT / "train_gpt2.py", **env):
    """The script as a process of its own: a CompletedProcess with stdout and stderr as text."""
    return finished(script, flags, cwd, [environment(**env)], check, input)


def ranks(n, *flags, cwd, check=True, script=ROOT / "train_gpt2.py", **env):
    """The script as n processes that torchrun could have started, which would itself import torch, too."""
    group = dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return finished(script, flags, cwd, [environment(**group, RANK=str(r), LOCAL_RANK=str(r), **env)
                                         for r in range(n)], check)


def finished(script, flags, cwd, environments, check, input=""):
    """A process of the script for each environment, as one CompletedProcess. If one fails, the others are ended."""
    with tempfile.TemporaryDirectory() as streams:
        Path(streams, "stdin").write_bytes(input.encode())
        processes, end = [], time.monotonic() + 300
        try:
            for env in environments:
                processes.append(start(script, *flags, cwd=cwd, env=env, streams=streams))
            while None in (codes := [p.poll() for p in processes]) and not any(codes):
                assert time.monotonic() < end, Path(streams, "stdout").read_text(encoding="utf-8")
                time.sleep(0.005)
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(timeout=30)
        finally:
            for process in processes:
                process.kill()
        out, err = (Path(streams, name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    done = subprocess.CompletedProcess(flags, next(filter(None, codes), 0), out, err)
    assert not check or done.returncode == 0, out + err
    return done


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun_command(n, *flags, options=("--standalone",), script=ROOT / "train_gpt2.py"):
    return [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={n}", str(script),
            *map(str, flags)]


def torchrun(n, *flags, cwd, check=True, options=("--standalone",), script=ROOT / "train_gpt2.py", **env):
    """The script as n processes under torchrun: a CompletedProcess with stdout and stderr as text."""
    done = subprocess.run(torchrun_command(n, *flags, options=options, script=script), cwd=cwd,
                          env=environment(**env), capture_output=True, encoding="utf-8", timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(monkeypatch, cwd, *flags):
    """The script in this process, which is quicker and lets a test look inside."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *map(str, flags)])
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        train_gpt2.main()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def losses(stdout):
    """The training losses that a run printed."""
    return [float(loss) for loss in re.findall(r"^step +\d+ \| loss (\S+)", stdout, re.M)]


@contextlib.contextmanager
def optimizer_steps(before=None, after=None):
    """Call before(optimizer) and after(optimizer) at every optimiser step."""
    handles = [register(lambda optimizer, args, kwargs, f=f: f(optimizer)) for register, f in (
        (register_optimizer_step_pre_hook, before), (register_optimizer_step_post_hook, after)) if f]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def losses_of(log_dir):
    """The values of log.txt, in its order."""
    return [float(row.split()[2]) for row in (log_dir / "log.txt").read_text().splitlines()]


def assert_they_say_the_same(models, cwd, monkeypatch, capsys):
    """--init_from each of the models, and the same seed, give the same text."""
    capsys.readouterr()
    said = []
    for model in models:
        run_here(monkeypatch, cwd, "--init_from", model, "--prompt", "MIRA:", "--max_new_tokens", "30")
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1 and said[0].startswith("MIRA:")


@contextlib.contextmanager
def serving(name, cwd):
    """The address of `transformers serve NAME` on loopback; a skip where that is not installed."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = str(Path(sys.executable).with_name("transformers"))
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([program, "serve", name, *flags], cwd=cwd, env=environment(HF_HUB_OFFLINE="1"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def completion(address, model, prompt, n):
    """The server's greedy text of n tokens."""
    body = dict(model=model, prompt=prompt, max_tokens=n, temperature=0)
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["text"]
