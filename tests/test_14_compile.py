"""Compiling and part V change the speed, not the numbers.

And nothing that is ragged trips over the compiled shape.
"""
import copy
import math
import shutil

import pytest
import torch
from torch.nn import functional as F

import train_gpt2
from common import ROOT, TINY, losses, machine_of, randomise, run, run_here, short_text
from train_gpt2 import (GPT, MLP, Block, FasterBlock, FasterGPT, FasterMLP, GPTConfig,
                        RecomputedBlock, TrainConfig, faster_classes, swap_classes)

CONFIG = GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
COMPILE = torch.compile

# The program, but it says what is compiled again.
WITH_LOGS = """
import sys
sys.path.insert(0, {root!r})
import torch._logging, train_gpt2
torch._logging.set_logs(recompiles=True)
train_gpt2.main()
"""


@pytest.fixture(autouse=True)
def forget():
    """What an earlier test compiled: of a function's versions, the ninth would run as it is."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    """Which of the library's functions part V does without were called."""
    names, cross_entropy, gelu = [], F.cross_entropy, F.gelu
    monkeypatch.setattr(
        F, "cross_entropy", lambda *args: names.append("loss") or cross_entropy(*args))
    monkeypatch.setattr(F, "gelu", lambda *args, **how: names.append("gelu") or gelu(*args, **how))
    return names


@pytest.mark.process
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="needs a C++ compiler")
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path):
    script = tmp_path / "with_logs.py"
    script.write_text(WITH_LOGS.format(root=str(ROOT)))
    done = [run(*TINY, flag, cwd=short_text(tmp_path), script=script) for flag in ("--no-compile", "--compile")]
    plain, compiled = (d.stdout for d in done)
    # Once, for evaluation, which wants no gradient; and not at all if nothing was compiled.
    assert [d.stderr.count("Recompiling function") for d in done] == [0, 1], done[1].stderr
    assert ", compiled" in compiled and ", compiled" not in plain
    assert len(losses(plain)) == 6
    assert losses(compiled) == pytest.approx(losses(plain), abs=1.5e-4)  # printed with four decimals
    # From lesson 21 on the same run evaluates 62 windows by fours, from lesson 22 on it samples too.
    reports = [[line for line in out.splitlines() if "val loss" in line] for out in (plain, compiled)]
    assert [r.split("|")[0] for r in reports[0]] == [r.split("|")[0] for r in reports[1]]
    for a, b in zip(*reports, strict=True):
        assert float(a.split()[5]) == pytest.approx(float(b.split()[5]), abs=1.5e-4)
    assert ("sample:" in compiled) == ("sample:" in plain)


