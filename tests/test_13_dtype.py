"""Only the matmuls are done in half the bits: weights and optimiser state stay float32, or small updates are lost."""
import pytest
import torch
from torch.nn import functional as F

from common import (TINY, losses, machine_of, optimizer_steps, parameters, randomise, run_here,
                    short_text)
from train_gpt2 import GPT, GPTConfig, TrainConfig, faster_classes, swap_classes


@pytest.fixture
def train(monkeypatch, tmp_path, capsys):
    """Train with a dtype; return the losses, and of each step the dtypes of the weights, gradients and state."""
    def train(dtype, *flags):
        kept = []

        def look(optimizer):
            state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
            kept.append({t.dtype for p in parameters(optimizer) for t in (p, p.grad)} | {t.dtype for t in state})

        with optimizer_steps(after=look):
            run_here(monkeypatch, short_text(tmp_path), *TINY, "--dtype", dtype, "--max_lr", "3e-3", *flags)
        return losses(capsys.readouterr().out), kept
    return train


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_about_as_float32_with_float32_weights(train, dtype):
    reference, _ = train("float32")
    measured, kept = train(dtype)
    assert len(measured) == 6 and measured[-1] < measured[0] - 0.3
    assert measured == pytest.approx(reference, abs=0.05)
    assert kept == [{torch.float32}] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_matmuls_are_done_in_the_dtype_and_the_loss_in_float32(train, monkeypatch, dtype):
    seen, cross_entropy, linear = set(), F.cross_entropy, F.linear

    def spy_linear(x, *args):
        y = linear(x, *args)
        seen.add(y.dtype)
        return y

    def spy_loss(logits, *args, **kwargs):
        loss = cross_entropy(logits, *args, **kwargs)
        assert loss.dtype == torch.float32
        return loss

    monkeypatch.setattr(F, "linear", spy_linear)
    monkeypatch.setattr(F, "cross_entropy", spy_loss)
    train(str(dtype)[6:], "--max_steps", "1")
    assert seen == {dtype}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype, stream", [("bfloat16", torch.bfloat16), ("float16", torch.float32),
                                           ("float32", torch.float32)])
def test_the_residual_stream_is_bfloat16_where_the_matmuls_are_and_its_end_is_exact(
        dtype, stream, recompute):
    """In part V, and not float16, whose largest number is 65504: a stream only ever grows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, seen = randomise(GPT(GPTConfig(8, 19, 2, 2, 8))).to(device), []
    idx = torch.arange(8, device=device)[None]
    for block in model.transformer.h:
        block.register_forward_hook(lambda _, args, out: seen.append(out))
    with machine_of(device=device, dtype=dtype).autocast(), torch.no_grad():
        model.trunk(idx)
        assert [x.dtype for x in seen] == [torch.float32] * 2  # part I's
        seen.clear()
        swap_classes(model, faster_classes(TrainConfig(checkpoint_activations=recompute)))
        end = model.trunk(idx)
        assert [x.dtype for x in seen] == [stream] * 2
        exact = model.transformer.ln_f(seen[-1].float())
        assert exact.dtype == torch.float32
        # A CPU has its LayerNorm round to the stream's dtype. The head would do so next.
        assert end.dtype == (stream if device == "cpu" else torch.float32)
        assert torch.equal(model.lm_head(end), model.lm_head(exact))


def test_the_loss_alone_comes_with_targets_and_is_that_of_the_logits_without():
    model, idx = GPT(GPTConfig(8, 19, 2, 2, 8)), torch.arange(8)[None]
    logits, loss = model(idx), model(idx, idx)
    assert logits.shape == (1, 8, 19) and loss.shape == ()
    torch.testing.assert_close(loss, F.cross_entropy(logits[0], idx[0]))
