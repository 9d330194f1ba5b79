"""Muon: a step of orthogonal matrices; and the whole recipe: resume, processes, sharding."""
import shutil

import pytest
import torch

import hellaswag
import train_gpt2
from common import ROOT, TINY, losses_of, randomise, ranks, run_here, short_text
from train_gpt2 import (GPTConfig, ModernGPT, SharedMuon, load_checkpoint, modern_optimizers,
                        newton_schulz)

MODERN = [*TINY, "--recipe", "modern", "--sample_every", "0", "--save_every", "2", "--eval_every", "2", "--keep", "9"]
CONFIG = GPTConfig(block_size=16, vocab_size=41, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return short_text(tmp_path_factory.mktemp("here"))


@pytest.fixture
def train(here, monkeypatch, capsys):
    def train(*flags):
        run_here(monkeypatch, here, *MODERN, *flags)
        return capsys.readouterr()
    return train


def test_a_step_is_the_orthogonal_matrix_nearest_to_the_momentum():
    p = torch.nn.Parameter(torch.zeros(24, 16))
    g = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -1, 16))
    p.grad = g.clone()
    SharedMuon([p], lr=1.0, weight_decay=0.0, momentum=0.85).step()
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    step = -p.detach() / (24 / 16) ** 0.5  # tall matrices take longer ones
    # A few products come near: singular values about 1, and the same directions.
    values = torch.linalg.svdvals(step)
    assert 0.6 < values.min() and values.max() < 1.3
    assert torch.diag(u.T @ step @ vt.T).min() > 0.6


def test_matrices_side_by_side_are_as_pytorchs_muon_has_them_one_by_one():
    ours, theirs = (randomise(ModernGPT(CONFIG)) for _ in range(2))
    muon, _ = modern_optimizers(ours, 0.02, 0.1)
    blocks = list(theirs.transformer.h.parameters())
    other = torch.optim.Muon(blocks, lr=0.02, weight_decay=0.1, momentum=0.85)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for a, b in zip(ours.transformer.h.parameters(), blocks):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step()
        other.step()
        other.param_groups[0]["momentum"] += 0.1 / 300
    for (name, a), b in zip(ours.transformer.h.named_parameters(), blocks):
        # Products are in bfloat16; a step moves a number by about 0.004.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4, msg=name)
        mean = muon.state[a]["momentum_buffer"]
        torch.testing.assert_close(mean, other.state[b]["momentum_buffer"], msg=name)


def test_momentum_grows_to_its_end_and_a_frozen_matrix_stays():
    p, frozen = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    muon = SharedMuon([p, frozen], lr=0.01, weight_decay=0.0, momentum=0.85)
    for _ in range(310):
        p.grad = torch.eye(2)
        muon.step()
    assert muon.param_groups[0]["momentum"] == pytest.approx(0.95)
    assert torch.equal(frozen, torch.ones(2, 2)) and not torch.equal(p, torch.ones(2, 2))


@pytest.mark.parametrize("rows, columns", [(16, 16), (24, 16), (16, 24)])
def test_newton_schulz_keeps_directions_and_makes_them_alike(rows, columns):
    """From 0.002 of the whole on; beside it, a matrix of noughts stays one, and disturbs nobody."""
    g = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    g = 1e-3 * u @ torch.diag(torch.logspace(0, -2.4, 16)) @ vt  # the smallest has 0.002 of the norm
    x, nought = newton_schulz(torch.stack((g, torch.zeros_like(g)))).float()
    sizes = (u.T @ x @ vt.T).diag()
    assert 0.6 < sizes.min() and sizes.max() < 1.3 and not nought.any()


def test_blocks_have_muon_tables_have_adamw_and_all_have_one():
    model = ModernGPT(CONFIG)
    muon, adamw = modern_optimizers(model, 0.02, 0.0)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    of = [[names[id(p)] for group in opt.param_groups for p in group["params"]] for opt in (muon, adamw)]
    assert of[0] == [name for name in names.values() if ".h." in name]
    assert of[1] == ["transformer.wte.weight", "lm_head.weight"]
    assert [group["max_lr"] for opt in (muon, adamw) for group in opt.param_groups] == pytest.approx([0.02, 0.15, 0.004])


