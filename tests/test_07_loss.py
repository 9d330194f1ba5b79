"""The loss: cross-entropy of the next token, in nats, averaged over all tokens."""
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common import randomise
from train_gpt2 import GPT, GPTConfig, from_pretrained


def test_loss_is_hugging_faces(tmp_path):
    hf = GPT2LMHeadModel(GPT2Config(n_positions=16, vocab_size=31, n_layer=2, n_head=2, n_embd=8, bos_token_id=0,
                                    eos_token_id=0)).eval()
    randomise(hf, std=1.0).save_pretrained(tmp_path)
    tokens = torch.randint(31, (3, 16), generator=torch.Generator().manual_seed(1))
    x, y = tokens[:, :-1], tokens[:, 1:].contiguous()
    with torch.no_grad():
        loss = from_pretrained(str(tmp_path))(x, y)
        expected = hf(tokens, labels=tokens).loss  # it shifts the labels by itself
    assert abs(expected.item() - math.log(31)) > 0.1  # not what any model would have
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_untrained_model_knows_nothing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=2, n_head=2, n_embd=32))
    x, y = torch.randint(50257, (2, 4, 16))
    with torch.no_grad():
        loss = model(x, y)
    assert loss.item() == pytest.approx(math.log(50257), rel=0.02)


def test_perplexity_of_a_hand_worked_distribution():
    model = GPT(GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=2))
    with torch.no_grad():  # 1/2, 1/4, 1/8, 1/8 after any text: a last LayerNorm that is constant, a head that is log p
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0.0]))
        model.lm_head.weight[:4, 0] = torch.tensor([1/2, 1/4, 1/8, 1/8]).log()
        loss = model(torch.tensor([[0, 0], [0, 0]]), torch.tensor([[0, 1], [2, 3]]))
    assert math.exp(loss.item()) == pytest.approx(2 ** ((1 + 2 + 3 + 3) / 4), rel=1e-5)  # bits: 1, 2, 3, 3


def test_targets_of_minus_100_do_not_count():
    model = randomise(GPT(GPTConfig(block_size=4, vocab_size=9, n_layer=1, n_head=1, n_embd=2)))
    idx, targets = torch.randint(9, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    log_probs = model(idx).log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]
    targets[1, 1:] = targets[0, 2] = -100
    torch.testing.assert_close(model(idx, targets), -log_probs[targets >= 0].mean())


def test_without_targets_there_are_logits_and_with_targets_the_loss_alone():
    model, idx = GPT(GPTConfig(4, 5, 1, 1, 2)), torch.tensor([[0, 1, 2]])
    assert model(idx).shape == (1, 3, 5)
    assert model(idx, idx).shape == ()