def computed(module, x, compiled=False):
    """What module makes of x (B, T, C), and the gradients of x and of all parameters."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    y = (COMPILE(module, backend="eager", fullgraph=True) if compiled else module)(x)
    # Every output counts differently.
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])]


def swapped(module, classes):
    """A copy of module, of faster classes, and with the same parameters."""
    module = copy.deepcopy(module)
    before = dict(module.named_parameters())
    plain = {type(part) for part in module.modules()} & set(classes)
    swap_classes(module, classes)
    after = dict(module.named_parameters())
    assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)
    now = {type(part) for part in module.modules()}
    assert now >= {classes[kind] for kind in plain} and not now & set(classes)
    return module


X = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cls", [FasterBlock, RecomputedBlock])
@pytest.mark.parametrize("dtype, stream", [("bfloat16", torch.bfloat16), ("float16", torch.float32),
                                           ("float32", torch.float32)])
def test_a_block_is_part_ones_with_the_stream_in_bfloat16_where_matmuls_are(
        dtype, stream, cls, compiled):
    block = randomise(Block(CONFIG))
    faster = swapped(block, {Block: cls})
    with machine_of(dtype=dtype).autocast():
        plain, got = computed(block, X), computed(faster, X, compiled)
        assert got[0].dtype == stream and plain[0].dtype == torch.float32
        assert all(g.dtype == torch.float32 for g in got[1:])
        # Part I's block does the same, bit for bit, with a stream that is bfloat16 already ...
        y, gx, *gradients = computed(block, X.to(stream))
    for a, b in zip(got, [y, gx.float(), *gradients], strict=True):
        assert torch.equal(a, b)
    # ... and with one that is not, as far as eight bits of mantissa go.
    for a, b in zip(got, plain, strict=True):
        assert (a - b).norm() <= (0.02 if dtype == "bfloat16" else 0) * b.norm()


def test_a_recomputed_block_computes_twice_where_a_gradient_is_wanted():
    block, times = swapped(randomise(Block(CONFIG)), {Block: RecomputedBlock}), []
    block.attn.register_forward_hook(lambda *args: times.append(torch.is_grad_enabled()))
    y = block(X)
    assert times == [True]
    y.sum().backward()
    assert times == [True, True]
    with torch.no_grad():
        block(X)
    assert times == [True, True, False]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_gelu_by_sigmoid_is_the_librarys(calls, dtype, rtol, compiled):
    mlp = randomise(MLP(CONFIG))
    faster = swapped(mlp, {MLP: FasterMLP})
    with machine_of(dtype=dtype).autocast():
        for x in (X, 10 * X, torch.zeros_like(X)):  # tanh() at its ends, and in the middle
            for a, b in zip(computed(faster, x, compiled), computed(mlp, x), strict=True):
                assert a.dtype == b.dtype and (a - b).norm() <= rtol * b.norm()
    assert calls == ["gelu"] * 3 * (1 if compiled else 2)  # compiled, it is not called


def by_gpt(model, idx, targets, compiled=False):
    """The loss, and the gradients of all parameters."""
    loss = (COMPILE(model, backend="eager", fullgraph=True) if compiled else model)(idx, targets)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("classes", [{GPT: FasterGPT}, faster_classes(TrainConfig()),
                                     faster_classes(TrainConfig(checkpoint_activations=True))])
@pytest.mark.parametrize("scale", [1, 29])
def test_the_loss_by_hand_is_the_librarys(calls, scale, classes, compiled):
    """Also of targets that do not count, and of tokens held for impossible: a loss of 118."""
    model = randomise(GPT(CONFIG))
    with torch.no_grad():
        model.lm_head.weight *= scale
    idx, targets = torch.randint(0, 50, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    targets[1, 5:] = targets[2, 0] = -100
    expected = by_gpt(model, idx, targets)
    with torch.no_grad():
        log_probs = model(idx).log_softmax(dim=-1).gather(2, targets.clamp(min=0)[..., None])
    assert scale == 1 or -124 < log_probs[targets >= 0].min() < -114
    assert expected[1].shape == (64, 16)
    assert not expected[1][50:].any()  # rows that stand for no token
    calls.clear()
    got = by_gpt(swapped(model, classes), idx, targets, compiled)
    assert ("loss" in calls) == (not compiled)  # the compiled one does not call it
    assert ("gelu" in calls) == (not compiled or MLP not in classes)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_logits_are_part_ones(compiled):
    model = randomise(GPT(CONFIG))
    faster = swapped(model, faster_classes(TrainConfig()))
    idx = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = (COMPILE(faster, backend="eager", fullgraph=True) if compiled else faster)(idx)
        torch.testing.assert_close(logits, model(idx))
    assert logits.shape == (4, 8, 50)


def test_the_loss_by_hand_is_right_also_where_some_tokens_are_250_below_the_target():
    """Where they underflow, and where another shift than by the target's logit would overflow."""
    model = randomise(GPT(CONFIG))
    with torch.no_grad():
        model.lm_head.weight *= 250
        idx = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(0))
        logits = model(idx)
        targets = logits.argmax(dim=-1)
        below = logits - logits.amax(dim=-1, keepdim=True)
    assert all((below[..., i] < -250).any() for i in (0, 49))
    expected = by_gpt(model, idx, targets)
    got = by_gpt(swapped(model, {GPT: FasterGPT}), idx, targets, compiled=True)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_the_loss_by_hand_counts_tokens_far_below_where_small_numbers_are_taken_for_zero():
    """As fast arithmetic on a GPU may: of one token 12 above 49 others, the loss is log(1 + 49 exp(-12))."""
    model = swapped(GPT(CONFIG), {GPT: FasterGPT})
    with torch.no_grad():
        model.lm_head.weight.zero_()[7, 0] = 12.0
    model.trunk = lambda idx: F.one_hot(torch.zeros_like(idx), 16).float()
    idx = torch.full((1, 4), 7)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        loss = COMPILE(model, backend="eager", fullgraph=True)(idx, idx)
    finally:
        torch.set_flush_denormal(False)
    assert loss.item() == pytest.approx(math.log1p(49 * math.exp(-12)), rel=0.05)


def test_the_shift_is_float32_where_the_logits_are_not():
    """In bfloat16, torch 2.11 on a GPU sums with the shift unrounded, and keeps it rounded for the backward pass."""
    shifts = []

    def look(graph, inputs):
        shifts.extend(node.meta["example_value"].dtype for node in graph.graph.nodes if 40 in node.args)
        return graph

    model = swapped(GPT(CONFIG), faster_classes(TrainConfig()))
    idx = torch.arange(16).view(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend=look)(idx, idx + 1)
    assert shifts == [torch.float32]


@pytest.mark.parametrize("flags, most", [
    ([], 0), (["--checkpoint_activations"], 0), (["--compile"], 1e-5),
    (["--dtype", "bfloat16"], 2e-3),
    (["--dtype", "bfloat16", "--compile", "--checkpoint_activations"], 2e-3)])
def test_a_run_without_part_v_has_the_same_losses(monkeypatch, tmp_path, flags, most):
    swap, logs, classes = train_gpt2.swap_classes, [], []

    def swap_and_look(model, faster):
        swap(model, faster)
        classes.append({type(part) for part in model.modules()})

    monkeypatch.setattr(
        torch, "compile", lambda model, **how: COMPILE(model, backend="eager", dynamic=False))
    for replacement in (swap_and_look, lambda model, faster: None):
        monkeypatch.setattr(train_gpt2, "swap_classes", replacement)
        run_here(monkeypatch, short_text(tmp_path), *TINY, "--sample_every", 0, *flags)
        rows = [row.split() for row in (tmp_path / "log" / "log.txt").read_text().splitlines()]
        logs.append([(step, stream, float(value)) for step, stream, value in rows])
    block = RecomputedBlock if "--checkpoint_activations" in flags else FasterBlock
    assert len(classes) == 1 and {FasterGPT, FasterMLP, block} <= classes[0]
    assert not {GPT, MLP, Block} & classes[0]
    faster, plain = logs
    assert [row[:2] for row in faster] == [row[:2] for row in plain] and len(plain) == 6 + 2
    assert [row[2] for row in faster] == pytest.approx([row[2] for row in plain], abs=most)
    assert plain[-1][2] < plain[0][2] - 0.3  # it did learn
