"""--fp8: the matmuls of training in 8-bit floats. A CPU can compute them too, so the numbers are tested there."""
import copy

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

import train_gpt2
from common import ROOT, TINY, generate, loader_of, optimizer_of, run, run_here, short_text
from train_gpt2 import GPT, FP8Linear, FP8Product, GPTConfig, TrainConfig, faster_classes, swap_classes


def inputs(x_scale=1.0, w_scale=0.1, B=4096, C=32, rows=48):
    """x, w, bias and a gradient such as the mean cross-entropy of B tokens has."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(B, C, generator=g) * x_scale, torch.randn(rows, C, generator=g) * w_scale
    gradient = (torch.randn(B, rows, generator=g).softmax(1) - F.one_hot(torch.arange(B) % rows, rows)) / B
    return x.requires_grad_(), w.requires_grad_(), torch.randn(rows, generator=g).requires_grad_(), gradient.bfloat16()


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


def count_products(monkeypatch):
    calls = []

    class Counted(FP8Product):
        @staticmethod
        def forward(ctx, *args):
            calls.append(tuple(args[1].shape))
            return FP8Product.forward(ctx, *args)

        @staticmethod
        def backward(ctx, g):
            calls.append("backward")
            return FP8Product.backward(ctx, g)

    monkeypatch.setattr(train_gpt2, "FP8Product", Counted)
    return calls


@pytest.mark.parametrize("x_scale, w_scale, g_scale", [(1, 0.02, 1), (0.02, 0.003, 1e-5), (20, 2, 10)])
def test_products_are_those_of_float32_to_three_bits(x_scale, w_scale, g_scale):
    x, w, bias, gradient = inputs(x_scale, w_scale)
    gradient = gradient * g_scale
    y = FP8Product.apply(x.view(2, 2048, 32), w, bias)
    y.backward(gradient.view(2, 2048, 48))
    assert y.dtype == torch.bfloat16 and y.shape == (2, 2048, 48)
    assert x.grad.dtype == w.grad.dtype == bias.grad.dtype == torch.float32
    y, exact = y.detach().flatten(0, 1) - bias, F.linear(x, w)
    rounded = torch.finfo(torch.bfloat16).eps * (bias.abs().max() / exact.std()).item()       # of y itself
    assert 0.005 < off(y, exact) < 0.05 + rounded             # above: else nothing was rounded to 3 bits
    assert 0.005 < off(x.grad, gradient.float() @ w) < 0.08   # e5m2 has 2 bits
    assert off(w.grad, gradient.float().t() @ x.bfloat16().float()) < 0.004
    assert off(bias.grad, gradient.float().sum(0)) < 0.004


def test_what_is_too_large_becomes_the_largest_and_not_infinite():
    x, w = torch.full((16, 32), 1e5, requires_grad=True), torch.full((16, 32), -1e5, requires_grad=True)
    y = FP8Product.apply(x, w, torch.zeros(16))
    y.backward(torch.full_like(y, 1e6))
    assert (y == torch.tensor(-32 * 112 * 14).bfloat16()).all()              # 448 / 4, 448 / 32
    assert (x.grad == torch.tensor(-16 * 57344 / 1024 / 16 * 14).bfloat16()).all() and w.grad.isfinite().all()


def test_a_bias_of_minus_infinity_keeps_the_padding_impossible():
    x, w, bias, _ = inputs()
    with torch.no_grad():
        bias[40:] = -torch.inf
    y = FP8Product.apply(x, w, bias)
    loss = F.cross_entropy(y, torch.arange(len(y)) % 40)
    loss.backward()
    assert (y[:, 40:] == -torch.inf).all() and y[:, :40].isfinite().all()
    assert x.grad.isfinite().all() and w.grad.isfinite().all() and not w.grad[40:].any()


def faster(model, **flags):
    """A copy of model, with the same weights, as train() has it with these flags."""
    model = copy.deepcopy(model)
    swap_classes(model, faster_classes(TrainConfig(**flags)))
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_in_fp8_where_a_gradient_is_wanted_and_else_as_the_librarys(monkeypatch, bias):
    calls, (x, _, _, gradient) = count_products(monkeypatch), inputs()
    plain = nn.Linear(32, 48, bias=bias)
    layer = faster(plain, fp8=True)
    assert type(layer) is FP8Linear and type(faster(plain)) is nn.Linear
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x)) and not calls
    y, exact = layer(x), plain(x)
    assert calls == [(48, 32)] and 0.005 < off(y.detach(), exact.detach()) < 0.05
    gradients = []
    for module, z in (layer, y.float()), (plain, exact):
        z.backward(gradient.float())
        gradients.append([p.grad for p in (x, *module.parameters())])
        x.grad = None
    assert calls == [(48, 32), "backward"] and len(gradients[0]) == 2 + bias
    for ours, theirs in zip(*gradients):
        assert ours.dtype == torch.float32 and off(ours, theirs) < 0.08


@pytest.mark.parametrize("recompute", [False, True])
def test_every_matrix_trains_in_fp8_and_is_judged_without(monkeypatch, recompute):
    calls = count_products(monkeypatch)
    plain = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32))
    model = faster(plain, fp8=True, checkpoint_activations=recompute)
    idx = torch.arange(32).view(2, 16)
    with torch.no_grad():
        exact = plain(idx, idx)
        assert torch.equal(model(idx, idx), exact) and torch.equal(model(idx), plain(idx))
    for cache in (False, True):
        assert generate(model, [[1, 2]], 3, cache, temperature=0) == generate(plain, [[1, 2]], 3, temperature=0)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx)
    assert loss != exact and loss.item() == pytest.approx(exact.item(), rel=2e-3)
    matrices = 2 * 4 + 1                                     # c_attn, c_proj, c_fc, c_proj; the head
    assert len(calls) == matrices
    loss.backward()
    assert len(calls) == 2 * matrices + recompute * 2 * 4    # the blocks once more


def test_compiled_it_is_one_graph_and_has_the_same_gradients():
    """The graph that goes forward and the one that goes back are traced here, types and shapes, but not compiled."""
    plain = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=32))
    models, idx, grads, products = [faster(plain), *[faster(plain, fp8=True) for _ in range(2)]], \
        torch.arange(32).view(2, 16), [], []

    def look(graph, inputs):
        products.append(sum(node.target is torch.ops.aten._scaled_mm.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(models[2], backend=aot_autograd(fw_compiler=look), fullgraph=True)
    for model, forward in zip(models, (*models[:2], compiled)):
        with torch.autocast("cpu", torch.bfloat16):
            forward(idx, idx).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert products == [5, 5]                                # forward, backward: the head is among them
    assert off(grads[2], grads[1]) < 0.5 * off(grads[1], grads[0])


def test_a_model_learns_as_well_with_it(monkeypatch):
    library, compared = torch._scaled_mm, []

    def product(a, b, a_scale, b_scale, bias=None, out_dtype=None):
        """The library's takes a CPU 0.04 s. In float32, too, products of 8-bit floats are exact."""
        y = a.float() @ b.float() * (a_scale * b_scale) + (0 if bias is None else bias.float())
        if len(compared) < 18:  # of a step, forward and backward
            theirs = library(a, b, a_scale, b_scale, bias, out_dtype=out_dtype)
            compared.append(off(y.to(out_dtype).float(), theirs.float()))
        return y.to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    text, final = (ROOT / "input.txt").read_bytes()[:50_000], []
    for fp8 in (False, True):
        torch.manual_seed(0)
        model = faster(GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=2, n_embd=32)), fp8=fp8)
        optimizer = optimizer_of(model, 3e-3)
        loader = loader_of(np.frombuffer(text, np.uint8).astype(np.uint16), 8, 16)
        for _ in range(150):
            x, y = loader.next_batch()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        final.append(loss.item())
    assert len(compared) == 18 and max(compared) < 1e-3
    assert final[0] < 3.5 and final[1] != final[0] and final[1] == pytest.approx(final[0], rel=0.02)


def test_the_flag_reaches_the_model_and_a_resumed_run_asks_for_it_again(tmp_path, monkeypatch, capsys):
    calls, require = count_products(monkeypatch), train_gpt2.require
    monkeypatch.setattr(train_gpt2, "require", lambda ok, what: what.startswith("--fp8") or require(ok, what))
    for flags, expected in (["--fp8", "--max_steps", "3"], True), (["--resume", "--max_steps", "6"], False):
        run_here(monkeypatch, short_text(tmp_path), *TINY, "--dtype", "bfloat16", *flags)
        assert (", fp8" in capsys.readouterr().out) == bool(calls) == expected
        matrices = set(calls) - {"backward"}
        assert len(matrices) == 5 * expected, matrices        # c_attn, c_proj, c_fc, c_proj, head: all shapes differ
        calls.clear()


def test_elsewhere_it_is_refused(tmp_path):
    done = run(*TINY, "--fp8", cwd=short_text(tmp_path), check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train_gpt2.py: --fp8 needs an H100 or newer")


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