def test_the_heads_rate_has_a_ceiling_and_follows_a_low_one():
    rates = [modern_optimizers(ModernGPT(CONFIG), lr, 0.0)[1].param_groups[1]["max_lr"] for lr in (0.04, 0.001)]
    assert rates == pytest.approx([0.004, 0.0002])


def test_it_resumes_to_the_same_bits(train, here, tmp_path):
    train("--log_dir", "whole")
    cut = shutil.copytree(here / "whole", tmp_path / "cut")
    for step in (4, 6):
        (cut / f"model_{step:05d}.pt").unlink()
    train("--log_dir", cut, "--resume")
    assert (cut / "log.txt").read_text() == (here / "whole" / "log.txt").read_text()
    a, b = (load_checkpoint(d / "model_00006.pt") for d in (cut, here / "whole"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])
    for name, kept in b["optimizer"]["state"].items():
        assert all(torch.equal(a["optimizer"]["state"][name][key], w) for key, w in kept.items()), name
    # Muon's momentum grows with the steps that were taken.
    momenta = [group["momentum"] for group in a["optimizer"]["param_groups"] if "momentum" in group]
    assert momenta == pytest.approx([0.85 + 6 * 0.1 / 300])


def test_a_recipe_cannot_change_and_other_flags_can(here, train, capsys):
    train("--log_dir", "fixed")
    with pytest.raises(SystemExit) as stop:
        train("--log_dir", "fixed", "--resume", "--recipe", "gpt2")
    assert stop.value.code == 2 and "--recipe gpt2" in capsys.readouterr().err
    # Which recipe it was, the checkpoint says.
    out = train("--init_from", "fixed/model_00006.pt", "--log_dir", "again", "--max_steps", "2").out
    assert "starting from step 0" in out
    assert load_checkpoint(here / "again" / "model_00002.pt")["config"]["recipe"] == "modern"


def test_it_is_looked_at_like_the_other(here, monkeypatch, capsys, train):
    train("--log_dir", "looked")
    run_here(monkeypatch, here, "--eval_only", "--log_dir", "looked")
    val = capsys.readouterr().out
    assert f"val loss {losses_of(here / 'looked')[-1]:.4f}" in val
    run_here(monkeypatch, here, "--prompt", "MIRA:", "--max_new_tokens", "9", "--log_dir", "looked")
    assert capsys.readouterr().out.startswith("MIRA:")


@pytest.mark.process
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does_and_share_the_matrices(here, train, parallel):
    train("--log_dir", "one")
    ranks(2, *MODERN, "--batch_size", "2", "--parallel", parallel, "--log_dir", parallel, cwd=here)
    assert losses_of(here / parallel) == pytest.approx(losses_of(here / "one"), abs=2e-3)
    # The checkpoint has each momentum, whosever it was; one process goes on from it, and the other kind, too.
    state = load_checkpoint(here / parallel / "model_00006.pt")
    momenta = [group["momentum"] for group in state["optimizer"]["param_groups"] if "momentum" in group]
    assert momenta == pytest.approx([0.85 + 6 * 0.1 / 300])
    assert all(kept["momentum_buffer"].abs().max() > 0
               for name, kept in state["optimizer"]["state"].items() if ".h." in name)
    alone = load_checkpoint(here / "one" / "model_00006.pt")
    for name, kept in alone["optimizer"]["state"].items():
        for key, w in kept.items():
            torch.testing.assert_close(state["optimizer"]["state"][name][key], w, rtol=5e-2, atol=5e-3)


@pytest.mark.process
def test_each_process_steps_its_share_alone(here, tmp_path):
    """It has no means of the others' matrices, unless a checkpoint is saved, which sends them round."""
    script = tmp_path / "says_what_it_has.py"
    script.write_text(f"""import os, sys; sys.path.insert(0, {str(ROOT)!r})
import train_gpt2
step = train_gpt2.SharedMuon.step
def counted(self):
    step(self)
    names = [i for i, p in enumerate(self.param_groups[0]["params"]) if "momentum_buffer" in self.state[p]]
    print("rank", os.environ["RANK"], "has", names, flush=True)
train_gpt2.SharedMuon.step = counted
train_gpt2.main()
""")
    out = ranks(2, *MODERN, "--batch_size", "2", "--max_steps", "1", "--save_every", "0", "--eval_every", "0",
                "--log_dir", "shares", cwd=here, script=script).stdout
    matrices = range(6)  # one layer's
    assert f"rank 0 has {[*matrices[0::2]]}" in out and f"rank 1 has {[*matrices[1::2]]}" in out


