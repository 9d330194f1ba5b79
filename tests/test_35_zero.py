"""ReLU², and projections that begin at zero: the untrained network is the identity."""
import torch

from train_gpt2 import GPTConfig, ModernGPT, rms_norm

CONFIG = GPTConfig(block_size=16, vocab_size=41, n_layer=3, n_head=2, n_embd=32)


def test_the_untrained_network_hands_on_what_it_reads():
    model, idx = ModernGPT(CONFIG), torch.arange(16)[None]
    x = rms_norm(model.transformer.wte(idx))
    torch.testing.assert_close(model.trunk(idx), x)


def test_the_bend_is_relu_squared():
    mlp = ModernGPT(CONFIG).transformer.h[0].mlp
    torch.nn.init.normal_(mlp.c_proj.weight)
    x = torch.randn(2, 3, 32)
    hidden = x @ mlp.c_fc.weight.T
    expected = torch.where(hidden > 0, hidden * hidden, torch.zeros(())) @ mlp.c_proj.weight.T
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)
