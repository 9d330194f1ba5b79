"""GPT-2 in one file: the model, its data, its training, its sampling. Read it top to bottom, or step by step in the git
history (`git log --reverse`): each commit there adds one idea and says what it changed.

    python train_gpt2.py                            laptop: a small GPT learns to write plays, in two minutes
    python train_gpt2.py --prompt "MIRA:"           let that run's newest checkpoint speak
    python train_gpt2.py --resume                   go on where it stopped: Ctrl-C, kill, or a larger --max_steps
    python fineweb.py && python train_gpt2.py       one GPU: GPT-2 124M on the 10 B tokens of FineWeb-Edu, 19,073 steps
    torchrun --standalone --nproc_per_node=8 train_gpt2.py     the same on 8 GPUs; with 2, a laptop shows how it goes
    python train_gpt2.py --init_from gpt2 --prompt "Hello"     OpenAI's weights, through Hugging Face
    python train_gpt2.py --init_from gpt2 --data my.txt        your own text: fine-tune them; from scratch, without them
    python train_gpt2.py --eval_only                val loss, perplexity, bits per byte; --export DIR: for Hugging Face

An untrained model's loss is about ln(vocab_size): 5.55 for bytes, 10.82 for GPT-2's vocabulary. The laptop run ends at
a val loss of 1.32 to 1.33. Papers: attention, Vaswani et al. 2017 (arXiv:1706.03762); GPT-2, Radford et al. 2019;
GPT-3, whose training recipe this is, Brown et al. 2020 (arXiv:2005.14165)."""
import argparse, codecs, contextlib, dataclasses, importlib.util, json, math, os, re, shutil, signal, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist, torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

class UserError(ValueError):
    """What the user asked for cannot be. main() prints it as one line, with the remedy, and exits with 2."""

def require(condition, message):
    """An assert about what the user asked for: raises UserError, also under `python -O`."""
    if not condition:
        raise UserError(message)

# The model ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class GPTConfig:
    """The shape of a GPT; GPT-2 124M by default. Shapes: B sequences, T tokens each; C = nh * hs, nh heads of hs."""
    block_size: int = 1024      # the longest T; each position has a learned vector
    vocab_size: int = 50257     # ids the tokenizer has: 256 bytes + 50,000 merges + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768           # C, the width of the residual stream
    padded_vocab_size: int = 0  # rows of wte, if more than vocab_size: 50304 = 786 * 64 suits a GPU, 50257 is odd

    def __post_init__(self):
        require(self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}")

SIZES = {
    "demo": dict(n_layer=2, n_head=4, n_embd=128, block_size=128),             # 0.4 M parameters
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),          # 124 M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024),  # 355 M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, block_size=1024),   # 774 M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, block_size=1024)}      # 1,558 M

class Linear(nn.Linear):
    """x W^T + bias; a bias given replaces its own. A model that trains with fp8 computes this in FP8Linear, below."""
    fp8 = False                 # train() sets it from its flag of this name

    def forward(self, x, bias=None):
        linear = FP8Linear.apply if self.fp8 and torch.is_grad_enabled() else F.linear  # eval, samples: not fp8
        return linear(x, self.weight, self.bias if bias is None else bias)  # (..., out)

class CausalSelfAttention(nn.Module):
    """Every token looks back: it compares its query with the keys of the tokens before it and its own, and takes in the
    mean of their values, weighted by softmax(q k^T / sqrt(hs)). Each head has a query, key and value of its own."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads in one matrix
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, pos=None, mask=None, cache=None):
        """x (B, T, C) -> (B, T, C). With cache (2, B, keys, nh, hs), keys and values of earlier tokens, x are new
        tokens at the positions pos (B, T), which may look where mask (B, 1, T, keys) is True."""
        B, T, C = x.size()
        q, k, v = (t.view(B, T, self.n_head, -1) for t in self.c_attn(x).split(C, dim=2))     # (B, T, nh, hs)
        if cache is not None:
            cache[:, torch.arange(B, device=x.device)[:, None], pos] = torch.stack((k, v)).to(cache.dtype)
            k, v = cache                                                                      # (B, keys, nh, hs)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                     # (B, nh, T or keys, hs)
        # Flash attention (Dao et al. 2022): softmax(q k^T / sqrt(hs)) v tile by tile, never holding the (T, T) matrix.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))                                # (B, T, C), side by side

class MLP(nn.Module):
    """Every token thinks by itself: C -> 4 C -> C."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        h = self.c_fc(x)
        if not torch.compiler.is_compiling():  # compiled, the last line is faster: (1 + tanh(u)) / 2 = sigmoid(2 u)
            return self.c_proj(F.gelu(h, approximate="tanh"))  # GELU: h (1 + tanh(u)) / 2, as GPT-2 was trained
        return self.c_proj(h * torch.sigmoid(math.sqrt(8 / math.pi) * (h + 0.044715 * h.float() ** 3)))

