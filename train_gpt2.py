"""GPT-2 in one file: the model, its data, its training, its sampling.

Part I is the lecture: a complete training program, to be read from top to bottom in one sitting.
What it calls and you have not read yet stands below, under a name that says what it does. Part II:
what a long run needs. III: the command line. IV: what came after GPT-2. V: the same, faster.

    python train_gpt2.py                            a laptop: a small GPT learns to write plays
    python train_gpt2.py --prompt "MIRA:"           let that run's newest checkpoint speak
    python train_gpt2.py --resume                   go on where it stopped: Ctrl-C, kill, more steps
    python fineweb.py && python train_gpt2.py       one GPU: GPT-2 124M on 10 B tokens, overnight
    torchrun --standalone --nproc_per_node=8 train_gpt2.py     the same on 8 GPUs
    python train_gpt2.py --init_from gpt2 --data my.txt        OpenAI's weights, your own text

The laptop's run begins at a loss of 5.56 and ends, on text that it was not trained on, at 1.32 to
1.33. All flags: --help. How this file was built, one idea at a time: git log --reverse
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn as nn
from torch.nn import functional as F

# ==================================================================================================
# PART I: THE LECTURE
# A language model reads the beginning of a text and gives each token a probability of being the
# next one. A token is a short piece of text that has a number, its id: in the laptop's run a byte,
# in GPT-2 one of 50,257 pieces such as " the". With such a model one can write: draw a token,
# append it, ask again (section 2). It learns from real text (section 5): how probable did it think
# the tokens that really came? The less probable, the larger is the loss. The model computes with
# millions of numbers, its parameters. Over and over, each is changed a little, for a smaller loss.
#
# In which direction? The gradient says for each parameter how fast the loss grows with it, and a
# step goes the other way. Nobody has to work that out: PyTorch remembers how the loss came about,
# and loss.backward() goes through it from the end to the beginning, by the chain rule, and leaves
# each parameter's gradient in its .grad.
# --------------------------------------------------------------------------------------------------
# 1. The model
# Shapes are written (B, T, C): a batch of B sequences, side by side, of T tokens each; and a token
# is a vector of C numbers. It begins as two tables' rows added, "which token am I" and "where", and
# is enriched block by block until it tells which token should come next.
#
# PyTorch: nn.Linear(a, b) turns a numbers into b, y = W x + bias; its parameters are W (b, a) and
# bias (b,). Of x (B, T, a) it does so with each token's vector. nn.Embedding(n, C) is a table of n
# rows. A Module holds the parameters of its parts; m(x) runs m.forward(x). P @ Q multiplies
# matrices, the last two dimensions, for each index of the others by itself.

@dataclass
class GPTConfig:
    """The shape of a GPT. The defaults are those of GPT-2 124M (Radford et al. 2019)."""
    block_size: int = 1024  # the most that it can read at once: T is at most this
    vocab_size: int = 50257  # tokens it knows: 256 bytes, 50,000 pieces, <|endoftext|>
    n_layer: int = 12  # blocks
    n_head: int = 12  # heads in each block: see attention()
    n_embd: int = 768  # C, the length of a token's vector

def attention(q, k, v):
    """Causal attention (Vaswani et al. 2017, arXiv:1706.03762), written out to be read; below, the
    library's is called. For each token, learnt matrices compute a query, a key and a value: what it
    looks for, what others find it by, what it gives to those that do. That is done nh times side by
    side, each time with matrices of its own; one such time is called a head, and its vectors have
    hs = C / nh numbers: q, k, v (B, nh, T, hs) -> (B, nh, T, hs). Each token gets a mean of the
    values of all tokens up to itself, and those count most whose keys match its query."""
    T, hs = q.size(-2), q.size(-1)
    # scores[..., t, s]: how well does key s match query t? A sum of hs products, about 1 each, some
    # positive, some negative. Most cancel; about sqrt(hs) is left, and divided by that, about 1.
    # softmax will make shares of a row of them, exp(x) / sum(exp(x)): each 0 or more, together 1.
    # With much larger scores one token would get nearly all, and a small change of the scores would
    # change nearly nothing: the gradient would be 0, and nothing could be learnt.
    scores = q @ k.transpose(-2, -1) / math.sqrt(hs)  # (B, nh, T, T)
    # No token may see a later one, as it is to foretell them. True is above the diagonal, where the
    # column is later than the row; there the score becomes -inf, and the share 0.
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(diagonal=1)
    scores = scores.masked_fill(later, -math.inf)
    shares = F.softmax(scores, dim=-1)
    return shares @ v  # row t: the sum of shares[t, s] * v[s] over all s, token t's mean

class CausalSelfAttention(nn.Module):
    """Where tokens talk, x (B, T, C) -> (B, T, C): each head looks for something else."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        # The matrices of all heads, stacked into one; and one that mixes what the heads find.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def heads(self, x):
        """Query, key and value for each head: x (B, T, C) -> three times (B, nh, T, hs)."""
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # Each vector is cut into nh pieces. Then the heads go before the tokens: they stay apart.
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
        return q, k, v

    def forward(self, x):
        q, k, v = self.heads(x)
        # attention(q, k, v), but tile by tile, so that a GPU need not write the T x T scores to
        # memory and read them again, which takes longest (FlashAttention, arXiv:2205.14135).
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        return self.merge(y)

    def merge(self, y):
        """The pieces of all heads side by side again, and mixed: (B, nh, T, hs) -> (B, T, C)."""
        return self.c_proj(y.transpose(1, 2).flatten(2))

class MLP(nn.Module):
    """Where each token thinks by itself about what it has gathered: two matrices with a bend, GELU,
    in between. Without it they would be no more than one matrix: W2 (W1 x) = (W2 W1) x."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4 C)
        # GELU is about max(x, 0), with a round corner; GPT-2 was trained with this form of it.
        x = F.gelu(x, approximate="tanh")
        return self.c_proj(x)  # (B, T, C)

class Block(nn.Module):
    """One layer: talk, then think. What either part finds is added to x, and nothing else changes
    x: it flows through all blocks, the residual stream. A sum hands a gradient on to both its terms
    as it is, so gradients get to the first block without growing or shrinking in all the others. x
    grows with each addition, so each part reads it through a LayerNorm, which brings a vector to
    mean 0 and variance 1; then each number has a factor and an offset, at first 1 and 0."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x

class GPT(nn.Module):
    """Ids in; out, at each position, a number for every token that might come next. The parts have
    the names that OpenAI gave them, so that OpenAI's parameters find their places."""
    def __init__(self, config):
        super().__init__()
        check_shape(config)
        self.config = config
        # 50304 rows for 50257 tokens, as a GPU is faster with multiples of 64; 47 are never used.
        rows = math.ceil(config.vocab_size / 64) * 64
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(rows, config.n_embd),  # word token embedding: a vector for each token
            wpe=nn.Embedding(config.block_size, config.n_embd),  # and one for each position
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),  # the hidden layers
            ln_f=nn.LayerNorm(config.n_embd),  # the final LayerNorm
        ))
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        # lm_head takes the dot product of a vector with each token's vector: the better they match,
        # the higher is this token's number. Its matrix is wte's, so there are 39 M parameters less.
        self.transformer.wte.weight = self.lm_head.weight
        self.init_weights()

    def init_weights(self):
        """Small random numbers. Each block adds two random vectors to the stream, and variances add
        up. So the matrices that make these vectors, all called c_proj, are drawn smaller the more
        there are: the stream is then as large after 48 blocks as after 12."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:  # not LayerNorm's factors, which have one dimension
                nn.init.normal_(p, std=0.02)  # wpe, too; OpenAI draws that with 0.01

    def trunk(self, idx):
        """All but lm_head: idx (B, T) -> (B, T, C). UserError if T is more than block_size."""
        check_length(idx, self.config)
        pos = torch.arange(idx.size(1), device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C) + (T, C)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, vocab_size): softmax makes of them the probabilities of
        what comes after each position. With targets (B, T), what did come: the loss, a number."""
        logits = self.lm_head(self.trunk(idx))[..., :self.config.vocab_size]
        if targets is None:
            return logits
        # Cross-entropy: -log of the probability that the model gave to the right token, a mean over
        # all positions (-100 as a target is for one that shall not count). At first, parameters are
        # random and small, all tokens are about equally probable, and the loss is about
        # log(vocab_size), 5.55 for 257. On a GPU, logits come in 16 bits (section 5). softmax
        # divides by a sum of thousands of exp(): too coarse for that, so float() makes them 32.
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

# --------------------------------------------------------------------------------------------------
# 2. Generation

def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw a token for each row of logits (B, vocab_size): (B, 1). A low temperature stretches the
    distances between logits, so that the probable becomes more probable; 0 always takes the most
    probable. top_k: only the k most probable can be drawn (0: all). top_p: only the most probable
    ones that together have this probability. generator: the source of chance, if not PyTorch's."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # Less than 1e-6 is as good as 0, and would overflow.
    logits = logits.float() / max(temperature, 1e-6)
    logits = keep_probable(logits, top_k, top_p)
    return torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)

@torch.no_grad()  # nothing is to be learnt here, so PyTorch need not remember for a backward()
def generate(model, idx, max_new_tokens, **how):
    """Continue idx (B, T), T > 0: an iterator over new tokens, (B, 1) each. `how`: see sample()."""
    for _ in range(max_new_tokens):
        # No position comes after block_size: of a longer text, only the end is read.
        logits = model(idx[:, -model.config.block_size:])
        # The model foretells what comes after each token. Only the last is news.
        token = sample(logits[:, -1], **how)
        yield token
        idx = torch.cat((idx, token), dim=1)

# Each time the whole text is computed again. Part V keeps its keys and values: they stay the same.
# --------------------------------------------------------------------------------------------------
# 3. Tokens and batches

def get_tokenizer(name):
    """Turns text into ids and back, by OpenAI's library tiktoken. `gpt2` is byte-pair encoding: at
    first, tokens were the 256 bytes; then, 50,000 times, the pair of neighbours that was most
    frequent in many texts became a new token. A text is encoded by the same joins in that order.
    `byte` has no joins. <|endoftext|> is a token of its own that stands between documents."""
    if name == "gpt2":
        return load_gpt2_vocabulary()
    # pat_str cuts a text before anything is joined (here: not at all); a token's rank is its id.
    return tiktoken.Encoding("byte", pat_str=r"[\s\S]+", special_tokens={"<|endoftext|>": 256},
                             mergeable_ranks={bytes([i]): i for i in range(256)})

def open_data(path, enc, separator=None):
    """(training split, validation split): lists of shards, which are long rows of ids or files of
    them. A text's last tenth is for validation, as a model may know by heart what it trained on."""
    path = Path(path)
    if path.is_dir():
        return find_shards(path)
    tokens = read_tokens(path, enc, separator)
    n = len(tokens) * 9 // 10
    return [tokens[:n]], [tokens[n:]]

@dataclass
class DataLoaderLite:
    """Batches of windows, T + 1 tokens each: x are the first T of them, y the last T, so that y[t]
    is what comes after x[t]. An epoch is all windows of all shards, once; a seed shuffles them.
    With 8 GPUs this program runs 8 times at once, as processes that differ only in their rank, 0 to
    7 (world_size = 8); a laptop is rank 0 of 1. All have the windows in the same order. Of the next
    8 B windows rank 0 takes the first B, rank 1 the B after those, ...; position is where they
    begin. A step (section 5) takes as many windows in all, and the same, with any world_size."""
    shards: list
    B: int
    T: int
    vocab_size: int
    name: str = "the data"
    rank: int = 0
    world_size: int = 1
    seed: int = None

    def __post_init__(self):
        self.windows = Windows(self.shards, self.T, self.vocab_size, self.name, self.seed)
        self.windows.require(self.B * self.world_size)
        self.position = 0

    def batch(self, position, B):
        """B windows from a position on: x, y (B, T) int64."""
        rows = np.stack([self.windows[p] for p in range(position, position + B)])  # (B, T + 1)
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].clone(), rows[:, 1:].clone()  # copies: a change of y leaves x alone

    def next_batch(self):
        """This process's own B of the next B * world_size windows."""
        first = self.position + self.rank * self.B
        self.position += self.B * self.world_size
        return self.batch(first, self.B)

# --------------------------------------------------------------------------------------------------
# 4. Optimiser and learning rate
# The optimiser turns gradients into steps, and the learning rate lr says how far they go. The plain
# way is p -= lr * p.grad, but some gradients are a thousand times larger: no lr suits all of them.

