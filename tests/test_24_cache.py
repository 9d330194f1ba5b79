"""The KV cache saves work and nothing else: the text is the one that comes without it."""
import pytest
import torch

import train_gpt2
from common import generate, machine_of, naive, talkative
from train_gpt2 import (GPT, CachedModel, GPTConfig, RecordedModel, TrainConfig, cached,
                        faster_classes, swap_classes)

S, V = 16, 41
PROMPTS = {"one token": [[7]], "one prompt": [[3, 1, 4, 1, 5]], "just full": [list(range(S))],
           "too long": [list(range(S + 6))], "a batch": [[7, 2, 8], [3, 1, 4], [9, 2, 9]],
           "a batch of one token": [[7], [8]],
           "a batch, too long": [list(range(S + 6)), list(range(6, S + 12))]}


@pytest.fixture
def model():
    return talkative(GPT(GPTConfig(block_size=S, vocab_size=V, n_layer=2, n_head=2, n_embd=16)), seed=2)


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS.keys())
def test_cached_is_uncached_is_naive_token_for_token(model, prompts):
    n = 2 * S  # crosses block_size
    expected = [naive(model, prompt, n) for prompt in prompts]
    assert all(len(set(row)) > 3 for row in expected)  # a text that repeats itself would prove little
    assert len(set(map(tuple, expected))) == len(prompts)
    assert type(cached(model)) is CachedModel
    assert generate(model, prompts, n, temperature=0) == expected
    assert generate(model, prompts, n, cache=False, temperature=0) == expected
    swap_classes(model, faster_classes(TrainConfig()))  # as in a sample while it trains
    assert generate(model, prompts, n, temperature=0) == expected


@pytest.mark.parametrize("cache, expected", [
    (True, [5] + [1] * 11 + [S] * 4),                  # the prompt, then each new token, until the context is full
    (False, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, S] + [S] * 4)])
def test_each_step_computes_one_new_position(model, cache, expected):
    computed = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: computed.append(out.size(1)))
    generate(model, [[3, 1, 4, 1, 5]], 16, cache, temperature=0)
    assert computed == expected


def test_logits_are_those_of_the_plain_model_at_each_step(model):
    idx = torch.randint(V, (3, S), generator=torch.Generator().manual_seed(1))
    speaker = cached(model)
    with torch.no_grad():
        expected = model(idx)
        prompt = speaker(idx[:, :4])
        assert prompt.shape == (3, 4, V)
        torch.testing.assert_close(prompt, expected[:, :4], rtol=1e-4, atol=1e-4)
        for T in range(5, S + 1):
            logits = speaker(idx[:, :T])
            assert logits.shape == (3, 1, V)
            torch.testing.assert_close(logits[:, 0], expected[:, T - 1], rtol=1e-4, atol=1e-4)


def test_half_precision_is_kept_in_half_the_bytes(model):
    speaker = cached(model)
    with machine_of(dtype="bfloat16").autocast(), torch.no_grad():
        idx = torch.tensor([[3, 1, 4, 1, 5]])
        first, second = speaker(idx[:, :4]), speaker(idx)
        expected = model(idx)
    assert {kv.dtype for kv in speaker.kv} == {torch.bfloat16}
    for got, at in ((first[:, -1], 3), (second[:, -1], 4)):
        assert (got - expected[:, at]).norm() < 0.05 * expected[:, at].norm()


def test_two_generations_at_once_do_not_share_a_cache(model):
    def tokens(prompt):
        return train_gpt2.generate(cached(model), torch.tensor([prompt]), 10, temperature=0)

    one, two = ([t.item() for t in tokens(prompt)] for prompt in ([7], [3, 1, 4]))
    both = zip(tokens([7]), tokens([3, 1, 4]))
    assert [(a.item(), b.item()) for a, b in both] == list(zip(one, two))


def test_a_model_of_shares_is_asked_as_it_is(model):
    """FSDP gathers parameters where a module is called, and a cache calls only its parts."""
    model.unshard = lambda: None  # what FSDP adds to a model
    assert cached(model) is model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs CUDA")
@pytest.mark.parametrize("prompts", [[[3, 1, 4]], [[3, 1, 4], [7, 2, 8]], [[7]]])
def test_a_replayed_step_is_the_one_that_python_would_have_started(prompts):
    model = talkative(GPT(GPTConfig(block_size=600, vocab_size=V, n_layer=2, n_head=2, n_embd=16)), seed=2).cuda()
    assert type(cached(model)) is RecordedModel
    steps = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: steps.append(out.size(1)))
    # Three stages of keys, then past block_size.
    recorded = generate(model, prompts, 620, temperature=0)
    # Python started the prompt, two passes a stage, and what is past the end.
    assert len(steps) < 2 * 3 + 40
    assert all(len(set(row)) > 3 for row in recorded)
    assert recorded == generate(model, prompts, 620, cache=False, temperature=0)
    uncaptured = torch.cat(list(train_gpt2.generate(
        CachedModel(model), torch.tensor(prompts).cuda(), 620, temperature=0)), dim=1)
    assert recorded == uncaptured.tolist()
