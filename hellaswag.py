"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): 10,042 beginnings of a scene with four endings
each, one of them right. A model need not chat to take this test: the ending that it finds likeliest
is its answer.

    python hellaswag.py -m gpt2                    OpenAI's GPT-2 124M; also gpt2-xl, or a folder
    python hellaswag.py -m log/model_19073.pt      a checkpoint; without -m, the newest one in log
    python hellaswag.py -m gpt2 -d cpu --limit 500     a laptop: the first 500 items
    torchrun --standalone --nproc_per_node=8 hellaswag.py -m gpt2-xl     8 GPUs share the items

acc takes the ending whose tokens have the lowest summed negative log-likelihood (NLL, what
train_gpt2.py calls the loss, of each token), acc_norm the one with the lowest mean, which does not
favour short endings. Guessing scores 0.25. Known numbers (the harness: see below):

                      acc      acc_norm     acc and acc_norm of the harness
    gpt2 (124M)       0.2859   0.2955       0.2892   0.3114
    gpt2-xl (1558M)   0.3842   0.4893       0.4004   0.5089

They stand in the hellaswag.py of github.com/karpathy/build-nanogpt, which scores as this file does,
one item at a time. EleutherAI's lm-evaluation-harness asks otherwise: it writes the activity's name
before the context, drops WikiHow's marks like [header], and its acc_norm divides by an ending's
characters, not by its tokens: compare like with like. A model of bytes is scored, too, but its
acc_norm is a mean over bytes: no number to set beside those of GPT-2's tokens.
"""
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
# Of the official file, as Hugging Face's datasets (dataset_infos.json) and TensorFlow's list them.
SIZE = 12_246_618
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
PATH = Path("hellaswag/hellaswag_val.jsonl")

# Tokens of a forward pass: enough to keep the device busy.
TOKENS = {"cuda": 2**16, "mps": 2**12, "cpu": 2**11}

class UserError(ValueError):
    """What the user asked for cannot be: one line, with the remedy."""

# --------------------------------------------------------------------------------------------------
# Scores. Each ending makes a row: the context, then the ending. The model foretells each token of
# the ending from those before it. Rows of many items go through the model together, the shorter
# ones filled up at the right: no token sees what comes after it, so the filling needs no mask.

def rows_of(items, block_size):
    """(tokens, n, slot) for each row, longest first. The last n tokens are to be scored, and the
    score is added up in a slot: 4 i + k for ending k of item i. The model gets all but the last
    token, and of a text longer than block_size only the end. An ending that is itself longer than
    block_size makes several rows, each of which scores half a block of it."""
    rows = []
    for i, item in enumerate(items):
        for k, ending in enumerate(item["endings"]):
            n = len(ending) if len(ending) <= block_size else max(block_size // 2, 1)
            for start in range(0, len(ending), n):
                piece = ending[start:start + n]
                tokens = item["context"] + ending[:start] + piece
                rows.append((tokens[-block_size - 1:], len(piece), 4 * i + k))
    return sorted(rows, key=lambda row: len(row[0]), reverse=True)

def batches_of(rows, device, batch_size):
    """The rows, 4 * batch_size at a time; None: as many as make up TOKENS."""
    batches = []
    while rows:
        n = 4 * batch_size if batch_size else max(TOKENS[device.type] // len(rows[0][0]), 1)
        batches.append(rows[:n])
        rows = rows[n:]
    return batches

@torch.no_grad()
def score(model, items, device, dtype, batch_size=None):
    """Summed and mean NLL in nats of each ending, two float64 arrays (items, 4). model is a GPT,
    not compiled, for no two batches have one shape. All processes call this, share the work, and
    get the same. batch_size, in items, has no influence on the scores but for rounding."""
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    V = model.config.vocab_size
    batches = batches_of(rows_of(items, model.config.block_size), device, batch_size)
    sums = torch.zeros(4 * len(items), dtype=torch.float64)
    # Each process makes as many passes as the others, which FSDP wants. Those too many count
    # nothing.
    turns = range(rank, math.ceil(len(batches) / world_size) * world_size, world_size)
    for turn in tqdm(turns, "HellaSwag", leave=False, delay=1, disable=rank > 0 or None):
        batch = batches[min(turn, len(batches) - 1)]
        inputs = [torch.tensor(tokens[:-1]) for tokens, _, _ in batch]
        # Only where an ending's token is foretold there is a target.
        targets = [torch.tensor([-100] * (len(tokens) - 1 - n) + tokens[-n:])
                   for tokens, n, _ in batch]
        inputs = pad_sequence(inputs, batch_first=True).to(device)  # (B, T)
        targets = pad_sequence(targets, batch_first=True, padding_value=-100).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x = model.trunk(inputs)  # (B, T, C)
        hidden, targets = x[targets >= 0].float(), targets[targets >= 0]  # (n, C), (n,)
        # The head in float32: bfloat16 has steps of 0.25 at -35, a common logit of GPT-2. And not
        # all at once: 2,048 rows of 50,304 logits are 0.4 GB.
        losses = [F.cross_entropy(model.lm_head(h)[:, :V], t, reduction="none")
                  for h, t in zip(hidden.split(2048), targets.split(2048))]
        slots = torch.tensor([slot for _, n, slot in batch for _ in range(n)])
        if turn < len(batches):
            sums.index_add_(0, slots, torch.cat(losses).cpu().double())
    if dist.is_initialized():
        sums = sums.to(device)
        dist.all_reduce(sums)
    sums = sums.cpu().numpy().reshape(-1, 4)
    lengths = np.array([[len(ending) for ending in item["endings"]] for item in items])
    return sums, sums / lengths

def accuracy(scores, items):
    """The share of items whose right ending has the lowest score (of equals, the first)."""
    return float(np.mean(np.argmin(scores, axis=1) == [item["label"] for item in items]))

# --------------------------------------------------------------------------------------------------
# Data

def load_items(enc, path=None, limit=None):
    """The first `limit` items (None: all) of a file of JSON lines, or else of the official
    validation file, downloaded if need be: dicts of ind, label (0 to 3), context (a list of ids)
    and endings (4 lists of ids). Raises UserError."""
    if path is None:
        path = PATH
        download(path)
    items = []
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip() and (limit is None or len(items) < limit):
                    items.append(parse(line, enc, number - 1, f"{path}, line {number}"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if not items:
        raise UserError(f"{path} holds no items")
    return items

def parse(line, enc, ind, where):
    """An item out of a line of JSON. Raises UserError, which begins with `where`."""
    try:
        item = json.loads(line)
        label = ["0", "1", "2", "3"].index(str(item["label"]))
        context = enc.encode_ordinary(item["ctx"])
        endings = [enc.encode_ordinary(" " + ending) for ending in item["endings"]]
        if not isinstance(item["endings"], list) or len(endings) != 4:
            raise ValueError("endings are 4 texts")
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{where} is not like the official file's: JSON with ctx, a text, endings, "
                        "4 texts, and label, 0 to 3") from None
    # Something must foretell the first token.
    context = context or [enc.eot_token]
    return dict(ind=item.get("ind", ind), label=label, context=context, endings=endings)

def download(path):
    """Download the official validation file to path, unless there is a file. What an interrupted
    download has left beside it is continued. Raises UserError."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, logging
    # Our own line says what is wrong. A broken connection loses its last chunk, and theirs are 10
    # MB.
    logging.set_verbosity_error()
    constants.DOWNLOAD_CHUNK_SIZE = 2**16
    beside = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_suffix(".lock")):
            # Another process may have been here first.
            if path.exists():
                return
            with open(beside, "ab") as f:
                if f.tell() > SIZE:
                    f.truncate(f.seek(0))
                # identity: a range is one of bytes as they are sent.
                http_get(URL, f, resume_size=f.tell(), expected_size=SIZE,
                         displayed_filename=path.name, headers={"Accept-Encoding": "identity"})
            if hashlib.sha256(beside.read_bytes()).hexdigest() != SHA256:
                raise OSError("what came is another file: its checksum is wrong")
            beside.replace(path)
    except Exception as e:  # whatever the network or the disk may raise
        if type(e) is OSError and e.errno is None:
            # It came to its end and is not the file: there is nothing to continue.
            beside.unlink(missing_ok=True)
        why = f"{e!s} ".splitlines()[0].strip() or type(e).__name__
        remedy = f"Try again, or put the file at {path}"
        raise UserError(f"cannot download {URL}: {why}. {remedy}") from None

