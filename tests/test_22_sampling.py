"""Samples come out whole and at once, and taking them does not change the training."""
import io
import itertools
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import train_gpt2
from common import TINY, losses, machine_of, optimizer_steps, parameters, run, run_here, short_text
from train_gpt2 import GPT, GPTConfig, due, get_tokenizer, stream_text

SPEAK = ["--device", "cpu", "--max_new_tokens", "20"]
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


@pytest.mark.parametrize("every, end, expected", [
    (None, 1000, [100, 200, 400, 800, 1000]),
    (None, 3600, [100, 200, 400, 800, 1600, 3200, 3600]),
    (None, 19_073, [100 * 2**n for n in range(8)] + [19_073]),
    (None, 400, [100, 200, 400]), (None, 7, [7]),
    (250, 1000, [250, 500, 750, 1000]), (300, 1000, [300, 600, 900, 1000]), (2000, 1000, [1000]),
    (0, 1000, [])])
def test_left_open_samples_come_ever_more_rarely_else_every_so_many_steps_and_at_the_end(
        every, end, expected):
    assert [step for step in range(1, end + 1) if due(step, every, step == end)] == expected


@pytest.mark.parametrize("flags, steps", [
    ([], [100, 200, 205]), (["--sample_every", 90], [90, 180, 205])])
def test_a_run_samples_on_schedule_always_from_the_same_prompt_and_seed(
        monkeypatch, tmp_path, capsys, flags, steps):
    asked = []

    def talk(model, enc, prompt, cfg, seed):
        asked.append((prompt, seed))
        yield f"sample {len(asked)}"

    monkeypatch.setattr(train_gpt2, "stream_text", talk)
    run_here(monkeypatch, short_text(tmp_path), *TINY, "--max_steps", 205, "--eval_every", 0,
             "--seed", 7, *flags)
    found = re.findall(r"^step +(\d+) \| sample: (.*)$", capsys.readouterr().out, re.M)
    assert found == [(str(step), f"sample {i + 1}") for i, step in enumerate(steps)]
    assert asked == [("\n", 7)] * 3
    enc = SimpleNamespace(name="gpt2")
    run = train_gpt2.Run(SimpleNamespace(seed=3), None, enc, None, None, None, machine_of())
    monkeypatch.setattr(run, "check_model", lambda step: None)
    run.sample(5)
    assert capsys.readouterr().out == "step     5 | sample: The first thing to know issample 4\n\n"
    assert asked[3] == ("The first thing to know is", 3)


def test_a_sample_is_what_the_model_says_after_the_prompt(train, monkeypatch, tmp_path, capsys):
    """The prompt is a line's end, which is not shown."""
    samples, _, _ = train("--sample_every", 3, "--seed", 7, "--max_new_tokens", 50)
    checkpoint = tmp_path / "log" / "model_00006.pt"
    run_here(monkeypatch, tmp_path, *SPEAK, "--prompt", "\n", "--init_from", checkpoint,
             "--seed", 7, "--max_new_tokens", 50)
    assert samples[-1] == ("6", capsys.readouterr().out.strip())


@pytest.mark.parametrize("every, steps, shown", [
    (1, 7, [0, 1, 2, 3, 4, 5, 6]), (3, 7, [0, 3, 6]), (3, 6, [0, 3, 5]), (5, 4, [0, 3]),
    (100, 1, [0]), (0, 4, [])])
def test_the_screen_shows_one_step_in_so_many_and_the_last_and_the_log_has_all(
        monkeypatch, tmp_path, capsys, every, steps, shown):
    run_here(monkeypatch, short_text(tmp_path), *TINY, "--max_steps", steps, "--log_every", every,
             "--eval_every", 2, "--sample_every", 0, "--save_every", 0)
    out = capsys.readouterr().out
    rows = [row.split() for row in (tmp_path / "log" / "log.txt").read_text().splitlines()]
    logged = {int(step): float(value) for step, stream, value in rows if stream == "train"}
    assert list(logged) == list(range(steps))
    assert [int(step) for step in re.findall(r"^step +(\d+) \| loss", out, re.M)] == shown
    expected = [logged[step] for step in shown]
    assert losses(out) == pytest.approx(expected, abs=0.51e-4)  # four decimals
    validated = [int(step) for step in re.findall(r"^step +(\d+) \| val loss", out, re.M)]
    assert validated == sorted({*range(0, steps, 2), steps})  # these are always shown


class Says:
    """A model that is sure to say these bytes, a token each, and then <|endoftext|>."""
    def __init__(self, said, vocab_size=257):
        self.said, self.vocab_size, self.prompt = iter(said), vocab_size, None
        self.lm_head = SimpleNamespace(weight=torch.zeros(1))
        self.config = SimpleNamespace(block_size=1000)

    def __call__(self, idx):
        if self.prompt is None:
            self.prompt = idx.tolist()
        logits = torch.full((*idx.shape, self.vocab_size), -1e4)
        logits[:, -1, next(self.said, self.vocab_size - 1)] = 0.0
        return logits


