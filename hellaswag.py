"""
HellaSwag (Zellers et al. 2019, arXiv:1905.07830): 10,042 beginnings of a scene with four endings each, one of them
right. A model need not chat to take this test: the ending that it finds likeliest is its answer.

    python hellaswag.py -m gpt2                       OpenAI's GPT-2 124M from Hugging Face; also gpt2-xl, or a folder
    python hellaswag.py -m log/model_19073.pt         a checkpoint of train_gpt2.py; without -m, the newest one in log
    python hellaswag.py -m gpt2 -d cpu --limit 500    a laptop: the first 500 items
    torchrun --standalone --nproc_per_node=8 hellaswag.py -m gpt2-xl      8 GPUs share the items

acc takes the ending whose tokens have the lowest summed negative log-likelihood (NLL), acc_norm the one with the lowest
mean, which does not favour short endings. Guessing scores 0.25. Known numbers, all items:

                      acc      acc_norm     acc and acc_norm of the harness
    gpt2 (124M)       0.2859   0.2955       0.2892   0.3114
    gpt2-xl (1558M)   0.3842   0.4893       0.4004   0.5089

They stand in the hellaswag.py of github.com/karpathy/build-nanogpt, which scores as this file does, one item at a time.
EleutherAI's lm-evaluation-harness asks otherwise: it writes the activity's name before the context, drops WikiHow's
marks like [header], and its acc_norm divides by an ending's characters, not by its tokens: compare like with like. A
model of bytes is scored, too, but its acc_norm is a mean over bytes: no number to set beside those of GPT-2's tokens.
"""
import argparse, hashlib, json, math, os, re, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from train_gpt2 import OUT_OF_MEMORY, UserError, autocast, configure, process, require, send, set_up, summed

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
# Of the official file, as Hugging Face's datasets (dataset_infos.json) and TensorFlow's (url_checksums) list them.
SIZE, SHA256 = 12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
PATH = Path("hellaswag/hellaswag_val.jsonl")
TOKENS = {"cuda": 2**16, "mps": 2**12, "cpu": 2**11}  # of a forward pass: enough to keep the device busy
ROWS = 512                                            # of logits at a time: each is 50,304 floats, 0.2 MB

