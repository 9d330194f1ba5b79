"""How fast is it on this machine? Prints Markdown tables, each side by side with what it is compared with.

    python tests/bench.py train                   a training step, against a textbook GPT-2 with autocast, compiled
    python tests/bench.py train --model gpt2-xl   the other sizes; a lower --batch_size if the memory does not hold it
    python tests/bench.py generate                new tokens a second, against transformers' generate()
    python tests/bench.py profile                 where the time of one forward and backward pass goes: the 15 most
                                                  costly operations, and trace.json for https://ui.perfetto.dev

On a CPU, training is timed with the demo's shape, and nothing is compiled. Both models of `train` have the same
weights, see the same batches in turn (ours, the textbook's, ours, ...), and their losses are printed: they must agree,
to 0.001 at first, or 0.22 in the demo's shape, as the textbook's model may also say tokens that there are not. Both are
compiled alike; train() itself also asks for a faster exp(), which is worth half a percent. `profile` does so, too.
"""
import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2
from train_gpt2 import GPT, GPTConfig, Machine, TrainConfig, UserError, cached, faster_classes, swap_classes

# Sequences a pass: what 80 GB hold, of the textbook's model, too.
BATCH_SIZE = {"demo": 8, "gpt2": 64, "gpt2-medium": 32, "gpt2-large": 16, "gpt2-xl": 8}


class TextbookBlock(nn.Module):
    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict(dict(c_attn=nn.Linear(C, 3 * C), c_proj=nn.Linear(C, C)))
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(C, 4 * C), c_proj=nn.Linear(4 * C, C)))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.attn.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class TextbookGPT(nn.Module):
    """GPT-2 as one writes it down: float32 between the matmuls, logits and loss returned, padding left to training."""

    def __init__(self, c):
        super().__init__()
        rows = -(-c.vocab_size // 64) * 64
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(rows, c.n_embd), wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList(TextbookBlock(c.n_embd, c.n_head) for _ in range(c.n_layer)), ln_f=nn.LayerNorm(c.n_embd)))
        self.lm_head = nn.Linear(c.n_embd, rows, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def train_step(model, optimizer, loader, machine, accumulate):
    """One optimiser step: its time in seconds, and its loss."""
    wait(machine.device)
    t0, total = time.perf_counter(), 0.0
    for _ in range(accumulate):
        x, y = machine.send(loader.next_batch())
        with machine.autocast():
            loss = model(x, y)
            loss = loss[1] if isinstance(loss, tuple) else loss
        loss = loss / accumulate
        total += loss.detach()
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    total = total.item()
    return time.perf_counter() - t0, total


def work(args, machine):
    """The size's name, its shape, and a function that makes a loader of batches, always the same."""
    name = args.model or ("gpt2" if machine.cuda else "demo")
    enc = train_gpt2.get_tokenizer("byte" if name == "demo" else "gpt2")
    config = GPTConfig(vocab_size=enc.n_vocab, **train_gpt2.SIZES[name])
    text, _ = train_gpt2.open_data(Path(__file__).resolve().parent.parent / "input.txt", enc)
    B = args.batch_size or BATCH_SIZE[name]
    return name, config, lambda: train_gpt2.DataLoaderLite(text, B, config.block_size, enc.n_vocab, seed=0)


def ours(config, **flags):
    """A GPT as train() has it with these flags."""
    model = GPT(config)
    swap_classes(model, faster_classes(TrainConfig(**flags)))
    return model


def bench_train(args, machine):
    name, config, batches = work(args, machine)
    B, T, device = batches().B, config.block_size, machine.device
    total = args.total_batch_size or (2**19 if machine.cuda else B * T)
    torch.manual_seed(0)
    models = {"train_gpt2.py": ours(config), "textbook": TextbookGPT(config)}
    if args.fp8:
        models["train_gpt2.py --fp8"] = ours(config, fp8=True)
    for model in models.values():
        model.load_state_dict(models["train_gpt2.py"].state_dict())
    if args.alone:
        del models["textbook"]
    runs = {}
    for key, model in models.items():
        model.to(device)
        (optimizer,) = train_gpt2.configure_optimizers(model, 6e-4, 0.1)
        t0 = time.perf_counter()
        step = (torch.compile(model, dynamic=False) if machine.compiles else model, optimizer, batches(), machine,
                max(total // (B * T), 1))
        if machine.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() - sum(p.numel() * 4 for p in model.parameters())
        losses = [train_step(*step)[1] for _ in range(2)]                    # compiles, makes AdamW's moments
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if machine.cuda else 0
        runs[key] = dict(step=step, losses=losses, peak=peak, first=time.perf_counter() - t0, times=[])
    for _ in range(args.steps):
        for run in runs.values():
            seconds, loss = train_step(*run["step"])
            run["times"].append(seconds)
            run["losses"].append(loss)
    flops = train_gpt2.flops_per_token(models["train_gpt2.py"], T)
    ceiling, tokens = train_gpt2.peak_flops(device), B * T * step[-1]
    print(f"\n{name}, B={B}, T={T}, {tokens:,} tokens a step, {str(machine.dtype)[6:]}, median of {args.steps} steps "
          "(fastest, slowest)\n\n| | ms a step | tokens/s | MFU | peak memory | first two steps | losses |\n|"
          + " --- |" * 7)
    for key, run in runs.items():
        median = statistics.median(run["times"])
        mfu = f"{flops * tokens / median / ceiling:.1%}" if ceiling else "?"
        print(f"| {key} | {median * 1e3:,.1f} ({min(run['times']) * 1e3:,.1f}, {max(run['times']) * 1e3:,.1f}) | "
              f"{tokens / median:,.0f} | {mfu} | {run['peak']:.1f} GiB | {run['first']:.0f} s | "
              + " ".join(f"{loss:.3f}" for loss in run["losses"][:4]) + " |")


@torch.no_grad()
def bench_generate(args, machine):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    device, model = machine.device, ours(GPTConfig()).to(machine.device)
    theirs = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=None, pad_token_id=0)).to(device).eval()
    n = args.new_tokens
    print(f"\ngpt2, float32, a prompt of 64 tokens, {n} new ones, greedy: new tokens a second of the whole batch "
          "(second of two runs)\n\n| batch | train_gpt2.py | transformers | transformers, static cache |\n|" + " --- |" * 4)
    for batch in args.batches:
        prompts = torch.randint(0, 50257, (batch, 64), generator=torch.Generator().manual_seed(1))
        idx = prompts.to(device)
        greedy = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(idx))
        kinds = [lambda: list(train_gpt2.generate(cached(model), idx, n, temperature=0)),
                 lambda: theirs.generate(idx, **greedy),
                 lambda: theirs.generate(idx, **greedy, cache_implementation="static")]
        speeds = []
        for kind in kinds[:2] if args.alone else kinds:
            for _ in range(2):
                wait(device)
                t0 = time.perf_counter()
                kind()
                wait(device)
                speed = batch * n / (time.perf_counter() - t0)
            speeds.append(f"{speed:,.1f}")
        print(f"| {batch} | " + " | ".join(speeds) + " |", flush=True)


