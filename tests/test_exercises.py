"""README's exercises. Each test is red on the program as it is, and says what is missing.

    python -m pytest tests/test_exercises.py -m exercise -k 11      exercise 11
    python -m pytest tests/test_exercises.py -m exercise -k 01      the first: -k 1 is 10 to 18, too

Without -m exercise they are left out. Some ask for a number: write it into ANSWERS, below. The
others ask for a change of train_gpt2.py, and say how it will be called; everything else about it
is yours. Commit first: then `git diff` shows what you did, and `git checkout train_gpt2.py` undoes
it. While an exercise is solved, tests of the step that it changes may fail: the program does
something else then. So does the last test here, which looks whether all exercises are still open.
"""
import inspect
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2
from common import (ROOT, TINY, environment, generate, loader_of, machine_of, naive, randomise,
                    run_here, short_text, talkative)
from train_gpt2 import (GPT, SIZES, CausalSelfAttention, GPTConfig, TrainConfig, cached,
                        configure_optimizers, evaluate, flops_per_token, get_tokenizer, lr_factor,
                        num_params, sample)

ANSWERS = {
    # Three tokens have the logits 2, 1 and 0. How probable is the first one, from 0 to 1, at these
    # temperatures? First guess whether it is more or less than at 1.
    1: {0.5: None, 1.0: None, 2.0: None},
    # A token is a byte, and the val loss is 1.202 nats. To three digits:
    2: {"perplexity": None, "bits per byte": None},
    # The parameters of a model of bytes with 6 layers, 8 heads, width 512, block_size 256: exactly.
    3: None,
    # A model of bytes with 4 layers, block_size 128 and, to 2 %, as many parameters as the demo's.
    4: {"n_head": None, "n_embd": None},
    # Tokens a second of gpt2-medium in training, T = 1024, on an A100 (312 TFLOP/s), at 40 % MFU.
    15: None,
    # With QK-norm, in a row of 128 tokens: the largest share of attention that one of them can get,
    # from 0 to 1, if a head's size is 4, and if it is 64?
    16: {4: None, 64: None},
    # `--recipe modern` has trained for 3,600 steps, with a checkpoint each 250. Which is the last
    # one that a run of 7,200 steps would have had, too, to the bit? Its step:
    18: None,
}
CONFIG = GPTConfig(block_size=32, vocab_size=41, n_layer=2, n_head=4, n_embd=32)


@pytest.fixture(autouse=True)
def task(request):
    """What is asked for, above what is missing: pytest shows it if the test fails."""
    print(inspect.getdoc(request.function))


def need(condition, missing, hint):
    """If the exercise is not solved yet: what is missing and where to begin, and no traceback."""
    if not condition:
        pytest.fail(f"{missing}\nHint: {hint}", pytrace=False)


def need_answer(number, given, right, hint, question=""):
    """An answer, if one was given, is judged by right(answer)."""
    where = f"ANSWERS[{number}]{question} in tests/test_exercises.py"
    need(given is not None, f"{where} is still None.", hint)
    need(right(given), f"{where}: it is not {given}.", hint)


def same_text(model):
    """Is the likeliest text the same with the cache as without, beyond block_size, too?"""
    prompts = [[3, 1, 4], [9, 2, 9]]
    expected = [naive(model, prompt, 50) for prompt in prompts]
    # A text that only repeats itself would prove little.
    assert len({token for row in expected for token in row}) > 3
    return generate(model, prompts, 50, temperature=0) == expected


@pytest.mark.exercise
def test_exercise_01_temperature():
    """ANSWERS[1], to 0.01. The truth is counted: 100,000 tokens that sample() draws."""
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(100_000, -1)
    for temperature, given in ANSWERS[1].items():
        drawn = sample(logits, temperature, generator=torch.Generator().manual_seed(0))
        share = (drawn == 0).double().mean().item()
        need_answer(1, given, lambda p: abs(p - share) < 0.01,
                    "softmax makes shares, exp(x) / sum(exp(x)), of the logits; what does sample() "
                    "do to them before?", f"[{temperature}]")