# Data -----------------------------------------------------------------------------------------------------------------
def download(path):
    """Download the official validation file to path, unless there is a file. What an interrupted download has left
    beside path is continued. Raises UserError."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, logging
    logging.set_verbosity_error()                  # our own line says what is wrong
    constants.DOWNLOAD_CHUNK_SIZE = 2**16          # a broken connection loses its last chunk, and theirs are of 10 MB
    beside = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_suffix(".lock")):  # processes of other runs, too
            if path.exists():
                return
            with open(beside, "ab") as f:
                f.truncate(f.tell() if f.tell() <= SIZE else f.seek(0))
                http_get(URL, f, resume_size=f.tell(), expected_size=SIZE, displayed_filename=path.name,
                         headers={"Accept-Encoding": "identity"})  # a range is one of bytes as they are sent
            if hashlib.sha256(beside.read_bytes()).hexdigest() != SHA256:
                raise OSError("what came is another file: its checksum is wrong")
            beside.replace(path)
    except Exception as e:                         # whatever the network or the disk may raise
        if type(e) is OSError:                     # it came to its end and is not the file: nothing to continue
            beside.unlink(missing_ok=True)
        raise UserError(f"cannot download {URL}: {f'{e!s} '.splitlines()[0].strip() or type(e).__name__}. Try again, "
                        f"or put the file at {path}") from None

def load_items(enc, device, path=None, limit=None):
    """The first `limit` items (None: all) of a file of JSON lines, or else of the official validation file, which is
    downloaded if need be. An item is a dict: ind, label (0..3), context (a list of ids), endings (4 lists of ids).
    All processes call this, and if one cannot, all raise UserError."""
    items, error = [], None
    if path is None and not PATH.exists() and process()[1] == 0:  # one process of each node
        try:
            download(PATH)
        except UserError as e:
            error = e
    if summed(error is not None, device=device)[0]:  # the others wait here
        raise error or UserError("another process cannot download HellaSwag")
    path = path or PATH
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if limit is not None and len(items) == limit:
                    break
                if line.strip():
                    items.append(parse(line, enc, number - 1, f"{path}, line {number}"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    require(items, f"{path} holds no items")
    return items

def load_items_or_say(enc, device):
    """All items of the official file, or, on all processes, None: a training run does without rather than stop."""
    try:
        return load_items(enc, device)
    except UserError as e:
        print(f"HellaSwag is off: {e}")

def parse(line, enc, ind, where):
    """An item out of a line of JSON. Raises UserError, which begins with `where`."""
    try:
        item = json.loads(line)
        context, endings, label = item["ctx"], item["endings"], str(item["label"])
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        what = f"has no {e}" if isinstance(e, KeyError) else "is no object of JSON"
        raise UserError(f"{where} {what}: it must be like the official file's, with ctx, endings and label") from None
    require(isinstance(context, str) and isinstance(endings, list) and len(endings) == 4
            and all(isinstance(ending, str) for ending in endings), f"{where}: ctx must be a text, endings 4 texts")
    require(label in ("0", "1", "2", "3"), f"{where}: label must be 0, 1, 2 or 3, and not {label!r}")
    return dict(ind=item.get("ind", ind), label=int(label),
                context=enc.encode_ordinary(context) or [enc.eot_token],  # something must predict the first token
                endings=[enc.encode_ordinary(" " + ending) for ending in endings])

# Scores ---------------------------------------------------------------------------------------------------------------
# The endings of an item share its context, so it is computed once, and all stand in one row. For "The man sat" with the
# endings "down .", "up and away", "on it" (the last token of an ending foretells nothing that is asked for):
#     row       The man sat   down   up and   on
#     pos        0   1   2     3      3   4    3    with each ending, positions go on from the context
#     branch     0   0   0     1      2   2    3    a token sees what is before it in the context and in its own ending
# A tree: the context is the trunk, the endings are branches.

def grow_trees(items, S):
    """What to compute, longest first: trees (context, endings, slots). Ending k of item i has slot 4 i + k. The endings
    share the context if each fits a window of S tokens together with it. Else each has a tree of its own, and the
    context loses its beginning; an ending of S tokens or more goes in pieces of half a window."""
    trees = []
    for i, item in enumerate(items):
        context, endings, slots = item["context"], item["endings"], range(4 * i, 4 * i + 4)
        if len(context) + max(map(len, endings)) <= S:
            trees.append((context, endings, slots))
            continue
        for ending, slot in zip(endings, slots):
            n = len(ending) if len(ending) < S else max(S // 2, 1)
            for start in range(0, len(ending), n):
                piece = ending[start:start + n]
                trees.append(((context + ending[:start])[-max(S - len(piece), 1):], [piece], [slot]))
    return sorted(trees, key=length, reverse=True)

def length(tree):
    """Tokens that go into the model: none comes after an ending's last."""
    return len(tree[0]) + sum(len(ending) - 1 for ending in tree[1])