def configure_optimizers(model, max_lr, weight_decay):
    """AdamW (arXiv:1711.05101) as GPT-3 used it. For each parameter it keeps two running means, m
    of the gradient g and v of its square: at each step m = 0.9 m + 0.1 g, v = 0.95 v + 0.05 g^2.
    (They begin at 0, and are corrected for being too small at first.) A step is lr * m / sqrt(v),
    eps keeping 0 / 0 away. If the gradient is always g, that is lr, however large g is; if its sign
    keeps changing, it is near 0. Weight decay makes matrices a little smaller at each step, so that
    only what gradients keep pushing grows large; LayerNorm's factors shall be near 1, not 0.
    Returns a list: other recipes use several. (max_lr is a note for train(); fused is faster.)"""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]  # biases and LayerNorm
    groups = [{"params": matrices, "weight_decay": weight_decay, "max_lr": max_lr},
              {"params": vectors, "weight_decay": 0.0, "max_lr": max_lr}]
    return [torch.optim.AdamW(groups, lr=max_lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]

def lr_factor(step, cfg):
    """What the highest learning rate is multiplied with at this step."""
    least = cfg.min_lr / cfg.max_lr if cfg.max_lr else 0.0
    # 1) Up in a line: at first, gradients are large and the running means know little.
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    # 2) From the last step on, the least.
    if step >= cfg.max_steps:
        return least
    # 3) In between, down along half a cosine: far steps to get near, short ones to settle.
    progress = (step - cfg.warmup_steps) / (cfg.max_steps - cfg.warmup_steps)  # 0 to 1
    return least + 0.5 * (1 + math.cos(math.pi * progress)) * (1 - least)

# --------------------------------------------------------------------------------------------------
# 5. Training

def train(cfg, raw_model, enc, machine):
    """Train a GPT as cfg says, all that can be set (part III), on this machine (part II)."""
    # Part V's classes take the place of those above: the same formulas, on a GPU in less time.
    swap_classes(raw_model, faster_classes(cfg))
    # model is raw_model made ready for training, with the same parameters: compiled (many small
    # operations become one), in touch with other processes.
    model = machine.parallelize(raw_model, cfg)
    B = machine.sequences(cfg)
    train_shards, val_shards = open_data(cfg.data, enc, cfg.separator)
    train_loader = DataLoaderLite(train_shards, B, cfg.seq_len, enc.n_vocab, f"{cfg.data} (train)",
                                  machine.rank, machine.world_size, cfg.seed)
    # Of this one, evaluate() takes as many windows at once as suit it.
    val_loader = DataLoaderLite(val_shards, 1, cfg.seq_len, enc.n_vocab, f"{cfg.data} (val)")
    make_optimizers, factor = how_to_train(cfg)  # the two functions above, or part IV's
    optimizers = make_optimizers(raw_model, cfg.max_lr, cfg.weight_decay)
    scaler = machine.scaler()  # for float16, a number format of older GPUs; else it does nothing
    run = Run(cfg, raw_model, enc, optimizers, scaler, train_loader, machine)
    start = run.begin()

    x, y = machine.send(train_loader.next_batch())
    for step in range(start, cfg.max_steps + 1):
        last_step = step == cfg.max_steps
        if run.stopping:  # somebody pressed Ctrl-C, or the machine is about to be shut down
            run.save(step)
            break

        # Once in a while, and at the end: how good is it, what does it write, is it safe on disk?
        if due(step, cfg.eval_every, last_step):
            val_loss, report = evaluate(model, val_loader, B, cfg.val_tokens, enc, machine)
            run.log(step, "val", val_loss, report)
        if due(step, cfg.hellaswag_every, last_step):
            run.score_hellaswag(step)  # a test: which of four endings is a story's own?
        if step > 0 and due(step, cfg.sample_every, last_step):
            run.sample(step)
        if step > 0 and (due(step, cfg.save_every, last_step) or run.is_best(step)):
            run.save(step)
        if last_step:
            break

        # One step, on total_batch_size tokens. A GPU has no room for so many at once: they come in
        # several passes, and backward() adds each one's gradient to what is in .grad already. On a
        # laptop there is one pass; averaging(), autocast() and the scaler do nothing; what remains
        # is model(x, y), loss.backward(), clip, optimizer.step(), optimizer.zero_grad().
        t0 = time.perf_counter()
        loss_sum = 0.0
        for micro_step in range(run.passes):
            last_pass = micro_step == run.passes - 1
            with machine.averaging(model, last_pass):  # of gradients, over all processes
                with machine.autocast():  # matrix products in 16 bits
                    loss = model(x, y)
                # The sum of all passes is to be the mean over the whole step.
                loss = loss / run.passes
                loss_sum += loss.detach()  # the number alone, not how it came about
                # A GPU is still at work on this batch, so there is time to fetch the next one.
                x, y = machine.send(train_loader.next_batch())
                scaler.scale(loss).backward()

        # All gradients together are one long vector. If it is longer than grad_clip, it is
        # shortened to that: one odd batch shall not throw the model off.
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), cfg.grad_clip or math.inf)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["max_lr"] * factor(step, cfg)
            # Here the parameters change, and the next gradients begin at nothing.
            if machine.dtype != torch.float16 or norm.isfinite():
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()

        # A GPU works while Python goes on. item() waits for it, so dt is the time of all of a step.
        loss = machine.sum(loss_sum.item()) / machine.world_size
        norm = norm.item()
        dt = time.perf_counter() - t0
        run.check_finite(step, loss, norm)
        run.log(step, "train", loss, f"loss {loss:.4f} | lr {cfg.max_lr * factor(step, cfg):.2e} | "
                f"norm {norm:.3f} | " + speed_report(raw_model, cfg, dt, machine))
        run.stop_if_asked()
    run.end(step)

# ==================================================================================================
# PART II: WHAT A LONG RUN NEEDS
# You have read a complete program. What follows teaches little new about models. It keeps a run of
# hours fast, safe and repeatable, on one GPU or on many. Read on, or look up what train() calls;
# sections 8 and 9 are the easiest, and 7 is for those who have several GPUs.
# --------------------------------------------------------------------------------------------------
# Parts II to V need more of the library.
import argparse
import codecs
import contextlib
import dataclasses
import errno
import importlib.util
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
import zipfile
import zlib

import filelock
import torch.distributed as dist
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# 6. Words for what is wrong, and for the screen

class UserError(ValueError):
    """What the user asked for cannot be. main() prints it as one line, with the remedy, and exits
    with 2."""

class RunError(Exception):
    """The run cannot go on. As above, but main() exits with 1."""

def one_line(error):
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__

def require(condition, message):
    """An assert about what the user asked for: raises UserError, also under `python -O`, which
    drops asserts."""
    if not condition:
        raise UserError(message)

def check_shape(config):
    require(config.n_head > 0 and config.n_embd % config.n_head == 0,
            f"n_embd={config.n_embd} is no multiple of n_head={config.n_head}")

def check_length(idx, config):
    T, longest = idx.size(1), config.block_size
    require(T <= longest, f"T={T} is longer than block_size={longest}: pass fewer tokens")

def from_torchrun(name, alone):
    """torchrun starts a process for each GPU, and tells it in environment variables which one it is
    (RANK of all, LOCAL_RANK of this machine's), and of how many (WORLD_SIZE). alone: what it is
    without torchrun."""
    return int(os.environ.get(name, alone))

def check_torchrun():
    """All of its variables or none: with a part of them, processes would not find each other. They
    meet at MASTER_ADDR, a machine, and MASTER_PORT, a number that tells it who is called."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found.keys() & set(names[:3]):
        return
    good = all(re.fullmatch("[0-9]{1,9}", found.get(name, "")) for name in names[:4])
    good = good and "MASTER_ADDR" in found
    require(good and int(found["RANK"]) < int(found["WORLD_SIZE"]), "of what torchrun sets, "
            f"{', '.join(names)}, this is here: {found}. Start with torchrun, or unset these")

def print0(*values, **how):
    """print(), but of several processes only one speaks."""
    if from_torchrun("RANK", 0) == 0:
        print(*values, **how)

def warn(message):
    print0(f"warning: {one_line(message)}", file=sys.stderr)

# --------------------------------------------------------------------------------------------------
# 7. The machine: its device, and the processes beside this one

class Machine:
    """All that depends on the machine is decided here: the device, the number format of matrix
    products (matmuls), whether to compile. And what this process does with the others, if any.

    Of the formats, float32 has 24 bits for digits and a wide range; bfloat16, in half the memory
    and many times faster on a GPU, has the same range and 8 bits; float16 has 11 bits and ends at
    65,504."""
    def __init__(self, cfg):
        self.rank = from_torchrun("RANK", 0)
        self.world_size = from_torchrun("WORLD_SIZE", 1)
        local_rank = from_torchrun("LOCAL_RANK", 0)
        gpus = torch.cuda.device_count()
        # mps is a Mac's GPU. For it there is no library that sums over processes.
        mps = torch.backends.mps.is_available() and "RANK" not in os.environ
        kind = cfg.device or ("cuda" if gpus else "mps" if mps else "cpu")
        there = {"cuda": local_rank < gpus, "mps": mps, "cpu": True}
        require(there[kind], f"--device {kind}: this machine, or this build of PyTorch, has {gpus} "
                "of CUDA's GPUs: leave the flag out, or lower torchrun's --nproc_per_node")
        self.cuda = kind == "cuda"
        self.device = torch.device(f"cuda:{local_rank}" if self.cuda else kind)
        fp8 = False
        bf16 = True
        if self.cuda:
            torch.cuda.set_device(self.device)
            # 8-bit floats (part V) came with generation 9, H100; bfloat16 with 8, A100. AMD's
            # cards (hip) count otherwise.
            hopper = torch.cuda.get_device_capability() >= (9, 0) and not torch.version.hip
            fp8 = hopper and cfg.n_embd % 16 == 0
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        best = "bfloat16" if bf16 else "float16"
        dtype = cfg.dtype or (best if self.cuda else "float32")
        require(bf16 or dtype != "bfloat16", "this GPU has no bfloat16: pass --dtype float16")
        require(not cfg.fp8 or fp8 and dtype == "bfloat16",
                "--fp8 needs an H100 or newer, bfloat16, and n_embd in 16s: leave it out")
        self.dtype = getattr(torch, dtype)
        # "high" is TF32: what is left in float32 is multiplied with 11 of its 24 bits, for speed.
        torch.set_float32_matmul_precision("high" if self.cuda else "highest")
        # torch.compile writes a GPU's programs in Triton, which Windows does not have.
        triton = importlib.util.find_spec("triton") is not None
        self.compiles = self.cuda and triton if cfg.compile is None else cfg.compile

    def meet(self):
        """Under torchrun: wait until all processes are there."""
        if "RANK" in os.environ:
            # The libraries that sum over processes, for GPUs and for CPUs.
            backend = "nccl" if self.cuda else "gloo"
            try:
                # Is there such a host at all? init_process_group() would try for half an hour.
                socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
                store, rank, world_size = next(dist.rendezvous("env://"))
                # rendezvous() gives the store, a table where each process writes its address and
                # finds those of the others. When one has died, torchrun starts all again with the
                # same store, in which the old addresses still stand. So each start writes under a
                # number of its own. Several machines (nodes; GROUP_WORLD_SIZE says how many) may
                # count their starts differently; README names a variable that helps there.
                starts = "0"
                if os.environ.get("GROUP_WORLD_SIZE") == "1":
                    starts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"start {starts}", store)
                dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                        timeout=dist.default_pg_timeout)  # 30 minutes
            except (OSError, RuntimeError, ValueError) as e:
                raise UserError(f"the processes do not find each other: {e}. Is MASTER_ADDR right, "
                                "and MASTER_PORT not in use? Restarts of several nodes need "
                                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") from None

    def sum(self, value, op=dist.ReduceOp.SUM):
        """The sum of a number, or of each number in a list, over all processes; or another op."""
        if not dist.is_initialized():
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, op)
        return total.tolist()

    def autocast(self):
        """Within this, matmuls are in dtype; parameters, LayerNorm and loss stay in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self):
        """In float16 the smallest numbers are larger than many gradients, which would become 0. So
        scale() multiplies the loss by a large factor, and thereby all gradients; unscale_() divides
        them again. If one got too large by that, the step is left out, and update() lowers the
        factor. step() looks only at the gradients of its own optimiser; so that all are left out or
        none, train() looks at the norm of all."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def send(self, batch):
        """x, y on the device. From pinned memory, which the system never moves, a GPU can copy them
        while Python goes on."""
        if self.cuda:
            batch = [t.pin_memory() for t in batch]
        return [t.to(self.device, non_blocking=self.cuda) for t in batch]

    def parallelize(self, model, cfg):
        """The model, spread over the processes, and compiled. ddp, distributed data parallel: each
        process has all of it, and gradients are averaged during the backward pass. fsdp, fully
        sharded data parallel, for a model that is too large for one GPU: each has a share of the
        parameters, their gradients and AdamW's means; a block is put together when its turn comes,
        and dropped after it."""
        if cfg.parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
            # The mesh is the processes in a row. fully_shard() puts each one's share on its device.
            mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
            for module in [*model.transformer.h, model]:
                fully_shard(module, mesh=mesh)
            # hellaswag.py calls trunk() by itself: there, too, the model is to be put together.
            register_fsdp_forward_method(model, "trunk")
        else:
            model.to(self.device)
        if cfg.parallel == "ddp" and dist.is_initialized():
            model = nn.parallel.DistributedDataParallel(model)
            # In its first backward pass DDP settles the order in which it sums, and another order
            # rounds a little differently. A resumed run would settle it at another step than a run
            # that was never stopped, and end with other bits. So it is settled here.
            idx = torch.zeros(1, cfg.seq_len, dtype=torch.int64, device=self.device)
            model(idx, idx).backward()
            model.zero_grad(set_to_none=True)
        if self.compiles:
            # For one shape alone, that of training, and with the GPU's fast exp().
            model = torch.compile(model, dynamic=False, options={"use_fast_math": True})
        return model

    def sequences(self, cfg):
        """B, the sequences of a pass: as cfg says or, if it leaves that open, as many as should
        fit, in every process. More than 64 are no faster."""
        if cfg.batch_size:
            return cfg.batch_size
        tokens = 4096
        if self.cuda:
            # Bytes that a token needs: 60 for each number of its vector in each block, and 500,000
            # for its logits. That is twice what was measured for compiled models in bfloat16, as
            # others take more.
            each = 60 * cfg.n_layer * cfg.n_embd + 500_000
            tokens = torch.cuda.mem_get_info()[0] / each
        # fits is the largest power of two that fits; B the largest one up to that which divides the
        # process's share of a step, so that passes come out even.
        fits = 2 ** int(math.log2(min(max(tokens / cfg.seq_len, 1), 64)))
        B = math.gcd(cfg.total_batch_size // (cfg.seq_len * self.world_size), fits)
        return int(self.sum(B, dist.ReduceOp.MIN))

    def averaging(self, model, last_pass):
        """DDP averages gradients over the processes in each backward pass, unless it is in
        no_sync(). The last pass of a step is enough: until then, each process adds up its own."""
        if last_pass or not hasattr(model, "no_sync"):
            return contextlib.nullcontext()
        return model.no_sync()

# A FLOP is one multiplication or addition, a TFLOP/s 1e12 of them a second. From NVIDIA's data
# sheets, for matmuls in bfloat16 (or else float16) with sums in float32, no numbers left out.
PEAK_TFLOPS = {
    "V100": 125, "T4": 65, "A10": 125, "A10G": 70, "A100": 312, "L4": 121, "L40S": 362,
    "H100": 989.5, "H100 PCIe": 756, "H200": 989.5, "B200": 2250, "RTX 3060": 25.5, "RTX 3090": 71,
    "RTX 4070": 58.3, "RTX 4080": 97.5, "RTX 4090": 165.2, "RTX 5090": 209.5,
}

def peak_flops(device):
    """FLOP/s that the device reaches at best; None where that is not known here."""
    if device.type != "cuda":
        return None
    # "NVIDIA A100-SXM4-80GB" is an A100, "H100 80GB HBM3" an H100. "H100 PCIe" is a slower card,
    # and a MIG device a slice of one.
    name = torch.cuda.get_device_name()
    name = re.sub("NVIDIA |GeForce |Tesla |(-SXM.)?[- ]..GB( HBM3| PCIe)?$", "", name)
    return PEAK_TFLOPS[name] * 1e12 if name in PEAK_TFLOPS else None

def num_params(model):
    """How many parameters: the shared matrix once, and no rows that stand for no token."""
    no_token = (model.lm_head.out_features - model.config.vocab_size) * model.config.n_embd
    return sum(p.numel() for p in model.parameters()) - len(tables_of(model)) * no_token

def tables_of(model):
    """The matrices that have a row for each token. lm_head and wte may be one."""
    tables = [model.lm_head, model.transformer.wte, *getattr(model, "value_tables", [])]
    return {table.weight for table in tables}

def flops_per_token(model, T):
    """FLOPs of forward and backward pass. A parameter costs a multiplication and an addition three
    times: forward, for its own gradient, and for its input's: 6. Attention multiplies C numbers for
    q k^T and C for shares @ v, with each of T tokens: that is like 2 C T more parameters in each
    layer (PaLM, arXiv:2204.02311, appendix B)."""
    # All tables but lm_head's are only looked up.
    looked_up = (len(tables_of(model)) - 1) * model.config.vocab_size * model.config.n_embd
    n = num_params(model) - looked_up
    return 6 * n + 12 * model.config.n_layer * model.config.n_embd * T

def speed_report(model, cfg, dt, machine):
    """The time of a step, tokens a second, and MFU, model FLOPs utilization: which share of the
    GPU's peak the model's own multiplications and additions are."""
    speed = cfg.total_batch_size / dt
    report = f"{dt * 1000:.1f} ms | {speed:,.0f} tokens/s"
    peak = peak_flops(machine.device)
    if peak:
        flops = flops_per_token(model, cfg.seq_len) * speed / machine.world_size
        report += f" | MFU {flops / peak:.1%}"
    return report

# --------------------------------------------------------------------------------------------------
# 8. Tokens from files

def load_gpt2_vocabulary():
    """GPT-2's tokenizer: 1.5 MB, downloaded once, then found in tiktoken's cache."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:
        raise UserError(
            f"no GPT-2 vocabulary to be had ({type(e).__name__}): connect to the network once, or "
            "point TIKTOKEN_CACHE_DIR to a folder that has it, or pass --tokenizer byte") from None

