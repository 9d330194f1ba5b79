"""Attention as a formula, one position at a time, against the module. It must hold however the module computes it."""
import math

import pytest
import torch

from common import randomise
from train_gpt2 import CausalSelfAttention, GPTConfig

B, T, C, NH = 2, 7, 12, 3


@pytest.fixture
def attention():
    return randomise(CausalSelfAttention(GPTConfig(block_size=16, vocab_size=10, n_layer=1, n_head=NH, n_embd=C)))


def naive(attention, x):
    """The same weights, loops over batch, heads and positions, float64."""
    w, b = attention.c_attn.weight.double(), attention.c_attn.bias.double()
    hs = C // NH
    rows = []
    for sequence in x:
        q, k, v = (sequence @ w.t() + b).split(C, dim=1)                # (T, C) each
        for t in range(T):
            heads = []
            for h in range(NH):
                at = slice(h * hs, (h + 1) * hs)
                scores = torch.stack([q[t, at] @ k[s, at] / math.sqrt(hs) for s in range(t + 1)])
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(weights[s] * v[s, at] for s in range(t + 1)))
            rows.append(torch.cat(heads))
    y = torch.stack(rows).view(B, T, C)
    return y @ attention.c_proj.weight.double().t() + attention.c_proj.bias.double()


def test_attention_is_the_formula_forward_and_backward(attention):
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(B, T, C, generator=generator)
    weight = torch.randn(B, T, C, generator=generator)                  # so that every output counts differently
    x32, x64 = x.clone().requires_grad_(), x.double().requires_grad_()
    y32, y64 = attention(x32), naive(attention, x64)
    torch.testing.assert_close(y32.double(), y64, atol=1e-5, rtol=1e-5)
    (y32 * weight).sum().backward()
    (y64 * weight).sum().backward()
    torch.testing.assert_close(x32.grad.double(), x64.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("t", range(T))
def test_a_token_never_sees_a_later_one(attention, t):
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[:, t] += 5
    before, after = attention(x), attention(changed)
    torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
    assert (after[:, t:] - before[:, t:]).abs().amax(dim=(0, 2)).min() > 1e-3  # itself and all later ones do see it


def test_one_token_attends_to_itself_alone(attention):
    x = torch.randn(B, 1, C, generator=torch.Generator().manual_seed(1))
    v = attention.c_attn(x)[..., 2 * C:]
    torch.testing.assert_close(attention(x), attention.c_proj(v))
