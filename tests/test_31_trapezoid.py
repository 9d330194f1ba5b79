"""Warm-up, stable, decay: a rate that can be gone on from."""
import pytest

from common import TINY, run_here, short_text
from train_gpt2 import TrainConfig, load_checkpoint, trapezoid

MODERN = [*TINY, "--recipe", "modern", "--sample_every", "0", "--eval_every", "0"]


def rates(**how):
    cfg = TrainConfig(**{"max_steps": 20, "warmup_steps": 4, "max_lr": 2.0, "min_lr": 0.0, **how})
    return [trapezoid(step, cfg) for step in range(cfg.max_steps)]


def test_up_flat_and_down():
    # By hand: up in quarters, flat to the middle, then a tenth less each step.
    expected = [0.25, 0.5, 0.75] + [1.0] * 8 + [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates() == pytest.approx(expected)
    assert rates(warmup_steps=0)[0] == 1.0
    # With a floor of a quarter of the highest: 1/4 + 3/4 of what it was.
    assert rates(min_lr=0.5)[10:] == pytest.approx([0.25 + 0.75 * f for f in expected[10:]])


def test_no_steps_divide_nothing_by_zero():
    assert trapezoid(0, TrainConfig(max_steps=0, warmup_steps=0, max_lr=1.0, min_lr=0.0)) == 0.0


def test_a_longer_run_begins_as_a_shorter_one_and_can_go_on_from_before_its_decay(monkeypatch, tmp_path, capsys):
    short_text(tmp_path)

    def train(*flags):
        run_here(monkeypatch, tmp_path, *MODERN, "--save_every", "5", "--warmup_steps", "2", *flags)

    train("--max_steps", "10", "--log_dir", "short")
    train("--max_steps", "20", "--log_dir", "long")
    (tmp_path / "short" / "model_00010.pt").unlink()
    capsys.readouterr()
    train("--max_steps", "20", "--log_dir", "short", "--resume")  # from step 5: the rate was still the highest
    assert capsys.readouterr().err == ""
    short, long = (load_checkpoint(tmp_path / d / "model_00020.pt")["model"] for d in ("short", "long"))
    assert all((short[key] == long[key]).all() for key in long)
