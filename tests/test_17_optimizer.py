"""The optimiser step is the one of the paper, and the gradient it gets is no longer than it may be."""
import re

import pytest
import torch
from torch import nn

from common import TINY, optimizer_of, optimizer_steps, parameters, run_here, short_text


def test_three_steps_are_adamws_worked_by_hand_in_float64():
    torch.manual_seed(0)
    lr, beta1, beta2, eps = 1e-2, 0.9, 0.95, 1e-8
    model = nn.Linear(5, 4)
    optimizer = optimizer_of(model, lr)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    byhand = [(p, p.detach().double(), torch.zeros(p.shape).double(), torch.zeros(p.shape).double())
              for p in model.parameters()]
    assert decay[id(model.weight)] > 0
    for step in (1, 2, 3):
        for p, theta, m, v in byhand:
            p.grad = torch.randn(p.shape) * 10.0 ** -step
            g = p.grad.double()
            theta *= 1 - lr * decay[id(p)]                       # decoupled: not part of the gradient
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g ** 2)
            theta -= lr * m / (1 - beta1 ** step) / ((v / (1 - beta2 ** step)).sqrt() + eps)
        optimizer.step()
        for p, theta, _, _ in byhand:
            torch.testing.assert_close(p.detach().double(), theta, rtol=1e-5, atol=1e-7)


@pytest.fixture
def norms(monkeypatch, tmp_path, capsys):
    """Train two steps; return the norms printed and those of the gradients that the optimiser got."""
    def norms(*flags):
        applied = []
        with optimizer_steps(before=lambda opt: applied.append(
                torch.stack([p.grad.norm() for p in parameters(opt)]).norm().item())):
            run_here(monkeypatch, short_text(tmp_path), *TINY, "--max_steps", "2", *flags)
        return [float(n) for n in re.findall(r"norm (\S+)", capsys.readouterr().out)], applied
    return norms


def test_a_long_gradient_is_cut_to_grad_clip(norms):
    printed, applied = norms("--grad_clip", "0.5")
    assert min(printed) > 0.6  # the norm before clipping, or nobody would see it grow
    assert applied == pytest.approx([0.5, 0.5], rel=1e-4)


@pytest.mark.parametrize("clip", ["0", "100"])
def test_a_short_gradient_is_left_as_it_is(norms, clip):
    printed, applied = norms("--grad_clip", clip)
    assert applied == pytest.approx(printed, abs=1e-3) and min(applied) > 0.6


def test_float16_is_clipped_after_its_scale_is_taken_out(norms):
    printed, applied = norms("--grad_clip", "0.5", "--dtype", "float16")
    reference, _ = norms("--grad_clip", "0.5", "--dtype", "float32")
    assert printed[0] == pytest.approx(reference[0], rel=0.02)
    assert applied == pytest.approx([0.5, 0.5], rel=1e-4)
