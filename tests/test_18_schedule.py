"""The learning rate, worked by hand."""
from types import SimpleNamespace

import pytest

from common import TINY, optimizer_steps, run_here, short_text
from train_gpt2 import get_lr

CFG = SimpleNamespace(max_lr=1.0, min_lr=0.2, warmup_steps=10, max_steps=110)


@pytest.mark.parametrize("step, lr", [
    (0, 0.1),             # not 0: the first step would be wasted
    (4, 0.5), (9, 1.0),   # a line
    (10, 1.0),
    (35, 0.6 + 0.4 * 0.5 ** 0.5),
    (60, 0.6),            # half way down the cosine
    (85, 0.6 - 0.4 * 0.5 ** 0.5),
    (110, 0.2), (111, 0.2), (10**6, 0.2)])
def test_hand_worked_steps(step, lr):
    assert get_lr(step, CFG) == pytest.approx(lr)


def test_it_has_no_jumps_and_stays_within_its_bounds():
    rates = [get_lr(step, CFG) for step in range(130)]
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.1 + 1e-9  # the slope of the warm-up
    assert max(abs(a - b) for a, b in zip(rates[9:], rates[10:])) < 0.02
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert max(rates) == 1.0 and min(rates[9:]) == pytest.approx(0.2)


def test_no_warm_up_begins_at_the_top_and_no_steps_at_all_divide_by_nothing():
    assert get_lr(0, SimpleNamespace(max_lr=1.0, min_lr=0.2, warmup_steps=0, max_steps=4)) == 1.0
    assert get_lr(2, SimpleNamespace(max_lr=1.0, min_lr=0.2, warmup_steps=0, max_steps=4)) == pytest.approx(0.6)
    assert get_lr(3, SimpleNamespace(max_lr=1.0, min_lr=0.2, warmup_steps=4, max_steps=4)) == 1.0
    assert get_lr(0, SimpleNamespace(max_lr=1.0, min_lr=0.2, warmup_steps=0, max_steps=0)) == 0.2


def test_training_steps_with_the_rate_of_the_step(monkeypatch, tmp_path):
    used = []
    with optimizer_steps(before=lambda opt: used.append([group["lr"] for group in opt.param_groups])):
        run_here(monkeypatch, short_text(tmp_path), *TINY, "--max_lr", "0.01", "--min_lr", "0.001",
                 "--warmup_steps", "2")
    cfg = SimpleNamespace(max_lr=0.01, min_lr=0.001, warmup_steps=2, max_steps=6)
    assert [max(rates) for rates in used] == [min(rates) for rates in used] == [get_lr(step, cfg) for step in range(6)]