@pytest.mark.exercise
def test_exercise_02_perplexity_by_hand():
    """ANSWERS[2], to 0.01 and 0.001. The truth is what evaluate() says of a model that has this
    loss at every token."""
    class Always(torch.nn.Module):
        def forward(self, idx, targets):
            return torch.tensor(1.202)

    loader = loader_of([1] * 99, 1, 8)
    _, report = evaluate(Always(), loader, 1, 80, get_tokenizer("byte"), machine_of())
    perplexity, bits = map(float, re.search(r"perplexity (\S+) \| (\S+) bits", report).groups())
    need_answer(2, ANSWERS[2]["perplexity"], lambda p: abs(p - perplexity) < 0.01,
                "the loss is a mean of -log(p), with the natural logarithm. What undoes a "
                "logarithm?", "['perplexity']")
    need_answer(2, ANSWERS[2]["bits per byte"], lambda b: abs(b - bits) < 0.001,
                "a probability of 1/2 is one bit. How many nats is it?", "['bits per byte']")


@pytest.mark.exercise
def test_exercise_03_count():
    """ANSWERS[3], exactly. The truth is num_params() of such a model."""
    model = GPT(GPTConfig(256, 257, 6, 8, 512))
    hint = ("go through __init__ of GPT, Block, CausalSelfAttention and MLP. nn.Linear(a, b) has "
            "a * b + b parameters, nn.LayerNorm(C) has 2 * C. lm_head and wte are one.")
    padded = sum(p.numel() for p in model.parameters())
    need(ANSWERS[3] != padded, "So many numbers are stored, but some rows of wte stand for no "
         "token.", "a byte model knows 257 tokens: 256 bytes and <|endoftext|>.")
    need_answer(3, ANSWERS[3], lambda n: n == num_params(model), hint)


@pytest.mark.exercise
def test_exercise_04_depth_or_width():
    """ANSWERS[4]: a shape that GPT() takes."""
    n_head, n_embd = ANSWERS[4]["n_head"], ANSWERS[4]["n_embd"]
    goal = num_params(GPT(GPTConfig(vocab_size=257, **SIZES["demo"])))
    need(n_head and n_embd, "ANSWERS[4] in tests/test_exercises.py is still None.",
         "a block's parameters grow with the square of the width. The demo has 2 layers and width "
         "128: what width do 4 layers leave?")
    need(n_embd % n_head == 0, f"Width {n_embd} cannot be cut into {n_head} heads.",
         "n_embd must be a multiple of n_head.")
    n = num_params(GPT(GPTConfig(128, 257, 4, n_head, n_embd)))
    need(abs(n / goal - 1) <= 0.02, f"With width {n_embd} it has {n:,} parameters; the demo has "
         f"{goal:,}.", "the tables count, too: they grow with the width, not with its square.")


@pytest.mark.exercise
def test_exercise_05_look_ahead():
    """GPT(config)(idx): each output depends on every token of idx, later ones too."""
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    idx = torch.arange(8)[None]
    for t in range(1, 8):
        other = idx.clone()
        other[0, t] = 40
        changed = (model(idx) != model(other)).any(-1)[0]
        need(changed.all(), f"Another token {t} changes these outputs: {changed.tolist()}.",
             "which argument in CausalSelfAttention.forward() hides later tokens?")


@pytest.mark.exercise
def test_exercise_06_forget_a_division(monkeypatch, tmp_path, capsys):
    """A step in four passes reports four times the loss and the gradient norm of one in one."""
    short_text(tmp_path)
    loss, norm = {}, {}
    for B in (4, 1):
        run_here(monkeypatch, tmp_path, *TINY, "--batch_size", B, "--max_steps", 1, "--save_every",
                 0, "--eval_every", 0, "--sample_every", 0, "--log_dir", f"with_{B}")
        row = re.search(r"loss (\S+) \| lr \S+ \| norm (\S+)", capsys.readouterr().out)
        loss[B], norm[B] = map(float, row.groups())
    for name, of in (("loss", loss), ("norm", norm)):
        need(abs(of[1] / of[4] - 4) < 0.04, f"In four passes the {name} is {of[1] / of[4]:.2f} "
             "times as large as in one.", "in train(), which line divides? Both change with it.")


