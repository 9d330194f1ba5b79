"""Samples come out whole and at once, and taking them does not change the training."""
import io
import itertools
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import train_gpt2
from common import TINY, optimizer_steps, parameters, run, run_here, short_text
from train_gpt2 import GPT, GPTConfig, get_tokenizer, stream_text

FRESH = [*TINY, "--init_from", "scratch", "--max_new_tokens", "20"]  # an untrained model babbles as well as any
CFG = SimpleNamespace(max_new_tokens=100, temperature=1.0, top_k=0, top_p=1.0)


@pytest.fixture
def train(monkeypatch, tmp_path, capsys):
    def train(*flags):
        weights = []
        with optimizer_steps(after=lambda opt: weights.append([p.detach().clone() for p in parameters(opt)])):
            run_here(monkeypatch, short_text(tmp_path), *TINY, *flags)
        samples = re.findall(r"^step +(\d+) \| sample: (.*?)\n\n", capsys.readouterr().out, re.M | re.S)
        return samples, (tmp_path / "log" / "log.txt").read_text(), weights[-1]
    return train


def test_sampling_leaves_the_training_run_as_it_is_and_repeats_itself(train):
    samples, log, weights = train("--sample_every", 2)
    again, _, _ = train("--sample_every", 2)
    none, log_without, weights_without = train("--sample_every", 0)
    assert [step for step, _ in samples] == ["2", "4", "6"] and none == []
    assert samples == again and len({text for _, text in samples}) == 3
    assert log == log_without
    assert all(map(torch.equal, weights, weights_without))


class Says:
    """A model that says these bytes, a token each, and what of its text a reader has seen when it says the next."""
    def __init__(self, said):
        self.said, self.prompts = said, None
        self.lm_head = SimpleNamespace(weight=torch.zeros(1))

    def generate(self, prompts, *args, **kwargs):
        self.prompts = prompts
        yield from (torch.tensor([token]) for token in self.said)


@pytest.mark.parametrize("text", ["é", "🙂", "a🙂é b", "日本"])
def test_a_character_split_over_tokens_comes_out_whole(text):
    pieces = list(stream_text(Says(text.encode()), get_tokenizer("byte"), "x", CFG, seed=1))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_shows_as_one_replacement_character():
    assert "".join(stream_text(Says("a🙂".encode()[:-1]), get_tokenizer("byte"), "x", CFG, seed=1)) == "a\ufffd"


def test_a_piece_is_there_before_the_next_token_is_made():
    pieces = stream_text(Says(itertools.cycle(b"ab")), get_tokenizer("byte"), "x", CFG, seed=1)
    assert "".join(itertools.islice(pieces, 5)) == "ababa"


def test_eot_is_not_printed_and_stands_in_for_an_empty_prompt():
    enc = get_tokenizer("byte")
    model = Says([97, enc.eot_token])
    assert "".join(stream_text(model, enc, "", CFG, seed=1)) == "a"
    assert model.prompts == [[enc.eot_token]]
    assert "".join(stream_text(model, enc, "<|endoftext|>", CFG, seed=1)) == "a"
    assert model.prompts == [list(b"<|endoftext|>")]  # what a user types is text


def test_the_global_generator_is_left_alone_and_the_seed_decides():
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    state = torch.get_rng_state()
    one, again, other = ("".join(stream_text(model, get_tokenizer("byte"), "x", CFG, seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_prompt_comes_first_then_so_many_samples_each_another(tmp_path):
    out = run(*FRESH, "--prompt", "Grüße, 🙂", "--num_samples", 3, cwd=short_text(tmp_path)).stdout
    texts = out.split("-" * 80 + "\n")
    assert len(set(texts)) == len(texts) == 3
    assert all(text.startswith("Grüße, 🙂") and text.endswith("\n") and len(text) > 10 for text in texts)


def test_a_prompt_from_stdin_an_empty_one_and_one_longer_than_the_context(tmp_path):
    here = dict(cwd=short_text(tmp_path))
    text = "To be or not to be, said é 🙂. " * 3
    piped = run(*FRESH, "--prompt", "-", input=text, **here).stdout
    assert piped.startswith(text)
    assert piped == run(*FRESH, "--prompt", text, **here).stdout
    assert len(run(*FRESH, "--prompt", "", **here).stdout) > 5


class Pipe(io.StringIO):
    """A stdout whose reader sees what was flushed."""
    seen = ""

    def flush(self):
        self.seen = self.getvalue()

    def reconfigure(self, **kwargs):
        pass


def test_text_reaches_the_reader_while_the_model_still_talks(monkeypatch, tmp_path):
    def talk(*args):
        for already, piece in [("Once", " a"), ("Once a", "bc"), ("Once abc", "!")]:
            assert pipe.seen == already
            yield piece

    pipe = Pipe()
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(train_gpt2, "stream_text", talk)
    run_here(monkeypatch, short_text(tmp_path), *FRESH, "--prompt", "Once")
    assert pipe.getvalue() == "Once abc!\n"
