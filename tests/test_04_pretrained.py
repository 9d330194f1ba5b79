"""Weights saved by Hugging Face speak the same here; what cannot be loaded is one clear line."""
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from common import randomise
from train_gpt2 import UserError, from_pretrained


def save_gpt2(folder, n_layer=2, n_head=2, n_embd=8):
    hf = GPT2LMHeadModel(GPT2Config(n_positions=16, vocab_size=31, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                                    bos_token_id=0, eos_token_id=0))
    randomise(hf, std=0.2).save_pretrained(folder)
    return hf.eval()


def assert_same_logits(ours, theirs):
    idx = torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(idx).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(idx), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_layer, n_head", [(1, 12), (2, 16), (3, 20), (4, 25)])  # GPT-2's, a twelfth as deep
def test_logits_are_hugging_faces(tmp_path, n_layer, n_head):
    theirs = save_gpt2(tmp_path, n_layer, n_head, 4 * n_head)
    assert_same_logits(from_pretrained(str(tmp_path)), theirs)


def test_openais_file_with_its_buffers_and_bare_names_loads(tmp_path):
    theirs, file = save_gpt2(tmp_path), tmp_path / "model.safetensors"
    state = {key.removeprefix("transformer."): w for key, w in load_file(file).items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    state |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(state, file, metadata={"format": "pt"})
    assert_same_logits(from_pretrained(str(tmp_path)), theirs)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="gpt3.*gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
        from_pretrained("gpt3")


def no_files(folder):
    pass


def truncated(folder):
    save_gpt2(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def gpt_neo(folder):
    GPTNeoForCausalLM(GPTNeoConfig(vocab_size=31, max_position_embeddings=16, hidden_size=8, num_layers=2, num_heads=2,
                                   attention_types=[[["global", "local"], 1]])).save_pretrained(folder)


def bert(folder):
    BertModel(BertConfig(vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32)).save_pretrained(folder)


def a_tensor_missing(folder):
    save_gpt2(folder)
    state = load_file(folder / "model.safetensors")
    del state["transformer.h.1.mlp.c_fc.bias"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spoil", [no_files, truncated, gpt_neo, bert, a_tensor_missing])
def test_what_is_no_whole_gpt2_is_one_line_with_its_name(tmp_path, spoil):
    spoil(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)) as e:
        from_pretrained(str(tmp_path))
    assert "\n" not in str(e.value)
