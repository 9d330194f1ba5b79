"""Flash attention is the written-out formula, only faster."""
import math

import pytest
import torch

from common import randomise
from train_gpt2 import CausalSelfAttention, GPTConfig


def written_out(attention, x):
    B, T, C = x.size()
    nh, hs = attention.n_head, C // attention.n_head
    q, k, v = (t.view(B, T, nh, hs).transpose(1, 2) for t in attention.c_attn(x).split(C, dim=2))  # (B, nh, T, hs)
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)                                              # (B, nh, T, T)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    y = scores.softmax(dim=-1) @ v
    return attention.c_proj(y.transpose(1, 2).reshape(B, T, C))


@pytest.mark.parametrize("B, T, C, nh", [(1, 1, 4, 1), (2, 5, 12, 3), (3, 64, 32, 4), (1, 130, 64, 1), (2, 33, 50, 25)])
def test_output_and_every_gradient_are_those_of_the_formula(B, T, C, nh):
    attention = randomise(CausalSelfAttention(GPTConfig(block_size=T, n_head=nh, n_embd=C)), std=1 / math.sqrt(C))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, C, generator=generator, requires_grad=True)
    weight = torch.randn(B, T, C, generator=generator)
    results = []
    for forward in (attention, lambda x: written_out(attention, x)):
        y = forward(x)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, *attention.parameters()])])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
