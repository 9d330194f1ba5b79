"""Models larger than one device: each process holds a share of the model, and nobody can tell by the results."""
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from common import (ROOT, command, environment, free_port, generate, losses, machine_of, ranks, run_here,
                    short_text)
from train_gpt2 import GPT, GPTConfig, faster_classes, swap_classes

SHAPE = ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "32", "--device", "cpu",
         "--log_every", "1"]
# Gradients of this model are longer than 0.1 at every step, so every step is clipped. 4 passes a step with 2 processes.
RUN = [*SHAPE, "--batch_size", "2", "--total_batch_size", 2 * 32 * 8, "--max_steps", "6", "--grad_clip", "0.1",
       "--eval_every", "2", "--save_every", "2", "--sample_every", "3", "--max_new_tokens", "50", "--keep", "9"]

# The program, and a file for each process that says how many numbers it holds when training begins and after a step.
WITH_SHARES = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch, train_gpt2

def held(tensors):
    return sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors)

def configure_optimizers(model, *args):
    (optimizer,) = original(model, *args)
    params, seen = [p for group in optimizer.param_groups for p in group["params"]], []
    def look(*_):
        seen.append((held(params), held(p.grad for p in params),
                     held(m for p in params for k, m in optimizer.state[p].items() if k.startswith("exp_avg"))))
        Path(os.environ["SHARES"], os.environ["RANK"]).write_text(f"{{total}} {{seen[-1]}}")
    total = train_gpt2.num_params(model)
    optimizer.register_step_post_hook(look)
    return [optimizer]

