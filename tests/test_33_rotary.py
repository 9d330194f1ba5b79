"""Rotary positions: a score depends on how far apart two tokens are, and not on where they are."""
import math

import pytest
import torch

from common import generate, naive, randomise
from train_gpt2 import CachedModel, GPTConfig, ModernGPT, Rotary, cached

CONFIG = GPTConfig(block_size=64, vocab_size=41, n_layer=2, n_head=2, n_embd=32)


def turned_by_hand(x, pos, hs):
    """One vector, pair by pair, as a complex number times exp(-i angle)."""
    half = hs // 2
    points = [complex(x[i], x[i + half]) for i in range(half)]
    points = [z * complex(math.cos(pos / 10_000 ** (2 * i / hs)), -math.sin(pos / 10_000 ** (2 * i / hs)))
              for i, z in enumerate(points)]
    return [z.real for z in points] + [z.imag for z in points]


def test_each_pair_is_a_point_that_turns_at_its_own_speed():
    x = torch.randn(1, 1, 3, 16)
    out = Rotary(CONFIG)(x, torch.tensor([0, 5, 63]))
    for t, pos in enumerate([0, 5, 63]):
        expected = turned_by_hand(x[0, 0, t].tolist(), pos, 16)
        assert out[0, 0, t].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_score_depends_on_the_distance_alone():
    rotary, q, k = Rotary(CONFIG), torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(t, s):
        return (rotary(q, torch.tensor([t])) * rotary(k, torch.tensor([s]))).sum().item()

    assert score(9, 4) == pytest.approx(score(63, 58), abs=1e-4) == pytest.approx(score(5, 0), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_there_is_no_table_of_positions_and_nothing_of_it_in_a_checkpoint():
    names = [name for name, _ in ModernGPT(CONFIG).state_dict().items()]
    assert not [name for name in names if "wpe" in name or "cos" in name or "rotary" in name]


@pytest.mark.parametrize("prompts", [[[7]], [[3, 1, 4], [9, 2, 9]], [list(range(41)) * 2]])
def test_cached_is_uncached_token_for_token_also_beyond_block_size(prompts):
    model = randomise(ModernGPT(CONFIG), std=1.0, seed=4)
    expected = [naive(model, prompt, 80) for prompt in prompts]
    assert len({token for row in expected for token in row}) > 3  # one that repeats itself would prove little
    assert type(cached(model)) is CachedModel
    assert generate(model, prompts, 80, temperature=0) == expected
    assert generate(model, prompts, 80, cache=False, temperature=0) == expected
