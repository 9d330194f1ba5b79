"""QK-norm: no score of attention can run away."""
import math

import torch

from common import randomise
from train_gpt2 import GPTConfig, ModernGPT


def test_no_score_is_over_the_root_of_hs_however_large_the_matrices():
    config = GPTConfig(block_size=16, vocab_size=41, n_layer=1, n_head=2, n_embd=32)
    attn = randomise(ModernGPT(config), std=1e4).transformer.h[0].attn
    q, k, _ = attn.heads(torch.randn(2, 16, 32))
    scores = q @ k.transpose(-2, -1) / math.sqrt(16)
    assert scores.abs().max() <= math.sqrt(16) + 1e-3
    torch.testing.assert_close(q.square().mean(-1), torch.ones(2, 2, 16), rtol=1e-4, atol=1e-4)