def bench_profile(args, machine):
    name, config, batches = work(args, machine)
    torch.manual_seed(0)
    model = machine.parallelize(ours(config, fp8=args.fp8), TrainConfig(fp8=args.fp8))
    loader = batches()
    for profiler in contextlib.nullcontext(), contextlib.nullcontext(), torch.profiler.profile():
        x, y = machine.send(loader.next_batch())  # the first pass compiles
        with profiler:
            with machine.autocast():
                loss = model(x, y)
            loss.backward()
            wait(machine.device)
        model.zero_grad(set_to_none=True)
    profiler.export_chrome_trace("trace.json")
    print(f"\n{name}, B={loader.B}, T={loader.T}, {str(machine.dtype)[6:]}{', compiled' * machine.compiles}: "
          "one forward and backward pass; trace.json has its course, for https://ui.perfetto.dev")
    print(profiler.key_averages().table(f"self_{'cuda' if machine.cuda else 'cpu'}_time_total", row_limit=15))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "generate", "profile"])
    parser.add_argument("--model", choices=list(train_gpt2.SIZES), help="train, profile: size (GPU: gpt2, CPU: demo)")
    parser.add_argument("--batch_size", type=int, help="train, profile: B (the size's own)")
    parser.add_argument("--total_batch_size", type=int, help="train: tokens a step (GPU: 524288, CPU: B * T)")
    parser.add_argument("--steps", type=int, default=10, help="train: steps to time (10)")
    parser.add_argument("--alone", action="store_true", help="without the textbook model, or without the static cache")
    parser.add_argument("--fp8", action="store_true", help="train: one more row, as --fp8 trains; profile: that alone")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="generate: batch sizes (1 8 64)")
    parser.add_argument("--new_tokens", type=int, default=128, help="generate: new tokens (128)")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="where to run (the best there is)")
    args = parser.parse_args()
    try:
        machine = Machine(TrainConfig(device=args.device, fp8=args.fp8))
    except UserError as e:
        parser.error(str(e))
    where = torch.cuda.get_device_name() if machine.cuda else f"{machine.device}, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    dict(train=bench_train, generate=bench_generate, profile=bench_profile)[args.what](args, machine)
