"""Attention as a formula, one position at a time, against the module, however that computes it.

attention() is the same formula for all positions at once, the library's kernel the same function.
"""
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import train_gpt2
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


@pytest.mark.parametrize("B, nh, T, hs", [
    (1, 1, 1, 4), (2, 3, 7, 4), (3, 4, 64, 8), (1, 1, 130, 64), (2, 25, 33, 2)])
def test_the_function_written_out_is_the_librarys_forward_and_backward(B, nh, T, hs):
    generator = torch.Generator().manual_seed(1)
    *qkv, weight = torch.randn(4, B, nh, T, hs, generator=generator, dtype=torch.float64)
    library, results = partial(F.scaled_dot_product_attention, is_causal=True), []
    for f in (train_gpt2.attention, library):
        leaves = [(2 * t).requires_grad_() for t in qkv]
        y = f(*leaves)
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    assert results[0][0].shape == (B, nh, T, hs)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_function_may_stand_where_the_librarys_kernel_stands(attention, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, C, generator=generator)
    weight = torch.randn(B, T, C, generator=generator)
    calls, results = [], []

    def written_out(q, k, v, is_causal):
        calls.append(is_causal)
        return train_gpt2.attention(q, k, v)

    for kernel in (F.scaled_dot_product_attention, written_out):
        monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
        leaf = x.clone().requires_grad_()
        y = attention(leaf)
        leaves = [leaf, *attention.parameters()]
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    assert calls == [True]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