@pytest.mark.exercise
def test_exercise_07_a_constant_rate():
    """lr_factor(step, cfg): the warm-up as it is, then 1 for all steps."""
    cfg = TrainConfig(max_steps=100, warmup_steps=10, max_lr=3e-3, min_lr=3e-5)
    rates = [lr_factor(step, cfg) for step in range(101)]
    need(rates[10:] == [1.0] * 91, f"After the warm-up the factor falls from {rates[10]:.2f} to "
         f"{rates[100]:.2f}.", "lr_factor() has three parts. Which one shall stay?")
    need(rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)]),
         f"The warm-up is another: {rates[:10]}.", "up in a line, as it was.")


@pytest.mark.exercise
def test_exercise_08_untie():
    """GPT(config).lm_head.weight and .transformer.wte.weight: two parameters, both drawn
    with std 0.02, and both in the hands of configure_optimizers()."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=32))
    names = [name for name, _ in model.named_parameters()]
    need("lm_head.weight" in names and "transformer.wte.weight" in names,
         "lm_head and wte are still one matrix.", "look for the line in GPT.__init__() that makes "
         "one of them the other.")
    loss = model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
    loss.backward()
    for matrix in (model.lm_head, model.transformer.wte):
        std = matrix.weight.std().item()
        need(abs(std - 0.02) < 0.001, f"A matrix is drawn with std {std:.3f}, not 0.02.",
             "init_weights() draws what named_parameters() has.")
    used = model.transformer.wte.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    need(used == [1, 2, 3], "wte gets a gradient for tokens that were not read.",
         "wte reads alone, lm_head foretells alone.")
    held = {id(p) for opt in configure_optimizers(model, 1.0, 0.1) for group in opt.param_groups
            for p in group["params"]}
    need(id(model.lm_head.weight) in held, "No optimiser moves lm_head.",
         "it must be a nn.Parameter of the model, as nn.Linear's weight is.")


@pytest.mark.exercise
def test_exercise_09_min_p_sampling():
    """sample(logits, ..., min_p=0.1) with logits (B, vocab_size): only tokens can be drawn whose
    probability, after the temperature, is at least min_p times that of their row's likeliest. The
    shares of those that are left keep their ratios. 0, the default: all can be drawn."""
    takes = inspect.signature(sample).parameters.values()
    need(any(p.name == "min_p" or p.kind == p.VAR_KEYWORD for p in takes),
         "sample() knows no min_p.", "top_k and top_p are keep_probable()'s work: what it drops "
         "gets the logit -inf. A ratio of probabilities is a difference of logits.")
    probs = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04], [0.04, 0.2, 0.3, 0.21, 0.25]])

    def shares(**how):
        generator = torch.Generator().manual_seed(0)
        rows = probs.log().repeat(20_000, 1)
        drawn = sample(rows, generator=generator, **how).view(-1, 2)
        return torch.stack([(drawn == token).double().mean(0) for token in range(5)], dim=1)

    def expected(min_p, temperature=1.0):
        p = (probs.double() ** (1 / temperature))
        p = torch.where(p >= min_p * p.max(1, keepdim=True).values, p, 0.0)
        return p / p.sum(1, keepdim=True)

    for min_p, temperature in ((0.0, 1.0), (0.15, 1.0), (0.65, 1.0), (0.4, 2.0), (1.0, 1.0)):
        found = shares(min_p=min_p, temperature=temperature)
        wanted = expected(min_p, temperature)
        need(((found == 0) == (wanted == 0)).all() and (found - wanted).abs().max() < 0.02,
             f"min_p={min_p}, temperature={temperature}, probabilities {probs.tolist()}:\n"
             f"drawn {found.tolist()}.",
             "each row has its own likeliest token, and the temperature comes first.")
    kept = (shares(min_p=0.01, top_k=2) > 0).sum(1)
    need(kept.max() == 2, f"With min_p and top_k=2, {kept.tolist()} tokens can be drawn.",
         "min_p is one more condition, and takes nobody's place.")
    need(torch.equal(shares(), shares(min_p=0.0)), "Without min_p, sample() draws other tokens.",
         "the default is 0.")


@pytest.mark.exercise
def test_exercise_10_a_gradient_by_hand():
    """loss_gradient(logits, targets), a new function of train_gpt2.py: logits (N, V), targets (N,)
    -> (N, V), what backward() would put into logits.grad after F.cross_entropy(logits, targets).
    Without autograd, that is, by softmax and arithmetic."""
    need(hasattr(train_gpt2, "loss_gradient"), "train_gpt2.py has no loss_gradient().",
         "for one row, the loss is log(sum(exp(z))) - z[target]. What is its derivative by z[i]? "
         "The first term's has a name.")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator)
    for targets in ([1, 0, 8, 3, 3, 5], [1, -100, 8, -100, 3, 5]):
        leaf, targets = logits.clone().requires_grad_(), torch.tensor(targets)
        F.cross_entropy(leaf, targets).backward()
        with torch.inference_mode():  # no tensor made here can have a gradient
            found = train_gpt2.loss_gradient(logits.clone(), targets.clone())
        need(found.shape == leaf.grad.shape and torch.allclose(found, leaf.grad, atol=1e-6),
             f"With targets {targets.tolist()} it is another gradient.", "a row of it sums to 0. "
             "The loss is a mean over the rows that count; a row with target -100 does not.")


@pytest.mark.exercise
def test_exercise_11_rotary_positions():
    """GPT(config), part I's model, without wpe; CausalSelfAttention(config).heads(x) returns
    queries and keys that are turned already. cached(model) works as before."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    need(not [name for name in model.state_dict() if "wpe" in name], "GPT still has its table of "
         "positions, wpe.", "part IV's model does without. Its Rotary may be used here, too: who "
         "calls it, and what does it need to know?")
    attn = randomise(CausalSelfAttention(CONFIG))
    q, k, v = attn.heads(torch.randn(1, 1, 32).expand(1, 20, 32))
    scores = q @ k.transpose(-2, -1)
    need((scores[..., 19, :] - scores[..., 19, :1]).abs().max() > 1e-3, "Of tokens that are alike, "
         "the last has the same score with all: the keys do not know where they are.",
         "heads() is the place: there each head's q and k are at hand.")
    need(torch.allclose(scores[..., 1:, 1:], scores[..., :-1, :-1], atol=1e-4), "Moved on by one, "
         "both of them, a query and a key have another score.", "turn q and k, both by an angle "
         "proportional to the position.")
    need(torch.allclose(v, v[:, :, :1].expand_as(v), atol=1e-5), "The values depend on the "
         "position.", "only q and k are turned.")
    need(same_text(talkative(model)), "With the KV cache the greedy text is another.",
         "CachedModel.step() gets one token at a time. Where is it?")


