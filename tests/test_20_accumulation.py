"""Several small passes are one large one."""
import pytest
import torch

from common import TINY, losses, optimizer_steps, parameters, run, run_here, short_text
from train_gpt2 import configure


@pytest.fixture
def train(monkeypatch, tmp_path, capsys):
    """Train with B sequences a pass; return the printed losses, every step's gradients and the last weights."""
    def train(B, *flags):
        gradients, weights = [], []
        with optimizer_steps(before=lambda opt: gradients.append([p.grad.clone() for p in parameters(opt)]),
                             after=lambda opt: weights.append([p.detach().clone() for p in parameters(opt)])):
            run_here(monkeypatch, short_text(tmp_path), *TINY, "--batch_size", B, "--total_batch_size", 8 * 32, *flags)
        return losses(capsys.readouterr().out), gradients, weights[-1]
    return train


@pytest.mark.parametrize("B", [2, 1])
def test_accumulated_passes_train_the_same_model(train, B):
    # Adam makes steps of equal size of all gradients, also of those that are rounding errors (the biases of the keys
    # have no gradient at all). A large eps would hide too much: a small learning rate bounds it.
    expected_losses, expected_gradients, expected = train(8, "--max_lr", "1e-6", "--min_lr", "1e-6")
    measured_losses, gradients, weights = train(B, "--max_lr", "1e-6", "--min_lr", "1e-6")
    assert len(measured_losses) == 6
    assert measured_losses == pytest.approx(expected_losses, abs=1.01e-4)  # printed with four decimals
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_accumulated_passes_learn_as_fast(train):
    assert train(2)[0] == pytest.approx(train(8)[0], abs=1e-3)


@pytest.mark.process
def test_a_step_that_is_no_whole_number_of_passes_is_refused(tmp_path):
    done = run(*TINY, "--batch_size", 3, "--total_batch_size", 8 * 32, cwd=short_text(tmp_path), check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "total_batch_size" in done.stderr


@pytest.mark.parametrize("processes, B, sequences", [
    (1, None, 8), (1, 1, 8), (1, 2, 8), (1, 8, 8), (1, 3, 9), (1, 12, 12),
    (2, None, 8), (2, 4, 8), (2, 3, 12), (3, None, 9)])
def test_left_open_a_step_is_8_sequences_or_as_few_more_as_fill_its_passes(
        monkeypatch, tmp_path, processes, B, sequences):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    flags = {} if B is None else {"batch_size": B}
    flags.update(data=str(short_text(tmp_path) / "input.txt"), log_dir=str(tmp_path / "log"))
    cfg, model = configure({**flags, "seq_len": 16})
    assert cfg.total_batch_size == sequences * 16 and model is None
    assert cfg.batch_size == B  # still open: the machine decides


def test_left_open_a_step_is_the_same_for_every_batch_size(monkeypatch, tmp_path, capsys):
    at = TINY.index("--total_batch_size")
    flags = [*TINY[:at], *TINY[at + 2:], "--eval_every", 0, "--sample_every", 0, "--save_every", 0]
    measured = []
    for B in (8, 2, 1):
        run_here(monkeypatch, short_text(tmp_path), *flags, "--batch_size", B)
        out = capsys.readouterr().out
        assert f"256 tokens a step = {8 // B} x 1 x {B} x 32 " in out
        measured.append(losses(out))
    assert len(measured[0]) == 6
    assert measured[1] == pytest.approx(measured[0], abs=1e-3) == measured[2]
