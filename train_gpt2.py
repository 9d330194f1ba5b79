"""
GPT-2 in one file, built step by step: each commit of the git history (`git log --reverse`) adds one idea and says what
it changed.

    python train_gpt2.py                            a whole untrained GPT-2, and what it predicts: nothing

Papers: Vaswani et al. 2017 (arXiv:1706.03762), attention; Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners", GPT-2.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


class UserError(ValueError):
    """What the user asked for cannot be; the message says why and what to do."""


# The model ------------------------------------------------------------------------------------------------------------
@dataclass
class GPTConfig:
    """The shape of a GPT; GPT-2 124M by default. In shapes, B are sequences, T tokens, C = nh * hs heads of size hs."""
    block_size: int = 1024      # the longest T; each position has a learned vector
    vocab_size: int = 50257     # ids the tokenizer has: 256 bytes + 50,000 merges + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768           # C, the width of the residual stream

    def __post_init__(self):
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}: heads share it equally")


SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),          # 124 M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024),  # 355 M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, block_size=1024),   # 774 M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, block_size=1024),      # 1,558 M
}


class CausalSelfAttention(nn.Module):
    """Every token looks back: it compares its query with the keys of the tokens before it and its own, and takes in the
    mean of their values, weighted by softmax(q k^T / sqrt(hs)). Each head has a query, key and value of its own."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads in one matrix
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head) for t in (q, k, v))            # (B, T, nh, hs)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                     # (B, nh, T, hs)
        att = q @ k.transpose(2, 3) / math.sqrt(q.size(3))                                    # (B, nh, T, T)
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)                   # True above the diagonal
        att = att.masked_fill(later, -math.inf).softmax(dim=3)                                # each row sums to 1
        y = att @ v                                                                           # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)                                                # heads side by side
        return self.c_proj(y)


class MLP(nn.Module):
    """Every token thinks by itself: C -> 4 C -> C."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # tanh: what GPT-2 was trained with


class Block(nn.Module):
    """Talk, then think. LayerNorm stands before each part, so x itself is only ever added to: the residual stream."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: token and position embeddings, n_layer blocks, a last LayerNorm, a head over the vocabulary."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx):
        """Logits for the token after each token: idx (B, T) int64 -> (B, T, vocab_size).

        Raises UserError if T is more than block_size."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise UserError(f"T={T} is longer than block_size={self.config.block_size}: pass a shorter sequence")
        pos = torch.arange(T, device=idx.device)                                         # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)                        # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))                                    # (B, T, vocab_size)


def main():
    """What does an untrained GPT-2 124M expect after 32 tokens?"""
    torch.manual_seed(1337)
    model = GPT(GPTConfig())
    with torch.no_grad():
        probs = model(torch.randint(50257, (4, 32))).softmax(dim=-1)  # (4, 32, 50257)
    best = probs[0, -1].topk(3)
    print(f"probabilities {tuple(probs.shape)}; the likeliest next tokens: {best.indices.tolist()} with "
          f"{[round(p, 6) for p in best.values.tolist()]}; no idea at all would be 1/50257 = {1 / 50257:.6f}")


if __name__ == "__main__":
    main()