class Block(nn.Module):
    """Talk, then think. LayerNorm stands before each part, so x itself is only ever added to: the residual stream."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, pos=None, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), pos, mask, cache)
        return x + self.mlp(self.ln_2(x))

class FP8Linear(torch.autograd.Function):
    """F.linear in 8-bit floats (arXiv:2209.05433): half bfloat16's bytes, up to twice its speed; not w's gradient. With
    these factors x fits to 448 / 4 = 112 (seen: 7), w to 14 (seen: 0.9), gradients of a mean to 56 / tokens (24)."""
    @staticmethod
    def forward(ctx, x, w, bias):
        x8 = (x.flatten(0, -2) * 4).clamp(-448, 448).to(torch.float8_e4m3fn)  # (tokens, in); over 448 e4m3 has NaN
        w8 = (w * 32).clamp(-448, 448).to(torch.float8_e4m3fn)                # (out, in); 3 bits of mantissa
        sx, sw = w.new_full((), 1 / 4), w.new_full((), 1 / 32)                # these undo the factors
        ctx.save_for_backward(x.bfloat16(), w8, sw)
        return torch._scaled_mm(x8, w8.t(), sx, sw, bias.bfloat16(), out_dtype=torch.bfloat16).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, g):
        (x, w8, sw), g = ctx.saved_tensors, g.flatten(0, -2)                  # g: (tokens, out)
        g8 = (g * 1024 * len(g)).clamp(-57344, 57344).to(torch.float8_e5m2)   # 57344: e5m2's largest; 2 bits
        sg = sw.new_full((), 1 / 1024 / len(g))
        gx = torch._scaled_mm(g8, w8.t().contiguous().t(), sg, sw, out_dtype=torch.bfloat16)  # takes w8 by columns
        return gx.view_as(x), g.t() @ x.flatten(0, -2), g.sum(0)              # x's, w's (out, in), bias's (out,)

# Hugging Face keeps these as Conv1D, (in, out); nn.Linear keeps (out, in).
TRANSPOSED, TIED = ("c_attn.weight", "c_proj.weight", "c_fc.weight"), ("wte.weight", "lm_head.weight")

class GPT(nn.Module):
    """GPT-2: token and position embeddings, n_layer blocks, a last LayerNorm, a head that shares wte's weights."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        rows = max(config.padded_vocab_size, config.vocab_size)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(rows, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd)))
        self.checkpoint_activations = False                # train() sets it from its flag of this name
        self.lm_head = Linear(config.n_embd, rows, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # one matrix reads tokens and writes them
        # A block adds two terms to the residual stream; variances add up: / sqrt(2 n_layer) undoes that at any depth.
        for name, p in self.named_parameters():            # the tied matrix comes once
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:                             # LayerNorm weights stay 1
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)

    def num_params(self):
        """Number of parameters, the tied matrix once, its padding not at all."""
        padding = (self.lm_head.out_features - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def trunk(self, idx, pos=None, caches=None, mask=None):
        """All but the head: idx (B, T) int64 -> (B, T, C). With caches (n_layer, 2, B, keys, nh, hs), idx are new
        tokens at pos (B, T). With pos and mask (B, 1, T, T), T may be above block_size; else that raises UserError."""
        T, S = idx.size(1), self.config.block_size
        require(T <= S or mask is not None, f"T={T} is longer than block_size={S}: pass less")
        pos = torch.arange(T, device=idx.device) if pos is None else pos                 # (T,) or (B, T)
        mask = mask if caches is None else torch.arange(caches.size(3), device=idx.device) <= pos[:, None, :, None]
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)                        # (B, T, C)
        if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16:
            x = x.bfloat16()                             # half the bytes to move; losses differ less than seeds do
        recompute = self.checkpoint_activations and torch.is_grad_enabled()  # each block again in backward, for memory
        for i, block in enumerate(self.transformer.h):
            args = (x, pos, mask, None if caches is None else caches[i])
            x = torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        return self.transformer.ln_f(x.to(self.lm_head.weight.dtype))

    def forward(self, idx, targets=None):
        """(logits, None): logits (B, T, vocab_size) for the token after each of idx (B, T) int64. With targets (B, T):
        (None, loss), their mean cross-entropy in nats; -100 is not counted. UserError if T is more than block_size."""
        bias = self.lm_head.weight.new_zeros(self.lm_head.out_features)
        bias[self.config.vocab_size:] = -math.inf  # padding has no probability: free, as the matmul's bias
        logits = self.lm_head(self.trunk(idx).flatten(0, 1), bias)                       # (B * T, rows of wte)
        if targets is None:
            return logits.unflatten(0, idx.size())[..., :self.config.vocab_size], None
        if not torch.compiler.is_compiling():
            return None, F.cross_entropy(logits, targets.flatten())  # None: unused logits would get a gradient of 0s
        # Compiled, faster by hand: softmax(logits) = softmax(logits - m) for any m. float32 holds exp(-87) to exp(88):
        # m = the target's logit + 80, at hand without a search, lets the other logits be up to 168 above the target's.
        z = logits.float() - (logits.detach().gather(1, targets.clamp(min=0).view(-1, 1)).float() + 80)
        return None, F.nll_loss(z - z.exp().sum(dim=1, keepdim=True).log(), targets.flatten())

    @classmethod
    def from_pretrained(cls, name, padded_vocab_size=0):
        """A GPT with the weights of a Hugging Face GPT-2, by name or folder. Raises UserError if there is none."""
        os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
        from transformers import GPT2Config, GPT2LMHeadModel     # our own line says what is wrong
        known = list(SIZES)[1:]
        require(name in known or Path(name).is_dir(), f"'{name}' is neither a folder nor a GPT-2: {', '.join(known)}")
        try:
            theirs, info = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
        except Exception as e:               # whatever the Hub, the disk or a broken file may raise
            raise UserError(f"cannot load {name} (no network? files missing?): {f'{e!s} '.splitlines()[0]}") from None
        c, theirs, fixed = theirs.config, theirs.state_dict(), GPT2Config().to_dict()
        odd = [*info["missing_keys"]] + [k for k in ("activation_function", "layer_norm_epsilon", "tie_word_embeddings",
            "n_inner", "scale_attn_weights", "scale_attn_by_inverse_layer_idx") if getattr(c, k) != fixed[k]]
        require(not odd, f"{name} is not a complete GPT-2, see its {', '.join(odd[:3])}")
        model = cls(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded_vocab_size))
        with torch.no_grad():
            for key, p in model.named_parameters():  # by our names: whatever buffers theirs has besides do not matter
                w = theirs[key].t() if key.endswith(TRANSPOSED) else theirs[key]
                p.zero_()[:len(w)].copy_(w)          # wte's padding rows stay 0
        return model

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, eot_token=-1,
                 use_cache=True):
        """Continue prompts, lists of ids of any lengths but 0: an iterator over new tokens, a (B,) tensor each.
        temperature 0 takes the likeliest token; top_k keeps the k likeliest (0: all); top_p the fewest that hold p of
        the probability (Holtzman et al. 2020, arXiv:1904.09751). After eot_token (-1: none) a row repeats it; when all
        have, the iterator ends. generator is on the model's device. Without use_cache each token begins anew."""
        device, S, caches, c = self.lm_head.weight.device, self.config.block_size, None, self.config
        rows, done = [list(prompt) for prompt in prompts], torch.zeros(len(prompts), dtype=torch.bool, device=device)
        require(all(rows), "a prompt is empty: begin it with eot_token")
        for _ in range(max_new_tokens):
            longest = max(map(len, rows))
            if caches is None or not use_cache or longest > S:  # past S, as positions cannot slide, all begins anew
                caches = torch.zeros(c.n_layer, 2, len(rows), S, c.n_head, c.n_embd // c.n_head, device=device)
                graph, new, start = None, [row[-S:] for row in rows], [0] * len(rows)
            else:
                new, start = [row[-1:] for row in rows], [len(row) - 1 for row in rows]
            T = max(map(len, new))  # short rows are filled up at the right, where no token sees the filling
            idx = torch.tensor([row + [0] * (T - len(row)) for row in new], device=device)  # (B, T)
            pos = torch.tensor(start, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
            if device.type != "cuda" or not any(start):
                x = self.trunk(idx, pos, caches[:, :, :, :longest])  # (B, T, C)
            else:  # A GPU is done before Python has started its next kernel. So all are recorded once, then replayed.
                if graph is None or longest > kv.size(3):          # attention over fixed shapes, 256 keys a stage
                    graph, inputs, kv = torch.cuda.CUDAGraph(), (idx, pos), caches[:, :, :, :longest // 256 * 256 + 256]
                    self.trunk(*inputs, kv)                        # what happens but once must not be recorded
                    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                        x = self.trunk(*inputs, kv)            # (B, 1, C): each replay() writes into this same x
                inputs[0].copy_(idx), inputs[1].copy_(pos)
                graph.replay()
            logits = self.lm_head(x[range(len(rows)), [len(row) - 1 for row in new]])[:, :c.vocab_size].float()
            if temperature == 0:
                token = logits.argmax(dim=-1)
            else:
                logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
                if top_k:
                    logits = logits.masked_fill(logits < logits.topk(min(top_k, c.vocab_size))[0][:, -1:], -math.inf)
                if top_p < 1:
                    probs, order = F.softmax(logits, dim=-1).sort(descending=True, stable=True)
                    drop = probs.cumsum(dim=-1) - probs >= max(top_p, 1e-30)             # p was reached before this one
                    logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
                token = torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator).squeeze(1)
            token = token.masked_fill(done, eot_token)
            done = done | (token == eot_token)
            yield token
            if done.all():
                return
            rows = [row + [t] for row, t in zip(rows, token.tolist())]

# Tokens ---------------------------------------------------------------------------------------------------------------
def get_tokenizer(name):
    """A tiktoken Encoding: `gpt2`, or `byte`, which is byte-pair encoding with zero merges. Raises UserError."""
    import tiktoken
    if name == "byte":
        return tiktoken.Encoding("byte", pat_str=r"[\s\S]+", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    try:
        return tiktoken.get_encoding("gpt2")  # downloads 1.5 MB once, then finds them in its cache
    except (OSError, ValueError) as e:
        raise UserError(f"no GPT-2 vocabulary to be had ({type(e).__name__}): connect to the network once, point "
                        f"TIKTOKEN_CACHE_DIR to a folder that has it, or pass --tokenizer byte") from None

def stream_text(model, enc, prompt, cfg, seed):
    """Continue prompt: an iterator over pieces of text. A character split over tokens waits until it is whole."""
    rng = torch.Generator(model.lm_head.weight.device).manual_seed(seed)  # not the global one: training uses that
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ids = enc.encode_ordinary(prompt) or [enc.eot_token]   # <|endoftext|> stands before every document
    for token in model.generate([ids], cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, rng, enc.eot_token):
        if token.item() != enc.eot_token:
            yield utf8.decode(enc.decode_single_token_bytes(token.item()))
    yield utf8.decode(b"", final=True)

# Data -----------------------------------------------------------------------------------------------------------------
def open_shard(path):
    """Token ids of one shard, (n,) uint16, mapped from disk: only what is indexed is read. Raises UserError.
    .npy as numpy writes it, or .bin as llm.c writes it: 256 int32 (20240520, 1, n, ...), then n uint16."""
    if isinstance(path, np.ndarray):
        return path  # a text's ids are in memory already
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
        else:
            header = np.fromfile(path, dtype="<i4", count=256)
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
            if header[:3].tolist() != [20240520, 1, len(tokens)]:
                raise ValueError(f"{len(tokens):,} tokens, but not llm.c's header for them, (20240520, 1, count)")
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path} is cut short or not a token shard: {e}. Make or copy it again") from None
    require(tokens.dtype == np.uint16 and tokens.ndim == 1, f"{path}: {tokens.dtype} {tokens.shape}, no row of uint16")
    return tokens

def open_data(path, enc):
    """Training and validation split, lists of shards: paths in a folder, or one array of a text. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        shards = sorted(p for p in path.iterdir() if p.suffix in (".npy", ".bin"))
        return ([p for p in shards if p.name.rfind("train") > p.name.rfind("val")],
                [p for p in shards if p.name.rfind("val") > p.name.rfind("train")])
    try:
        tokens = enc.encode_to_numpy(path.read_text(encoding="utf-8"), disallowed_special=())
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path} as UTF-8 text: {e}") from None
    n = len(tokens) * 9 // 10
    return [tokens[:n]], [tokens[n:]]

class DataLoaderLite:
    """Batches of windows of T+1 tokens, of which x are the first T and y the last T: one apart. Windows begin at 0, T,
    2T, ... of a shard; in an epoch each comes once. With a seed, shards are shuffled, then the windows of each. The
    order follows from seed and position, which all processes share: rank r takes the r-th B windows of a global batch.
    So no number of processes changes the batches. Raises UserError for too few data, or an id that is too large."""
    def __init__(self, shards, B, T, vocab_size, name="the data", rank=0, world_size=1, seed=None):
        self.shards, self.B, self.T, self.vocab_size = shards, B, T, vocab_size
        self.name, self.rank, self.world_size, self.seed = name, rank, world_size, seed
        lengths = [len(open_shard(shard)) for shard in shards]
        self.windows = np.array([max(n - 1, 0) // T for n in lengths])
        self.total = int(self.windows.sum())
        require(self.total >= B * world_size,
                f"{name}: {sum(lengths):,} tokens, too few for {B * world_size} windows of T={T}: lower --batch_size")
        self.position, self._order, self._open = 0, (None,), (None,)  # position: windows that all processes have taken

    def _perm(self, n, *key):
        return np.arange(n) if self.seed is None else np.random.default_rng([self.seed, *key]).permutation(n)

    def window(self, epoch, position):
        """The T+1 tokens at a position of an epoch."""
        if self._order[0] != epoch:
            shards = self._perm(len(self.shards), epoch)
            self._order = epoch, shards, np.cumsum(self.windows[shards])
        _, shards, ends = self._order
        nth = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[nth])
        if self._open[0] != (epoch, shard):    # one shard at a time stays open
            self._open = (epoch, shard), open_shard(self.shards[shard]), self._perm(self.windows[shard], epoch, shard)
        _, tokens, windows = self._open
        start = int(windows[position - ends[nth] + self.windows[shard]]) * self.T
        window = tokens[start:start + self.T + 1]
        require(window.max() < self.vocab_size, f"{getattr(tokens, 'filename', self.name)}: id {window.max()} is "
                f"outside the vocabulary of {self.vocab_size}: wrong --tokenizer?")
        return window

    def batch(self, position, n):
        """n windows from a position on: x, y, each (n, T) int64."""
        windows = [self.window(*divmod(p, self.total)) for p in range(position, position + n)]
        buf = torch.from_numpy(np.stack(windows).astype(np.int64))
        return buf[:, :-1].clone(), buf[:, 1:].clone()  # of one row, views would be contiguous, and one memory

    def next_batch(self):
        """This rank's part of the next global batch: x, y, each (B, T) int64."""
        position, self.position = self.position, self.position + self.B * self.world_size
        return self.batch(position + self.rank * self.B, self.B)

def send(batch, device):
    """x, y on the device. From pinned memory the copy to a GPU can run while the GPU computes."""
    return [t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device) for t in batch]

# Optimiser and learning rate ------------------------------------------------------------------------------------------
def configure_optimizer(model, lr, weight_decay):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with GPT-3's betas. Only matrices decay: a bias or a
    LayerNorm weight pulled towards 0 gains nothing."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)  # fused: one kernel for all

def get_lr(step, cfg):
    """The learning rate of a step: 1) up in a line, 2) down along a cosine, 3) from max_steps on, min_lr."""
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    progress = 1 if step >= cfg.max_steps else (step - cfg.warmup_steps) / (cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.max_lr - cfg.min_lr)

# The machine ----------------------------------------------------------------------------------------------------------
PEAK_TFLOPS = {"V100": 125, "V100-PCIE": 112, "T4": 65, "A10": 125, "A10G": 70, "A100": 312, "L4": 121, "L40S": 362,
    "H100": 989.5, "H100 PCIe": 756, "H100 NVL": 835.5, "H200": 989.5, "H200 NVL": 835.5, "B200": 2250,
    "RTX 3060": 25.5, "RTX 3090": 71, "RTX 4070": 58.3, "RTX 4080": 97.5, "RTX 4090": 165.2, "RTX 5090": 209.5}

def peak_flops(device):
    """FLOP/s at best, from NVIDIA's data sheets: dense bf16 (or else fp16), float32 sums. None if not known here."""
    name = re.sub("NVIDIA |GeForce |Tesla |-..GB", "", torch.cuda.get_device_name() if device.type == "cuda" else "")
    tflops = PEAK_TFLOPS.get(name) or PEAK_TFLOPS.get(re.split("[- ]", name)[0])  # "H100 80GB HBM3" is an H100
    return tflops * 1e12 if tflops and "MIG" not in name else None                # MIG: a slice of a GPU

def flops_per_token(model, T):
    """FLOPs of forward and backward: 6 for each parameter, 12 L C T for attention (arXiv:2204.02311, appendix B)."""
    return 6 * model.num_params() + 12 * model.config.n_layer * model.config.n_embd * T

def process():
    """(rank, local_rank, world_size): which process this is, of all and of its node, and of how many. From torchrun."""
    return tuple(int(os.environ.get(*key)) for key in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))

