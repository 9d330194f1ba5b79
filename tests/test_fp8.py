"""--fp8: the head's matmuls in 8-bit floats. A CPU can compute them too, so the numbers are tested there."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train_gpt2
from common import ROOT, TINY, loader_of, logits_of, optimizer_of, run, run_here, short_text
from train_gpt2 import GPT, FP8Linear, GPTConfig


def inputs(scale=1.0, B=4096, C=32, rows=48):
    """x, w, bias and a gradient such as the mean cross-entropy of B tokens has."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(B, C, generator=g) * scale, torch.randn(rows, C, generator=g) / scale
    gradient = (torch.randn(B, rows, generator=g).softmax(1) - F.one_hot(torch.arange(B) % rows, rows)) / B
    return x.requires_grad_(), w.requires_grad_(), torch.randn(rows, generator=g), gradient.bfloat16()


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("scale", [1e-6, 1, 1e4])
def test_products_are_those_of_float32_to_three_bits_for_numbers_of_any_size(scale):
    x, w, bias, gradient = inputs(scale)
    y = FP8Linear.apply(x, w, bias)
    y.backward(gradient)
    assert y.dtype == torch.bfloat16 and x.grad.dtype == w.grad.dtype == torch.float32
    exact = F.linear(x, w, bias)
    assert 0.005 < off(y, exact) < 0.05                       # above: else nothing was rounded to 3 bits
    assert 0.005 < off(x.grad, gradient.float() @ w) < 0.08   # e5m2 has 2 bits
    assert off(w.grad, gradient.float().t() @ x.bfloat16().float()) < 0.004


def test_a_bias_of_minus_infinity_keeps_the_padding_impossible():
    x, w, bias, _ = inputs()
    bias[40:] = -torch.inf
    y = FP8Linear.apply(x, w, bias)
    loss = F.cross_entropy(y, torch.arange(len(y)) % 40)
    loss.backward()
    assert (y[:, 40:] == -torch.inf).all() and y[:, :40].isfinite().all()
    assert x.grad.isfinite().all() and w.grad.isfinite().all() and not w.grad[40:].any()


def test_the_head_trains_in_fp8_and_is_judged_without(monkeypatch):
    calls, scaled_mm = [], torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: calls.append(1) or scaled_mm(*args, **kwargs))
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32, padded_vocab_size=64))
    idx = torch.arange(32).view(2, 16)
    with torch.no_grad():
        exact, logits = model(idx, idx)[1], logits_of(model, idx)
    model.fp8 = True
    with torch.no_grad():
        assert torch.equal(model(idx, idx)[1], exact) and torch.equal(logits_of(model, idx), logits)
        list(model.generate([[1, 2]], 3))
    assert not calls
    for forward in (model, torch.compile(model, backend="eager")):
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(idx, idx)[1]
        loss.backward()
        assert loss != exact and loss.item() == pytest.approx(exact.item(), rel=2e-3)
        assert calls


def test_a_model_learns_as_well_with_it():
    text, final = (ROOT / "input.txt").read_bytes()[:50_000], []
    for fp8 in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=32))
        model.fp8, optimizer = fp8, optimizer_of(model, 3e-3)
        loader = loader_of(np.frombuffer(text, np.uint8).astype(np.uint16), 8, 16)
        for _ in range(150):
            x, y = loader.next_batch()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x, y)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        final.append(loss.item())
    assert final[0] < 3.5 and final[1] == pytest.approx(final[0], rel=0.02)


def test_the_flag_reaches_the_model_and_a_resumed_run_asks_for_it_again(tmp_path, monkeypatch, capsys):
    calls, scaled_mm, require = [], torch._scaled_mm, train_gpt2.require
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: calls.append(1) or scaled_mm(*args, **kwargs))
    monkeypatch.setattr(train_gpt2, "require", lambda ok, what: what.startswith("--fp8") or require(ok, what))
    for flags, expected in (["--fp8", "--max_steps", "3"], True), (["--resume", "--max_steps", "6"], False):
        run_here(monkeypatch, short_text(tmp_path), *TINY, "--dtype", "bfloat16", *flags)
        assert (", fp8" in capsys.readouterr().out) == bool(calls) == expected
        calls.clear()


def test_elsewhere_it_is_refused(tmp_path):
    done = run(*TINY, "--fp8", cwd=short_text(tmp_path), check=False)
    assert done.returncode == 2
    assert done.stderr == "train_gpt2.py: --fp8 needs an H100 or newer, bfloat16, and n_embd in 16s\n"


@pytest.mark.parametrize("capability, flags", [((8, 0), []), ((9, 0), ["--dtype", "float16"]),
                                               ((9, 0), ["--n_embd", "24"])])
def test_it_is_refused_by_an_older_gpu_and_where_no_kernel_is(tmp_path, monkeypatch, capability, flags, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, short_text(tmp_path), *TINY, "--device", "cuda", "--fp8", *flags)
    assert stop.value.code == 2 and "--fp8 needs" in capsys.readouterr().err
