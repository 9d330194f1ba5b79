"""Compiling changes the speed, not the numbers, and nothing that is ragged trips over the compiled shape."""
import shutil

import pytest
import torch
from torch.nn import functional as F

from common import TINY, logits_of, losses, randomise, run, short_text
from train_gpt2 import GPT, GPTConfig


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="needs a C++ compiler")
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path):
    done = [run(*TINY, flag, cwd=short_text(tmp_path), TORCH_LOGS="recompiles") for flag in
            ("--no-compile", "--compile")]
    plain, compiled = (d.stdout for d in done)
    assert done[1].stderr.count("Recompiling function") == 1, done[1].stderr  # for evaluation, which wants no gradient
    assert ", compiled" in compiled and ", compiled" not in plain
    assert len(losses(plain)) == 6
    assert losses(compiled) == pytest.approx(losses(plain), abs=1.5e-4)  # printed with four decimals
    # From lesson 21 on the same run evaluates 62 windows by fours, from lesson 22 on it samples too.
    reports = [[line for line in out.splitlines() if "val loss" in line] for out in (plain, compiled)]
    assert [r.split("|")[0] for r in reports[0]] == [r.split("|")[0] for r in reports[1]]
    for a, b in zip(*reports, strict=True):
        assert float(a.split()[5]) == pytest.approx(float(b.split()[5]), abs=1.5e-4)
    assert ("sample:" in compiled) == ("sample:" in plain)


@pytest.mark.parametrize("scale", [1, 60])
def test_gelu_and_the_loss_by_hand_are_the_librarys(monkeypatch, scale):
    """Gradients too, with targets that do not count, and with tokens held for impossible: a loss of up to 133."""
    config = GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=16, padded_vocab_size=64)
    model = randomise(GPT(config))
    with torch.no_grad():
        model.lm_head.weight *= scale
    idx, targets = torch.randint(0, 50, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    targets[1, 5:], calls, cross_entropy, gelu = -100, [], F.cross_entropy, F.gelu
    monkeypatch.setattr(F, "cross_entropy", lambda *args: calls.append("loss") or cross_entropy(*args))
    monkeypatch.setattr(F, "gelu", lambda *args, **kwargs: calls.append("gelu") or gelu(*args, **kwargs))
    results = []
    for forward in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        loss = forward(idx, targets)[1]
        loss.backward()
        results.append((loss.detach(), *(p.grad.clone() for p in model.parameters())))
    assert calls == ["gelu", "loss"]  # the compiled one does not call them
    with torch.no_grad():
        worst = cross_entropy(logits_of(model, idx).flatten(0, 1), targets.flatten(), reduction="none").max().item()
    assert scale == 1 or 120 < worst < 160
    torch.testing.assert_close(*results, rtol=2e-4, atol=1e-6)


def test_the_shift_is_float32_where_the_logits_are_not():
    """In bfloat16, torch 2.11 on a GPU sums with the shift unrounded, and keeps it rounded for the backward pass."""
    shifts = []

    def look(graph, inputs):
        shifts.extend(node.meta["example_value"].dtype for node in graph.graph.nodes if 80 in node.args)
        return graph

    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=16, padded_vocab_size=64))
    idx = torch.arange(16).view(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend=look)(idx, idx + 1)
    assert shifts == [torch.float32]
