"""The KV cache saves work and nothing else: the text is the one that comes without it."""
import pytest
import torch

from common import generate, naive, talkative
from train_gpt2 import GPT, GPTConfig

S, V = 16, 41
PROMPTS = {"one token": [[7]], "one prompt": [[3, 1, 4, 1, 5]], "just full": [list(range(S))],
           "too long": [list(range(S + 6))], "unequal": [[7], [3, 1, 4, 1, 5], [9, 2]],
           "unequal, one too long": [[7, 8], list(range(S + 6)), [9] * 12]}


@pytest.fixture
def model():
    return talkative(GPT(GPTConfig(block_size=S, vocab_size=V, n_layer=2, n_head=2, n_embd=16)), seed=2)


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS.keys())
def test_cached_is_uncached_is_naive_token_for_token(model, prompts):
    n = 2 * S  # crosses block_size
    expected = [naive(model, prompt, n) for prompt in prompts]
    assert all(len(set(row)) > 3 for row in expected)  # a text that repeats itself would prove little
    assert generate(model, prompts, n, temperature=0) == expected
    assert generate(model, prompts, n, temperature=0, use_cache=False) == expected


@pytest.mark.parametrize("use_cache, expected", [
    (True, [5] + [1] * 11 + [S] * 4),                  # the prompt, then each new token, until the context is full
    (False, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, S] + [S] * 4)])
def test_each_step_computes_one_new_position(model, use_cache, expected):
    computed = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: computed.append(out.size(1)))
    generate(model, [[3, 1, 4, 1, 5]], 16, temperature=0, use_cache=use_cache)
    assert computed == expected


def test_two_generations_at_once_do_not_share_a_cache(model):
    one, two = ([t.item() for t in model.generate([p], 10, temperature=0)] for p in ([7], [3, 1, 4]))
    both = zip(model.generate([[7]], 10, temperature=0), model.generate([[3, 1, 4]], 10, temperature=0))
    assert [(a.item(), b.item()) for a, b in both] == list(zip(one, two))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs CUDA")
def test_a_replayed_step_is_the_one_that_python_would_have_started():
    model = talkative(GPT(GPTConfig(block_size=600, vocab_size=V, n_layer=2, n_head=2, n_embd=16)), seed=2).cuda()
    steps = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: steps.append(out.size(1)))
    cached = generate(model, [[3, 1, 4], [7]], 620, temperature=0)  # two stages of keys, then past block_size
    assert len(steps) < 2 * 3 + 40              # Python started the prompt, two passes a stage, and what is past the end
    assert cached == generate(model, [[3, 1, 4], [7]], 620, temperature=0, use_cache=False)
