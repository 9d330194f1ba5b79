"""Rows of wte that no token has make matmuls faster and must change nothing else."""
import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from common import generate, randomise
from train_gpt2 import GPT, GPTConfig, from_pretrained, num_params

V, ROWS = 19, 64
SHAPE = dict(block_size=8, vocab_size=V, n_layer=2, n_head=2, n_embd=8)


@pytest.fixture
def padded():
    """The padding rows hold what would show."""
    model = randomise(GPT(GPTConfig(**SHAPE)))
    with torch.no_grad():
        model.lm_head.weight[V:] = 5.0
    return model


@pytest.fixture
def plain(padded):
    """The same weights, and no rows but the tokens'."""
    model = copy.deepcopy(padded)
    model.lm_head = nn.Linear(8, V, bias=False)
    model.transformer.wte = nn.Embedding(V, 8)
    rows = padded.lm_head.weight[:V].detach().clone()
    model.lm_head.weight = model.transformer.wte.weight = nn.Parameter(rows)
    return model


@pytest.mark.parametrize("vocab_size, rows", [
    (1, 64), (63, 64), (64, 64), (65, 128), (257, 320), (50257, 50304)])
def test_there_are_as_many_rows_as_the_next_multiple_of_64(vocab_size, rows):
    model = GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=2))
    assert model.lm_head.weight.shape == model.transformer.wte.weight.shape == (rows, 2)
    assert model.lm_head.out_features == model.transformer.wte.num_embeddings == rows
    assert model(torch.tensor([[0]])).shape == (1, 1, vocab_size)


def test_logits_loss_and_gradients_are_those_of_the_plain_model(plain, padded):
    x, y = torch.randint(V, (2, 3, 8), generator=torch.Generator().manual_seed(1))
    assert padded.lm_head.weight.shape == (ROWS, 8) and plain.lm_head.weight.shape == (V, 8)
    logits, expected_logits = padded(x), plain(x)
    loss, expected_loss = padded(x, y), plain(x, y)
    assert logits.shape == (3, 8, V)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in padded.named_parameters():
        expected = gradients.pop(name)
        torch.testing.assert_close(p.grad[:len(expected)], expected, msg=lambda m: f"{name}: {m}")
    assert not gradients
    assert (padded.transformer.wte.weight.grad[V:] == 0).all()


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("kwargs", [dict(temperature=0), dict(temperature=1.0), dict(top_k=ROWS), dict(top_p=0.9)])
def test_no_id_outside_the_vocabulary_is_ever_drawn(padded, kwargs, cache):
    with torch.no_grad():  # a last LayerNorm that is constant: the padding's logits are 80 everywhere, the others' 0
        padded.transformer.ln_f.weight.zero_()
        padded.transformer.ln_f.bias.fill_(2.0)
        padded.transformer.wte.weight[:V] = 0
    generator = torch.Generator().manual_seed(0)
    tokens = generate(padded, [[1]] * 50, 10, cache, generator=generator, **kwargs)
    assert torch.tensor(tokens).max() < V


def test_pretrained_weights_say_the_same_with_padding(tmp_path):
    hf = GPT2LMHeadModel(GPT2Config(n_positions=8, vocab_size=V, n_layer=2, n_head=2, n_embd=8, bos_token_id=0,
                                    eos_token_id=0)).eval()
    randomise(hf).save_pretrained(tmp_path)
    padded = from_pretrained(str(tmp_path))
    idx = torch.arange(8)[None]
    assert padded.lm_head.weight.shape == (ROWS, 8)
    assert torch.equal(padded.lm_head.weight[:V], hf.lm_head.weight)
    assert (padded.lm_head.weight[V:] == 0).all()
    with torch.no_grad():
        torch.testing.assert_close(padded(idx), hf(idx).logits, rtol=1e-4, atol=1e-4)


def test_padding_is_not_counted(plain, padded):
    expected = sum(p.numel() for p in plain.parameters())
    assert num_params(padded) == num_params(plain) == expected
    assert sum(p.numel() for p in padded.parameters()) == expected + (ROWS - V) * 8