@pytest.mark.process
def test_with_fsdp_each_process_multiplies_some_of_the_matrices_whole(here, tmp_path):
    """Of four alike each of two has two; of one, the first has it and the other an empty stack."""
    script = tmp_path / "says_what_it_multiplies.py"
    script.write_text(f"""import os, sys; sys.path.insert(0, {str(ROOT)!r})
import train_gpt2
newton_schulz = train_gpt2.newton_schulz
def seen(g):
    print("rank", os.environ["RANK"], "multiplies", tuple(g.shape), type(g).__name__, flush=True)
    return newton_schulz(g)
train_gpt2.newton_schulz = seen
train_gpt2.main()
""")
    out = ranks(2, *MODERN, "--batch_size", "2", "--max_steps", "1", "--save_every", "0", "--eval_every", "0",
                "--parallel", "fsdp", "--log_dir", "pieces", cwd=here, script=script).stdout
    C = int(TINY[TINY.index("--n_embd") + 1])
    for rank, n, rows, columns in ((0, 2, C, C), (1, 2, C, C), (0, 1, C, 4 * C), (1, 0, C, 4 * C),
                                   (0, 1, 4 * C, C), (1, 0, 4 * C, C)):
        assert out.count(f"rank {rank} multiplies ({n}, {rows}, {columns}) Tensor") == 1


@pytest.mark.process
def test_steps_with_fsdp_are_those_of_one_process(tmp_path):
    """Also of matrices that no number of processes divides, of a frozen one, and with weight decay."""
    script = tmp_path / "steps.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
from torch.distributed.tensor import distribute_tensor, Shard
from train_gpt2 import SharedMuon, newton_schulz, newton_schulz_of_pieces
dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
def pieces(w):
    return distribute_tensor(w, mesh, [Shard(0)])
shapes = [(7, 5), (7, 5), (7, 5), (5, 7), (2, 9), (4, 4)]
generator = torch.Generator().manual_seed(0)
whole = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
shared = [torch.nn.Parameter(pieces(p.detach().clone())) for p in whole]
# Alone, each process is the owner of all; it sends nothing.
alone = SharedMuon(whole, lr=0.02, weight_decay=0.1, momentum=0.85)
alone.owners = lambda: [(p, dist.get_rank()) for p in whole]
broadcast, dist.broadcast = dist.broadcast, lambda *args: None
together = SharedMuon(shared, lr=0.02, weight_decay=0.1, momentum=0.85)
for step in range(4):
    for p, s in zip(whole[:-1], shared):
        p.grad = torch.randn(p.shape, generator=generator)
        s.grad = pieces(p.grad.clone())
    alone.step()
    together.step()
for p, s in zip(whole, shared):
    torch.testing.assert_close(s.full_tensor(), p, rtol=0, atol=1e-3)
    assert s.placements == (Shard(0),)
for p, s in zip(whole[:-1], shared):
    mean = together.state[s]["momentum_buffer"]
    torch.testing.assert_close(mean.full_tensor(), alone.state[p]["momentum_buffer"])
g = torch.stack([s.grad for s in shared[:3]])
assert newton_schulz_of_pieces(g).placements == g.placements == (Shard(1),)
print("the same", flush=True)
""")
    assert ranks(3, cwd=tmp_path, script=script).stdout.count("the same") == 3


@pytest.mark.process
def test_two_processes_resume_to_the_same_bits(here, tmp_path):
    ranks(2, *MODERN, "--batch_size", "2", "--log_dir", "two", cwd=here)
    cut = shutil.copytree(here / "two", tmp_path / "cut")
    for step in (4, 6):
        (cut / f"model_{step:05d}.pt").unlink()
    ranks(2, *MODERN, "--batch_size", "2", "--resume", "--log_dir", cut, cwd=here)
    assert (cut / "log.txt").read_text() == (here / "two" / "log.txt").read_text()


@pytest.mark.process
def test_processes_that_find_different_checkpoints_are_refused_and_wait_for_nobody(here, train, tmp_path):
    train("--log_dir", "seen_by_one")
    script = tmp_path / "one_sees_it.py"
    script.write_text(f"""import os, sys; sys.path.insert(0, {str(ROOT)!r})