original, train_gpt2.configure_optimizers = train_gpt2.configure_optimizers, configure_optimizers
train_gpt2.main()
"""

# The program, and a line for each process that says how often it was compiled.
SAYING_COMPILED = """
import os, sys
sys.path.insert(0, {root!r})
import torch._dynamo, train_gpt2
train_gpt2.main()
print(os.environ["RANK"], "compiled", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def final(log_dir, step=6):
    return torch.load(log_dir / f"model_{step:05d}.pt", weights_only=True)


def norms(stdout):
    return [float(norm) for norm in re.findall(r"^step +\d+ \| loss .* norm (\S+)", stdout, re.M)]


def samples(stdout):
    return re.findall(r"sample: (.*?)\n\n(?=step|Done)", stdout, re.S)


def assert_same_log(a, b):
    """The same rows, values to 1e-4."""
    a, b = ((log_dir / "log.txt").read_text().split() for log_dir in (a, b))
    assert a[::3] == b[::3] and a[1::3] == b[1::3] and len(a) > 3
    assert [float(value) for value in a[2::3]] == pytest.approx([float(value) for value in b[2::3]], abs=1e-4)


def moments(state):
    return {f"{name}.{key}": m for name, p in state["optimizer"]["state"].items() for key, m in p.items()}


def assert_same_end(a, b):
    """The same weights to 1e-4, and moments, which show a gradient that is too long or too short: AdamW does not."""
    a, b = final(a), final(b)
    torch.testing.assert_close(a["model"], b["model"], atol=1e-4, rtol=0)
    torch.testing.assert_close(moments(a), moments(b), atol=2e-5, rtol=1e-2)


def layout(value):
    """Keys, types, shapes and number formats of a state, without its values."""
    if isinstance(value, dict):
        return [(key, layout(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [layout(item) for item in value]
    return (type(value), value.dtype, tuple(value.shape)) if torch.is_tensor(value) else type(value)


def as_after_step(step, log_dir, copy):
    """A copy of a log_dir as it was right after a step's checkpoint."""
    shutil.copytree(log_dir, copy)
    for path in copy.glob("model_*.pt"):
        if int(path.stem[6:]) > step:
            path.unlink()
    return copy


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    here = short_text(tmp_path_factory.mktemp("here"))
    (here / "with_shares.py").write_text(WITH_SHARES.format(root=str(ROOT)))
    return here


@pytest.fixture(scope="module")
def trained(here):
    """trained(parallel, n): a run that nothing disturbed, as log_dir, stdout, stderr and what each process held."""
    known = {}

    def trained(parallel, n):
        if (parallel, n) not in known:
            log_dir, shares = here / f"{parallel}_{n}", here / f"shares_{parallel}_{n}"
            shares.mkdir()
            done = ranks(n, *RUN, "--parallel", parallel, "--log_dir", log_dir.name, cwd=here,
                         script=here / "with_shares.py", SHARES=str(shares))
            known[parallel, n] = SimpleNamespace(
                log_dir=log_dir, out=done.stdout, err=done.stderr,
                shares=[[int(n) for n in re.findall(r"\d+", (shares / str(r)).read_text())] for r in range(n)])
        return known[parallel, n]

    return trained


@pytest.fixture(scope="module")
def alone(here):
    """The log_dir of the same run by one plain process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, here, *RUN, "--log_dir", "alone")
    return here / "alone"


# The same training ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [2, 4])
def test_shares_change_neither_losses_nor_norms_nor_samples_nor_weights(trained, n):
    ddp, fsdp = trained("ddp", 2), trained("fsdp", n)
    assert_same_log(ddp.log_dir, fsdp.log_dir)
    assert len(norms(ddp.out)) == 6 and min(norms(ddp.out)) > 0.2  # all of them are clipped
    assert norms(fsdp.out) == pytest.approx(norms(ddp.out), abs=1e-3)
    assert len(samples(ddp.out)) == 2 and samples(fsdp.out) == samples(ddp.out)
    assert_same_end(ddp.log_dir, fsdp.log_dir)
    assert fsdp.out.count("\n") == ddp.out.count("\n")  # one process speaks for all
    assert "Warning" not in fsdp.err


@pytest.mark.parametrize("parallel, n, share", [("ddp", 2, 1.0), ("fsdp", 2, 0.5), ("fsdp", 4, 0.25)])
def test_each_process_holds_its_share_of_parameters_gradients_and_moments(trained, parallel, n, share):
    for total, params, grads, exp_avgs in trained(parallel, n).shares:
        rows = 320 / 257  # num_params() leaves out the rows of wte without a token, which are there all the same
        assert share * total <= params < share * total * rows
        assert grads == params and exp_avgs == 2 * params


def test_fsdp_without_torchrun_is_a_mistake_and_not_a_plain_run(here, monkeypatch, capsys):
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, here, *RUN, "--parallel", "fsdp", "--log_dir", "no_torchrun")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and "torchrun" in err
    assert not (here / "no_torchrun").exists()


# The same checkpoints -------------------------------------------------------------------------------------------------

def test_a_checkpoint_of_shares_is_whole_and_like_that_of_one_plain_process(trained, alone):
    expected = final(alone)
    for parallel in ("ddp", "fsdp"):
        state = final(trained(parallel, 2).log_dir)  # weights_only=True: a DTensor would not load
        assert list(state) == list(expected)
        for key in ("model", "optimizer"):
            assert layout(state[key]) == layout(expected[key])
        assert {type(t) for t in [*state["model"].values(), *moments(state).values()]} == {torch.Tensor}
        size, plain = ((d / "model_00006.pt").stat().st_size for d in (trained(parallel, 2).log_dir, alone))
        assert size == pytest.approx(plain, rel=0.02)  # the tied matrix once
    GPT(GPTConfig(**state["model_config"])).load_state_dict(state["model"])


@pytest.mark.parametrize("first, then", [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_a_run_may_go_on_with_other_shares(trained, here, tmp_path, first, then):
    log_dir = as_after_step(4, trained(first, 2).log_dir, tmp_path / "resumed")
    out = ranks(2, "--resume", "--parallel", then, "--log_dir", log_dir, cwd=here).stdout
    assert "resumed from step 4" in out
    assert_same_log(log_dir, trained(first, 2).log_dir)
    assert_same_end(log_dir, trained(first, 2).log_dir)
    assert norms(out) == pytest.approx(norms(trained(first, 2).out)[4:], abs=1e-3)


def test_one_plain_process_goes_on_from_shares_and_shares_from_one_plain_process(trained, alone, here, tmp_path,
                                                                                 monkeypatch):
    log_dir = as_after_step(4, trained("fsdp", 2).log_dir, tmp_path / "to_one")
    run_here(monkeypatch, here, "--resume", "--log_dir", log_dir)
    assert_same_log(log_dir, trained("fsdp", 2).log_dir)
    assert_same_end(log_dir, trained("fsdp", 2).log_dir)
    log_dir = as_after_step(2, alone, tmp_path / "from_one")
    ranks(2, "--resume", "--parallel", "fsdp", "--log_dir", log_dir, cwd=here)
    assert_same_log(log_dir, alone)
    assert_same_end(log_dir, alone)


def test_a_checkpoint_of_shares_speaks_and_is_evaluated_without_torchrun(trained, alone, here, monkeypatch, capsys):
    said = {}
    for log_dir in (trained("fsdp", 2).log_dir, trained("ddp", 2).log_dir):
        capsys.readouterr()
        run_here(monkeypatch, here, "--prompt", "MIRA:", "--max_new_tokens", "20", "--log_dir", log_dir)
        run_here(monkeypatch, here, "--eval_only", "--log_dir", log_dir)
        said[log_dir.name] = capsys.readouterr().out
    assert said["fsdp_2"] == said["ddp_2"] and said["fsdp_2"].startswith("MIRA:")
    val = (trained("fsdp", 2).log_dir / "log.txt").read_text().split()[-1]
    assert f"val loss {float(val):.4f}" in said["fsdp_2"]


# Activations ----------------------------------------------------------------------------------------------------------

def small(n_layer=4, computed_again=False):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=n_layer, n_head=2, n_embd=32))
    cfg = SimpleNamespace(checkpoint_activations=computed_again, fp8=False)
    swap_classes(model, faster_classes(cfg))
    return model


def loss_and_gradients(model, idx):
    model.zero_grad()
    loss = model(idx, idx)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def saved_bytes(model, idx):
    """Bytes that a forward pass keeps for the backward pass, each memory once, parameters left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        x = model.trunk(idx)  # without the head, whose logits both of them keep
    assert x.requires_grad
    return sum(kept.values())


def test_checkpointed_activations_change_no_bit_and_save_memory():
    idx = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(1))
    model, plain = small(computed_again=True), small()
    expected = loss_and_gradients(plain, idx)
    for a, b in zip(loss_and_gradients(model, idx), expected, strict=True):
        assert torch.equal(a, b)
    assert any(g.any() for g in expected[1:])
    assert saved_bytes(model, idx) < saved_bytes(plain, idx) / 5


def test_checkpointed_activations_are_recomputed_as_they_were_under_autocast():
    idx = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(1))
    both = []
    for model in (small(computed_again=True), small()):
        with machine_of(dtype="bfloat16").autocast():
            loss = model(idx, idx)
        loss.backward()
        both.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)


def test_checkpointed_activations_keep_one_input_for_each_block():
    idx, kept = torch.zeros(4, 32, dtype=torch.int64), []
    for n_layer in (4, 5):
        kept.append(saved_bytes(small(n_layer, computed_again=True), idx))
    assert kept[1] - kept[0] == 4 * 32 * 32 * 4  # (B, T, C) float32


def test_checkpointed_activations_leave_generation_and_evaluation_alone():
    model, plain, idx = small(computed_again=True), small(), torch.randint(64, (2, 32))
    with torch.no_grad():
        assert torch.equal(model(idx), plain(idx)) and torch.equal(model(idx, idx), plain(idx, idx))
    for cache in (True, False):
        texts = [generate(m, [[1, 2, 3], [4, 5, 6]], 40, cache=cache, temperature=0)
                 for m in (model, plain)]
        assert texts[0] == texts[1] and len(texts[0][0]) == 40


def test_the_flag_reaches_the_model(here, monkeypatch):
    blocks, original = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint",
                        lambda block, *args, **kwargs: blocks.append(block) or original(block, *args, **kwargs))
    flags = [*SHAPE, "--batch_size", "2", "--max_steps", "1", "--sample_every", "0"]
    run_here(monkeypatch, here, *flags, "--log_dir", "kept")
    assert not blocks
    run_here(monkeypatch, here, *flags, "--checkpoint_activations", "--log_dir", "computed_again")
    assert len(blocks) >= 2 and (here / "computed_again/log.txt").read_text() == (here / "kept/log.txt").read_text()