def read_tokens(path, enc, separator=None):
    """The ids of a text file, (n,): uint8 for bytes, or else uint16. If a separator is known that
    stands between its documents, <|endoftext|> stands before each of them instead. Raises
    UserError."""
    # Bytes are not joined, so that a text can be read in pieces, which saves memory.
    size = 2**16 if enc.name == "byte" and not separator else -1
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            while text := file.read(size):
                if not rows:
                    # Some editors begin a file with this mark, which is no text.
                    text = text.removeprefix("\ufeff")
                for document in text.split(separator) if separator else [text]:
                    if separator and document:
                        rows.append(np.array([enc.eot_token], dtype=np.uint16))
                    rows.append(encode(document, enc))
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path} as UTF-8 text: {e}") from None
    return np.concatenate(rows or [np.array([], dtype=np.uint8)])

def encode(text, enc):
    """The ids of a text, (n,). In it, the letters "<|endoftext|>" are letters like others."""
    if enc.name == "byte":
        return np.frombuffer(text.encode(), dtype=np.uint8)
    try:
        return enc.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
    except ValueError:
        # tiktoken gives up at a very long run of blanks.
        run = max(re.finditer(r"\s+", text), key=lambda run: run.end() - run.start())
        line = text.count("\n", 0, run.start()) + 1
        raise UserError(f"from line {line:,} on there are {len(run.group()):,} blanks, too many to "
                        "be tokenized: shorten them") from None

def find_shards(path):
    """The files of tokens in a folder: (training split, validation split), lists of paths."""
    require(not [*path.glob("**/dataset_info.json")], f"--data {path} is a data set: write it to "
            "a file, with datasets.load_from_disk() and to_json('text.jsonl'), and make shards: "
            "python fineweb.py --files text.jsonl --out_dir shards")
    files = [p for p in sorted(path.iterdir()) if p.suffix in (".npy", ".bin")]
    # In a name like interval_train_01.npy the later word counts.
    train = [p for p in files if p.name.rfind("train") > p.name.rfind("val")]
    val = [p for p in files if p.name.rfind("val") > p.name.rfind("train")]
    require(train and val, f"--data {path}: looked for files of tokens, *train* and *val*, .npy or "
            f".bin; found {len(train)} and {len(val)}. fineweb.py makes some out of text: python "
            f"fineweb.py --files '{path}/*.txt' --out_dir shards")
    return train, val

def open_shard(path):
    """The ids of a shard, (n,). A text's are an array already. A file is mapped from disk, so that
    only what is indexed is read: .npy as numpy writes it, or .bin as llm.c does, a trainer of GPT-2
    in C: 256 int32 (20240520, 1, n, ...) and then n uint16. Raises UserError."""
    if isinstance(path, np.ndarray):
        return path
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
            if path.stat().st_size != tokens.offset + tokens.nbytes:
                raise ValueError("it is not as long as its header says")
        else:
            header = np.fromfile(path, dtype="<i4", count=256)
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
            if header[:3].tolist() != [20240520, 1, len(tokens)]:
                raise ValueError(f"{len(tokens):,} tokens, and its header is not (20240520, 1, n)")
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f"{tokens.dtype} {tokens.shape}, no row of uint16")
        return tokens
    except Exception as e:  # whatever numpy meets in a broken file
        raise UserError(f"{path} is cut short or no shard: {e}. Make or copy it again") from None