import train_gpt2
newest = train_gpt2.newest_checkpoint
train_gpt2.newest_checkpoint = lambda log_dir: (None, None) if os.environ["RANK"] == "1" else newest(log_dir)
train_gpt2.main()
""")
    done = ranks(2, *MODERN, "--batch_size", "2", "--resume", "--log_dir", "seen_by_one", cwd=here, script=script,
                 check=False)
    assert done.returncode == 2 and "different checkpoints" in done.stderr


@pytest.mark.process
def test_more_processes_than_matrices(here):
    """One layer has six; of eight processes, two have none."""
    few = ["--batch_size", "1", "--total_batch_size", "256", "--max_steps", "2", "--eval_every", "2"]
    ranks(8, *MODERN, *few, "--log_dir", "eight", cwd=here)
    ranks(1, *MODERN, *few, "--log_dir", "alone", cwd=here)
    a, b = (load_checkpoint(here / d / "model_00002.pt")["model"] for d in ("eight", "alone"))
    for key, w in b.items():
        torch.testing.assert_close(a[key], w, rtol=1e-2, atol=5e-3, msg=key)


@pytest.mark.parametrize("flags", [["--resume"], ["--prompt", "x"], ["--init_from", "log/model_00002.pt"]], ids=str)
def test_the_size_may_be_named_again(tmp_path, monkeypatch, capsys, flags):
    short_text(tmp_path)
    first = ["--recipe", "modern", "--model", "demo", "--max_steps", "2", "--sample_every", "0", "--device", "cpu"]
    run_here(monkeypatch, tmp_path, *first)
    run_here(monkeypatch, tmp_path, *first[:4], "--max_steps", "2", "--device", "cpu", *flags)


def test_float16_leaves_out_a_step_for_all_optimisers_or_for_none(train, monkeypatch, here):
    """A nan in a table's gradient alone, and clipping would hand it to all."""
    optimizers = train_gpt2.modern_optimizers
    factors = iter([1.0, float("nan"), *[1.0] * 20])

    def ruined(model, *args):
        model.lm_head.weight.register_hook(lambda g: g * next(factors))
        return optimizers(model, *args)

    monkeypatch.setattr(train_gpt2, "modern_optimizers", ruined)
    train("--dtype", "float16", "--log_dir", "half")
    state = load_checkpoint(here / "half" / "model_00006.pt")
    assert all(w.isfinite().all() for w in state["model"].values())


def test_the_screen_shows_the_rate_that_was_asked_for(train):
    assert "| lr 1.70e-02 |" in train("--max_lr", "0.017", "--log_dir", "rate").out


@pytest.mark.parametrize("flags, said", [(["--n_embd", "36", "--n_head", "12"], "even"), (["--fp8"], "--fp8")], ids=str)
def test_what_cannot_be_is_one_line(train, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        train(*flags, "--log_dir", "never")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and said in err


def test_hellaswag_scores_it_by_the_logits_that_it_gives():
    """The head stands by itself there: its softcap must not be forgotten."""
    model = randomise(ModernGPT(CONFIG), std=2.0)
    items = [{"ind": 0, "label": 1, "context": [3, 1, 4], "endings": [[1, 5], [9, 2, 6], [5], [3, 5, 8, 9]]}]
    sums, _ = hellaswag.score(model, items, torch.device("cpu"), torch.float32)
    for ending, got in zip(items[0]["endings"], sums[0]):
        row = torch.tensor([items[0]["context"] + ending])
        log_probs = model(row[:, :-1]).log_softmax(-1)[0, -len(ending):]
        assert got == pytest.approx(-sum(log_probs[i, token].item() for i, token in enumerate(ending)), rel=1e-4)


def test_a_checkpoint_is_one_of_plain_values(here, train):
    train("--log_dir", "plain", "--max_steps", "2")
    state = torch.load(here / "plain" / "model_00002.pt", weights_only=True)
    assert state["model"]["lm_head.weight"].data_ptr() != state["model"]["transformer.wte.weight"].data_ptr()
    assert not [key for key in state["model"] if "rotary" in key]