def to_batch(trees):
    """idx, pos, branch, each (B, L): a tree a row, [context, ending, ending, ...]. pos begins again after the context
    with each ending; branch is 0 in the context, 1, 2, ... in the endings, -1 in what fills the row up. And rows,
    targets, each (n,): where in (B * L,) each token of an ending is predicted, and that token."""
    L = -(-length(trees[0]) // 8) * 8              # a multiple of 8: what the GPU's kernels like
    idx, pos, branch = np.zeros((3, len(trees), L), np.int64)
    branch[:], rows, targets = -1, [], []
    for b, (context, endings, _) in enumerate(trees):
        n = len(context)
        tokens, places, branches = list(context), list(range(n)), [0] * n
        for k, ending in enumerate(endings, 1):
            start, more = b * L + len(tokens), len(ending) - 1
            rows += [b * L + n - 1, *range(start, start + more)]
            tokens += ending[:-1]
            places += range(n, n + more)
            branches += [k] * more
            targets += ending
        idx[b, :len(tokens)], pos[b, :len(tokens)], branch[b, :len(tokens)] = tokens, places, branches
    return [torch.from_numpy(a) for a in (idx, pos, branch, np.array(rows), np.array(targets))]

@torch.no_grad()
def score(model, items, device, dtype, batch_size=None):
    """Summed and mean NLL in nats of each ending, two float64 arrays (items, 4), the same on all processes, which share
    the work and all call this. model is a GPT, not compiled, for no two batches have one shape. batch_size: contexts a
    forward pass; None: as many as make up TOKENS. It has no influence on the scores, but for rounding."""
    (rank, _, world_size), V = process(), model.config.vocab_size
    trees, starts = grow_trees(items, model.config.block_size), [0]
    while starts[-1] < len(trees):
        starts.append(starts[-1] + (batch_size or max(TOKENS[device.type] // length(trees[starts[-1]]), 1)))
    batches = [trees[start:end] for start, end in zip(starts, starts[1:])]
    ends = np.cumsum([0] + [sum(len(ending) for tree in batch for ending in tree[1]) for batch in batches])
    slots = np.repeat([slot for tree in trees for slot in tree[2]], [len(e) for tree in trees for e in tree[1]])
    nll = torch.zeros(len(slots), device=device)   # of every ending's tokens, in the order of the trees
    if hasattr(model, "unshard"):
        model.unshard()                            # FSDP: trunk() passes by the hook of the whole module
    # Each process makes as many passes, for under FSDP all gather a block together; what the last repeats is dropped.
    for nth in tqdm(range(rank, -(-len(batches) // world_size) * world_size, world_size), "HellaSwag", leave=False,
                    delay=1, disable=rank > 0 or None):
        idx, pos, branch, rows, targets = send(to_batch(batches[min(nth, len(batches) - 1)]), device)
        earlier = torch.ones(idx.size(1), idx.size(1), dtype=torch.bool, device=device).tril()
        mask = earlier & ((branch == 0)[:, None] | (branch[:, None] == branch[:, :, None]))  # (B, L, L)
        with autocast(device, dtype):
            x = model.trunk(idx, pos, mask=mask[:, None]).flatten(0, 1)[rows].float()        # (n, C)
        losses = []
        for hidden, target in zip(x.split(ROWS), targets.split(ROWS)):
            logits = model.lm_head(hidden)         # float32: bfloat16 has steps of 0.25 at -35, a common logit of GPT-2
            logits[:, V:] = -math.inf              # padding has no probability
            losses.append(F.cross_entropy(logits, target, reduction="none"))
        if nth < len(batches):
            nll[ends[nth]:ends[nth + 1]] = torch.cat(losses)  # this batch's place among the tokens of all endings
    if dist.is_initialized():
        dist.all_reduce(nll)                       # zero but for the own share
    sums = np.bincount(slots, nll.cpu().numpy().astype(np.float64)).reshape(-1, 4)
    return sums, sums / np.bincount(slots).reshape(-1, 4)

def accuracy(scores, items):
    """The share of items whose right ending has the lowest score (the first one of equals), and its standard error."""
    right = np.argmin(scores, axis=1) == [item["label"] for item in items]
    return right.mean(), math.sqrt(right.mean() * (1 - right.mean()) / len(items))

def accuracies(model, items, device, dtype):
    """acc and acc_norm of a model in training, see score()."""
    return [accuracy(scores, items)[0] for scores in score(model, items, device, dtype)]

# Command line ---------------------------------------------------------------------------------------------------------
def write_scores(path, items, sums, means):
    """A line of JSON for each item: ind, label, four summed and four mean NLLs, and the ending that has the lowest."""
    lines = [json.dumps(dict(ind=item["ind"], label=item["label"], sum=s.tolist(), mean=m.tolist(),
                             pred=int(s.argmin()), pred_norm=int(m.argmin())))
             for item, s, m in zip(items, sums, means)]
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("\n".join(lines) + "\n")
    beside.replace(path)

def run(flags):
    """Score a model as the flags say and print a table."""
    data, limit, batch_size, out = (flags.pop(key, None) for key in ("data", "limit", "batch_size", "out"))
    require(all(n is None or n > 0 for n in (limit, batch_size)), "--limit and --batch_size must be 1 or more")
    require(flags.get("init_from") != "scratch", "-m scratch: a model of random weights has nothing to score")
    require(out is None or os.access(Path(out).parent, os.W_OK) and (Path(out).is_file() or not Path(out).exists()),
            f"cannot write --out {out}: it must be a file in a folder that is there")
    cfg, checkpoint = configure(dict(flags, prompt=""))  # as if to generate: then the training data may be elsewhere
    device, dtype, _, enc, model = set_up(cfg, checkpoint)
    name = flags.get("init_from") or f"{cfg.log_dir}, step {checkpoint['step']}"
    checkpoint = None                                    # optimiser and all: no longer needed
    items, model = load_items(enc, device, data, limit), model.to(device)
    start = time.perf_counter()
    sums, means = score(model, items, device, dtype, batch_size)
    took = f"{len(items):,} items in {time.perf_counter() - start:.1f} s"
    require(np.isfinite(sums).all(), f"{name}: its losses are no numbers. Are its weights? Or try --dtype float32")
    if out and process()[0] == 0:
        write_scores(Path(out), items, sums, means)
    print(f"HellaSwag | {name} | {process()[2]} x {device.type}, {str(dtype)[6:]} | {took}")
    if enc.name == "byte":
        print("note: this is a model of bytes. Its acc_norm is a mean over bytes: not comparable with GPT-2's tokens")
    print(f"{'':8}   value   stderr")
    for metric, scores in (("acc", sums), ("acc_norm", means)):
        print(f"{metric:8}  {'{:.4f}   {:.4f}'.format(*accuracy(scores, items))}")

def main():
    """Read the flags, do what they ask. Exit codes: 0 done, 1 failed while running, 2 cannot be done as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)  # only what was given
    parser.add_argument("-m", "--init_from", metavar="MODEL", help="a GPT-2 of Hugging Face (gpt2, gpt2-medium, "
                        "gpt2-large, gpt2-xl, or a folder), or a checkpoint of ours (.pt); the newest one in log")
    parser.add_argument("-d", "--device", choices=["cpu", "cuda", "mps"], help="where to run; the best there is")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="of matmuls; as suits the device")
    parser.add_argument("--tokenizer", choices=["gpt2", "byte"], help="of a Hugging Face folder; gpt2")
    parser.add_argument("--data", metavar="FILE", help=f"JSON lines like the official file's; {PATH}, downloaded once")
    parser.add_argument("--limit", metavar="N", type=int, help="score the first N items only; all")
    parser.add_argument("--batch_size", metavar="N", type=int, help="items in a forward pass. Lower it if memory runs "
                        f"out; as many as make up {TOKENS['cuda']:,} tokens on a GPU, {TOKENS['cpu']:,} on a CPU")
    parser.add_argument("--out", metavar="FILE", help="write each item's scores there, as JSON lines")
    parser.error = lambda message: require(False, f"{message} (--help lists all flags)")  # and not argparse's usage
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a console that lacks a character shows "?"
    try:
        flags = vars(parser.parse_args())
        sys.stdout = sys.stdout if process()[0] == 0 else open(os.devnull, "w")  # rank 0 speaks for all
        run(flags)
    except UserError as e:
        print(f"hellaswag.py: {e}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, OSError) as e:
        sys.exit(f"hellaswag.py: {e or 'interrupted'}")
    except RuntimeError as e:
        if not re.search(OUT_OF_MEMORY, str(e)):
            raise
        sys.exit("hellaswag.py: out of memory: pass a lower --batch_size")
    finally:
        if dist.is_initialized():
            if sys.exc_info()[0]:             # the others may wait for us
                dist.group.WORLD.abort()
            time.sleep(0.1)                   # as in train_gpt2.py
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
