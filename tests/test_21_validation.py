"""The validation loss is a number about the model, not about the batch size."""
import math

import numpy as np
import pytest
import tiktoken
import torch
from torch.nn import functional as F

from common import TINY, loader_of, machine_of, randomise, run_here, short_text
from train_gpt2 import GPT, GPTConfig, evaluate, get_tokenizer

T = 8


def validate(model, tokens, enc, batch_size=4, val_tokens=10**9):
    return evaluate(model, loader_of(tokens, 1, T), batch_size, val_tokens, enc, machine_of())


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 256, 13 * T + 5)  # 13 windows and a rest


@pytest.fixture
def model():
    return randomise(GPT(GPTConfig(block_size=T, vocab_size=257, n_layer=1, n_head=2, n_embd=8)))


def plain_loss(model, tokens, windows):
    x, y = (torch.tensor(tokens[i:i + windows * T].reshape(windows, T)) for i in (0, 1))
    with torch.no_grad():
        return F.cross_entropy(model(x).double().flatten(0, 1), y.flatten()).item()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 13, 64])
def test_the_loss_is_that_of_one_plain_pass_whatever_the_batch_size(model, tokens, batch_size):
    loss, report = validate(model, tokens, get_tokenizer("byte"), batch_size)
    expected = plain_loss(model, tokens, 13)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert f"val loss {expected:.4f} | perplexity {math.exp(expected):.2f} | {expected / math.log(2):.3f} bits" in report


@pytest.mark.parametrize("val_tokens, windows", [(5 * T, 5), (6 * T - 1, 5), (1, 1), (13 * T, 13), (10**9, 13)])
def test_val_tokens_caps_the_windows(model, tokens, val_tokens, windows):
    for batch_size in (2, 64):
        loss, _ = validate(model, tokens, get_tokenizer("byte"), batch_size, val_tokens)
        assert loss == pytest.approx(plain_loss(model, tokens, windows), abs=1e-6)


def test_every_batch_has_the_shape_that_the_module_was_compiled_for(model, tokens):
    shapes = []

    def compiled(x, y):
        shapes.append(tuple(x.shape))
        return model(x, y)

    validate(compiled, tokens, get_tokenizer("byte"), 5)  # 13 = 5 + 5 + 3
    assert shapes == [(5, T)] * 3


def test_processes_share_the_work_and_their_sums_are_those_of_one(model, tokens):
    """13 windows by threes: of five processes the last has nothing that counts."""
    enc, sums = get_tokenizer("byte"), {}
    for n in (2, 5):
        for rank in range(n):
            machine = machine_of()
            machine.rank, machine.world_size = rank, n
            passes, own = [], sums.setdefault((n, rank), [])
            machine.sum = lambda values, own=own: own.extend(values) or [1.0] * len(values)

            def counting(x, y, passes=passes):
                passes.append(x)
                return model(x, y)

            evaluate(counting, loader_of(tokens, 1, T), 3, 10**9, enc, machine)
            # As many in each, for under FSDP they wait for each other.
            assert len(passes) == math.ceil(13 / (3 * n))
        nats, counted, text_bytes = (sum(sums[n, rank][i] for rank in range(n)) for i in range(3))
        assert (counted, text_bytes) == (13 * T, 13 * T)
        assert nats / counted == pytest.approx(plain_loss(model, tokens, 13), abs=1e-6)


def test_bits_per_byte_counts_the_bytes_of_the_tokens():
    ranks = {b"a": 0, b" the": 1, "é".encode(): 2, b"\xff": 3, b"ab": 4}
    enc = tiktoken.Encoding("tiny", pat_str=".+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 5})
    model = GPT(GPTConfig(block_size=T, vocab_size=6, n_layer=1, n_head=1, n_embd=4))
    with torch.no_grad():
        model.transformer.wte.weight.zero_()  # every token as likely as any other: log2(6) bits each
    targets = [1, 2, 3, 5, 4, 0, 0, 5]        # 4 + 2 + 1 + 0 + 2 + 1 + 1 + 0 = 11 bytes: an <|endoftext|> is no text
    loss, report = validate(model, np.array([5] + targets), enc)
    assert loss == pytest.approx(math.log(6))
    assert f"{8 * math.log2(6) / 11:.3f} bits per byte" in report


def test_an_evaluation_changes_nothing_in_training(monkeypatch, tmp_path):
    logs = []
    for every in (1, 0):
        short_text(tmp_path)
        run_here(monkeypatch, tmp_path, *TINY, "--eval_every", every)
        logs.append((tmp_path / "log" / "log.txt").read_text().splitlines())
    with_eval, without = logs
    assert [row.split()[:2] for row in with_eval if " val " in row] == [[str(step), "val"] for step in range(7)]
    assert [row for row in with_eval if " train " in row] == without and len(without) == 6
