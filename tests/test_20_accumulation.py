"""Several small passes are one large one."""
import pytest
import torch

from common import TINY, losses, optimizer_steps, parameters, run, run_here, short_text


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


def test_a_step_that_is_no_whole_number_of_passes_is_refused(tmp_path):
    done = run(*TINY, "--batch_size", 3, "--total_batch_size", 8 * 32, cwd=short_text(tmp_path), check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "total_batch_size" in done.stderr
