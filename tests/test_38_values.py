"""--value_embeddings: values that are remembered, beside those that are computed."""
import shutil

import pytest
import torch
from torch.nn import functional as F

import train_gpt2
from common import TINY, generate, losses_of, naive, randomise, ranks, run_here, short_text
from train_gpt2 import (GPTConfig, ModernGPT, TrainConfig, attention, faster_classes, flops_per_token,
                        get_tokenizer, load_checkpoint, modern_optimizers, num_params, swap_classes)

CONFIG = GPTConfig(block_size=16, vocab_size=41, n_layer=7, n_head=2, n_embd=32)
MODERN = [*TINY, "--n_layer", "3", "--recipe", "modern", "--value_embeddings", "--sample_every", "0",
          "--save_every", "2", "--eval_every", "2", "--keep", "9"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return short_text(tmp_path_factory.mktemp("here"))


@pytest.fixture
def train(here, monkeypatch, capsys):
    def train(*flags):
        run_here(monkeypatch, here, *MODERN, *flags)
        return capsys.readouterr()
    return train


def by_hand(model, idx):
    """The logits, with the tables looked up and mixed in here."""
    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    table_of = {0: 0, 1: 1, 2: 2, 4: 0, 5: 1, 6: 2}  # block 3 of 7 has none
    B, T = idx.shape
    x = norm(model.transformer.wte.weight[idx])
    for i, block in enumerate(model.transformer.h):
        q, k, v = (c(norm(x)).view(B, T, 2, 16).transpose(1, 2) for c in (block.attn.c_q, block.attn.c_k, block.attn.c_v))
        q, k = (norm(block.attn.rotary(z, torch.arange(T))) for z in (q, k))
        if i in table_of:
            rows = model.value_tables[table_of[i]].weight[idx].view(B, T, 2, 16).transpose(1, 2)
            v = model.value_shares[i, 0] * v + model.value_shares[i, 1] * rows
        x = x + block.attn.c_proj(attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + block.mlp.c_proj(F.relu(block.mlp.c_fc(norm(x))) ** 2)
    return 15 * torch.tanh(model.lm_head.weight @ norm(x).mT / 15).mT[..., :41]


def test_the_first_three_blocks_and_the_last_read_their_table():
    model = randomise(ModernGPT(CONFIG, value_embeddings=True), std=0.3)
    idx = torch.randint(41, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = model(idx)
    torch.testing.assert_close(logits, by_hand(model, idx), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.value_shares[:, 1] = 0
    assert (model(idx) - logits).abs().max() > 0.1  # the rows do count


def test_without_the_flag_there_is_no_table():
    plain = ModernGPT(CONFIG)
    assert not [name for name in plain.state_dict() if "value" in name]
    assert [len(ModernGPT(GPTConfig(16, 41, n, 2, 32), True).value_tables) for n in (1, 2, 3, 5, 6, 12)] == [0, 1, 1, 2, 3, 3]


def test_parameters_and_flops_by_hand():
    model = ModernGPT(CONFIG, value_embeddings=True)
    blocks = 7 * 12 * 32 * 32
    assert num_params(model) == blocks + 5 * 41 * 32 + 7 * 2
    assert flops_per_token(model, 16) == 6 * (blocks + 41 * 32 + 14) + 12 * 7 * 32 * 16  # four tables are only looked up


def test_each_parameter_has_one_optimiser():
    model = ModernGPT(CONFIG, value_embeddings=True)
    muon, adamw = modern_optimizers(model, 0.02, 0.0)
    of = [p for opt in (muon, adamw) for group in opt.param_groups for p in group["params"]]
    assert len(of) == len({id(p) for p in of}) == len(list(model.parameters()))
    assert [group["max_lr"] for group in adamw.param_groups] == pytest.approx([0.15, 0.004, 0.02])
    assert all(p.dim() == 2 for group in muon.param_groups for p in group["params"])


@pytest.mark.parametrize("prompts", [[[7]], [[3, 1, 4], [9, 2, 9]]])
def test_cached_is_uncached_token_for_token_also_beyond_block_size(prompts):
    model = randomise(ModernGPT(CONFIG, value_embeddings=True), std=1.0, seed=4)
    expected = [naive(model, prompt, 30) for prompt in prompts]
    assert len({token for row in expected for token in row}) > 3
    assert generate(model, prompts, 30, temperature=0) == expected
    swap_classes(model, faster_classes(TrainConfig()))  # as in a sample while it trains
    assert generate(model, prompts, 30, temperature=0) == expected


def test_faster_and_recomputed_blocks_hand_the_rows_on():
    plain = randomise(ModernGPT(CONFIG, value_embeddings=True), std=0.3)
    idx = torch.arange(16)[None]
    loss = plain(idx, idx)
    loss.backward()
    for flag in False, True:
        other = randomise(ModernGPT(CONFIG, value_embeddings=True), std=0.3)
        swap_classes(other, faster_classes(TrainConfig(checkpoint_activations=flag)))
        again = other(idx, idx)
        again.backward()
        assert torch.equal(again, loss)
        for (name, a), b in zip(plain.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(a.grad, b[1].grad), name
        with torch.autocast("cpu", torch.bfloat16):
            stream = other.trunk(idx)
        torch.testing.assert_close(stream.float(), plain.trunk(idx), rtol=0.2, atol=0.2)


def test_compiled_attention_mixes_the_rows_in_and_turns_by_the_positions_that_it_is_given():
    model = randomise(ModernGPT(CONFIG, value_embeddings=True), std=0.3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 32, generator=generator)
    e = torch.randn(2, 6, 32, generator=generator), torch.tensor([0.3, 0.9])
    pos = torch.tensor([3, 4, 5, 9, 10, 11])
    expected = model.transformer.h[0].attn.heads(x, pos, e)
    swap_classes(model, faster_classes(TrainConfig()))
    attn = model.transformer.h[0].attn
    torch._dynamo.reset()
    for a, b in zip(torch.compile(attn.heads, backend="eager")(x, pos, e), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_run_learns_its_shares_and_resumes_to_the_same_bits(train, here, tmp_path):
    train("--log_dir", "whole")
    cut = shutil.copytree(here / "whole", tmp_path / "cut")
    for step in (4, 6):
        (cut / f"model_{step:05d}.pt").unlink()
    train("--log_dir", cut, "--resume")
    assert (cut / "log.txt").read_text() == (here / "whole" / "log.txt").read_text()
    shares = load_checkpoint(cut / "model_00006.pt")["model"]["value_shares"]
    assert shares.shape == (3, 2) and (shares[[0, 2]] != 0.5).all() and (shares[1] == 0.5).all()


@pytest.mark.process
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(here, train, parallel):
    train("--log_dir", "one")
    ranks(2, *MODERN, "--batch_size", "2", "--parallel", parallel, "--log_dir", parallel, cwd=here)
    assert losses_of(here / parallel) == pytest.approx(losses_of(here / "one"), abs=2e-3)


def test_it_is_looked_at_gone_on_from_and_not_exported(here, train, monkeypatch, capsys):
    train("--log_dir", "looked")
    run_here(monkeypatch, here, "--eval_only", "--log_dir", "looked")
    assert f"val loss {losses_of(here / 'looked')[-1]:.4f}" in capsys.readouterr().out
    run_here(monkeypatch, here, "--prompt", "MIRA:", "--max_new_tokens", "9", "--log_dir", "looked")
    assert capsys.readouterr().out.startswith("MIRA:")
    run_here(monkeypatch, here, "--init_from", "looked/model_00006.pt", "--log_dir", "tuned", "--max_steps", "2",
             "--sample_every", "0", "--device", "cpu")
    assert load_checkpoint(here / "tuned" / "model_00002.pt")["config"]["value_embeddings"] is True
    for flags, said in [(["--export", "hf"], "without --value_embeddings"),
                        (["--resume", "--no-value_embeddings"], "cannot change")]:
        with pytest.raises(SystemExit) as stop:
            run_here(monkeypatch, here, *flags, "--log_dir", "looked", "--device", "cpu")
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and said in err
    assert not (here / "hf").exists()


@pytest.mark.parametrize("flags", [[], ["--recipe", "modern"]], ids=str)
def test_it_is_for_the_modern_recipe_of_two_layers_or_more(here, monkeypatch, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, here, *TINY, *flags, "--value_embeddings", "--log_dir", "never")  # TINY has one
    assert stop.value.code == 2 and "--recipe modern, with 2 layers" in capsys.readouterr().err
    with pytest.raises(train_gpt2.UserError, match="value"):
        train_gpt2.export(ModernGPT(CONFIG, True), get_tokenizer("byte"), here / "hf", "")