@pytest.mark.exercise
def test_exercise_12_grouped_queries():
    """GPTConfig(..., n_kv_head=2): so many heads of keys and values, each for n_head / n_kv_head
    heads of queries, neighbours; without it, as before. heads(x) returns q (B, n_head, T, hs) and
    k, v (B, n_kv_head, T, hs). cached(model) keeps such k and v in its list kv."""
    need("n_kv_head" in GPTConfig.__dataclass_fields__, "GPTConfig has no n_kv_head.",
         "c_attn's outputs are C for queries, C for keys, C for values. Which of them get fewer?")
    usual, models = vars(CONFIG), {}
    for groups in (None, 4, 2, 1):
        torch.manual_seed(0)
        models[groups] = GPT(GPTConfig(**{**usual, "n_kv_head": groups} if groups else usual))
    idx = torch.arange(20)[None]
    need(torch.equal(models[None](idx), models[4](idx)), "With a key for each query, or without "
         "n_kv_head, the model is not the same.", "left out, n_kv_head is n_head.")
    used = {}
    for groups in (4, 2, 1):
        attn = randomise(models[groups]).transformer.h[0].attn
        x = torch.randn(2, 20, 32)
        q, k, v = attn.heads(x)
        need(q.shape == (2, 4, 20, 8) and k.shape == v.shape == (2, groups, 20, 8),
             f"n_kv_head={groups}: q, k, v are {[tuple(t.shape) for t in (q, k, v)]}.",
             "split() takes a list of sizes, too.")
        k, v = (t.repeat_interleave(4 // groups, dim=1) for t in (k, v))
        need(torch.allclose(attn(x), attn.merge(train_gpt2.attention(q, k, v)), atol=1e-4),
             f"n_kv_head={groups}: not what copied keys and values would give.",
             "F.scaled_dot_product_attention(..., enable_gqa=True) does it.")
        speaker = cached(models[groups])
        speaker(idx)
        used[groups] = sum(part.numel() for part in speaker.kv)
        need(used[groups] * 4 == used[4] * groups, f"The cache holds {used[groups]} numbers; with "
             f"4 heads of keys, {used[4]}.", "keep k and v as heads() returns them.")
        need(same_text(talkative(models[groups])), "With the cache the greedy text is another.",
             "CachedModel.step() calls attention by itself.")


@pytest.mark.exercise
def test_exercise_13_your_own_tokenizer():
    """get_tokenizer("mine"): a tiktoken.Encoding of 256 bytes, 1,000 merges of input.txt and
    <|endoftext|>, for which --tokenizer mine asks."""
    enc = get_tokenizer("mine")
    need(enc.n_vocab == 1257, f'get_tokenizer("mine") knows {enc.n_vocab} tokens, not 1257.',
         "section 1.5 of the notebook has the loop. A token's rank is its id: mergeable_ranks has "
         "256 bytes, then the merges in their order.")
    need("mine" in train_gpt2.CHOICES["tokenizer"], "--tokenizer mine is refused.",
         "CHOICES lists what a flag may be.")
    for text in ("MIRA:\nThe sea, the sea!", "a  \n\n b\tc", "naïve 雪 🙂", "<|endoftext|>", ""):
        ids = train_gpt2.encode(text, enc).tolist()
        need(enc.decode(ids) == text, f"{text!r} comes back as {enc.decode(ids)!r}.",
             "pat_str must match every character of any text; and an Encoding named byte is taken "
             "for bytes, without any merges.")
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    size = len(text.encode()) / len(train_gpt2.encode(text, enc))
    need(size > 2.6, f"A token of input.txt is {size:.2f} bytes.",
         "1,000 times the most frequent pair, each time counted after the last merge.")
    lengths = sum(len(enc.decode_single_token_bytes(i)) == 1 for i in range(1257))
    need(lengths == 256, f"{lengths} tokens are one byte long.", "256 bytes come first.")


@pytest.mark.exercise
def test_exercise_14_resume_exactly(monkeypatch, tmp_path):
    """model.train(): a tenth of each c_proj's outputs is 0, the others are larger by 1 / 0.9.
    model.eval(): nothing is. A run's training has it; its validation, samples and checks do not,
    and leave the training as it would be without them."""
    torch.manual_seed(0)
    model, idx = randomise(GPT(CONFIG)), torch.arange(20)[None]
    seen = []
    for name, module in model.named_modules():
        if name.endswith((".attn", ".mlp")):
            module.register_forward_hook(lambda module, inputs, y: seen.append(y))
    need(not torch.equal(model.train()(idx), model(idx)), "Two passes through model.train() give "
         "the same logits: nothing is dropped.", "F.dropout(y, 0.1, self.training), where c_proj "
         "is called: there are two places.")
    dropped = [round((y == 0).double().mean().item(), 2) for y in seen]
    need(all(0.02 < share < 0.2 for share in dropped), f"The shares of zeros are {dropped}.",
         "attention and MLP both, a tenth each.")
    need(torch.equal(model.eval()(idx), model(idx)), "model.eval() drops something, too.",
         "self.training says which it is.")
    short_text(tmp_path)

    def weights(log_dir, *flags):
        run_here(monkeypatch, tmp_path, *TINY, "--save_every", 3, "--log_dir", log_dir, *flags)
        rows = [row for row in (tmp_path / log_dir / "log.txt").read_text().splitlines()
                if " train " in row]
        return rows, train_gpt2.load_checkpoint(tmp_path / log_dir / "model_00006.pt")["model"]

    def equal(a, b):
        return a[0] == b[0] and all(torch.equal(w, b[1][name]) for name, w in a[1].items())

    busy = weights("busy", "--eval_every", 1, "--sample_every", 1)
    need(equal(busy, weights("quiet", "--eval_every", 0, "--sample_every", 0)), "A run that "
         "validates and samples in between ends at other weights.", "evaluate(), sample() and "
         "check_model() draw random numbers, if they drop; or they leave eval() on.")
    shutil.copytree(tmp_path / "busy", tmp_path / "stopped")
    (tmp_path / "stopped" / "model_00006.pt").unlink()
    need(equal(busy, weights("stopped", "--resume")), "A run that is resumed ends at other bits.",
         "what is drawn between a checkpoint and the next step is drawn twice.")
    loader, machine = loader_of([1, 2, 3, 4] * 99, 1, 8), machine_of()
    enc = get_tokenizer("byte")
    wide = randomise(GPT(GPTConfig(8, 257, 1, 2, 32)))
    twice = [evaluate(wide, loader, 4, 320, enc, machine)[0] for _ in range(2)]
    need(twice[0] == twice[1] and wide.training, f"Two validations of one model say {twice}, or "
         "leave it in eval().", "eval() before, train() after.")


@pytest.mark.exercise
def test_exercise_15_how_fast_should_it_be():
    """ANSWERS[15], to 2 %. The truth is from flops_per_token()."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES["gpt2-medium"]))
    flops = train_gpt2.PEAK_TFLOPS["A100"] * 1e12 * 0.40
    need_answer(15, ANSWERS[15], lambda n: abs(n * flops_per_token(model, 1024) / flops - 1) < 0.02,
                "a token takes 6 FLOPs for each of N parameters and 12 L C T for attention. 40 % "
                "of 312e12 of them are done in a second.")


@pytest.mark.exercise
def test_exercise_16_how_sharp_can_a_head_be():
    """ANSWERS[16], to 0.005. The truth is attention() with the best query and keys there are."""
    for hs, given in ANSWERS[16].items():
        q = train_gpt2.rms_norm(torch.ones(1, 1, 128, hs))
        k = torch.cat((q[..., :1, :], -q[..., 1:, :]), dim=2)
        share = train_gpt2.attention(q, k, torch.eye(128))[0, 0, -1, 0].item()
        need_answer(16, given, lambda p: abs(p - share) < 0.005,
                    "two vectors of length sqrt(hs): what is the largest product q · k, and the "
                    "smallest? attention() divides by sqrt(hs). One token has the largest score, "
                    "127 the smallest.", f"[{hs}]")


@pytest.mark.exercise
def test_exercise_17_fewer_rounds(monkeypatch):
    """newton_schulz() in three rounds, with three numbers of its own in each, instead of five rounds
    with the same ones: singular values from 0.01 to 1 of the whole (the root of the sum of their
    squares) shall end between 0.6 and 1.4. No more products of matrices than nine."""
    generator = torch.Generator().manual_seed(0)
    # 200 matrices with two directions each: one from 0.01 to 0.71 of the whole, the other the rest.
    small = torch.logspace(-2, -0.5 * math.log10(2), 200)
    sizes = torch.stack((small, (1 - small**2).sqrt()), dim=1)  # (200, 2)
    # Side by side they are of different scales.
    scales = torch.logspace(-3, 3, 200)[torch.randperm(200, generator=generator)]
    for rows, columns in ((16, 16), (24, 16), (16, 48)):
        u, v = (torch.linalg.qr(torch.randn(200, n, 2, generator=generator)).Q
                for n in (rows, columns))
        g = scales[:, None, None] * (u @ torch.diag_embed(sizes) @ v.mT)
        with monkeypatch.context() as without:
            for name in ("svd", "qr", "eigh", "eig"):
                without.delattr(torch.linalg, name)
            without.delattr(torch, "svd")
            with Products() as products:
                x = train_gpt2.newton_schulz(g).float()
        need(products.count <= 9, f"{products.count} products of matrices, where nine are enough.",
             "5 rounds become 3, as `for a, b, c in ((...), (...), (...)):`. The first has to lift "
             "what is small: its a is the factor of a singular value near 0.")
        inside = u.mT @ x @ v  # diagonal, if the directions are the same
        after = inside.diagonal(dim1=1, dim2=2)
        rest = (inside - torch.diag_embed(after)).abs().max()
        need(rest < 0.1, f"directions are mixed: {rest:.2f} beside the diagonal.",
             "only x, x x^T x and x x^T x x^T x keep them.")
        need(0.6 < after.min() and after.max() < 1.4,
             f"singular values from 0.01 to 1 end between {after.min():.2f} and {after.max():.2f}.",
             "each matrix of the stack must begin with a norm of 1. Plot a s + b s^3 + c s^5 over s "
             "for each round. What one round makes of 0.01 to 1 is what the next one gets; choose "
             "its numbers for that, and for 2 % more, as bfloat16 rounds. arXiv:2505.16932 has the "
             "best ones.")


class Products(TorchDispatchMode):
    """Counts the products of matrices in it, by what PyTorch computes in the end."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += func.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm,
                                              aten.addmm_, aten.baddbmm_, aten.addbmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.exercise
def test_exercise_18_longer_than_planned():
    """ANSWERS[18]. The truth is from trapezoid(): a step is the same if its rate is."""
    short, long = (TrainConfig(max_steps=n, warmup_steps=0, max_lr=0.02, min_lr=0.0)
                   for n in (3600, 7200))
    taken = 0
    while train_gpt2.trapezoid(taken, short) == train_gpt2.trapezoid(taken, long):
        taken += 1
    need_answer(18, ANSWERS[18], lambda step: step == taken // 250 * 250,
                "trapezoid() says when the rate begins to fall, and of which steps there are "
                "checkpoints is in the question.")


# --------------------------------------------------------------------------------------------------

@pytest.mark.process
def test_each_exercise_is_open_and_says_what_is_missing(tmp_path):
    """Not by an error, such as a name that is gone. If you are solving them: this one is for the
    others, and may fail."""
    report = tmp_path / "report.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m",
                    "exercise", "--junitxml", report, ROOT / "tests" / "test_exercises.py"],
                   cwd=tmp_path, env=environment(PYTEST_ADDOPTS=""), capture_output=True, timeout=300)
    cases = list(ElementTree.parse(report).iter("testcase"))
    names = [case.get("name") for case in cases]
    assert [name[:17] for name in names] == [f"test_exercise_{n:02}_" for n in range(1, 19)]
    for name, case in zip(names, cases):
        # -k looks for a number anywhere in a name: there is no other one in it.
        assert re.fullmatch(r"\D+\d\d\D+", name), name
        red = [red.get("message") for red in case.iter("failure")]
        assert len(red) == 1 and not case.findall("error"), f"{name} is solved, or broken"
        assert re.match(r"Failed: \S.+\nHint: \S.+", red[0], re.S), f"{name}: {red[0]}"
