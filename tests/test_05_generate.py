"""Generation: what may be drawn, how often, and that neither batching nor length changes a row's text."""
import itertools

import pytest
import torch

import train_gpt2
from common import generate, naive, talkative
from train_gpt2 import GPT, GPTConfig, cached, sample

S, V = 8, 23


@pytest.fixture
def model():
    return talkative(GPT(GPTConfig(block_size=S, vocab_size=V, n_layer=2, n_head=2, n_embd=16)), seed=2)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_temperature_0_and_top_k_1_are_the_argmax_also_past_block_size(model):
    for prompt in ([5], [3, 1, 4], list(range(S)), list(range(S + 5))):
        expected = naive(model, prompt, 2 * S)
        assert len(set(expected)) > 6  # a text that repeats itself would prove little
        for cache in (False, True):
            assert generate(model, [prompt], 2 * S, cache, temperature=0) == [expected]
            assert generate(model, [prompt], 2 * S, cache, top_k=1) == [expected]


def test_a_row_of_a_batch_says_what_it_says_alone(model):
    short, longer = [[5], [6], [7]], [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]]
    for batch in (short, longer, [list(range(n, n + S + 3)) for n in range(3)]):
        expected = [naive(model, p, 2 * S) for p in batch]
        assert len(set(map(tuple, expected))) == len(batch)
        for cache in (False, True):
            assert generate(model, batch, 2 * S, cache, temperature=0) == expected


def test_the_seed_alone_decides_and_the_global_generator_is_left_alone(model):
    state = torch.get_rng_state()
    once, again, by_cache, other = (
        generate(model, [[1, 2]], 20, cache, temperature=5.0, generator=seeded(seed))
        for cache, seed in ((False, 1), (False, 1), (True, 1), (True, 2)))
    assert once == again == by_cache != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kwargs, expected", [
    (dict(), [1/8, 1/2, 1/8, 1/4]),
    (dict(temperature=0.5), [1/22, 16/22, 1/22, 4/22]),           # p squared
    (dict(top_k=2), [0, 2/3, 0, 1/3]),
    (dict(top_k=99), [1/8, 1/2, 1/8, 1/4]),
    (dict(top_p=0.01), [0, 1, 0, 0]),
    (dict(top_p=0.45), [0, 1, 0, 0]),
    (dict(top_p=0.55), [0, 2/3, 0, 1/3]),                         # the one that crosses p is in
    (dict(top_p=0.80), [1/7, 4/7, 0, 2/7]),                       # of equals the first
    (dict(top_k=2, top_p=0.60), [0, 1, 0, 0]),                    # after top_k, id 1 holds 2/3
    (dict(temperature=2.0, top_p=0.70), [0.227, 0.453, 0, 0.320]),  # square roots: 0.37 + 0.26 of 1 do not reach 0.7
])
def test_draws_follow_the_hand_worked_distribution(kwargs, expected):
    model, n = GPT(GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=2)), 5000
    with torch.no_grad():  # the same after any text: a last LayerNorm that is constant, a head that is log p
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0.0]))
        model.lm_head.weight[:4, 0] = torch.tensor([1/8, 1/2, 1/8, 1/4]).log()
    drawn = torch.tensor(generate(model, [[0]] * n, 1, generator=seeded(0), **kwargs)).flatten()
    measured, expected = torch.bincount(drawn, minlength=4) / n, torch.tensor(expected, dtype=torch.float32)
    assert torch.equal(measured > 0, expected > 0)
    torch.testing.assert_close(measured, expected, atol=0.03, rtol=0)


def test_a_batch_draws_each_row_for_itself():
    logits = torch.full((3, V), -90.0)
    logits[range(3), [4, 0, 22]] = 9.0
    for how in ({}, {"temperature": 0}, {"temperature": 1e-300}, {"top_k": 3}, {"top_p": 0.5}):
        assert sample(logits, **how).tolist() == [[4], [0], [22]]


def test_tokens_come_one_by_one(model):
    for speaker in (model, cached(model)):
        tokens = train_gpt2.generate(speaker, torch.tensor([[5], [6]]), 10**9, temperature=0)
        first = list(itertools.islice(tokens, 5))  # a list of all would take years
        assert all(t.shape == (2, 1) for t in first)
        assert torch.cat(first, dim=1).tolist() == [naive(model, [5], 5), naive(model, [6], 5)]
        assert not first[0].requires_grad