@dataclass
class Windows:
    """windows[n], the T + 1 tokens of the n-th window; n goes on from epoch to epoch. A shard is
    cut at 0, T, 2 T, ..., and two windows share the token that is a target in one and an input in
    the other. With a seed, each epoch has another order: of the shards, and of the windows in
    each."""
    shards: list
    T: int
    vocab_size: int
    name: str
    seed: int

    def __post_init__(self):
        self.counts = [max(len(open_shard(shard)) - 1, 0) // self.T for shard in self.shards]
        self.total = sum(self.counts)
        self.opened = None

    def fingerprint(self):
        """A checksum, to tell whether the data are the same: of a text, of each id; of a file, of
        its length and of its first and last 1,000 ids."""
        crc = 0
        for shard in self.shards:
            tokens = open_shard(shard)
            ends = tokens if tokens is shard else np.concatenate((tokens[:1000], tokens[-1000:]))
            crc = zlib.crc32(f"{len(tokens)}".encode() + ends.tobytes(), crc)
        return crc

    def require(self, n):
        require(self.total >= n, f"{self.name}: {self.total} windows of {self.T} + 1 tokens, and "
                f"{n} are needed: lower --seq_len or --batch_size, or bring more text")

    def shuffled(self, n, *key):
        """The numbers below n, in an order that follows from seed and key."""
        if self.seed is None:
            return np.arange(n)
        return np.random.default_rng([self.seed, *key]).permutation(n)

    def __getitem__(self, n):
        epoch, n = divmod(n, self.total)
        # In which of the epoch's shards is it? From here on, n counts within that shard.
        for shard in self.shuffled(len(self.shards), epoch):
            if n < self.counts[shard]:
                break
            n -= self.counts[shard]
        if self.opened != (epoch, shard):
            # One shard at a time is open.
            self.opened = (epoch, shard)
            self.tokens = open_shard(self.shards[shard])
            self.starts = self.T * self.shuffled(self.counts[shard], epoch, shard)
        window = self.tokens[self.starts[n]:self.starts[n] + self.T + 1]
        name = getattr(self.tokens, "filename", self.name)
        require(window.max() < self.vocab_size, f"{name}: id {window.max()} is outside the "
                f"vocabulary of {self.vocab_size}: wrong --tokenizer?")
        return window

# --------------------------------------------------------------------------------------------------
# 9. Looking at the model while it trains

def due(step, every, last_step):
    """Is it time for what comes every so many steps, and after the last one? every=0 is never;
    None, which samples of a text have, is after 100, 200, 400, 800, ... steps, as most is learnt at
    first."""
    if every is None:
        return last_step or step in [100 * 2**n for n in range(20)]
    return every > 0 and (step % every == 0 or last_step)

@torch.no_grad()
def evaluate(model, loader, B, max_tokens, enc, machine):
    """(loss, report): a mean over the loader's first max_tokens, in nats, the unit of natural
    logarithms. The processes share the work; neither their number nor B changes the result."""
    # Another tokenizer makes more or fewer tokens of a text, so losses a token do not compare. The
    # loss of the whole text does, divided by its bytes. How many does each token stand for?
    # <|endoftext|> for none.
    lengths = np.array([len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)])
    lengths[enc.eot_token] = 0
    windows = min(loader.windows.total, max(max_tokens // loader.T, 1))
    # Every process makes as many passes as the others, because under FSDP they wait for each other.
    own = range(machine.rank * B, windows + machine.rank * B, machine.world_size * B)
    sums = np.zeros(3)
    # None: no progress bar where no terminal is.
    hidden = True if machine.rank > 0 else None
    for first in tqdm(own, "validation", leave=False, delay=1, disable=hidden):
        x, y = loader.batch(first, B)
        # What fills up the last batch is not counted.
        y[max(windows - first, 0):] = -100
        counted = y[y >= 0]
        with machine.autocast():
            loss = model(*machine.send((x, y)))
        if len(counted):
            sums += [loss.item() * len(counted), len(counted), lengths[counted].sum()]
    nats, tokens, text_bytes = machine.sum(sums.tolist())
    loss = nats / tokens
    # With logarithms to base 2, nats become bits. So many a byte would store the text, if a program
    # that packs texts had the model's probabilities.
    bits = nats / math.log(2) / max(text_bytes, 1)
    # Perplexity, exp(loss): as unsure as if one guessed among so many equally probable tokens.
    return loss, (f"val loss {loss:.4f} | perplexity {math.exp(min(loss, 99)):.2f} | "
                  f"{bits:.3f} bits per byte")

def keep_probable(logits, top_k, top_p):
    """logits (B, vocab_size), with -inf for all but the top_k most probable tokens (0: all), and of
    these for all but the fewest, the most probable first, that hold the share top_p of the
    probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        probs, order = F.softmax(logits, dim=-1).sort(descending=True, stable=True)
        # A token is dropped if those before it hold the share already; the first has none before
        # it. scatter() brings the answers from the sorted order to the tokens' own places.
        drop = probs.cumsum(dim=-1) - probs >= max(top_p, 1e-6)
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return logits

def stream_text(model, enc, prompt, cfg, seed):
    """Continue prompt: an iterator over pieces of text, until <|endoftext|>. A character that is
    split over tokens waits until it is whole."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    device = model.lm_head.weight.device
    # Something must come first. For an empty prompt, it is what stood before each document.
    idx = torch.tensor([enc.encode_ordinary(prompt) or [enc.eot_token]], device=device)
    # A generator of its own: or else a sample would use up random numbers, and what training draws
    # after it would change. cached() is the same model, but does not compute old tokens again (part
    # V).
    rng = torch.Generator(device).manual_seed(seed)
    for token in generate(cached(model), idx, cfg.max_new_tokens, temperature=cfg.temperature,
                          top_k=cfg.top_k, top_p=cfg.top_p, generator=rng):
        if token.item() == enc.eot_token:
            break
        yield utf8.decode(enc.decode_single_token_bytes(token.item()))
    yield utf8.decode(b"", final=True)

# --------------------------------------------------------------------------------------------------
# 10. The run's folder: log.txt, checkpoints, going on after a stop

# A checkpoint is a file with all that a run needs to go on from a step as if it had never stopped:
# the parameters, what the optimisers keep of each, the place in the data, the settings. It is a
# plain dict of plain values and tensors. This is the version of its contents; a file of another
# version is refused.
FORMAT = 5

def state_dicts():
    """PyTorch's functions for state dicts, which go from a name to a tensor, of models and
    optimisers that may be spread over processes; and the options for one that is in one piece, on
    the CPU. They are imported when they are needed, which saves a second at start."""
    import torch.distributed.checkpoint.state_dict as dcp
    return dcp, dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)

def save_checkpoint(path, state):
    """Write state to path. It is complete on disk, beside path, before it takes path's name."""
    # Always the same name: what a kill left there, the next one overwrites.
    beside = path.with_name("model.tmp")
    try:
        with open(beside, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:
        # torch.save() makes a RuntimeError out of a full disk.
        cause = e.__context__ if isinstance(e, RuntimeError) else e
        if not isinstance(cause, OSError):
            raise
        with contextlib.suppress(OSError):
            beside.unlink()
        raise RunError(f"cannot write {path}: {cause}. Earlier checkpoints are whole: "
                       "make room, then --resume") from None

def load_checkpoint(path):
    """The state in a checkpoint, on the CPU. Raises UserError if it cannot be used."""
    require(path.is_file(), f"cannot use {path}: there is no such file")
    try:
        # It is a zip file, which has a checksum of each of its parts.
        with zipfile.ZipFile(path) as file:
            # They do not cover the table of contents, where a bit of a part (16) says that it is a
            # folder. If a fault of the disk sets it, PyTorch reads nothing of that part.
            damaged = file.testzip() or any(part.external_attr & 16 for part in file.infolist())
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
        whole = not damaged and (found != FORMAT or is_whole(state))
    except Exception as e:  # whatever is met in a broken file
        name = type(e).__name__
        raise UserError(f"cannot use {path}: cut short, or no checkpoint? ({name})") from None
    require(whole, f"cannot use {path}: it is damaged, does not fit together, or has weights that "
            "are no numbers (nan, inf)")
    require(found == FORMAT, f"cannot use {path}: it has format {found}, and this version writes "
            f"{FORMAT}. The version that wrote it can --export it, for --init_from")
    return state

def is_whole(state):
    """Has a checkpoint all that a run needs to go on? Or else it may raise whatever."""
    # On the device "meta", tensors have a shape and no numbers.
    with torch.device("meta"):
        model = model_like(state)
    shapes = {name: w.shape for name, w in model.state_dict().items()}
    # What an optimiser keeps of a parameter has its shape, or is one number.
    kept = [(w, shapes[name]) for name, of_it in state["optimizer"]["state"].items()
            for w in of_it.values()]
    numbers = state["step"], state["position"], state["data"], *state["best"]
    return (shapes == {name: w.shape for name, w in state["model"].items()}
            and all(w.dim() == 0 or w.shape == shape for w, shape in kept)
            and all_finite(state["model"]) and all(type(n) in (int, float) for n in numbers))

def all_finite(weights):
    return all(w.isfinite().all() for w in weights.values())

def checkpoints(log_dir):
    """Paths of the checkpoints in log_dir by step, oldest first."""
    paths = [p for p in Path(log_dir).glob("model_*.pt")
             if re.fullmatch("model_[0-9]+", p.stem) and p.is_file()]
    return dict(sorted((int(p.stem[6:]), p) for p in paths))

def newest_checkpoint(log_dir):
    """(path, state) of the newest checkpoint that can be used; (None, None) if there is none.
    Raises UserError if none of them can be used."""
    why = None
    for path in reversed(checkpoints(log_dir).values()):
        try:
            state = load_checkpoint(path)
        except UserError as e:
            why = why or e
            continue
        if why:
            warn(f"{why}; going on from {path}")
        return path, state
    require(why is None, f"{why}. Nor can any other in {log_dir} be used")
    return None, None

def open_log(folder, start):
    """log.txt, open for more rows. Rows from step start on are dropped, as these steps are taken
    again. A run that begins at step 0 first moves an earlier one aside."""
    path = folder / "log.txt"
    earlier = [*checkpoints(folder).values(), path]
    # try_folder() has made log.txt, so it is there; if it is empty, no run was.
    if start == 0 and (len(earlier) > 1 or path.stat().st_size):
        n = 1
        while (aside := folder / f"earlier_run_{n}").exists():
            n += 1
        aside.mkdir()
        for file in earlier:
            file.rename(aside / file.name)
        print0(f"{folder} held an earlier run: it is in {aside} now")
    rows = path.read_text("utf-8", errors="replace") if path.exists() else ""
    # Rows that are whole, STEP STREAM VALUE.
    rows = [row for row in re.findall(r"(?m)^[0-9]{1,9} [a-z]+ -?[0-9]+\.[0-9]+\n", rows)
            if int(row.split()[0]) < start]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(rows), "utf-8")
    return open(beside.replace(path), "a", 1, "utf-8")  # 1: a line at a time

@contextlib.contextmanager
def only_run_in(folder, machine):
    """Two runs in one folder would spoil each other: the second is refused. The lock is gone when
    the first process is, whatever ended it."""
    lock = filelock.FileLock(Path(folder) / ".lock", timeout=0)
    taken = False
    if machine.rank == 0:
        try:
            lock.acquire()
        except filelock.Timeout:
            taken = True
        except (RuntimeError, OSError) as e:
            # Some disks have no locks. Older versions of filelock raise a RuntimeError there.
            number = getattr(e, "errno", None)
            if number not in (None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
    require(not machine.sum(taken), f"another run is at work in {folder}: wait for it, or pass "
            "another --log_dir")
    try:
        yield
    finally:
        lock.release()

@dataclass
class Run:
    """What a run leaves in cfg.log_dir, and how it begins, goes on, and ends."""
    cfg: object
    model: GPT
    enc: object
    optimizers: list
    scaler: object
    loader: DataLoaderLite
    machine: Machine
    best: tuple = (math.inf, -1)  # the val loss and the step of the best checkpoint
    val: tuple = (math.inf, -1)  # of the last validation
    signals: int = 0  # how often this process was asked to end
    board: object = None  # Weights & Biases, with --wandb
    stopping: bool = False  # one of the processes was asked to
    left_out: int = 0  # steps in a row that float16's scaler has left out

    def begin(self):
        """Go on from the checkpoint that cfg names, or begin; returns the step."""
        cfg, loader, machine = self.cfg, self.loader, self.machine
        self.folder = Path(cfg.log_dir)
        # A checkpoint's name has its step: model_00250.pt.
        start = int(Path(cfg.init_from).stem[6:]) if cfg.resume else 0
        require(start <= cfg.max_steps,
                f"--max_steps {cfg.max_steps}: the checkpoint already has {start} steps")
        # All look at this together, for in restore() they may wait for each other.
        require(machine.sum(start) == start * machine.world_size, "the processes find different "
                f"checkpoints in {self.folder}: put it on a disk that all machines share")
        if cfg.resume:
            self.restore()
        # Wrong data show now, before an earlier run is moved aside.
        loader.batch(loader.position, loader.B)
        why = self.open_board() if cfg.wandb and machine.rank == 0 else ""
        require(not machine.sum(bool(why)), why or "--wandb: the first process says why")
        self.rows = open_log(self.folder, start) if machine.rank == 0 else open(os.devnull, "w")
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.on_signal)
        self.passes = cfg.total_batch_size // (loader.B * loader.T * loader.world_size)
        tokens = loader.windows.total * loader.T
        print0(f"{cfg.total_batch_size:,} tokens a step = {self.passes} x {loader.world_size} x "
               f"{loader.B} x {loader.T} | {tokens:,} training tokens | {cfg.max_steps:,} steps, "
               f"{cfg.max_steps * cfg.total_batch_size / tokens:.1f} epochs")
        print0(f"resumed from step {start:,}" if start else "starting from step 0")
        self.items = self.load_hellaswag()
        return start

    def open_board(self):
        try:
            import wandb
            self.board = wandb.init(project="gpt2", dir=self.cfg.log_dir, config=vars(self.cfg))
            return ""
        except Exception as e:  # it is not installed, there is no key, no network
            return (f"--wandb: {one_line(e)}: pip install wandb, then wandb login, or "
                    "WANDB_MODE=offline, or --no-wandb")

    def restore(self):
        """All but the weights as it was when the checkpoint was saved. load_start() (section 13)
        has found the file, cfg.init_from, and taken the weights from it. To keep the rest of it in
        memory until now would be too much: it is read again."""
        dcp, whole = state_dicts()
        cfg = self.cfg
        state = load_checkpoint(Path(cfg.init_from))
        # But the highest rate and the weight decay are what cfg says now.
        now = dcp.get_optimizer_state_dict(self.model, self.optimizers)["param_groups"]
        for group, asked in zip(state["optimizer"]["param_groups"], now, strict=True):
            group.update(max_lr=asked["max_lr"], weight_decay=asked["weight_decay"])
        dcp.set_optimizer_state_dict(self.model, self.optimizers, state["optimizer"], options=whole)
        step = state["step"]
        if state["data"] == self.loader.windows.fingerprint():
            self.best = tuple(state["best"])
        else:
            warn(f"{cfg.data} is not what this run has been trained on so far")
        _, factor = how_to_train(cfg)
        before = factor(step, TrainConfig(**state["config"]))
        if factor(step, cfg) != before:
            warn(f"with these flags the learning rate goes on at {factor(step, cfg):.2g} of "
                 f"the highest, not at {before:.2g}")
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.loader.position = state["position"]
        torch.set_rng_state(state["rng"])

    def log(self, step, stream, value, report):
        """A row of log.txt, STEP STREAM VALUE, where the stream is train, val or hella; and a line
        on the screen. Of the training steps that has one in log_every, and the last."""
        self.check_finite(step, value)
        if stream == "val":
            self.val = (value, step)
        if stream != "train" or due(step, self.cfg.log_every, step + 1 == self.cfg.max_steps):
            print0(f"step {step:5d} | {report}")
        self.rows.write(f"{step} {stream} {value:.6f}\n")
        if self.board:
            self.board.log({stream: value}, step=step)

    def load_hellaswag(self):
        """HellaSwag's items, if they are wanted. A run goes on without them rather than end, and
        says why; all processes have them, or none."""
        items = []
        if self.cfg.hellaswag_every:
            import hellaswag
            try:
                items = hellaswag.load_items(self.enc)
            except hellaswag.UserError as e:
                print0(f"HellaSwag is off: {e}")
        return items if self.machine.sum(bool(items)) == self.machine.world_size else []

    def score_hellaswag(self, step):
        """HellaSwag is a test: which of four endings of a story is the right one? See
        hellaswag.py."""
        if self.items:
            from hellaswag import accuracy, score
            # acc goes by the sum of an ending's losses; acc_norm by the mean, fair to long ones.
            sums, means = score(self.model, self.items, self.machine.device, self.machine.dtype)
            acc, acc_norm = accuracy(sums, self.items), accuracy(means, self.items)
            self.log(step, "hella", acc_norm, f"HellaSwag acc {acc:.4f} | acc_norm {acc_norm:.4f}")

    def sample(self, step):
        """Show what the model writes: always the same prompt and seed, so that it alone makes the
        difference."""
        self.check_model(step)
        prompt = "\n" if self.enc.name == "byte" else "The first thing to know is"
        with self.machine.autocast():
            text = "".join(stream_text(self.model, self.enc, prompt, self.cfg, self.cfg.seed))
        print0(f"step {step:5d} | sample: {(prompt + text).strip()}\n")

    @torch.no_grad()
    def check_model(self, step):
        """Is the model still good after the last step? A checkpoint of a ruined one would take the
        place of a good one."""
        x, y = self.machine.send(self.loader.batch(self.loader.position, 1))
        with self.machine.autocast():
            self.check_finite(step, self.model(x, y).item())

    def is_best(self, step):
        """Is there no better checkpoint? Then it is saved right now, if any are wanted."""
        return self.cfg.save_every > 0 and self.val[1] == step and self.val[0] < self.best[0]

    def save(self, step):
        """Write a checkpoint, then delete those that are too old. The best one is kept."""
        self.check_model(step)
        if self.is_best(step):
            self.best = self.val
        model, loader = self.model, self.loader
        dcp, whole = state_dicts()
        weights = dcp.get_model_state_dict(model, options=whole)
        state = {
            "format": FORMAT,
            "step": step,
            "config": {key: value for key, value in vars(self.cfg).items() if key not in NOT_SAVED},
            "model_config": vars(model.config),
            "model": weights,
            "optimizer": dcp.get_optimizer_state_dict(model, self.optimizers, options=whole),
            "scaler": self.scaler.state_dict(),
            # train() has fetched one batch that it has not used yet.
            "position": loader.position - loader.B * loader.world_size,
            "rng": torch.get_rng_state(),
            "best": self.best,
            "data": loader.windows.fingerprint(),
        }
        if self.machine.rank == 0:
            if model.lm_head.weight is model.transformer.wte.weight:
                # Two names of one matrix: as one tensor it is written once.
                weights["lm_head.weight"] = weights["transformer.wte.weight"]
            save_checkpoint(self.folder / f"model_{step:05d}.pt", state)
            # Later ones than this can only be broken ones, which were passed over.
            kept = checkpoints(self.folder)
            for old in [s for s in kept if s <= step and s != self.best[1]][:-self.cfg.keep]:
                kept[old].unlink()

    def check_finite(self, step, loss, norm=None):
        """End a run that has no numbers any more: nothing after that would be worth saving."""
        if norm is not None:
            self.left_out = 0 if math.isfinite(norm) else self.left_out + 1
        # float16 may overflow now and then, and its scaler leaves out the step. But not ten.
        allowed = 9 if self.scaler.is_enabled() else 0
        if math.isfinite(loss) and self.left_out <= allowed:
            return
        again = "Begin again with"
        good = list(checkpoints(self.folder))
        if good:
            again = f"The checkpoint of step {good[-1]} is good: go on from it with --resume and"
        raise RunError(f"step {step}: loss {loss}, gradient norm {norm}; not saved. {again} a "
                       "lower --max_lr, or with --dtype float32")

    def on_signal(self, signum, frame):
        """The first Ctrl-C or SIGTERM, by which a system asks a program to end, ends the run after
        its step, the second at once. torchrun passes such a signal on to each process, which may
        have had it from the terminal already; so under torchrun the second is ignored."""
        self.signals += 1
        signal.signal(signum, signal.SIG_IGN if dist.is_initialized() else signal.SIG_DFL)

    def stop_if_asked(self):
        """All processes stop after the same step, if one of them was told to."""
        self.stopping = self.machine.sum(self.signals) > 0

    def end(self, step):
        kept = checkpoints(self.folder)
        if self.stopping:
            print0(f"stopped after {step:,} steps: --resume goes on from there")
        elif kept:
            best = str(kept.get(self.best[1]) or kept[max(kept)])
            command = shlex.join(["python", sys.argv[0], "--init_from", best, "--prompt", "Once"])
            print0(f"Done: the run is in {self.folder}. What next?\n  {command}")
        else:
            print0(f"Done: the log is in {self.folder}, and no checkpoint")

# --------------------------------------------------------------------------------------------------
# 11. Other people's weights, ours for others, and models that are only looked at

# Hugging Face is a site where people share models, the Hub, and its library transformers uses them.
# A model there is a folder: its shape (config.json), its weights, its tokenizer. GPT-2 is one, and
# what part IV's model is called there is NanoChat.

# Hugging Face keeps these matrices as (in, out), nn.Linear as (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# What Hugging Face calls the parts of part IV's model.
NANOCHAT = {"transformer.wte": "model.embed_tokens", "transformer.h.": "model.layers.",
            "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
            "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
            "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}

def theirs_of(key, w, modern):
    """Hugging Face's name for our key, and w in their form. A matrix that is transposed twice is as
    before: if w is theirs, it comes back in our form."""
    if not modern:
        return key, w.t() if key.endswith(TRANSPOSED) else w
    for ours, theirs in NANOCHAT.items():
        key = key.replace(ours, theirs)
    return key, w

def from_pretrained(name):
    """A GPT with the weights of a Hugging Face GPT-2, by name or folder, or a ModernGPT with those
    of a NanoChat of the shape that export() writes, by folder. Raises UserError."""
    # Our own line says what is wrong.
    os.environ.update(HF_HUB_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = [*list(SIZES)[1:], "distilgpt2"]
    folder = Path(name)
    require(folder.is_dir() or name.removeprefix("openai-community/") in known,
            f"'{name}' is neither a folder nor a GPT-2: {', '.join(known)}")
    require(not (folder / "adapter_config.json").exists(), f"{name} is an adapter, not a model: "
            "merge it first, with peft's merge_and_unload() and save_pretrained()")
    try:
        modern = (folder.is_dir()
                  and transformers.AutoConfig.from_pretrained(name).model_type == "nanochat")
        kind = transformers.NanoChatForCausalLM if modern else transformers.GPT2LMHeadModel
        theirs, info = kind.from_pretrained(name, output_loading_info=True)
    except Exception as e:  # whatever the Hub, the disk or a broken file may raise
        why = one_line(e)[:200]
        raise UserError(f"cannot load {name} (no network? files missing?): {why}") from None
    c = theirs.config
    if modern:
        shape = GPTConfig(c.max_position_embeddings, c.vocab_size, c.num_hidden_layers,
                          c.num_attention_heads, c.hidden_size)
    else:
        shape = GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    # These settings our code takes for granted. Do they have the values that it takes?
    usual = their_config(shape, modern)
    fixed = ("activation_function", "layer_norm_epsilon", "tie_word_embeddings", "n_inner",
             "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "hidden_act", "rms_norm_eps",
             "intermediate_size", "num_key_value_heads", "attention_bias", "rope_parameters",
             "final_logit_softcapping")
    odd = [key for key in fixed if getattr(c, key, None) != getattr(usual, key, None)]
    # And are there weights that the files lack?
    odd = [*info["missing_keys"], *odd]
    require(not odd, f"{name} is not a complete GPT-2, see its {', '.join(odd[:3])}")
    model = (ModernGPT if modern else GPT)(shape)
    weights = theirs.state_dict()
    require(all_finite(weights), f"{name} has weights that are no numbers (nan, inf)")
    # By our names: theirs may have buffers besides, which do not matter.
    for key, p in model.named_parameters():
        name, _ = theirs_of(key, p, modern)
        _, w = theirs_of(key, weights[name], modern)
        p.data.zero_()
        p.data[:len(w)] = w  # wte has more rows than tokens; the rest stays 0
    return model

def their_config(c, modern, **ids):
    """Hugging Face's configuration for a GPTConfig."""
    from transformers import GPT2Config, NanoChatConfig
    if modern:
        return NanoChatConfig(
            max_position_embeddings=c.block_size, vocab_size=c.vocab_size, hidden_size=c.n_embd,
            intermediate_size=4 * c.n_embd, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, **ids)
    # n_ctx is the old name of n_positions. llama.cpp's converter to its own format asks for it.
    return GPT2Config(n_positions=c.block_size, n_ctx=c.block_size, vocab_size=c.vocab_size,
                      n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, **ids)

def export(model, enc, path, note):
    """Write a folder for Hugging Face's from_pretrained(), complete before it takes path's name.
    Raises UserError if there is something at path already."""
    require(not path.exists(), f"--export {path} exists: choose another folder")
    require(not getattr(model, "value_tables", []), "--export: Hugging Face has no such model, "
            "with value embeddings: train one without --value_embeddings")
    import transformers
    from transformers.convert_slow_tokenizer import TikTokenConverter
    transformers.logging.disable_progress_bar()
    c = model.config
    # Hugging Face has three names for what is one token here.
    names = ("bos", "eos", "pad")
    ids = {f"{name}_token_id": enc.eot_token for name in names}
    modern = isinstance(model, ModernGPT)
    kind = transformers.NanoChatForCausalLM if modern else transformers.GPT2LMHeadModel
    theirs = kind(their_config(c, modern, **ids))
    weights = dict(theirs_of(key, w, modern) for key, w in model.state_dict().items())
    for key, w in weights.items():
        # Without the rows that stand for no token.
        if key.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight")):
            weights[key] = w[:c.vocab_size]
    theirs.load_state_dict(weights)
    theirs.generation_config = transformers.GenerationConfig(do_sample=True, temperature=0.8,
                                                             top_k=50, **ids)
    converter = TikTokenConverter(pattern=enc._pat_str, extra_special_tokens=["<|endoftext|>"])
    converter.load_tiktoken_bpe = lambda _: enc._mergeable_ranks  # ours is in no file to be read
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), model_max_length=c.block_size, padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": "<|endoftext|>" for name in names})
    card = ("---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n# A GPT-2\n\n"
            f"By train_gpt2.py: {num_params(model) / 1e6:.1f} M parameters, {note}\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of a name that nobody has, and that is gone in any case.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="export_") as folder:
            beside = Path(folder, path.name)
            theirs.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            (beside / "README.md").write_text(card, "utf-8")
            # Version 5 of transformers writes a class that version 4 does not have.
            settings = beside / "tokenizer_config.json"
            settings.write_text(settings.read_text("utf-8").replace(
                "TokenizersBackend", "PreTrainedTokenizerFast"), "utf-8")
            for file in beside.iterdir():
                file.chmod(0o644)  # for all to read
            beside.rename(path)
    except Exception as e:  # whatever the libraries and the disk may raise
        raise UserError(f"cannot write --export {path}: {one_line(e)}") from None
    print0(f"exported to {path}")

def print_banner(cfg, model, machine):
    """What is trained, on what, and where."""
    kind = "a text (shards would be found in edu_fineweb10B)"
    if Path(cfg.data).is_dir():
        kind = "shards"
    print0(f"training on {cfg.data}, {kind}")
    extras = ", fp8" * cfg.fp8 + ", compiled" * machine.compiles
    print0(f"{cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}: "
           f"{num_params(model) / 1e6:.1f} M parameters | tokenizer {cfg.tokenizer} | "
           f"{machine.world_size} x {machine.device.type}, {str(machine.dtype)[6:]}{extras}")

def look(cfg, model, enc, machine):
    """--export, --eval_only or --prompt: what is done with a model that is not to be trained."""
    if cfg.export is not None:
        if machine.rank == 0:
            note = f"tokenizer {enc.name}, data {cfg.data}, from {cfg.init_from}"
            export(model, enc, Path(cfg.export), note)
        return
    swap_classes(model.to(machine.device), faster_classes(cfg))
    if cfg.eval_only:
        _, val_shards = open_data(cfg.data, enc, cfg.separator)
        loader = DataLoaderLite(val_shards, 1, cfg.seq_len, enc.n_vocab, f"{cfg.data} (val)")
        _, report = evaluate(model, loader, machine.sequences(cfg), cfg.val_tokens, enc, machine)
        print0(report)
        return
    prompt = cfg.prompt
    if prompt == "-":
        require(sys.stdin, "--prompt -: there is no stdin to read")
        prompt = sys.stdin.buffer.read().decode(errors="replace")
    for i in range(cfg.num_samples):
        print0("-" * 80 + "\n" if i else "", prompt, sep="", end="", flush=True)
        with machine.autocast():
            for piece in stream_text(model, enc, prompt, cfg, cfg.seed + i):
                print0(piece, end="", flush=True)
        print0()

# ==================================================================================================
# PART III: THE COMMAND LINE
# --------------------------------------------------------------------------------------------------
# 12. What can be set

@dataclass
class TrainConfig:
    """All that can be set, a flag each; --help shows this text. In brackets: what it is if it is
    not given. Where a default is None, the preset, the data or the machine decides.

    data             folder of *train* and *val* shards (.npy, .bin), or a text file
    separator        in a text: what stands between documents (nothing)
    tokenizer        gpt2 for shards and for GPT-2's weights, byte for a text
    recipe           gpt2, or modern: what has been found since
    value_embeddings with modern: up to three more tables, of values; no export
    model            size: demo for a text, gpt2 for shards; or gpt2-medium, gpt2-large, gpt2-xl
    n_layer          override the model's depth
    n_head           override the model's heads
    n_embd           override the model's width
    block_size       override the model's longest context
    init_from        scratch, a Hugging Face GPT-2 (name or folder), or a checkpoint (.pt)
    batch_size       B, sequences a pass: a matter of memory, not of the result (what should fit)
    seq_len          T, tokens a sequence (block_size)
    total_batch_size tokens a step, in passes of B * T (shards: 524288; a text: 8 * T)
    max_steps        steps to train
    warmup_steps     steps until the learning rate is at its highest
    max_lr           highest learning rate (by width; to fine-tune given weights: a 20th of that)
    min_lr           last learning rate (a 10th of the highest; a text from scratch: a 100th)
    weight_decay     pull of the matrices towards 0
    grad_clip        largest gradient norm; 0: no clipping
    seed             of the weights, the order of the data, the samples
    parallel         ddp: each process has all of the model; fsdp: a share of it
    checkpoint_activations  less memory: the backward pass computes each block once more
    device           cpu, cuda or mps
    dtype            number format of the matmuls: bfloat16, float16 or float32
    compile          torch.compile the model for training
    fp8              train in 8-bit floats: faster, on an H100 or newer
    log_every        steps between lines on the screen; log.txt has all
    eval_every       steps between validation losses; 0: never
    val_tokens       tokens of the validation split to use, if it has as many
    hellaswag_every  steps between HellaSwag scores; 0: never
    sample_every     steps between samples (a text: after 100, 200, 400, ... steps); 0: never
    save_every       steps between checkpoints; 0: never
    keep             checkpoints to keep: the newest so many, and the best
    log_dir          where the run lives: log.txt and the checkpoints
    resume           go on from the newest good checkpoint in log_dir, if there is one
    prompt           continue this text (- reads stdin) and exit
    temperature      0: always the likeliest token; 1: as the model believes; above: wilder
    top_k            sample among the k likeliest; 0: all
    top_p            sample among the fewest that hold this much of the probability
    max_new_tokens   tokens to generate
    num_samples      texts to generate
    eval_only        print the validation loss and exit
    export           write a folder for Hugging Face transformers and exit
    wandb            send what log.txt gets to Weights & Biases as well
    """
    data: str = None
    separator: str = None
    tokenizer: str = None
    recipe: str = "gpt2"
    value_embeddings: bool = False
    model: str = None
    n_layer: int = None
    n_head: int = None
    n_embd: int = None
    block_size: int = None
    init_from: str = "scratch"
    batch_size: int = None
    seq_len: int = None
    total_batch_size: int = None
    max_steps: int = None
    warmup_steps: int = None
    max_lr: float = None
    min_lr: float = None
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 1337
    parallel: str = "ddp"
    checkpoint_activations: bool = False
    device: str = None
    dtype: str = None
    compile: bool = None
    fp8: bool = False
    log_every: int = None
    eval_every: int = 250
    val_tokens: int = 10_485_760
    hellaswag_every: int = None
    sample_every: int = None
    save_every: int = None
    keep: int = 2
    log_dir: str = "log"
    resume: bool = False
    prompt: str = None
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    max_new_tokens: int = 300
    num_samples: int = 1
    eval_only: bool = False
    export: str = None
    wandb: bool = False

# Of the numbers, these must be 1 or more, all others 0 or more.
AT_LEAST_1 = {"n_layer", "n_head", "n_embd", "block_size", "batch_size", "seq_len",
              "total_batch_size", "val_tokens", "keep", "num_samples"}

SIZES = {
    "demo": dict(n_layer=2, n_head=4, n_embd=128, block_size=128),  # 0.4 M parameters
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),  # 124 M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024),  # 355 M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, block_size=1024),  # 774 M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, block_size=1024),  # 1,558 M
}
SHAPE = list(SIZES["demo"])
CHOICES = {"model": SIZES, "recipe": ["gpt2", "modern"], "tokenizer": ["gpt2", "byte"],
           "parallel": ["ddp", "fsdp"],
           "device": ["cpu", "cuda", "mps"], "dtype": ["bfloat16", "float16", "float32"]}

# The two kinds of run.
PRESETS = {
    # A laptop, two minutes.
    "text": dict(model="demo", max_steps=3600, warmup_steps=200, save_every=250,
                 hellaswag_every=0, log_every=50),
    # A GPU, hours. 19,073 steps of 2**19 tokens are 10e9; GPT-3 warmed up for 375e6, or 715 steps.
    "shards": dict(model="gpt2", max_steps=19_073, warmup_steps=715, total_batch_size=2**19,
                   save_every=1000, hellaswag_every=250, sample_every=500, log_every=1),
}
# To fine-tune is to train weights further that know something already, on a text of one's own: with
# few steps, and small ones. This goes before the preset.
FINE_TUNE = dict(max_steps=200, warmup_steps=20, save_every=25, eval_every=25, log_every=10,
                 total_batch_size=None)

# The highest learning rate by the model's width, from GPT-3's table 2.1; the first one is measured.
# For widths in between it is interpolated.
WIDTHS = [128, 768, 1024, 1280, 1600]
RATES = [3e-3, 6e-4, 3e-4, 2.5e-4, 2e-4]

# With --recipe modern: the highest rates of its optimiser, Muon (part IV), for the same widths, the
# first two measured and the others taken to be alike; and what takes the place of the preset's.
MODERN_RATES = [0.02, 0.04, 0.04, 0.04, 0.04]
MODERN = dict(min_lr=0.0, warmup_steps=0, weight_decay=0.0)

# These do not train.
LOOKS = ["prompt", "eval_only", "export"]
# What a checkpoint does not bring along: a run may go on on another machine, in another folder.
NOT_SAVED = ["model", "init_from", "device", "compile", "fp8", "parallel", "checkpoint_activations",
             "log_dir", "resume", *LOOKS]

# --------------------------------------------------------------------------------------------------
# 13. From the flags to a complete configuration

def new_model(recipe, value_embeddings=False, **shape):
    """A model with fresh parameters; shape: see GPTConfig."""
    if recipe == "modern":
        return ModernGPT(GPTConfig(**shape), value_embeddings)
    return GPT(GPTConfig(**shape))

def model_like(state):
    """A model of a checkpoint's kind and shape, with fresh parameters."""
    cfg = TrainConfig(**state["config"])
    return new_model(cfg.recipe, cfg.value_embeddings, **state["model_config"])

def how_to_train(cfg):
    """The functions for the optimisers and for the course of the learning rate."""
    if cfg.recipe == "modern":
        return modern_optimizers, trapezoid
    return configure_optimizers, lr_factor

def size_of(model, recipe):
    """The shape that --model stands for. Part IV's has half as many heads, of twice the size, if
    that can be."""
    size = dict(SIZES.get(model, {}))
    if recipe == "modern" and size and size["n_head"] % 2 == 0:
        size["n_head"] //= 2
    return size

def configure(flags):
    """(cfg, model): a complete TrainConfig, and the model to begin with, or None for a fresh one.
    What a flag says goes before what a checkpoint says, and that before the preset. Raises
    UserError for what cannot be."""
    asked = TrainConfig(**flags)
    check_values(asked)
    looking = looks(asked)
    model, known, init_from, resume = load_start(asked, looking)
    # A run that goes on must keep seq_len, too: its place in the data is counted in such windows.
    fixed = [*SHAPE, "recipe", "value_embeddings"] + ["seq_len"] * resume
    recipe = {**known, **flags}.get("recipe")
    for key, value in {**size_of(asked.model, recipe), **flags}.items():
        if model and key in fixed:
            require(value == known[key], f"--{key} {value}: {init_from} has {known[key]}, and the "
                    "shape of a model, or of its run's data, cannot change")
    if "max_lr" in flags:
        # min_lr follows it.
        known.pop("min_lr", None)

    # The data decide which preset it is, or the demo's size does, which is for a laptop.
    data = asked.data
    if data is None:
        data = known.get("data") or default_data()
    require(looking or Path(data).exists(), f"--data {data} does not exist")
    text = not Path(data).is_dir()
    small = text or asked.model == "demo"
    preset = {**PRESETS["text" if small else "shards"], "tokenizer": "byte" if text else "gpt2"}
    # Are weights given, and is this a new run, not the rest of an old one?
    fine_tune = model is not None and not resume
    if recipe == "modern":
        preset.update(MODERN)
    if fine_tune:
        preset = {**preset, **FINE_TUNE}
    size = size_of(asked.model or preset["model"], recipe)
    chosen = {"data": data, "init_from": init_from, "resume": resume}
    cfg = TrainConfig(**{**preset, **size, **known, **flags, **chosen})

    if "warmup_steps" not in {**known, **flags}:
        # A short trial, too, gets to its highest rate.
        cfg.warmup_steps = min(cfg.warmup_steps, cfg.max_steps // 5)
    if cfg.seq_len is None:
        cfg.seq_len = cfg.block_size
    if cfg.max_lr is None:
        rates = MODERN_RATES if cfg.recipe == "modern" else RATES
        cfg.max_lr = float(np.interp(cfg.n_embd, WIDTHS, rates)) / (20 if fine_tune else 1)
    if cfg.min_lr is None:
        cfg.min_lr = cfg.max_lr / (100 if small and not fine_tune else 10)
    check_and_share(cfg, looking)
    return cfg, model

def check_and_share(cfg, looking):
    """Do the settings go together, and with the number of processes?"""
    one_pass = (cfg.batch_size or 1) * from_torchrun("WORLD_SIZE", 1) * cfg.seq_len
    if cfg.total_batch_size is None:
        # 8 sequences, or the next number that all processes can share.
        cfg.total_batch_size = math.ceil(8 * cfg.seq_len / one_pass) * one_pass
    require(not cfg.value_embeddings or cfg.recipe == "modern" and cfg.n_layer > 1,
            "--value_embeddings is for --recipe modern, with 2 layers or more")
    require(cfg.seq_len <= cfg.block_size,
            f"--seq_len {cfg.seq_len}: the model's block_size is {cfg.block_size}")
    if not looking:
        require(cfg.warmup_steps <= cfg.max_steps,
                f"--warmup_steps {cfg.warmup_steps} is over max_steps={cfg.max_steps}")
        require(cfg.parallel == "ddp" or "RANK" in os.environ, "--parallel fsdp needs torchrun")
        require(not cfg.fp8 or cfg.recipe == "gpt2", "--fp8: its factors are measured for GPT-2's "
                "model, not for --recipe modern: leave it out")
        require(cfg.total_batch_size % one_pass == 0, f"--total_batch_size {cfg.total_batch_size}: "
                f"must be a multiple of batch_size * seq_len * processes={one_pass}; --batch_size "
                "may be another, too")
        try_folder(Path(cfg.log_dir))
        if cfg.init_from == "scratch" and cfg.seq_len < cfg.block_size:
            warn(f"no sequence is longer than seq_len={cfg.seq_len}: positions after that, up to "
                 f"block_size={cfg.block_size}, are not trained")

def looks(cfg):
    """Is it not to be trained?"""
    return cfg.eval_only or cfg.prompt is not None or cfg.export is not None

def try_folder(folder):
    """Can log.txt be written? Better to know before anything slow."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        open(folder / "log.txt", "a").close()
    except OSError as e:
        raise UserError(f"cannot write to --log_dir {folder}: {e.strerror}") from None

def load_start(asked, looking):
    """(model, known, init_from, resume): the weights to begin from, or None; the settings that come
    with them; where they are from; whether their run goes on."""
    init_from = asked.init_from
    state = None
    if asked.resume or looking and init_from == "scratch":
        path, state = newest_checkpoint(asked.log_dir)
        require(state or not looking,
                f"no checkpoint in {asked.log_dir}: train one, or pass --init_from gpt2")
        init_from = str(path or init_from)
    from_log_dir = state is not None
    if init_from == "scratch":
        return None, {}, init_from, False
    if init_from.endswith(".pt"):
        state = state or load_checkpoint(Path(init_from))
        model = model_like(state)
        model.load_state_dict(state["model"])
        if from_log_dir or looking:
            # The checkpoint's run goes on, or its model is to be looked at: all its settings hold.
            # One from before there was --value_embeddings was made without.
            return model, {"value_embeddings": False, **state["config"]}, init_from, not looking
    else:
        model = from_pretrained(init_from)
    # A new run takes nothing but what is in the weights.
    known = {key: getattr(model.config, key) for key in SHAPE}
    known["recipe"] = "modern" if isinstance(model, ModernGPT) else "gpt2"
    known["value_embeddings"] = len(getattr(model, "value_tables", [])) > 0
    known["tokenizer"] = "byte" if model.config.vocab_size == 257 else "gpt2"
    return model, known, init_from, False

def default_data():
    """Shards if there are any here, else a text, else the text beside this file."""
    here = [name for name in ("edu_fineweb10B", "input.txt") if Path(name).exists()]
    return here[0] if here else str(Path(__file__).with_name("input.txt"))

def check_values(cfg):
    for key, value in vars(cfg).items():
        least = 1 if key in AT_LEAST_1 else 0
        if type(value) in (int, float):
            most = 2**63 if type(value) is int else math.inf
            require(least <= value < most,
                    f"--{key} {value} is out of range: it must be finite, and {least} or more")
    require(0 < cfg.top_p <= 1, f"--top_p {cfg.top_p}: must be above 0 and at most 1")

# --------------------------------------------------------------------------------------------------
# 14. main

# What the user can mend, by a word in the message.
REMEDIES = {"out of memory|can't allocate memory": "lower --batch_size, which changes no result",
            "[Cc](\\+\\+)? compiler": "install one, such as g++, or pass --no-compile"}
# What the system says of a disk that is full or broken, or may not be written to; and of a path.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR)

@contextlib.contextmanager
def exit_codes(program, *user_errors):
    """What a user did or can mend ends the program with one line, and with 2 if it cannot be done
    as asked, 1 if it failed while running. A fault of the program's own keeps its traceback."""
    # A program without a console has None here: then what it prints goes nowhere.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    # A console that lacks a character shows "?"; each line is there at once.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        yield
    except (UserError, *user_errors) as e:
        print(f"{program}: {one_line(e)}", file=sys.stderr)
        sys.exit(2)
    except RunError as e:
        sys.exit(one_line(e))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (OSError, RuntimeError) as e:
        number = getattr(e, "errno", None)
        gone = isinstance(e, BrokenPipeError)  # as in `| head`: nobody reads on
        if gone or number in DISK_ERRORS:
            # Python writes what is left as it leaves: into nothing now, or it would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1 if gone else f"{program}: {one_line(e)}. Checkpoints already written are "
                     "whole")
        if number in PATH_ERRORS:
            print(f"{program}: cannot use {one_line(e.filename)}: {e.strerror}", file=sys.stderr)
            sys.exit(2)
        for words, remedy in REMEDIES.items():
            if re.search(words, str(e)):
                sys.exit(f"{program}: {one_line(e)[:200]}: {remedy}")
        raise
    finally:
        if dist.is_initialized():
            if sys.exc_info()[0]:
                # The others may wait for this one. A regular farewell would wait for them.
                dist.group.WORLD.abort()
            # A thread of gloo, which sums on a CPU, may still be about to drop tensors. For that it
            # needs the interpreter, which sleep() leaves to it for a moment.
            time.sleep(0.1)
            dist.destroy_process_group()

class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, without the usage."""
    def error(self, message):
        raise UserError(f"{message} (--help lists all flags)")

def main():
    """Read the flags, do what they ask. Exit codes: 0 done, 1 failed while running, 2 cannot be
    done as asked."""
    # SUPPRESS: a flag that was not given is not in the result either.
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    one_of = parser.add_mutually_exclusive_group()
    # The lines of TrainConfig's docstring are the flags' help.
    help_of = dict(re.findall(r"^ *(\w+) +(.+)$", TrainConfig.__doc__ or "", re.M))
    for f in dataclasses.fields(TrainConfig):
        kind = dict(type=f.type, choices=CHOICES.get(f.name))
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        group = one_of if f.name in LOOKS else parser
        default = "" if f.default is None else f" ({f.default})"
        group.add_argument(f"--{f.name}", help=help_of.get(f.name, "") + default, **kind)
    with exit_codes("train_gpt2.py"):
        check_torchrun()
        cfg, model = configure(vars(parser.parse_args()))
        machine = Machine(cfg)
        machine.meet()
        torch.manual_seed(cfg.seed)
        enc = get_tokenizer(cfg.tokenizer)
        if model is None:
            shape = {key: getattr(cfg, key) for key in SHAPE}
            model = new_model(cfg.recipe, cfg.value_embeddings, vocab_size=enc.n_vocab, **shape)
        require(model.config.vocab_size == enc.n_vocab, f"{cfg.init_from} knows "
                f"{model.config.vocab_size} tokens, and the tokenizer {cfg.tokenizer} has "
                f"{enc.n_vocab}: see --tokenizer")
        if looks(cfg):
            look(cfg, model, enc, machine)
        else:
            with only_run_in(cfg.log_dir, machine):
                print_banner(cfg, model, machine)
                train(cfg, model, enc, machine)

# ==================================================================================================
# PART IV: SINCE GPT-2
#
# GPT-2 is of 2019. With what has been found since, --recipe modern, a model came to GPT-2's loss
# with 0.23 to 0.30 of its tokens. If GPT-2, too, gets a higher rate, a third of the tokens is not
# quite enough for its loss (all measured: README). Each idea is a
# commit, with what it brought: those that git log --reverse --grep "^3[1-8]:" shows. Here are a
# second model, which keeps GPT-2's plan but for what is named below, and has half as many heads,
# each twice as wide; its optimisers; and its learning rate.
# --------------------------------------------------------------------------------------------------
# 15. A model of today

def rms_norm(x):
    """RMSNorm (arXiv:1910.07467): a vector, which is x's last dimension, divided by the root of the
    mean of its squares. So its numbers are about 1, and that is what LayerNorm was needed for.
    Nothing was lost without its mean, factors and offsets, and without all biases (commit 32)."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)

def linear(a, b):
    return nn.Linear(a, b, bias=False)

class Rotary(nn.Module):
    """Rotary positions (RoPE, arXiv:2104.09864), instead of the table wpe. Number i of a vector and
    number i + hs / 2 are a point in the plane, which is turned by an angle that grows with the
    position. Two points that are turned by the same angle keep their dot product. So the dot
    product of a query and a key depends on the difference of their angles alone: on how far apart
    two tokens are, wherever they stand. Each pair has a speed of its own. The fastest turns by 1
    radian a token, a full circle in 2 pi = 6.3 tokens, and tells near neighbours apart. The slowest
    turns by about 1 / 8,000 radian a token, and tells far from farther."""
    def __init__(self, config):
        super().__init__()
        hs = config.n_embd // config.n_head
        speeds = 10_000 ** (-torch.arange(0, hs, 2) / hs)  # (hs / 2,)
        angles = torch.arange(config.block_size)[:, None] * speeds  # (block_size, hs / 2)
        # Buffers go where the parameters go; these are not written to checkpoints.
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x, pos):
        """x (B, nh, T, hs), of tokens at pos (T,), turned. (In part V pos is (T, 1, 1), and x is
        (B, T, 2, nh, hs). cos and sin have pos's shape, with hs / 2 at the end.)"""
        cos = self.cos[pos].to(x.dtype)  # (T, hs / 2)
        sin = self.sin[pos].to(x.dtype)
        a, b = x.chunk(2, dim=-1)  # the points are (a[i], b[i])
        # Clockwise, which is as good as the other way, as queries and keys are turned alike.
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

class ModernAttention(CausalSelfAttention):
    """Without biases, here and in all layers below."""
    def __init__(self, config):
        # Not super().__init__(), which would make part I's layers.
        nn.Module.__init__(self)
        C = config.n_embd
        self.n_head = config.n_head
        # Three matrices instead of c_attn: Muon, below, takes a matrix as a whole, and what is
        # looked for, offered and handed over are three things.
        self.c_q = linear(C, C)
        self.c_k = linear(C, C)
        self.c_v = linear(C, C)
        self.c_proj = linear(C, C)
        self.rotary = Rotary(config)

    def heads(self, x, pos=None, e=None):
        """As in part I. The tokens are at pos (T,), or else at 0, 1, 2, ... For e see mix()."""
        B, T, C = x.size()
        if pos is None:
            pos = torch.arange(T, device=x.device)
        q, k, v = [vectors.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hs)
                   for vectors in (self.c_q(x), self.c_k(x), self.c_v(x))]
        # QK-norm (arXiv:2010.04245): queries and keys get the length sqrt(hs). A dot product is at
        # most the product of the lengths, hs, and attention divides it by sqrt(hs): no score is
        # over sqrt(hs), 11 for hs = 128, however large c_q and c_k grow. Without a bound, scores
        # can grow on and on, until a head sees one token alone and learns no more. It is an
        # insurance: in our short runs it gained nothing (commit 34).
        return rms_norm(self.rotary(q, pos)), rms_norm(self.rotary(k, pos)), self.mix(v, e)

    def mix(self, v, e):
        """The values that attention hands over, made of v (B, nh, T, hs), in the same shape. With
        --value_embeddings, e is a pair: a row for each token (B, T, C) to mix with its value, and
        the factors of value and row, the shares; see ModernGPT.value_embeddings."""
        if e is None:
            return v
        B, nh, T, hs = v.size()
        rows, shares = e
        rows = rows.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        # Shares and rows stay float32 where matmuls are in 16 bits; the sum gets v's format.
        return (shares[0] * v + shares[1] * rows).to(v.dtype)

    def forward(self, x, e=None):
        q, k, v = self.heads(x, e=e)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))