# --------------------------------------------------------------------------------------------------
# Command line

def run(tg, flags):
    """Score a model as the flags say and print a table. tg: train_gpt2, which knows how to load
    it."""
    data = flags.pop("data", None)
    limit = flags.pop("limit", None)
    batch_size = flags.pop("batch_size", None)
    for name, number in (("limit", limit), ("batch_size", batch_size)):
        tg.require(number is None or number > 0, f"--{name} {number}: it must be 1 or more")
    tg.require(flags.get("init_from") != "scratch",
               "-m scratch: random weights have nothing to score")
    # Configured as for --prompt, which asks for no training data: they may be elsewhere.
    cfg, model = tg.configure({**flags, "prompt": ""})
    machine = tg.Machine(cfg)
    machine.meet()
    items = load_items(tg.get_tokenizer(cfg.tokenizer), data, limit)
    start = time.perf_counter()
    scores = score(model.to(machine.device), items, machine.device, machine.dtype, batch_size)
    took = time.perf_counter() - start
    tg.require(np.isfinite(scores[0]).all(),
               f"{cfg.init_from}: its losses are no numbers. Are its weights? Or try "
               "--dtype float32")
    tg.print0(f"HellaSwag | {cfg.init_from} | {machine.world_size} x {machine.device.type}, "
              f"{str(machine.dtype)[6:]} | {len(items):,} items in {took:.1f} s")
    if cfg.tokenizer == "byte":
        tg.print0("note: this is a model of bytes. Its acc_norm is a mean over bytes: not "
                  "comparable with GPT-2's tokens")
    # stderr, the standard error: by how much chance in the choice of the items moves a share.
    tg.print0("           value   stderr")
    for name, of_endings in zip(("acc", "acc_norm"), scores):
        share = accuracy(of_endings, items)
        tg.print0(f"{name:8}  {share:.4f}   {math.sqrt(share * (1 - share) / len(items)):.4f}")

def main():
    """Read the flags, do what they ask. Exit codes: 0 done, 1 failed while running, 2 cannot be
    done as asked."""
    import argparse
    import train_gpt2 as tg
    parser = tg.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                       allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-m", "--init_from", metavar="MODEL",
                        help="a GPT-2 of Hugging Face (gpt2, gpt2-medium, gpt2-large, gpt2-xl, or "
                             "a folder), or a checkpoint of ours (.pt); the newest one in log")
    parser.add_argument("-d", "--device", choices=["cpu", "cuda", "mps"], help="where to run")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
                        help="of matmuls; as suits the device")
    parser.add_argument("--tokenizer", choices=["gpt2", "byte"], help="of a Hugging Face folder")
    parser.add_argument("--data", metavar="FILE",
                        help=f"JSON lines like the official file's; {PATH}, downloaded once")
    parser.add_argument("--limit", metavar="N", type=int, help="score the first N items only; all")
    parser.add_argument("--batch_size", metavar="N", type=int,
                        help="items in a forward pass: lower it if memory runs out")
    with tg.exit_codes("hellaswag.py", UserError):
        tg.check_torchrun()
        run(tg, vars(parser.parse_args()))

if __name__ == "__main__":
    main()
