"""Fine-tuning: from weights that know something, with small steps, and the best of them is what speaks in the end."""
import re
from dataclasses import asdict

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import train_gpt2
from common import ROOT, TINY, randomise, run_here, short_text
from train_gpt2 import load_checkpoint

OTHER = "The quick brown fox jumps over the lazy dog. " * 700


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a short input.txt, another text, and a trained model."""
    here = short_text(tmp_path_factory.mktemp("here"))
    (here / "other.txt").write_text(OTHER)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, here, *TINY, "--max_steps", "150", "--sample_every", "0", "--log_dir", "base")
    return here


@pytest.fixture
def run(here, monkeypatch, capsys):
    def run(*flags):
        capsys.readouterr()
        run_here(monkeypatch, here, *flags)
        return capsys.readouterr().out
    return run


BASE = "base/model_00150.pt"


def vals(here, log_dir):
    rows = [row.split() for row in (here / log_dir / "log.txt").read_text().splitlines()]
    return {int(step): float(value) for step, stream, value in rows if stream == "val"}


def perplexity(out):
    return float(re.search(r"perplexity (\S+)", out).group(1))


def test_what_is_not_asked_for_suits_fine_tuning(here, run):
    out = run("--init_from", BASE, "--data", "other.txt", "--device", "cpu", "--sample_every", "0",
              "--log_dir", "tuned")
    config = load_checkpoint(here / "tuned/model_00200.pt")["config"]
    usual = {"max_steps": 200, "warmup_steps": 20, "save_every": 25, "eval_every": 25,
             "log_every": 10}
    assert usual.items() <= config.items()
    assert "256 tokens a step = 1 x 1 x 8 x 32" in out and config["total_batch_size"] == 8 * 32
    assert config["max_lr"] == pytest.approx(3e-3 / 20) and config["min_lr"] == pytest.approx(1.5e-5)
    assert max(float(lr) for lr in re.findall(r"lr (\S+)", out)) == pytest.approx(1.5e-4)
    shown = re.findall(r"^step +(\d+) \| loss", out, re.M)
    assert shown == [str(step) for step in [*range(0, 200, 10), 199]]
    assert config["n_layer"] == 1 and config["tokenizer"] == "byte"  # the shape came along


def test_flags_go_before_the_recipe_and_a_fresh_model_has_its_own(here, run):
    run("--init_from", BASE, "--data", "other.txt", "--max_steps", "3", "--max_lr", "1e-5", "--save_every", "3",
        "--device", "cpu", "--sample_every", "0", "--log_dir", "flags")
    config = load_checkpoint(here / "flags/model_00003.pt")["config"]
    assert (config["max_steps"], config["max_lr"], config["save_every"], config["eval_every"]) == (3, 1e-5, 3, 25)
    assert config["warmup_steps"] == 0
    fresh = load_checkpoint(here / BASE)["config"]
    assert (fresh["max_lr"], fresh["save_every"], fresh["eval_every"]) == (3e-3, 250, 250)


def test_it_learns_the_new_text_and_forgets_the_old_one_and_a_lower_rate_forgets_less(here, run):
    def score(model, data):
        return perplexity(run("--init_from", model, "--data", data, "--eval_only", "--device", "cpu"))

    flags = ["--init_from", BASE, "--data", "other.txt", "--max_steps", "60", "--save_every", "60", "--device", "cpu",
             "--sample_every", "0"]
    run(*flags, "--max_lr", "3e-3", "--log_dir", "fast")
    run(*flags, "--max_lr", "1e-4", "--log_dir", "slow")
    old = {name: score(f"{name}/model_00060.pt", "input.txt") for name in ("fast", "slow")}
    new = {name: score(f"{name}/model_00060.pt", "other.txt") for name in ("fast", "slow")}
    assert new["fast"] < new["slow"] < score(BASE, "other.txt")
    assert old["fast"] > old["slow"] and old["fast"] > score(BASE, "input.txt")


def test_the_best_of_a_run_that_overfits_is_kept_and_named(here, run):
    (here / "few.txt").write_text(OTHER[:9000] + (ROOT / "input.txt").read_text()[:1000])  # what it learns is no use
    out = run("--init_from", BASE, "--data", "few.txt", "--max_lr", "1e-2", "--max_steps", "200", "--keep", "1",
              "--device", "cpu", "--sample_every", "0", "--log_dir", "overfit")
    losses = vals(here, "overfit")
    best = min((step for step in losses if step), key=losses.get)
    assert 0 < best < 200 and losses[best] < losses[200] - 0.05
    assert f"--init_from overfit/model_{best:05d}.pt --prompt" in out.replace("\\", "/")
    assert sorted(p.name for p in (here / "overfit").glob("*.pt")) == [f"model_{best:05d}.pt", "model_00200.pt"]
    for step in (best, 200):
        kept = load_checkpoint(here / f"overfit/model_{step:05d}.pt")["best"]
        assert kept == (pytest.approx(losses[best], abs=1e-6), best)


def test_fine_tuning_resumes_as_what_it_is(here, run):
    flags = ["--init_from", BASE, "--data", "other.txt", "--max_steps", "50", "--device", "cpu", "--sample_every", "0"]
    run(*flags, "--log_dir", "whole")
    run(*flags, "--log_dir", "parts")
    (here / "parts/model_00050.pt").unlink()
    assert "resumed from step 25" in run("--resume", "--log_dir", "parts", "--device", "cpu")
    assert (here / "parts/log.txt").read_text() == (here / "whole/log.txt").read_text()
    a, b = (load_checkpoint(here / name / "model_00050.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_an_exported_folder_and_the_checkpoint_it_came_from_make_the_same_run(here, run):
    run("--init_from", BASE, "--export", "exported")
    flags = {"data": "other.txt", "device": "cpu", "max_steps": 4, "sample_every": 0,
             "log_every": 1}
    configs, outs = [], []
    for start, log_dir in ((BASE, "from_checkpoint"), ("exported", "from_exported")):
        cfg, model = train_gpt2.configure({**flags, "init_from": start, "log_dir": log_dir})
        assert model is not None and cfg.tokenizer == "byte"
        configs.append({**asdict(cfg), "init_from": None, "log_dir": None})
        given = [word for key, value in flags.items() for word in (f"--{key}", value)]
        out = run("--init_from", start, "--log_dir", log_dir, *given)
        outs.append(re.findall(r"^step.* \| (?:val loss|loss .* norm) \S+", out, re.M))
    assert configs[0] == configs[1] and outs[0] == outs[1]
    assert len(outs[0]) == 4 + 2  # validation before and after
    logs = [(here / name / "log.txt").read_text() for name in ("from_checkpoint", "from_exported")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 4 + 2
    a, b = (load_checkpoint(here / name / "model_00004.pt")
            for name in ("from_checkpoint", "from_exported"))
    assert a["config"] == b["config"] and a["model_config"] == b["model_config"]
    for key, w in a["model"].items():
        rows = 257 if "wte" in key or "lm_head" in key else len(w)  # the others stand for no token
        assert torch.equal(w[:rows], b["model"][key][:rows]), key


def test_fine_tuning_takes_the_weights_and_no_setting_of_their_run(here, run):
    """Rates and batches of a training from the start would be too much."""
    run(*TINY, "--max_steps", "2", "--max_lr", "1e-2", "--weight_decay", "0.7", "--seed", "3",
        "--seq_len", "16", "--sample_every", "0", "--log_dir", "odd")
    odd, _ = train_gpt2.configure({"init_from": "odd/model_00002.pt", "log_dir": "x"})
    usual, _ = train_gpt2.configure({"init_from": BASE, "log_dir": "x"})
    assert {**asdict(odd), "init_from": None} == {**asdict(usual), "init_from": None}


def test_hugging_faces_weights_begin_where_they_are(here, run):
    """Their 257 rows become 320: the padding has no probability, and the first loss is theirs."""
    config = GPT2Config(vocab_size=257, n_positions=32, n_layer=1, n_head=2, n_embd=32, bos_token_id=256,
                        eos_token_id=256, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    theirs = randomise(GPT2LMHeadModel(config), std=0.1).eval()
    theirs.save_pretrained(here / "theirs")
    run("--init_from", "theirs", "--data", "other.txt", "--max_steps", "2", "--device", "cpu", "--sample_every", "0",
        "--log_dir", "from_theirs")
    data = torch.tensor(list(OTHER.encode())[len(OTHER) * 9 // 10:])
    windows = torch.stack([data[i:i + 33] for i in range(0, len(data) - 32, 32)])
    with torch.no_grad():
        logits = theirs(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert vals(here, "from_theirs")[0] == pytest.approx(loss.item(), abs=1e-5)
    assert train_gpt2.GPT(train_gpt2.GPTConfig(**load_checkpoint(here / "from_theirs/model_00002.pt")["model_config"])
                          ).lm_head.weight.shape == (320, 32)