class ModernMLP(MLP):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.c_fc = linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # ReLU² (arXiv:2109.08668) instead of GELU: cheaper, and as good. What commit 35 gained by
        # it and by beginning at zero is no more than what another seed makes.
        return self.c_proj(F.relu(self.c_fc(x)).square())

class ModernBlock(Block):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.ln_1 = nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
        self.attn = ModernAttention(config)
        self.ln_2 = nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
        self.mlp = ModernMLP(config)

    def forward(self, x, e=None):
        x = x + self.attn(self.ln_1(x), e)
        x = x + self.mlp(self.ln_2(x))
        return x

class SoftcappedHead(nn.Linear):
    """Logits from -15 to 15 (arXiv:2408.00118). 15 tanh(x / 15) is about x where x is small, and
    never beyond 15. A token with 15 is exp(15) = 3 million times as probable as one with 0, so the
    model can be as sure as it needs to be, and no odd text can drive a logit on and on."""
    def forward(self, x):
        return 15 * torch.tanh(super().forward(x).float() / 15)

class ModernGPT(GPT):
    """With an lm_head of its own, not wte: a token to read and a token to foretell are two things.
    Zero are, at first, lm_head and each c_proj, so that each block adds nothing to the stream and
    all tokens are equally probable: what is learnt need not first undo what was random. They do not
    stay zero: in the first step lm_head has a gradient, in the second wte and each c_proj, too, and
    in the third all parameters."""
    def __init__(self, config, value_embeddings=False):
        nn.Module.__init__(self)
        check_shape(config)
        require(config.n_embd // config.n_head % 2 == 0, f"n_embd={config.n_embd} / n_head="
                f"{config.n_head}: rotary positions turn pairs, so a head's size must be even")
        self.config = config
        rows = math.ceil(config.vocab_size / 64) * 64
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(rows, config.n_embd),
            h=nn.ModuleList([ModernBlock(config) for _ in range(config.n_layer)]),
            ln_f=nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False),
        ))
        self.lm_head = SoftcappedHead(config.n_embd, rows, bias=False)
        tables = min(3, config.n_layer // 2) if value_embeddings else 0
        self.value_tables = nn.ModuleList(nn.Embedding(rows, config.n_embd) for _ in range(tables))
        if tables:
            self.value_shares = nn.Parameter(torch.zeros(config.n_layer, 2))
        for name, p in self.named_parameters():
            if name.endswith(("c_proj.weight", "lm_head.weight")):
                nn.init.zeros_(p)
            elif name.startswith(("transformer.wte", "value_tables")):
                nn.init.normal_(p)
            elif name == "value_shares":
                nn.init.constant_(p, 0.5)
            else:
                # Of numbers of about 1, a sum of n_embd products with these is about 1 again.
                nn.init.normal_(p, std=1 / math.sqrt(config.n_embd))

    def trunk(self, idx):
        check_length(idx, self.config)
        # However far wte's rows grow, the stream begins with numbers of about 1.
        x = rms_norm(self.transformer.wte(idx))  # (B, T, C)
        for block, e in zip(self.transformer.h, self.value_embeddings(idx)):
            x = block(x, e)
        return self.transformer.ln_f(x)

    def value_embeddings(self, idx):
        """--value_embeddings (after arXiv:2410.17897 and modded-nanogpt). A value, what attention
        hands over, is computed from the token's vector, which has to serve for all else, too. Here
        a part of it need not be computed: it is remembered, as a table's row for this token. There
        are three tables, or half as many as layers, if these are fewer than six. The first blocks
        have a table each, and the last blocks the same tables in the same order; blocks in between
        have none. Gives for each block None, or the rows (B, T, C) and the shares of the value and
        of the row: each 0.5 at first, and then learnt (they need not come to 1)."""
        rows = [table(idx) for table in self.value_tables]
        if not rows:
            return [None] * self.config.n_layer
        between = [None] * (self.config.n_layer - 2 * len(rows))
        rows = [*rows, *between, *rows]
        return [r if r is None else (r, shares) for r, shares in zip(rows, self.value_shares)]

# --------------------------------------------------------------------------------------------------
# 16. Its optimisers and learning rate

def newton_schulz(g):
    """Matrices g (n, rows, columns), each with its directions made about equally large. A matrix is
    a product U S V^T, its singular value decomposition. The columns of U and of V are directions,
    of length 1 and at right angles: U^T U and V^T V are the identity. S is diagonal; its numbers,
    the singular values, say how large each direction is. g^T is V S U^T, so in g g^T g =
    U S (V^T V) S (U^T U) S V^T the brackets drop out, and U S^3 V^T is left: such products change S
    and keep the directions. So the polynomial below makes 3.4445 s - 4.775 s^3 + 2.0315 s^5 of each
    number s in S, and leaves the directions as they are. After five times, all that were between
    0.002 and 1 are between 0.68 and 1.21, which is near enough to 1; smaller ones have grown, too,
    but not so far."""
    tall = g.size(1) > g.size(2)
    x = (g.mT if tall else g).bfloat16()  # with fewer rows than columns, x x^T is the small product
    # The norm is the root of the sum of the squares of g's numbers, and S's numbers have the same
    # one. None of them is larger than it; so, divided by it, none is over 1.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        # x becomes 3.4445 x - 4.775 x x^T x + 2.0315 x x^T x x^T x. For n matrices at a time,
        # baddbmm(c, a, b, beta=, alpha=) is beta c + alpha a @ b.
        y = x @ x.mT
        y = torch.baddbmm(y, y, y, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, y, x, beta=3.4445)
    return x.mT if tall else x

def newton_schulz_of_pieces(g):
    """newton_schulz() with FSDP, where each process has some rows of each matrix. g is a DTensor.
    It has the shape of the whole, (n, rows, columns), and each process holds a piece of it,
    (n, rows / processes, columns). Products need whole matrices. So the processes exchange pieces
    until each has some of the n matrices whole (or none, where n is small), multiply those, and
    exchange once more, until each has its rows of all of them."""
    from torch.distributed.tensor import DTensor, Shard
    # Shard(d): the processes have shared out dimension d. In g that is 1, the rows.
    mine = g.redistribute(placements=[Shard(0)]).to_local()  # whole matrices
    # What each process has now is a piece again, of one DTensor.
    done = DTensor.from_local(newton_schulz(mine), g.device_mesh, [Shard(0)], shape=g.shape,
                              stride=g.stride())
    return done.redistribute(placements=g.placements)

class SharedMuon(torch.optim.Muon):
    """Muon (https://kellerjordan.github.io/posts/muon). Like AdamW, it keeps a running mean of a
    matrix's gradient, the momentum. AdamW makes the steps of single numbers about equally large;
    Muon does so with directions, by newton_schulz() of the momentum. In the momentum, mostly, a few
    directions are large and many small. A step along it would be nearly the large ones alone,
    though as much may be to learn in the small ones. PyTorch's Muon takes one matrix after another;
    here those of a shape are computed side by side, in 0.4 of the time for matrices as small as the
    laptop's. Of several processes, each steps a share of the matrices and sends them to the others.
    With FSDP, each has a piece of every matrix, and steps that."""
    def owners(self):
        """Each matrix and the process that steps it; an empty list with FSDP, where no process has
        a whole one. There a matrix is a DTensor, which is told by its method full_tensor()."""
        matrices = self.param_groups[0]["params"]
        if hasattr(matrices[0], "full_tensor"):
            return []
        processes = dist.get_world_size() if dist.is_initialized() else 1
        return [(p, i % processes) for i, p in enumerate(matrices)]

    def direction(self, p, momentum):
        """Where to go, before newton_schulz(). The mean of p's gradients becomes momentum * mean +
        (1 - momentum) * gradient, as a.lerp(b, w) is (1 - w) a + w b. What is returned is the same
        mixture once more, of gradient and new mean, so that the last gradient counts more
        (Nesterov)."""
        mean = self.state[p].get("momentum_buffer")
        if mean is None:
            mean = self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        mean.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[0]
        rank = dist.get_rank() if dist.is_initialized() else 0
        owners = self.owners()
        mine = [p for p, owner in owners if owner == rank] if owners else group["params"]
        mine = [p for p in mine if p.grad is not None]
        # Each shape once. A dict has an order, which a set has not: with FSDP, processes exchange
        # pieces in this loop, so they must go through it alike.
        for shape in {p.shape: None for p in mine}:
            alike = [p for p in mine if p.shape == shape]
            # Rounded one by one to what newton_schulz() computes in, which takes less memory.
            directions = [self.direction(p, group["momentum"]).bfloat16() for p in alike]
            g = torch.stack(directions)  # (n, rows, columns)
            updates = newton_schulz(g) if owners else newton_schulz_of_pieces(g)
            # With its directions alike, a matrix has numbers of about 1 / sqrt(longer side): a wide
            # one of 1 / sqrt(columns), and a tall one is brought to the same by a factor. An output
            # is a sum over the columns, so it moves by about lr, whatever the shape. Part I's lr is
            # what one number of a matrix moves by, not such a sum: so it is much smaller.
            lr = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
            for p, update in zip(alike, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-lr)
        if dist.is_initialized():
            for p, owner in owners:
                # Looking up makes an entry for p, if an empty one. When a checkpoint is saved,
                # PyTorch calls step() if an optimiser has no entries, to have some. A process
                # without a matrix of its own would do that alone, and wait in broadcast() for ever.
                self.state[p]
                # The owner sends p, all others receive it.
                dist.broadcast(p, owner)
        # The factor in direction(): 0.85 makes a mean over about 1 / (1 - 0.85) = 7 steps; 0.95,
        # from step 300 on, over 20. At first the model changes fast, and earlier gradients are soon
        # out of date.
        group["momentum"] = min(group["momentum"] + 0.1 / 300, 0.95)

    @torch.no_grad()
    def state_dict(self):
        """For a checkpoint, which has all momenta. Each process has those of its own matrices: it
        sends them to the others, which have no use for them but this."""
        if dist.is_initialized():
            for p, owner in self.owners():
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                dist.broadcast(mean, owner)
        return super().state_dict()

def modern_optimizers(model, max_lr, weight_decay):
    """Muon for the blocks, which are all matrices. AdamW for the tables: a row is one token's own.
    With AdamW it moves in the steps after its token came by; Muon would move a rare token's row as
    far as a frequent one's. The rates were tried out: a large factor for what is looked up, whose
    rows have a gradient only once in a while; a small one for lm_head, whose rows have one from
    every token (a fifth of Muon's rate, but no more than the laptop's). betas and eps are those of
    modded-nanogpt, where Muon comes from."""
    muon = {"params": list(model.transformer.h.parameters()), "max_lr": max_lr}
    looked_up = [model.transformer.wte.weight, *model.value_tables.parameters()]
    tables = [{"params": looked_up, "max_lr": 7.5 * max_lr},
              {"params": [model.lm_head.weight], "max_lr": min(max_lr / 5, 0.004)}]
    if model.value_tables:
        # No table, but two numbers for each block, which is nothing for Muon either.
        tables.append({"params": [model.value_shares], "max_lr": max_lr})
    return [SharedMuon([muon], lr=max_lr, weight_decay=weight_decay, momentum=0.85),
            torch.optim.AdamW(tables, lr=max_lr, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0,
                              fused=True)]

def trapezoid(step, cfg):
    """Warm-up, stable, decay: with --warmup_steps (there are none by default), up in a line; then
    the highest; in the second half down to min_lr in a line. The first half is the same for all
    max_steps, so it can be gone on from: --resume with more of them, from a checkpoint before the
    decay."""
    least = cfg.min_lr / cfg.max_lr if cfg.max_lr else 0.0
    up = (step + 1) / max(cfg.warmup_steps, 1)
    left = 2 * (cfg.max_steps - step) / max(cfg.max_steps, 1)  # 1 in the middle, 0 at the end
    return min(up, 1.0, least + (1 - least) * left)

# ==================================================================================================
# PART V: FASTER
#
# The same in less time: to rounding, and with --fp8 to what 8 bits can tell apart. In section 17
# each class of modules stands in for one of part I or IV, or for nn.Linear: it adds no parameters,
# only computes otherwise. So swap_classes() can assign it to a module that is there already. Some
# do that only where is_compiling(): the compiler makes one operation of their many, which without
# it would be slower than the library's one.
# --------------------------------------------------------------------------------------------------
# 17. Training

def faster_classes(cfg):
    """Which class stands in for which."""
    classes = {GPT: FasterGPT, Block: FasterBlock, MLP: FasterMLP, ModernGPT: FasterModernGPT,
               ModernBlock: FasterModernBlock, ModernAttention: FasterModernAttention}
    if cfg.checkpoint_activations:
        classes.update({Block: RecomputedBlock, ModernBlock: RecomputedModernBlock})
    if cfg.fp8:
        classes[nn.Linear] = FP8Linear
    return classes

def swap_classes(model, classes):
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))

