"""Flash attention is the written-out formula, only faster."""
import math

import pytest
import torch

import train_gpt2
from common import randomise
from train_gpt2 import CausalSelfAttention, GPTConfig


def written_out(module, x):
    """Part I's formula where the library's kernel is: all T x T scores in memory."""
    return module.merge(train_gpt2.attention(*module.heads(x)))


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


def test_heads_are_the_pieces_of_a_tokens_vector_and_merge_puts_them_side_by_side():
    module = randomise(CausalSelfAttention(GPTConfig(block_size=5, n_head=3, n_embd=12)))
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    for t, y in zip(module.heads(x), module.c_attn(x).split(12, dim=-1), strict=True):
        assert t.shape == (2, 3, 5, 4)
        for h in range(3):
            assert torch.equal(t[:, h], y[..., 4 * h:4 * h + 4])
        torch.testing.assert_close(module.merge(t), module.c_proj(y))
