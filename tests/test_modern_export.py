"""Hugging Face has this model as NanoChat: an independent implementation, and where an export can go."""
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatConfig, NanoChatForCausalLM

import train_gpt2
from common import TINY, assert_they_say_the_same, completion, generate, randomise, run_here, serving, short_text
from train_gpt2 import GPTConfig, ModernGPT, UserError, get_tokenizer

CONFIG = GPTConfig(block_size=64, vocab_size=257, n_layer=3, n_head=2, n_embd=48)


@pytest.fixture
def folder(tmp_path):
    model = randomise(ModernGPT(CONFIG), std=0.2)
    train_gpt2.export(model, get_tokenizer("byte"), tmp_path / "hf", "a note")
    return model, tmp_path / "hf"


def test_the_logits_are_theirs(folder):
    model, path = folder
    theirs = AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(theirs, NanoChatForCausalLM) and theirs.config.vocab_size == 257
    idx = torch.randint(257, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(idx)
        torch.testing.assert_close(theirs(idx).logits, ours, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.5  # all logits alike would prove little
    text = theirs.generate(idx[:1, :8], do_sample=False, max_new_tokens=40)[0, 8:].tolist()
    assert text == generate(model, idx[:1, :8].tolist(), 40, temperature=0)[0] and len(set(text)) > 5
    assert AutoTokenizer.from_pretrained(path)("MIRA:")["input_ids"] == [*b"MIRA:"]


def test_back_again_the_weights_are_the_same_bits(folder):
    model, path = folder
    back = train_gpt2.from_pretrained(str(path))
    assert type(back) is ModernGPT and back.config == CONFIG
    for (name, a), b in zip(model.named_parameters(), back.parameters(), strict=True):
        n = 257 if "wte" in name or "lm_head" in name else len(a)
        assert torch.equal(a[:n], b[:n]), name


@pytest.mark.parametrize("other", [dict(final_logit_softcapping=30.0), dict(intermediate_size=100), dict(hidden_act="gelu"),
                                   dict(num_key_value_heads=1), dict(rms_norm_eps=1e-5)], ids=str)
def test_a_nanochat_of_another_shape_is_refused(tmp_path, other):
    how = dict(vocab_size=257, hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    NanoChatForCausalLM(NanoChatConfig(**{**how, **other})).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=next(iter(other))):
        train_gpt2.from_pretrained(str(tmp_path / "hf"))


@pytest.mark.process
def test_it_is_served(folder, tmp_path):
    model, _ = folder
    enc = get_tokenizer("byte")
    with serving("hf", tmp_path) as address:
        served = completion(address, "hf", "MIRA:", 20)
    ours = generate(model, [enc.encode_ordinary("MIRA:")], 20, temperature=0)[0]
    assert served.encode() == enc.decode(ours).encode() and len(set(ours)) > 5


def test_a_run_is_exported_spoken_with_and_gone_on_from(tmp_path, monkeypatch, capsys):
    short_text(tmp_path)
    run_here(monkeypatch, tmp_path, *TINY, "--recipe", "modern", "--max_steps", "60", "--sample_every", "0")
    run_here(monkeypatch, tmp_path, "--export", "my_model")
    assert_they_say_the_same(("my_model", "log/model_00060.pt"), tmp_path, monkeypatch, capsys)
    run_here(monkeypatch, tmp_path, "--init_from", "my_model", "--max_steps", "2", "--log_dir", "tuned", "--device", "cpu",
             "--sample_every", "0")
    state = train_gpt2.load_checkpoint(tmp_path / "tuned" / "model_00002.pt")
    assert state["config"]["recipe"] == "modern"