class FasterBlock(Block):
    """Where matmuls are in bfloat16, the residual stream is, too: half the bytes to move. Losses
    change by less than with another seed. Not in float16, which the growing stream could
    overflow. (*e is what a ModernBlock gets besides x, and a Block does not.)"""
    def forward(self, x, *e):
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            x = x.bfloat16()
        return super().forward(x, *e)

class FasterModernBlock(FasterBlock, ModernBlock):
    """Python looks for a method in FasterBlock first, then in ModernBlock. So it is FasterBlock's
    forward() that is called, and the super() in it is ModernBlock."""

class RecomputedBlock(FasterBlock):
    """--checkpoint_activations. The backward pass needs what the forward pass has computed, the
    activations, and keeping them takes most of the memory. Here a block keeps its input alone, and
    computes the rest again when the backward pass comes to it."""
    def forward(self, x, *e):
        return torch.utils.checkpoint.checkpoint(super().forward, x, *e, use_reentrant=False)

class RecomputedModernBlock(RecomputedBlock, ModernBlock):
    """The same for part IV."""

class FasterMLP(MLP):
    """GELU is x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), and (1 + tanh(u)) / 2
    is sigmoid(2 u), which has one exp() and little else. Compiled, a step is 1 % shorter."""
    def forward(self, x):
        if not torch.compiler.is_compiling():
            return super().forward(x)
        x = self.c_fc(x)
        u = math.sqrt(2 / math.pi) * (x + 0.044715 * x.float() ** 3)
        return self.c_proj(x * torch.sigmoid(2 * u))

