"""Rows of wte that no token has make matmuls faster and must change nothing else."""
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common import randomise
from train_gpt2 import GPT, GPTConfig

V, ROWS = 19, 64
SHAPE = dict(block_size=8, vocab_size=V, n_layer=2, n_head=2, n_embd=8)


@pytest.fixture
def plain():
    return randomise(GPT(GPTConfig(**SHAPE)))


@pytest.fixture
def padded(plain):
    """The same weights; the padding rows hold what would show."""
    model = GPT(GPTConfig(**SHAPE, padded_vocab_size=ROWS))
    state = plain.state_dict()
    for key in ("transformer.wte.weight", "lm_head.weight"):
        state[key] = torch.cat((state[key], torch.full((ROWS - V, 8), 5.0)))
    model.load_state_dict(state)
    return model


def test_logits_loss_and_gradients_are_those_of_the_plain_model(plain, padded):
    x, y = torch.randint(V, (2, 3, 8), generator=torch.Generator().manual_seed(1))
    logits, expected_logits = padded(x)[0], plain(x)[0]
    loss, expected_loss = padded(x, y)[1], plain(x, y)[1]
    assert logits.shape == (3, 8, V)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    for (name, p), q in zip(padded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad[:len(q)], q.grad, msg=lambda m: f"{name}: {m}")
    assert (padded.transformer.wte.weight.grad[V:] == 0).all()


@pytest.mark.parametrize("kwargs", [dict(temperature=0), dict(temperature=1.0), dict(top_k=ROWS), dict(top_p=0.9)])
def test_no_id_outside_the_vocabulary_is_ever_drawn(padded, kwargs):
    with torch.no_grad():  # a last LayerNorm that is constant: the padding's logits are 80 everywhere, the others' 0
        padded.transformer.ln_f.weight.zero_()
        padded.transformer.ln_f.bias.fill_(2.0)
        padded.transformer.wte.weight[:V] = 0
    tokens = torch.stack(list(padded.generate([[1]] * 50, 10, generator=torch.Generator().manual_seed(0), **kwargs)))
    assert tokens.max() < V


def test_pretrained_weights_say_the_same_with_padding(tmp_path):
    hf = GPT2LMHeadModel(GPT2Config(n_positions=8, vocab_size=V, n_layer=2, n_head=2, n_embd=8, bos_token_id=0,
                                    eos_token_id=0))
    randomise(hf).save_pretrained(tmp_path)
    plain, padded = GPT.from_pretrained(str(tmp_path)), GPT.from_pretrained(str(tmp_path), padded_vocab_size=ROWS)
    idx = torch.arange(8)[None]
    assert padded.lm_head.weight.shape == (ROWS, 8)
    torch.testing.assert_close(padded(idx)[0], plain(idx)[0])


def test_padding_is_not_counted(plain, padded):
    assert padded.num_params() == plain.num_params() == sum(p.numel() for p in plain.parameters())
