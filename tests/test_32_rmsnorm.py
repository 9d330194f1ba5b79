"""RMSNorm without weights, layers without biases."""
import math

import torch
from torch import nn

from train_gpt2 import GPT, GPTConfig, ModernGPT, new_model

SMALL = dict(block_size=16, vocab_size=41, n_layer=2, n_head=2, n_embd=32)


def test_all_parameters_are_matrices():
    model = ModernGPT(GPTConfig(**SMALL))
    assert {p.dim() for p in model.parameters()} == {2}
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())


def test_what_a_block_reads_has_a_mean_square_of_1_and_keeps_its_direction():
    block = ModernGPT(GPTConfig(**SMALL)).transformer.h[0]
    x = 7 * torch.randn(3, 5, 32) + 2
    expected = torch.stack([row / math.sqrt(sum(v * v for v in row.tolist()) / 32) for row in x.flatten(0, 1)])
    torch.testing.assert_close(block.ln_1(x).flatten(0, 1), expected, rtol=1e-5, atol=1e-6)


def test_the_recipe_chooses_the_model():
    assert type(new_model("modern", **SMALL)) is ModernGPT and type(new_model("gpt2", **SMALL)) is GPT
