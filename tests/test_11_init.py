"""The random weights a training run begins with."""
import math

import pytest
import torch
from torch import nn

from train_gpt2 import GPT, GPTConfig


def test_every_parameter_is_drawn_as_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=100, n_layer=8, n_head=4, n_embd=64))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            n = p.numel()  # the error of a measured std is std / sqrt(2 n), that of a mean std / sqrt(n)
            assert p.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * n)), name
            assert p.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(n)), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_the_tied_matrix_is_drawn_once(monkeypatch):
    drawn, normal = [], nn.init.normal_

    def spy(tensor, mean=0.0, std=1.0, *args, **kwargs):
        if std != 1:  # nn.Embedding's own draw, before ours
            drawn.append(tensor)
        return normal(tensor, mean, std, *args, **kwargs)

    monkeypatch.setattr(nn.init, "normal_", spy)
    model = GPT(GPTConfig(block_size=8, vocab_size=19, n_layer=3, n_head=2, n_embd=8))
    for p in model.parameters():
        assert sum(t is p for t in drawn) == (p.dim() == 2)


def stream_std(n_layer, scaled):
    """Of the residual stream where it leaves the last block."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=n_layer, n_head=4, n_embd=128))
    seen = []
    model.transformer.ln_f.register_forward_hook(lambda module, args, out: seen.append(args[0].std().item()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight") and not scaled:
                p.mul_(math.sqrt(2 * n_layer))
        model(torch.randint(100, (2, 16)))
    return seen[0]


def test_the_residual_stream_does_not_grow_with_depth():
    assert stream_std(24, scaled=True) < 1.5 * stream_std(1, scaled=True)
    assert stream_std(24, scaled=False) > 3 * stream_std(1, scaled=False)  # what the scaling is for
