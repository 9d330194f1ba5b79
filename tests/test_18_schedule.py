"""The learning rate, worked by hand."""
import re
from types import SimpleNamespace

import pytest
import torch

import train_gpt2
from common import TINY, optimizer_steps, run_here, short_text
from train_gpt2 import lr_factor


def get_lr(step, cfg):
    """The rate of a parameter whose highest is max_lr."""
    return cfg.max_lr * lr_factor(step, cfg)


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
    small = SimpleNamespace(**{**vars(CFG), "max_lr": 1e-3, "min_lr": 2e-4})
    assert get_lr(step, small) == pytest.approx(lr * 1e-3)  # the shares are the same


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


def test_without_a_rate_nothing_is_divided_by_it():
    cfg = SimpleNamespace(max_lr=0.0, min_lr=0.0, warmup_steps=2, max_steps=6)
    assert [get_lr(step, cfg) for step in range(8)] == [0.0] * 8


def test_training_steps_with_the_rate_of_the_step(monkeypatch, tmp_path, capsys):
    used = []
    with optimizer_steps(before=lambda opt: used.append([group["lr"] for group in opt.param_groups])):
        run_here(monkeypatch, short_text(tmp_path), *TINY, "--max_lr", "0.01", "--min_lr", "0.001",
                 "--warmup_steps", "2")
    cfg = SimpleNamespace(max_lr=0.01, min_lr=0.001, warmup_steps=2, max_steps=6)
    expected = [get_lr(step, cfg) for step in range(6)]
    assert [max(rates) for rates in used] == [min(rates) for rates in used] == expected
    printed = re.findall(r"\| lr (\S+) \|", capsys.readouterr().out)
    assert printed == [f"{rate:.2e}" for rate in expected]


def test_each_group_has_its_share_of_its_own_highest_rate(monkeypatch, tmp_path):
    """Other recipes give other parameters another rate, and have several optimisers."""
    configure = train_gpt2.configure_optimizers

    def two(model, max_lr, weight_decay):
        (optimizer,) = configure(model, max_lr, weight_decay)
        matrices, vectors = optimizer.param_groups
        vectors["max_lr"] = 5.0
        return [torch.optim.AdamW([matrices], lr=max_lr), torch.optim.SGD([vectors], lr=5.0)]

    used = []
    monkeypatch.setattr(train_gpt2, "configure_optimizers", two)
    with optimizer_steps(before=lambda opt: used.append([g["lr"] for g in opt.param_groups])):
        run_here(monkeypatch, short_text(tmp_path), *TINY, "--max_lr", "0.01", "--min_lr", "0.001",
                 "--warmup_steps", "2", "--save_every", 0)
    cfg = SimpleNamespace(max_lr=0.01, min_lr=0.001, warmup_steps=2, max_steps=6)
    shares = [lr_factor(step, cfg) for step in range(6)]
    assert used == [[max_lr * share] for share in shares for max_lr in (0.01, 5.0)]