def test_shares_and_checkpointed_activations_go_together(trained, here):
    out = ranks(2, *RUN, "--parallel", "fsdp", "--checkpoint_activations", "--log_dir", "both", cwd=here).stdout
    assert_same_log(here / "both", trained("fsdp", 2).log_dir)
    assert norms(out) == norms(trained("fsdp", 2).out)
    assert samples(out) == samples(trained("fsdp", 2).out)


def test_a_fresh_python_imports_all_that_shares_need(trained, here):
    """The processes of the other tests begin with torch in them, and what it imports itself."""
    env = environment(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    flags = [*RUN, "--parallel", "fsdp", "--checkpoint_activations", "--log_dir", "fresh"]
    done = subprocess.run(command(*flags), cwd=here, env=env, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert_same_log(here / "fresh", trained("fsdp", 2).log_dir)


# Compiling ------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="needs a C++ compiler")
def test_shares_and_compiling_go_together(here, monkeypatch, capsys):
    flags = [*SHAPE, "--n_layer", "1", "--batch_size", "2", "--total_batch_size", "128", "--max_steps", "2",
             "--sample_every", "0"]
    (here / "saying_compiled.py").write_text(SAYING_COMPILED.format(root=str(ROOT)))
    compiled = ranks(2, *flags, "--parallel", "fsdp", "--compile", "--log_dir", "compiled",
                     cwd=here, script=here / "saying_compiled.py").stdout
    run_here(monkeypatch, here, *flags, "--log_dir", "not_compiled")
    graphs = re.findall(r"^[01] compiled (\d+)$", compiled, re.M)
    assert len(graphs) == 2 and min(map(int, graphs)) > 0 and len(losses(compiled)) == 2
    assert_same_log(here / "compiled", here / "not_compiled")
    assert norms(compiled) == pytest.approx(norms(capsys.readouterr().out), abs=1e-3)