def summed(*values, device):
    """The sums of some numbers over all processes."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)                  # sum: an average is not to be had on every backend
    return total.tolist()

def autocast(device, dtype):
    """Matmuls in dtype, and the residual stream if that is bfloat16; the loss and the weights stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def parallelize(model, cfg, device):
    """The model spread over the processes. ddp: each has all of it; gradients are averaged during the backward pass.
    fsdp: each has a share of all parameters, gradients, moments; a block is gathered for its turn, then dropped."""
    if cfg.parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model.to(device)) if dist.is_initialized() else model.to(device)
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh(device.type, (process()[2],))
    for module in [*model.transformer.h, model]:
        fully_shard(module, mesh=mesh)
    return model

# Checkpoints ----------------------------------------------------------------------------------------------------------
def save_checkpoint(path, state):
    """Write state to path. It is complete on disk beside path before it takes path's name."""
    beside = path.with_name("model.tmp")  # the same for all: what a kill left of one, the next overwrites
    try:
        with open(beside, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:  # torch.save() makes a RuntimeError out of a full disk
        beside.unlink(missing_ok=True)
        e = e if isinstance(e, OSError) else e.__context__ or e
        sys.exit(f"cannot write {path}: {e}. Earlier checkpoints are whole: make room, then --resume")

def load_checkpoint(path):
    """The state in a checkpoint, on the CPU. Raises UserError if it is cut short or not ours."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        require(state["format"] == FORMAT, "written by another version")
        return state
    except Exception as e:  # whatever torch.load meets in a broken file
        raise UserError(f"cannot use the checkpoint {path}, is it cut short, or old? ({type(e).__name__})") from None

def checkpoints(log_dir):
    """Paths of the checkpoints in log_dir by step, oldest first."""
    return dict(sorted((int(p.stem[6:]), p) for p in Path(log_dir).glob("model_*.pt") if p.stem[6:].isdigit()))

def newest_checkpoint(log_dir):
    """The newest checkpoint that can be read, or None if there is none yet. Raises UserError if all are broken."""
    found = checkpoints(log_dir)
    for path in reversed(found.values()):
        try:
            return load_checkpoint(path)
        except UserError as e:
            print(f"warning: {e}; trying the one before", file=sys.stderr)
    require(not found, f"no checkpoint in {log_dir} can be read: start again without --resume")

# Configuration --------------------------------------------------------------------------------------------------------
def flag(default, help, least=None, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "choices": choices})

@dataclasses.dataclass
class TrainConfig:
    """All that can be set, one command-line flag each. None: chosen for the model, the data or the machine."""
    data: str = flag(None, "folder of *train* and *val* shards (.npy, .bin), or a text file")
    tokenizer: str = flag(None, "gpt2 for shards and for GPT-2's weights, byte for text", choices=["gpt2", "byte"])
    model: str = flag(None, "size: gpt2 for shards, demo for text", choices=list(SIZES))
    n_layer: int = flag(None, "override the model's depth", 1)
    n_head: int = flag(None, "override the model's heads", 1)
    n_embd: int = flag(None, "override the model's width", 1)
    block_size: int = flag(None, "override the model's longest context", 1)
    init_from: str = flag(None, "scratch, a Hugging Face GPT-2 (name or folder), or a checkpoint (.pt)")
    batch_size: int = flag(None, "B, sequences a forward pass; if left out it is halved until it fits the memory", 1)
    seq_len: int = flag(None, "T, tokens a sequence (block_size)", 1)
    total_batch_size: int = flag(None, "tokens a step, in as many passes of B * T as it takes", 1)
    max_steps: int = flag(None, "steps to train", 0)
    warmup_steps: int = flag(None, "steps until the learning rate is at its highest", 0)
    max_lr: float = flag(None, "highest learning rate", 0)
    min_lr: float = flag(None, "last learning rate (a tenth of the highest; demo: 3e-5)", 0)
    weight_decay: float = flag(0.1, "pull of the matrices towards 0", 0)
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping", 0)
    parallel: str = flag("ddp", "each process has the whole model, or a share of it", choices=["ddp", "fsdp"])
    checkpoint_activations: bool = flag(False, "less memory: the backward pass computes each block once more")
    seed: int = flag(1337, "seed of the initial weights, the order of the data and the samples", 0)
    device: str = flag(None, "where to run", choices=["cpu", "cuda", "mps"])
    dtype: str = flag(None, "number format of the matmuls", choices=["bfloat16", "float16", "float32"])
    compile: bool = flag(None, "torch.compile the model for training")
    fp8: bool = flag(False, "train in 8-bit floats: faster, on an H100 or newer")
    eval_every: int = flag(None, "steps between validation losses (250; with --init_from 25); 0: never", 0)
    val_tokens: int = flag(10_485_760, "tokens of the validation split to use, if it has as many", 1)
    hellaswag_every: int = flag(None, "steps between HellaSwag scores (shards: 250, else never)", 0)
    sample_every: int = flag(500, "steps between samples; 0: never", 0)
    save_every: int = flag(None, "steps between checkpoints; 0: never", 0)
    keep: int = flag(2, "checkpoints to keep: the newest so many, and the best", 1)
    log_dir: str = flag("log", "where the run lives: log.txt and the checkpoints")
    resume: bool = flag(False, "go on from the newest good checkpoint in log_dir, if there is one")
    prompt: str = flag(None, "continue this text (- reads stdin) and exit")
    temperature: float = flag(0.8, "0: always the likeliest token; 1: as the model believes; higher: wilder", 0)
    top_k: int = flag(50, "sample among the k likeliest; 0: all", 0)
    top_p: float = flag(1.0, "sample among the fewest that hold this much of the probability")
    max_new_tokens: int = flag(300, "tokens to generate", 0)
    num_samples: int = flag(1, "texts to generate", 1)
    eval_only: bool = flag(False, "print the validation loss and exit")
    export: str = flag(None, "write a folder for Hugging Face transformers and exit")
    wandb: bool = flag(False, "send what log.txt gets to Weights & Biases as well")
    profile: bool = flag(False, "say where the time of forward and backward goes; the trace: log_dir/trace.json")

# What the command line leaves open. Rates: GPT-3, table 2.1. 19,073 steps = 10e9 tokens / 2**19; 715 = 375e6 / 2**19.
GPT3 = dict(total_batch_size=2**19, max_steps=19_073, warmup_steps=715, save_every=1000)
RECIPES = {"demo": dict(batch_size=8, max_steps=3600, warmup_steps=200, max_lr=3e-3, min_lr=3e-5, save_every=250),
           "gpt2": dict(batch_size=64, max_lr=6e-4, **GPT3), "gpt2-medium": dict(batch_size=32, max_lr=3e-4, **GPT3),
           "gpt2-large": dict(batch_size=16, max_lr=2.5e-4, **GPT3), "gpt2-xl": dict(batch_size=8, max_lr=2e-4, **GPT3)}
FINE_TUNE = dict(batch_size=8, total_batch_size=None, max_steps=200, warmup_steps=20, save_every=25, eval_every=25)
SHAPE = ["tokenizer", "model", "n_layer", "n_head", "n_embd", "block_size"]
MAY_CHANGE = ("max_steps batch_size dtype eval_every val_tokens hellaswag_every sample_every save_every keep data "
              "temperature top_k top_p max_new_tokens num_samples wandb").split()
UNSAVED = "device compile fp8 parallel checkpoint_activations log_dir resume init_from prompt eval_only export profile"
OUT_OF_MEMORY = "out of memory|can't allocate memory"
FORMAT = 3  # of the checkpoints: a plain dict of plain values and tensors

def configure(flags):
    """(cfg, checkpoint): all that the flags leave open, and the state to begin from, or None. Raises UserError."""
    cfg, (_, local_rank, world_size) = TrainConfig(**flags), process()
    look_only = cfg.prompt is not None or cfg.eval_only or cfg.export is not None
    restarted = not look_only and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # one of us had died
    def default(**values):
        vars(cfg).update({key: value for key, value in values.items() if getattr(cfg, key) is None})
    newest = cfg.resume or restarted or look_only and not cfg.init_from
    checkpoint, keys = newest_checkpoint(cfg.log_dir) if newest else None, []
    if restarted and not cfg.resume and checkpoint and checkpoint["run"] != os.environ.get("TORCHELASTIC_RUN_ID"):
        checkpoint = None  # it is an earlier run's: this one has none yet
    require(checkpoint or not (look_only and newest), f"no checkpoint in {cfg.log_dir}: train, or --init_from gpt2")
    if checkpoint:
        keys, cfg.init_from = list(checkpoint["config"]), "scratch"  # no other start any more
    elif cfg.init_from and cfg.init_from.endswith(".pt"):
        checkpoint = load_checkpoint(Path(cfg.init_from))
        keys = list(checkpoint["config"]) if look_only else SHAPE
    for key in keys:  # a checkpoint brings its configuration; only what MAY_CHANGE may differ from it
        value = checkpoint["config"][key]
        setattr(cfg, key, flags.get(key, value))
        require(getattr(cfg, key) == value or key in MAY_CHANGE or (look_only and key not in SHAPE),
                f"--{key} {getattr(cfg, key)}: the checkpoint has {value}; may change: {', '.join(MAY_CHANGE)}")
    pretrained = not checkpoint and cfg.init_from not in (None, "scratch")
    if pretrained:
        for key in SHAPE[1:]:
            require(key not in flags, f"--{key} cannot be chosen: the shape comes with --init_from {cfg.init_from}")
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # from_pretrained() says what
            theirs = json.loads((Path(cfg.init_from) / "config.json").read_text())
            default(tokenizer="byte" if theirs["vocab_size"] == 257 else "gpt2",
                    **{key: theirs.get(key.replace("block_size", "n_positions")) for key in SHAPE[2:]})
    candidates = [name for name in ("edu_fineweb10B", "input.txt") if Path(name).exists()]
    default(data=[*candidates, str(Path(__file__).with_name("input.txt"))][0], init_from="scratch")
    require(cfg.prompt is not None or cfg.export or Path(cfg.data).exists(), f"--data {cfg.data} does not exist")
    size = "gpt2" if pretrained or Path(cfg.data).is_dir() else "demo"
    default(tokenizer="byte" if size == "demo" else "gpt2", model=cfg.init_from if cfg.init_from in SIZES else size)
    have = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available() and world_size == 1, "cpu": 999}
    default(device=next(name for name in have if have[name]))
    require(local_rank < have[cfg.device], f"--device {cfg.device}: this machine, or this build of PyTorch, has "
            f"{int(have[cfg.device])}: leave the flag out, or lower torchrun's --nproc_per_node")
    default(batch_size=4 if cfg.device != "cuda" and cfg.model != "demo" else None)  # GPT-2 at B=64 wants 80 GB
    unasked = {key for key, value in vars(cfg).items() if value is None}
    recipe = RECIPES[cfg.model]  # fine-tuning: what it knows already is changed in few and small steps
    fine_tune = FINE_TUNE | dict(max_lr=recipe["max_lr"] / 20) if cfg.init_from != "scratch" else {}
    default(**SIZES[cfg.model], **recipe | fine_tune)
    default(seq_len=cfg.block_size, min_lr=cfg.max_lr / 10, hellaswag_every=250 if Path(cfg.data).is_dir() else 0)
    default(total_batch_size=cfg.batch_size * cfg.seq_len, eval_every=250)
    if "warmup_steps" in unasked:
        cfg.warmup_steps = min(cfg.warmup_steps, cfg.max_steps // 5)  # a short trial still gets to its highest rate
    for f in dataclasses.fields(cfg):
        value, least = getattr(cfg, f.name), f.metadata["least"]
        require(least is None or least <= value < (2**63 if f.type is int else math.inf),
                f"--{f.name} {value} is out of range: it must be {least} or more")
    require(cfg.parallel == "ddp" or "RANK" in os.environ, "--parallel fsdp needs torchrun --nproc_per_node=N")
    require(0 < cfg.top_p <= 1, f"--top_p {cfg.top_p}: must be above 0 and at most 1")
    require(cfg.seq_len <= cfg.block_size, f"--seq_len {cfg.seq_len}: the model's block_size is {cfg.block_size}")
    require(cfg.warmup_steps <= cfg.max_steps, f"--warmup_steps {cfg.warmup_steps} is over max_steps={cfg.max_steps}")
    done = checkpoint["step"] if checkpoint and cfg.init_from == "scratch" else 0
    require(done <= cfg.max_steps, f"--max_steps {cfg.max_steps}: the checkpoint already has {done} steps")
    share = cfg.total_batch_size // (cfg.seq_len * world_size)  # sequences of a step for each process
    if "batch_size" not in flags or "total_batch_size" in unasked:
        cfg.batch_size = next((B for B in range(min(cfg.batch_size, share), 1, -1) if share % B == 0), 1)
    unit = cfg.batch_size * cfg.seq_len * world_size
    require(look_only or cfg.total_batch_size % unit == 0,
            f"--total_batch_size {cfg.total_batch_size}: must be a multiple of batch_size * seq_len * processes={unit}")
    if not look_only:
        try:
            Path(cfg.log_dir).mkdir(parents=True, exist_ok=True)
            open(Path(cfg.log_dir) / "log.txt", "a").close()
        except OSError as e:
            raise UserError(f"cannot write to --log_dir {cfg.log_dir}: {e.strerror}") from None
    return cfg, checkpoint

def set_up(cfg, checkpoint):
    """device, dtype, whether to compile, tokenizer, model (CPU, float32). Under torchrun, all processes meet here."""
    device = torch.device(cfg.device, process()[1]) if cfg.device == "cuda" else torch.device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)          # one GPU for each process
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun restarts us with the old store, full of dead addresses
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend, patience = "nccl" if device.type == "cuda" else "gloo", dist.default_pg_timeout  # 30 minutes
        dist.init_process_group(backend, timeout=patience, world_size=world_size, rank=rank, store=store)
    bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = cfg.dtype or ("float32" if device.type != "cuda" else "bfloat16" if bf16 else "float16")
    require(bf16 or dtype != "bfloat16", "this GPU has no bfloat16: pass --dtype float16")
    able = device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0) and dtype == "bfloat16"
    require(not cfg.fp8 or able and cfg.n_embd % 16 == 0, "--fp8 needs an H100 or newer, bfloat16, and n_embd in 16s")
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # TF32: 10 bits of mantissa
    compiles = device.type == "cuda" and importlib.util.find_spec("triton") is not None  # none on Windows
    torch.manual_seed(cfg.seed)
    enc = get_tokenizer(cfg.tokenizer)
    padded = math.ceil(enc.n_vocab / 64) * 64  # 50257 -> 50304: matmuls like round numbers
    if checkpoint:
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    elif cfg.init_from == "scratch":
        model = GPT(GPTConfig(cfg.block_size, enc.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd, padded))
    else:
        model = GPT.from_pretrained(cfg.init_from, padded)
        require(model.config.vocab_size == enc.n_vocab, f"--tokenizer {cfg.tokenizer} is not that of {cfg.init_from}")
    return device, getattr(torch, dtype), compiles if cfg.compile is None else cfg.compile, enc, model

@torch.no_grad()
def evaluate(model, loader, cfg, enc, device, dtype):
    """(loss, report): nats per token, a mean over the loader's first val_tokens, shared out among the processes."""
    rank, _, world_size = process()
    bytes_of = np.array([(i != enc.eot_token) * len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)])
    windows, B, sums = min(loader.total, max(cfg.val_tokens // loader.T, 1)), cfg.batch_size, np.zeros(3)
    passes = range(rank * B, windows + rank * B, world_size * B)
    for first in tqdm(passes, "validation", leave=False, delay=1, disable=rank > 0 or None):
        x, y = loader.batch(first, B)
        y[max(windows - first, 0):] = -100  # fills up the last batch, is not counted
        with autocast(device, dtype):
            _, loss = model(*send((x, y), device))
        count = int((y >= 0).sum())
        sums += [loss.item() * count if count else 0.0, count, bytes_of[y[y >= 0]].sum()]
    nats, tokens, text_bytes = summed(*sums.tolist(), device=device)
    loss, bits = nats / tokens, nats / math.log(2) / max(text_bytes, 1)
    return loss, f"val loss {loss:.4f} | perplexity {math.exp(min(loss, 99)):.2f} | {bits:.3f} bits per byte"

def export(model, enc, path, note):
    """Write a folder for Hugging Face's from_pretrained(), complete before it takes path's name. Raises UserError."""
    require(not path.exists(), f"--export {path} exists: choose another folder")
    from transformers import GPT2Config, GPT2LMHeadModel, GenerationConfig, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    c, eot = model.config, {f"{name}_token_id": enc.eot_token for name in ("bos", "eos", "pad")}
    shape = {key: getattr(c, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=c.block_size, n_ctx=c.block_size, **shape, **eot))  # as GGUF wants
    theirs.load_state_dict({key: w.t() if key.endswith(TRANSPOSED) else w[:c.vocab_size] if key.endswith(TIED) else w
                            for key, w in model.state_dict().items()})
    theirs.generation_config = GenerationConfig(do_sample=True, temperature=0.8, top_k=50, **eot)
    converter = TikTokenConverter(pattern=enc._pat_str, extra_special_tokens=["<|endoftext|>"])
    converter.load_tiktoken_bpe = lambda _: enc._mergeable_ranks      # and not from a file
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converter.converted(), model_max_length=c.block_size,
                                        **{key[:-3]: "<|endoftext|>" for key in eot})
    beside = path.with_name(path.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    theirs.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    (beside / "README.md").write_text("---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n# A GPT-2\n"
                                      f"\nBy train_gpt2.py: {model.num_params() / 1e6:.1f} M parameters, {note}\n")
    beside.rename(path)
    print(f"exported to {path}")

def look(cfg, checkpoint):
    """--eval_only: the validation loss. --export: a Hugging Face folder. --prompt: continue it, num_samples times."""
    device, dtype, _, enc, model = set_up(cfg, checkpoint)
    if cfg.export:
        run = f"step {checkpoint['step']}, best val loss {checkpoint['best_loss']:.4f}" if checkpoint else cfg.init_from
        return export(model, enc, Path(cfg.export), f"{cfg.model}, tokenizer {cfg.tokenizer}, data {cfg.data}, {run}")
    model.to(device)
    if cfg.eval_only:
        loader = DataLoaderLite(open_data(cfg.data, enc)[1], 1, cfg.seq_len, enc.n_vocab, f"{cfg.data} (val)")
        return print(evaluate(model, loader, cfg, enc, device, dtype)[1])
    prompt = sys.stdin.buffer.read().decode(errors="replace") if cfg.prompt == "-" else cfg.prompt
    for i in range(cfg.num_samples):
        print("-" * 80 + "\n" if i else "", prompt, sep="", end="", flush=True)
        with autocast(device, dtype):
            for piece in stream_text(model, enc, prompt, cfg, cfg.seed + i):
                print(piece, end="", flush=True)
        print()

# Training -------------------------------------------------------------------------------------------------------------
def rehearse(model, parallel_model, cfg, device, dtype, auto_batch):
    """Two trial passes. In the first, with auto_batch, cfg.batch_size is halved until every process has the memory. In
    the second DDP settles the order in which it sums gradients, and cfg.profile shows where the time goes."""
    passes = 2
    while passes:
        parallel_model.require_backward_grad_sync, too_large = passes == 1, False
        try:
            moments = [torch.empty_like(p) for p in parallel_model.parameters() for _ in range(2)]  # room AdamW needs
            idx = torch.arange(cfg.batch_size * cfg.seq_len, device=device).view(cfg.batch_size, cfg.seq_len) % 256
            with torch.profiler.profile() if cfg.profile else contextlib.nullcontext() as prof, autocast(device, dtype):
                model(idx, idx.clone())[1].backward()  # y another tensor than x, as in training: else it compiles twice
        except RuntimeError as e:
            if not auto_batch or not re.search(OUT_OF_MEMORY, str(e)) or cfg.batch_size % 2:
                raise
            too_large = True
        moments = None
        parallel_model.zero_grad()
        torch.cuda.empty_cache()
        if summed(too_large, device=device)[0]:
            cfg.batch_size //= 2
            print(f"out of memory: trying --batch_size {cfg.batch_size}")
        else:
            passes -= 1
    if cfg.profile and process()[0] == 0:
        prof.export_chrome_trace(str(Path(cfg.log_dir) / "trace.json"))
        print(prof.key_averages().table(f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total", row_limit=15))

def open_log(log_dir, step, resume):
    """log.txt, open for more rows; those from step on go, they will come again. An earlier run is moved aside first."""
    path, found = log_dir / "log.txt", checkpoints(log_dir)
    if (found or path.stat().st_size) and not (resume and found):
        aside = next(p for n in range(1, 10**9) if not (p := log_dir / f"earlier_run_{n}").exists())
        aside.mkdir()
        for old in [*found.values(), path]:
            old.rename(aside / old.name)
        print(f"{log_dir} held an earlier run: it is in {aside} now")
    rows = path.read_text().splitlines(True) if path.exists() else []
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(r for r in rows if re.fullmatch(r"\d+ \w+ \S+\n", r) and int(r.split()[0]) < step))
    return open(beside.replace(path), "a", buffering=1)  # a line at a time

def check_finite(step, loss, norm, log_dir):
    """End the run if a loss or a gradient norm is not a number: nothing after it would be worth saving."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        last_good = [path.name for path in checkpoints(log_dir).values()][-1:] or ["none"]
        sys.exit(f"step {step}: loss {loss}, gradient norm {norm}; not saved. Last good checkpoint: {last_good[0]}. "
                 f"Start from there (--init_from) with a lower --max_lr, or try --dtype float32")

def train(cfg, checkpoint, auto_batch):
    """Train as cfg says, from a checkpoint's state if there is one to resume."""
    import torch.distributed.checkpoint.state_dict as dcp
    resumed = checkpoint if cfg.init_from == "scratch" else None
    (rank, _, world_size), log_dir = process(), Path(cfg.log_dir)
    device, dtype, compiles, enc, raw_model = set_up(cfg, checkpoint)
    raw_model.checkpoint_activations = cfg.checkpoint_activations
    raw_model.apply(lambda module: setattr(module, "fp8", cfg.fp8))  # Linear looks at it
    (train_shards, val_shards), T, V = open_data(cfg.data, enc), cfg.seq_len, enc.n_vocab
    train_loader = DataLoaderLite(train_shards, cfg.batch_size, T, V, f"{cfg.data} (train)", rank, world_size, cfg.seed)
    val_loader = DataLoaderLite(val_shards, 1, T, V, f"{cfg.data} (val)")
    parallel = parallelize(raw_model, cfg, device)  # compiled: for the training shape only, with a faster exp()
    model = torch.compile(parallel, dynamic=False, options={"use_fast_math": True}) if compiles else parallel
    optimizer = configure_optimizer(raw_model, cfg.max_lr, cfg.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # else its calls change nothing
    kind = "shards" if Path(cfg.data).is_dir() else "a text (shards would be found in edu_fineweb10B)"
    print(f"training {cfg.model} on {cfg.data}, {kind}\n{raw_model.num_params() / 1e6:.1f} M parameters | tokenizer "
          f"{enc.name} | {world_size} x {device.type}, {str(dtype)[6:]}{', fp8' * cfg.fp8}{', compiled' * compiles}")
    rehearse(model, parallel, cfg, device, dtype, auto_batch and cfg.parallel == "ddp")
    B = train_loader.B = cfg.batch_size
    accumulate, tokens = cfg.total_batch_size // (B * T * world_size), train_loader.total * T
    print(f"{cfg.total_batch_size:,} tokens a step = {accumulate} x {world_size} x {B} x {T} | {tokens:,} training "
          f"tokens | {cfg.max_steps:,} steps, {cfg.max_steps * cfg.total_batch_size / tokens:.1f} epochs")
    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # the same file under ddp and fsdp
    start, best_loss, best_step = map(resumed.get, ("step", "best_loss", "best_step")) if resumed else (0, math.inf, -1)
    if resumed:
        dcp.set_optimizer_state_dict(raw_model, optimizer, resumed["optimizer"], options=whole)
        scaler.load_state_dict(resumed["scaler"] or scaler.state_dict())  # empty unless it trained in float16
        train_loader.position = resumed["position"]
        torch.set_rng_state(resumed["rng"]["cpu"])
        if device.type == "cuda" and torch.is_tensor(resumed["rng"]["cuda"]):
            torch.cuda.set_rng_state(resumed["rng"]["cuda"])
    print(f"resumed from step {start:,}" if start else "starting from step 0")
    (checkpoint or {}).clear()          # frees a copy of model and moments; main() holds the dict, so del would not
    position, (x, y) = train_loader.position, send(train_loader.next_batch(), device)
    require(summed(start, device=device)[0] == start * world_size,
            f"the processes find different checkpoints in {log_dir}: put it on a disk that all nodes share")
    board = refused = None
    if cfg.wandb and rank == 0:
        try:
            board = importlib.import_module("wandb").init(project="gpt2", dir=log_dir, config=vars(cfg))
        except Exception as e:          # it is not installed, there is no key, no network
            refused = f"{f'{e!s} '.splitlines()[0]}: pip install wandb, wandb login, WANDB_MODE=offline, or --no-wandb"
    require(not summed(refused is not None, device=device)[0], f"--wandb: {refused or 'see rank 0'}")
    log = open_log(log_dir, start, start > 0) if rank == 0 else open(os.devnull, "w")
    def record(stream, value, report):
        print(f"step {step:5d} | {report}")
        log.write(f"{step} {stream} {value:.6f}\n")
        if board:
            board.log({stream: value}, step=step)
    stop, stopping = [], False          # the first SIGTERM or Ctrl-C ends the run after its step, the second at once
    def ask_to_stop(signum, frame):
        stop.append(signum)             # torchrun repeats what all have heard already, and kills them after 30 s
        signal.signal(signum, signal.SIG_IGN if dist.is_initialized() else signal.SIG_DFL)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, ask_to_stop)
    if cfg.hellaswag_every:
        import hellaswag
        items = hellaswag.load_items_or_say(enc, device)
    prompt = "\n" if cfg.tokenizer == "byte" else "The first thing to know is"
    peak, flops = peak_flops(device), flops_per_token(raw_model, T)
    for step in range(start, cfg.max_steps + 1):
        last_step, val_loss = step == cfg.max_steps, None
        evaluating, scoring, sampling, saving = (every and (step % every == 0 or last_step) for every in (
            cfg.eval_every, cfg.hellaswag_every, cfg.sample_every, cfg.save_every))
        if step > 0 and (stopping or evaluating or scoring or sampling or saving):
            with torch.no_grad(), autocast(device, dtype):
                check_finite(step, raw_model(x[:1], y[:1])[1].item(), 0.0, log_dir)  # did the last step ruin it?
        if evaluating and not stopping:
            val_loss, report = evaluate(model, val_loader, cfg, enc, device, dtype)
            record("val", val_loss, report)
        if scoring and not stopping and items:
            acc, acc_norm = hellaswag.accuracies(raw_model, items, device, dtype)
            record("hella", acc_norm, f"HellaSwag acc {acc:.4f} | acc_norm {acc_norm:.4f}")
        if sampling and not stopping and step > 0:
            if cfg.parallel == "fsdp":
                raw_model.unshard()     # generate() passes by the hook of the whole module, which would do it
            with autocast(device, dtype):
                text = "".join(stream_text(raw_model, enc, prompt, cfg, cfg.seed))
            print(f"step {step:5d} | sample: {(prompt + text).strip()}\n")
        if step > 0 and (stopping or saving):
            if val_loss is not None and val_loss < best_loss:
                best_loss, best_step = val_loss, step
            state = {"step": step, "val_loss": val_loss, "best_loss": best_loss, "best_step": best_step,
                "model": dcp.get_model_state_dict(raw_model, options=whole),
                "optimizer": dcp.get_optimizer_state_dict(raw_model, optimizer, options=whole),
                "rng": {"cpu": torch.get_rng_state(), "cuda": device.type == "cuda" and torch.cuda.get_rng_state()},
                "scaler": scaler.state_dict(), "position": position, "run": os.environ.get("TORCHELASTIC_RUN_ID"),
                "format": FORMAT, "model_config": dataclasses.asdict(raw_model.config),
                "config": {k: v for k, v in dataclasses.asdict(cfg).items() if k not in UNSAVED.split()}}
            if rank == 0:
                state["model"]["lm_head.weight"] = state["model"]["transformer.wte.weight"]  # one matrix, written once
                save_checkpoint(log_dir / f"model_{step:05d}.pt", state)
                for path in [p for s, p in checkpoints(log_dir).items() if s <= step and s != best_step][:-cfg.keep]:
                    path.unlink()
        if stopping or last_step:
            break
        # One step: the gradient of the mean loss over total_batch_size tokens, gathered in several passes
        t0, loss_sum = time.perf_counter(), 0.0
        for micro_step in range(accumulate):
            parallel.require_backward_grad_sync = micro_step == accumulate - 1  # DDP: one average a step
            with autocast(device, dtype):
                _, loss = model(x, y)
            loss = loss / accumulate    # backward() adds up; the mean over the step wants each pass's share
            loss_sum += loss.detach()
            position = train_loader.position                         # the batch in hand is used, the next one not yet
            x, y = send(train_loader.next_batch(), device)           # on its way while the GPU still computes
            scaler.scale(loss).backward()   # float16: small gradients would vanish, so the loss is scaled up first
        scaler.unscale_(optimizer)      # or the norm would be that of the scaled gradient
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), cfg.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lr = get_lr(step, cfg)
        scaler.step(optimizer)          # float16: leaves out the step if the gradient overflowed
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loss, stopping = summed(loss_sum.item() / world_size, len(stop), device=device)  # all must stop alike
        norm, dt = norm.item(), time.perf_counter() - t0  # after item() the GPU is done: dt is all of the step
        check_finite(step, loss, 0.0 if scaler.is_enabled() else norm, log_dir)  # the scaler expects overflows
        mfu = f" | MFU {flops * cfg.total_batch_size / dt / peak / world_size:.1%}" if peak else ""
        record("train", loss, f"loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | {dt * 1000:.1f} ms | "
               f"{cfg.total_batch_size / dt:,.0f} tokens/s{mfu}")
    best = f"init_from {log_dir / f'model_{best_step:05d}.pt'}" if best_step > 0 else f"log_dir {log_dir}"
    print(f"stopped after {step:,} steps: --resume goes on from there" if stopping else
          f"Done: the run is in {log_dir}. What next?\n  python train_gpt2.py --{best} --prompt Once")

# Command line ---------------------------------------------------------------------------------------------------------
def main():
    """Read the flags, do what they ask. Exit codes: 0 done, 1 failed while running, 2 cannot be done as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)  # only what was given
    for f in dataclasses.fields(TrainConfig):
        kind = dict(type=f.type, choices=f.metadata["choices"])
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else kind
        parser.add_argument(f"--{f.name}", **kind, help=f"{f.metadata['help']} ({f.default})".replace(" (None)", ""))
    parser.error = lambda message: require(False, f"{message} (--help lists all flags)")  # and not argparse's usage
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a console that lacks a character shows "?"
    try:
        flags = vars(parser.parse_args())
        if os.environ.get("TORCHELASTIC_RUN_ID") == "none" and os.environ["GROUP_WORLD_SIZE"] == "1":
            os.environ["TORCHELASTIC_RUN_ID"] = f"torchrun {os.getppid()}"  # the same after a restart, unlike "none"
        cfg, checkpoint = configure(flags)
        sys.stdout = sys.stdout if process()[0] == 0 else open(os.devnull, "w")  # rank 0 speaks for all
        looking = cfg.prompt is not None or cfg.eval_only or cfg.export
        look(cfg, checkpoint) if looking else train(cfg, checkpoint, auto_batch="batch_size" not in flags)
    except UserError as e:
        print(f"train_gpt2.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except OSError as e:                      # the disk is full, or, as in `| head`, nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again as it leaves
        sys.exit(1 if isinstance(e, BrokenPipeError) else f"train_gpt2.py: {e}. Checkpoints already written are whole")
    except RuntimeError as e:
        if not re.search(OUT_OF_MEMORY, str(e)):
            raise
        sys.exit("train_gpt2.py: out of memory: lower --batch_size (not --total_batch_size) or --seq_len")
    finally:
        if dist.is_initialized():
            if sys.exc_info()[0]:             # the others may wait for us: a regular farewell would wait for them
                dist.group.WORLD.abort()
            time.sleep(0.1)                   # gloo's threads let go of the last tensors, for which they need Python
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