@pytest.fixture
def told(monkeypatch):
    """Text that a model's tokens become, in pieces. It has no parts that a cache could use."""
    monkeypatch.setattr(train_gpt2, "cached", lambda model: model)
    enc = get_tokenizer("byte")
    return lambda model, prompt="x", cfg=CFG: stream_text(model, enc, prompt, cfg, seed=1)


@pytest.mark.parametrize("text", ["é", "🙂", "a🙂é b", "日本"])
def test_a_character_split_over_tokens_comes_out_whole(told, text):
    pieces = list(told(Says(text.encode())))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("max_new_tokens", [4, 100])  # it has said enough, or says <|endoftext|>
def test_half_a_character_at_the_end_shows_as_one_replacement_character(told, max_new_tokens):
    cfg = SimpleNamespace(**{**vars(CFG), "max_new_tokens": max_new_tokens})
    assert "".join(told(Says("a🙂".encode()[:-1]), cfg=cfg)) == "a\ufffd"


def test_a_piece_is_there_before_the_next_token_is_made(told):
    said = itertools.count(97)
    pieces = told(Says(said))
    for expected in "abcde":
        assert next(pieces) == expected
    assert next(said) == 102  # nothing was made ahead


def test_so_many_tokens_and_no_more(told):
    cfg = SimpleNamespace(**{**vars(CFG), "max_new_tokens": 3})
    assert "".join(told(Says(itertools.cycle(b"ab")), cfg=cfg)) == "aba"


def test_eot_is_not_printed_ends_the_text_and_stands_in_for_an_empty_prompt(told):
    eot = get_tokenizer("byte").eot_token
    said = iter([97, eot, 98])
    model = Says(said)
    assert "".join(told(model, "")) == "a"
    assert list(said) == [98]  # nobody asked for what comes after it
    assert model.prompt == [[eot]]
    model = Says([97])
    assert "".join(told(model, "<|endoftext|>")) == "a"
    assert model.prompt == [list(b"<|endoftext|>")]  # what a user types is text


def test_the_global_generator_is_left_alone_and_the_seed_decides():
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    state = torch.get_rng_state()
    one, again, other = ("".join(stream_text(model, get_tokenizer("byte"), "x", CFG, seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run in it; a model that has learnt little babbles as well as any."""
    folder = short_text(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_here(monkeypatch, folder, *TINY, "--max_steps", 1, "--eval_every", 0, "--sample_every", 0)
    return folder


def test_the_prompt_comes_first_then_so_many_samples_each_another(monkeypatch, trained, capsys):
    run_here(monkeypatch, trained, *SPEAK, "--prompt", "Grüße, 🙂", "--num_samples", 3)
    texts = capsys.readouterr().out.split("-" * 80 + "\n")
    assert len(set(texts)) == len(texts) == 3
    assert all(text.startswith("Grüße, 🙂") and text.endswith("\n") and len(text) > 10 for text in texts)


@pytest.mark.process
def test_a_prompt_from_stdin_an_empty_one_and_one_longer_than_the_context(
        monkeypatch, trained, capsys):
    text = "To be or not to be, said é 🙂. " * 3
    piped = run(*SPEAK, "--prompt", "-", input=text, cwd=trained).stdout
    assert piped.startswith(text)
    run_here(monkeypatch, trained, *SPEAK, "--prompt", text)
    assert capsys.readouterr().out == piped
    run_here(monkeypatch, trained, *SPEAK, "--prompt", "")
    assert len(capsys.readouterr().out) > 5


def test_who_has_not_trained_has_nothing_to_say(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run_here(monkeypatch, tmp_path, *SPEAK, "--prompt", "x", "--init_from", "scratch")
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ""
    assert err.count("\n") == 1 and "no checkpoint in log" in err


class Pipe(io.StringIO):
    """A stdout whose reader sees what was flushed."""
    seen = ""

    def flush(self):
        self.seen = self.getvalue()

    def reconfigure(self, **kwargs):
        pass


def test_text_reaches_the_reader_while_the_model_still_talks(monkeypatch, trained):
    def talk(*args):
        for already, piece in [("Once", " a"), ("Once a", "bc"), ("Once abc", "!")]:
            assert pipe.seen == already
            yield piece

    pipe = Pipe()
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(train_gpt2, "stream_text", talk)
    run_here(monkeypatch, trained, *SPEAK, "--prompt", "Once")
    assert pipe.getvalue() == "Once abc!\n"
