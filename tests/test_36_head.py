"""A head of its own that begins at zero, and logits that end at 15."""
import math

import pytest
import torch
from torch.nn import functional as F

from common import randomise
from train_gpt2 import (FasterModernGPT, GPTConfig, ModernGPT, TrainConfig, configure,
                        faster_classes, flops_per_token, num_params, swap_classes)

CONFIG = GPTConfig(block_size=16, vocab_size=41, n_layer=2, n_head=2, n_embd=32)


def test_the_untrained_model_is_exactly_as_unsure_as_can_be():
    idx = torch.arange(16)[None]
    assert ModernGPT(CONFIG)(idx, idx).item() == pytest.approx(math.log(41), abs=1e-6)


def test_logits_are_within_15_and_small_ones_as_they_were():
    model = randomise(ModernGPT(CONFIG), std=30.0)
    logits = model(torch.arange(16)[None])
    assert logits.shape == (1, 16, 41) and logits.abs().max() <= 15 and logits.abs().max() > 14
    x = torch.randn(2, 32) / 100
    torch.testing.assert_close(model.lm_head(x), 15 * torch.tanh(F.linear(x, model.lm_head.weight) / 15))


def test_parameters_and_flops_by_hand():
    model = ModernGPT(CONFIG)
    blocks = 2 * 12 * 32 * 32
    assert num_params(model) == blocks + 2 * 41 * 32  # two tables, without the rows up to 64
    assert flops_per_token(model, 16) == 6 * (blocks + 41 * 32) + 12 * 2 * 32 * 16  # wte is only looked up


def test_heads_are_twice_as_wide_where_that_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("text")
    for model, heads in {"demo": 2, "gpt2": 6, "gpt2-medium": 8, "gpt2-large": 10, "gpt2-xl": 25}.items():
        assert configure({"recipe": "modern", "model": model})[0].n_head == heads
    assert configure({"recipe": "modern", "n_head": 4})[0].n_head == 4


@pytest.mark.process  # a compiler is one
@pytest.mark.parametrize("skipped", [False, True])
def test_the_faster_loss_is_the_loss_and_so_are_its_gradients(skipped):
    plain, faster = (randomise(ModernGPT(CONFIG), std=0.5) for _ in range(2))
    swap_classes(faster, faster_classes(TrainConfig()))
    assert type(faster) is FasterModernGPT
    idx = torch.randint(41, (2, 16), generator=torch.Generator().manual_seed(0))
    targets = idx.roll(-1, 1)
    if skipped:
        targets[0, :5] = -100
    expected, loss = plain(idx, targets), torch.compile(faster)(idx, targets)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(plain.named_parameters(), faster.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_queries_keys_and_values_are_one_product(recompute):
    plain, faster = (randomise(ModernGPT(CONFIG), std=0.5) for _ in range(2))
    swap_classes(faster, faster_classes(TrainConfig(checkpoint_activations=recompute)))
    products = {}
    for name, model in ("plain", plain), ("faster", faster):
        sizes = products.setdefault(name, [])

        def count(graph, inputs):
            # Each product's columns, wherever it stands: recomputed blocks are graphs of their own.
            for part in graph.modules():
                for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else []:
                    if node.target in (F.linear, torch._C._nn.linear):
                        sizes.append(node.meta["example_value"].size(-1))
            return graph

        idx = torch.arange(16)[None]
        torch._dynamo.reset()
        loss = torch.compile(model, backend=count)(idx, idx)
        torch.testing.assert_close(loss, model(idx, idx), rtol=1e-5, atol=1e-5)
    assert len(products["plain"]) == 2 * 6 + 1 and 96 not in products["plain"]
    assert len(products["faster"]) == 2 * 4 + 1 and products["faster"].count(96) == 2
