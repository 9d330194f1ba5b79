"""The skeleton has GPT-2's parts, under GPT-2's names: without that no pretrained weight finds its place."""
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from train_gpt2 import GPT, GPTConfig, SIZES, num_params

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face keeps these matrices as (in, out)
BUFFERS = (".attn.bias", ".attn.masked_bias")


def test_names_and_shapes_are_hugging_faces_but_for_rows_without_a_token():
    ours = GPT(GPTConfig(block_size=11, vocab_size=97, n_layer=3, n_head=5, n_embd=20)).state_dict()
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=11, vocab_size=97, n_layer=3, n_head=5, n_embd=20)).state_dict()
    expected = {key: tuple(w.t().shape if key.endswith(CONV1D) else w.shape)
                for key, w in theirs.items() if not key.endswith(BUFFERS)}
    for key in ("transformer.wte.weight", "lm_head.weight"):
        assert expected[key] == (97, 20)
        expected[key] = (128, 20)  # the next multiple of 64
    assert {key: tuple(w.shape) for key, w in ours.items()} == expected


@pytest.mark.parametrize("name, count", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                         ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_each_size_has_as_many_parameters_as_openais(name, count):
    size = SIZES[name]
    with torch.device("meta"):  # shapes without memory
        ours = GPT(GPTConfig(**size))
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=size["n_layer"], n_head=size["n_head"], n_embd=size["n_embd"]))
    assert num_params(ours) == count
    assert sum(p.numel() for p in theirs.transformer.parameters()) == count


def test_the_default_is_gpt2_124m():
    assert GPTConfig() == GPTConfig(**SIZES["gpt2"])


def test_heads_that_cannot_share_the_width_are_refused_by_name():
    with pytest.raises(ValueError, match=r"n_embd=100\b.*n_head=12\b"):
        GPT(GPTConfig(n_embd=100, n_head=12))