class FasterGPT(GPT):
    """cross_entropy, but softmax without a search. exp(x) overflows above 88, so the library looks
    for the largest logit and subtracts it from all, which does not change the shares. Any number
    will do that keeps exp() in its range, and one is at hand: m, the target's logit + 40. From
    exp(-87) on, fast arithmetic may take 0 for it: that leaves out tokens whose logit is 47 below
    the target's, which are of no account. exp() overflows only for one 128 = 40 + 88 above it. That
    would be a loss of 128, and a bad one is 15; if it happens all the same, the loss is infinite,
    and the run ends."""
    def forward(self, idx, targets=None):
        if targets is None or not torch.compiler.is_compiling():
            return super().forward(idx, targets)
        # Rows without a token get no probability, by a bias: in a matmul that costs nothing.
        bias = self.lm_head.weight.new_zeros(self.lm_head.out_features)
        bias[self.config.vocab_size:] = -math.inf
        product = FP8Product.apply if isinstance(self.lm_head, FP8Linear) else F.linear
        logits = product(self.trunk(idx).flatten(0, 1), self.lm_head.weight, bias)  # (B * T, rows)
        # For a target of -100, which does not count, any token will do. detach(): m drops out of
        # the loss, so no gradient need go through it.
        m = logits.detach().gather(1, targets.clamp(min=0).view(-1, 1)).float() + 40  # (B * T, 1)
        z = logits.float() - m
        # nll_loss: minus the target's entry, a mean over all.
        return F.nll_loss(z - z.exp().sum(dim=1, keepdim=True).log(), targets.flatten())

