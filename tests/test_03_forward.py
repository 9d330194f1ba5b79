"""How the parts are put together: the residual stream, the LayerNorms before each part, GELU, the head."""
import math

import pytest
import torch

from common import randomise
from train_gpt2 import GPT, Block, GPTConfig, UserError

CONFIG = GPTConfig(block_size=8, vocab_size=19, n_layer=2, n_head=2, n_embd=12)


def layer_norm(x, ln):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return x * ln.weight + ln.bias


def gelu(x):  # the tanh approximation (Hendrycks and Gimpel 2016)
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def by_hand(block, x):
    x = x + block.attn(layer_norm(x, block.ln_1))
    return x + block.mlp.c_proj(gelu(block.mlp.c_fc(layer_norm(x, block.ln_2))))


def test_block_adds_attention_then_mlp_of_the_normed_stream():
    block = randomise(Block(CONFIG), std=0.5).double()  # float64 tells tanh-GELU from erf-GELU, 1e-3 apart
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(block(x), by_hand(block, x), atol=1e-9, rtol=1e-9)


def test_forward_is_embeddings_blocks_last_norm_and_head():
    model = randomise(GPT(CONFIG)).double()
    idx = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 18]])
    x = model.transformer.wte.weight[idx] + model.transformer.wpe.weight[:5]
    for block in model.transformer.h:
        x = by_hand(block, x)
    expected = layer_norm(x, model.transformer.ln_f) @ model.lm_head.weight[:19].t()
    logits = model(idx)
    assert logits.shape == (2, 5, 19)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)


def test_a_full_context_fits_and_one_token_more_is_refused_by_name():
    model = GPT(CONFIG)
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 19)
    for targets in (None, torch.zeros(1, 9, dtype=torch.int64)):
        with pytest.raises(UserError, match=r"T=9\b.*block_size=8\b"):
            model(torch.zeros(1, 9, dtype=torch.int64), targets)