class FasterModernAttention(ModernAttention):
    """Queries, keys and values by one product: the three matrices, apart as parameters, stand side
    by side here. A GPU is done with one large product sooner than with three small ones. And
    queries and keys are turned and normed together, before they are parted. Together the two make
    a step 4 to 5 % shorter."""
    def heads(self, x, pos=None, e=None):
        if not torch.compiler.is_compiling():
            return super().heads(x, pos, e)
        B, T, C = x.size()
        matrix = torch.cat((self.c_q.weight, self.c_k.weight, self.c_v.weight))  # (3 C, C)
        qkv = F.linear(x, matrix).view(B, T, 3, self.n_head, -1)  # (B, T, 3, nh, hs)
        if pos is None:
            pos = torch.arange(T, device=x.device)
        # Of pos (T, 1, 1), cos and sin are (T, 1, 1, hs / 2); they meet (B, T, 2, nh, hs / 2), so
        # that all queries and keys of a token are turned alike.
        qk = rms_norm(self.rotary(qkv[:, :, :2], pos[:, None, None]))  # (B, T, 2, nh, hs)
        qk = qk.transpose(1, 3)  # (B, nh, 2, T, hs)
        v = qkv[:, :, 2].transpose(1, 2)  # (B, nh, T, hs)
        return qk[:, :, 0], qk[:, :, 1], self.mix(v, e)

class FasterModernGPT(ModernGPT):
    """As in FasterGPT, no search for the largest logit: here none is over 15. And tanh(u) is
    2 sigmoid(2 u) - 1, which has one exp() and little else: 15 tanh(z / 15) becomes
    30 sigmoid(z / 7.5) - 15."""
    def forward(self, idx, targets=None):
        if targets is None or not torch.compiler.is_compiling():
            return super().forward(idx, targets)
        logits = F.linear(self.trunk(idx).flatten(0, 1), self.lm_head.weight)  # (B * T, rows)
        logits = 30 * torch.sigmoid(logits.float() / 7.5) - 15
        # Rows without a token get no probability. After the cap, which would make -15 of -inf.
        bias = logits.new_zeros(logits.size(1))
        bias[self.config.vocab_size:] = -math.inf
        logits = logits + bias
        return F.nll_loss(logits - logits.exp().sum(dim=1, keepdim=True).log(), targets.flatten())

class FP8Linear(nn.Linear):
    """--fp8: a layer that trains in 8-bit floats. Validation and samples do without."""
    def forward(self, x):
        if not torch.is_grad_enabled():
            return super().forward(x)
        bias = self.weight.new_zeros(self.out_features) if self.bias is None else self.bias
        return FP8Product.apply(x, self.weight, bias)

class FP8Product(torch.autograd.Function):
    """F.linear in 8-bit floats (arXiv:2209.05433): half of bfloat16's bytes, up to twice its speed.
    PyTorch knows no gradients of this, so backward() works them out: from g, that of y = x W^T +
    bias, come g W for x, g^T x for W, and the sum of g for bias. ctx carries over what forward()
    has saved. The gradient of W, of which AdamW keeps a mean over many steps, stays in bfloat16.

    e4m3 has 4 bits for the exponent and 3 for digits, and ends at 448; e5m2 has 5 and 2, and ends
    at 57,344. Fixed factors bring numbers into the range: x may be up to 448 / 4 = 112 (seen with
    GPT-2 124M: 7), w up to 14 (seen: 0.9). The loss is a mean over the tokens, so gradients are the
    smaller, the more there are. Multiplied by 1,024 and by the number of tokens, they may be up to
    57,344, that is, up to 56 / tokens before (seen: 24 / tokens)."""
    @staticmethod
    def forward(ctx, x, w, bias):
        x8 = to_8_bits(x.flatten(0, -2) * 4, torch.float8_e4m3fn)  # (tokens, in)
        w8 = to_8_bits(w * 32, torch.float8_e4m3fn)  # (out, in)
        # These undo the factors.
        x_scale, w_scale = w.new_full((), 1 / 4), w.new_full((), 1 / 32)
        ctx.save_for_backward(x.bfloat16(), w8, w_scale)
        y = torch._scaled_mm(x8, w8.t(), x_scale, w_scale, bias.bfloat16(),
                             out_dtype=torch.bfloat16)
        return y.view(*x.shape[:-1], -1)  # (..., out)

    @staticmethod
    def backward(ctx, g):
        x, w8, w_scale = ctx.saved_tensors
        g = g.flatten(0, -2)  # (tokens, out)
        factor = 1024 * len(g)
        g8 = to_8_bits(g * factor, torch.float8_e5m2)
        g_scale = w_scale.new_full((), 1 / factor)
        # _scaled_mm() wants its second matrix stored column by column.
        w8 = w8.t().contiguous().t()
        gx = torch._scaled_mm(g8, w8, g_scale, w_scale, out_dtype=torch.bfloat16)
        return gx.view_as(x), g.t() @ x.flatten(0, -2), g.sum(0)  # of x, w (out, in), bias (out,)

def to_8_bits(x, dtype):
    """What is too large for dtype becomes its largest number, not infinity."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)

# --------------------------------------------------------------------------------------------------
# 18. Generation

class CachedModel:
    """Is called like a model by one generate(), each time with one token more. Keys and values of
    earlier tokens stay what they are, as these do not see later ones. So they are kept, the KV
    cache, and only the new token has to be computed."""
    def __init__(self, model):
        self.model = model
        self.config = model.config
        self.seen = 0
        self.kv = []

    def __call__(self, idx):
        end = idx.size(1)
        if end != self.seen + 1:
            # The prompt. Or a text over block_size: its window has moved by one, so all tokens have
            # other positions than before, and all is to be computed again.
            self.seen = 0
        pos = torch.arange(self.seen, end, device=idx.device)
        logits = self.step(idx[:, self.seen:], pos, room=end)
        self.seen = end
        return logits

    def step(self, idx, pos, room):
        """idx (B, T), the new tokens, at pos (T,) -> logits (B, T, vocab_size). They look at the
        cache's first `room` positions: here at all that are filled, in RecordedModel at more, of
        which the mask hides those later than a token's own."""
        parts = self.model.transformer
        modern = isinstance(self.model, ModernGPT)
        x = rms_norm(parts.wte(idx)) if modern else parts.wte(idx) + parts.wpe(pos)
        # True where a token may look: up to its own position.
        mask = torch.arange(room, device=idx.device) <= pos[:, None]  # (T, room)
        values = self.model.value_embeddings(idx) if modern else []
        for i, block in enumerate(parts.h):
            y = block.ln_1(x)
            q, k, v = block.attn.heads(y, pos, values[i]) if modern else block.attn.heads(y)
            if len(self.kv) == i:
                B, nh, _, hs = k.shape
                # Keys and values of this block, with room for all positions.
                self.kv.append(k.new_zeros(2, B, nh, self.config.block_size, hs))
            self.kv[i][:, :, :, pos] = torch.stack((k, v))
            y = F.scaled_dot_product_attention(q, *self.kv[i][..., :room, :], attn_mask=mask)
            x = x + block.attn.merge(y)
            x = x + block.mlp(block.ln_2(x))
        return self.model.lm_head(parts.ln_f(x))[..., :self.config.vocab_size]

class RecordedModel(CachedModel):
    """A GPU computes by kernels, small programs that Python starts one by one; for a single token
    it is done with one before Python has started the next. So the kernels of a step are recorded
    once, as a CUDA graph, and replayed as a whole, always with the same tensors. As their shapes
    cannot change then, attention looks at 256 positions, or 512, ...: each time there is a new
    recording."""
    recorded = 0

    def step(self, idx, pos, room):
        if self.seen == 0:
            return super().step(idx, pos, room)
        room = min(math.ceil(room / 256) * 256, self.config.block_size)
        if room != self.recorded:
            self.recorded = room
            self.inputs = idx.clone(), pos.clone()
            # Once without recording: the first time, libraries make themselves ready.
            super().step(*self.inputs, room)
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do meanwhile shall not end it.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = super().step(*self.inputs, room)
        self.inputs[0].copy_(idx)
        self.inputs[1].copy_(pos)
        self.graph.replay()
        return self.logits

def cached(model):
    """model, as generate() is done with it soonest. FSDP gathers parameters where a module is
    called as a whole, which the steps here are not."""
    if hasattr(model, "unshard"):
        return model
    cuda = model.lm_head.weight.device.type == "cuda"
    return RecordedModel(model) if cuda else CachedModel(model)

if __name__ == "__main__":
    main()
