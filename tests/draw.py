"""Draw the README's pictures, assets/model.svg and assets/curves.png: python tests/draw.py

The model: the names, their order, the shapes and the numbers of parameters are what one forward
pass of the default run's model reports. In that model T and C are both 128; which is which is seen
in a second pass, of a small model whose sizes are all different.

The curves: the logs of the long runs, assets/run/*.txt, by the tokens read and by the clock.
"""
import hashlib
import math
import sys
import tempfile
from html import escape
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt2
from train_gpt2 import GPT, GPTConfig

FUNCTIONS = ["add", "gelu", "scaled_dot_product_attention", "__getitem__", "cross_entropy"]
# What stands in small letters below a name.
SAYS = {
    "wte": "a vector for each token", "wpe": "and for each position",
    "Block": "tokens talk, then each thinks",
    "LayerNorm": "mean 0, variance 1, then a factor, an offset",
    "lm_head": "how well does each token match?", "c_attn": "each token's query, key and value",
    "scaled_dot_product_attention": "a mean of values, of earlier tokens only",
    "attn.c_proj": "what the heads found, mixed", "c_fc": "four times as wide", "gelu": "the bend",
    "mlp.c_proj": "and back", "cross_entropy": "-log of the right token's probability, mean",
}


class Recorder(TorchFunctionMode):
    """While it is on: what a model calls, in order, as dictionaries. The functions are seen by this
    class, the modules by hooks."""

    def __init__(self, model):
        super().__init__()
        self.calls, self.inside = [], [""]
        self.vocab_size = model.config.vocab_size
        for name, module in model.named_modules():
            if name and not isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)):
                module.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name))
                module.register_forward_hook(lambda m, _, out, name=name: self.leave(m, out, name))

    def leave(self, module, out, name):
        self.inside.pop()
        size = sum(p.numel() for p in module.parameters())
        if name == "transformer.wte":
            # Without the rows that stand for no token, as num_params() counts.
            size = self.vocab_size * module.embedding_dim
        self.calls.append(dict(name=name, kind=type(module).__name__, within=self.inside[-1],
                               out=tuple(out.shape), into=(), size=size))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in FUNCTIONS:
            into = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
            self.calls.append(dict(name=func.__name__, kind="function", within=self.inside[-1],
                                   out=tuple(out.shape), into=into, size=0))
        return out


def record(B, T, **shape):
    """The calls of a forward pass with targets, and the model."""
    model = GPT(GPTConfig(**shape))
    idx = torch.zeros(B, T, dtype=torch.int64)
    recorder = Recorder(model)
    with torch.no_grad(), recorder:
        model(idx, idx)
    return recorder.calls, model


def default_run():
    """Its configuration. configure() tries whether log_dir can be written to, so it gets another."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"data": str(ROOT / "input.txt"), "device": "cpu", "log_dir": folder}
        return train_gpt2.configure(flags)[0]


def with_letters():
    """(calls of the default run's model, shapes in letters and numbers; the model; (B, T); cfg)."""
    cfg = default_run()
    vocab = train_gpt2.get_tokenizer(cfg.tokenizer).n_vocab
    shape = {name: getattr(cfg, name) for name in train_gpt2.SHAPE}
    B, T = cfg.total_batch_size // cfg.seq_len, cfg.seq_len
    calls, model = record(B, T, vocab_size=vocab, **shape)
    # All sizes differ, also those that are made of others: 3 C, B T, the rows of wte.
    small, other = record(5, 6, vocab_size=100, n_layer=shape["n_layer"], n_head=3, n_embd=21,
                          block_size=11)
    letters = {5: "B", 6: "T", 21: "C", 3: "nh", 7: "hs", 63: "3 C", 84: "4 C", 30: "B T",
               100: "vocab_size", other.lm_head.out_features: "rows"}
    for call, twin in zip(calls, small, strict=True):
        def both(mine, its):
            names = ", ".join(letters[n] for n in its)
            return f"({names}) = ({', '.join(map(str, mine))})" if mine else "one number"
        call["shape"] = both(call["out"], twin["out"])
        call["takes"] = [both(mine, its) for mine, its in zip(call["into"], twin["into"])]
    return calls, model, (B, T), cfg


class Svg:
    """Plain shapes, and text in a fixed-width font, so that its width is known."""

    def __init__(self, width, height):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" '
            'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#fff"/>']

    def text(self, x, y, words, size=12, color="#222", anchor="start", bold=False):
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" '
                          f'text-anchor="{anchor}"{weight}>{escape(words)}</text>')

    def rect(self, x, y, w, h, fill, line="#888"):
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" '
                          f'fill="{fill}" stroke="{line}"/>')

    def line(self, *points, tip=True, dashed=False):
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        more = (' marker-end="url(#tip)"' if tip else "")
        more += ' stroke-dasharray="4 4"' if dashed else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="#555"{more}/>')

    def plus(self, x, y):
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="10" fill="#fff" stroke="#555"/>')
        self.line((x - 5, y), (x + 5, y), tip=False)
        self.line((x, y - 5), (x, y + 5), tip=False)

    def box(self, x, y, w, call, name=None, note=""):
        """A call: its name, what it does, and at the right the number of its parameters."""
        fill = {"function": "#eef3fa", "Block": "#fdf1dc"}.get(call["kind"], "#e9f5ea")
        self.rect(x, y, w, BOX, fill)
        name = name or call["name"]
        self.text(x + 8, y + 16, name, 12, bold=True)
        keys = [k for k in SAYS if name.endswith(k) or call["kind"] == k]
        self.text(x + 8, y + 31, SAYS[keys[0]] if keys else "", 10.5, "#555")
        count = f"{call['size']:,}" if call["size"] else ""
        self.text(x + w - 8, y + 16, note or count, 10.5, "#555", "end")


BOX, STEP = 38, 64  # the height of a box; from one to the next, at the left


def svg():
    """The drawing, as the file's text."""
    calls, model, (B, T), cfg = with_letters()
    draw = Svg(900, 622)
    # At the left, what the model calls itself; at the right, what the first block calls.
    outer = [c for c in calls if c["within"] == ""]
    first = next(c["name"] for c in outer if c["kind"] == "Block")
    inner = [c for c in calls if c["within"].startswith(first)
             and c["name"] not in (f"{first}.attn", f"{first}.mlp")]

    x, y, w, arrow = 24, 70, 372, 94
    draw.text(x, 32, f"idx (B, T) = ({B}, {T}): ids of tokens", bold=True)
    tables = [c for c in outer if c["kind"] == "Embedding"]
    half = (w - 12) // 2
    for left, call in zip((x, x + half + 12), tables):
        draw.line((arrow, 40), (left + arrow - x, y))
        draw.box(left, y, half, call)
        draw.line((left + arrow - x, y + BOX), (arrow, y + 60))
    for call in outer[len(tables):]:
        name, takes = call["name"], call["takes"]
        if name == "add":
            draw.plus(arrow, y + 66)
            y, top = y + 32, y + 76
        elif name != "__getitem__":
            y += STEP
            draw.line((arrow, top), (arrow, y))
            label = "logits " if name == "cross_entropy" else ""
            draw.text(arrow + 10, y - 10, label + shape, 11)
            note = f"targets: {takes[1]}" if name == "cross_entropy" else ""
            if name == "lm_head" and model.lm_head.weight is model.transformer.wte.weight:
                note = "wte's matrix, once more"
            draw.box(x, y, w, call, name, note)
            top = y + BOX
            if name == first:
                draw.line((x + w, y + BOX // 2), (424, y + BOX // 2), tip=False, dashed=True)
        shape = call["shape"]
    draw.line((arrow, top), (arrow, top + 24))
    vocab, large, tokens = model.config.vocab_size, train_gpt2.SIZES["gpt2"], GPTConfig.vocab_size
    draw.text(x, top + 40, f"loss: {shape}, at first about ln {vocab} = {math.log(vocab):.2f}",
              bold=True)
    count = f"{train_gpt2.num_params(model) / 1e6:.1f} M"
    for i, words in enumerate([
            f"backward() gives each of the {count} parameters its gradient.",
            f"GPT-2 124M is the same with {large['n_layer']} blocks, C = {large['n_embd']},",
            f"{large['n_head']} heads, T = {large['block_size']:,}, {tokens:,} tokens."
    ]):
        draw.text(x, top + 62 + 16 * i, words, 10.5, "#555")

    # The block: the stream goes down at the left, each part reads it and adds what it found.
    draw.rect(424, 12, 456, 568, "#fffaf0", "#d9b36a")
    draw.text(436, 32, f"inside of {first}; {cfg.n_layer} blocks in all", bold=True)
    stream, x, y, w, arrow = 448, 486, 58, 382, 540
    top, bottom = 42, None  # the last ends of the stream, and of the part that is being drawn
    for call in inner:
        name, takes = call["name"].removeprefix(first + "."), call["takes"]
        if name == "add":
            draw.line((arrow, bottom), (arrow, bottom + 16), (stream + 10, bottom + 16))
            draw.text(arrow + 10, bottom + 14, shape, 11)
            draw.line((stream, top), (stream, bottom + 6))
            draw.plus(stream, bottom + 16)
            y, top, bottom = bottom + 42, bottom + 26, None
        else:
            if bottom:
                draw.line((arrow, bottom), (arrow, y))
                label = f"q, k, v {takes[0]} each" if len(takes) == 3 else shape
                draw.text(arrow + 10, y - 6, label, 11)
            else:
                draw.line((stream, y + BOX // 2), (x, y + BOX // 2))
            draw.box(x, y, w, call, name)
            y, bottom = y + BOX + 20, y + BOX
        shape = call["shape"]
    draw.line((stream, top), (stream, 574))
    draw.text(24, 606, "green: has parameters, so many; blue: a function. B sequences of T tokens, "
              "a token is C numbers, nh heads of hs numbers", 11, "#555")
    return "\n".join([*draw.parts, "</svg>", ""])


RUNS = {"gpt2": "tab:blue", "modern_third": "tab:green", "modern": "tab:orange"}
TOKENS_A_STEP = 524_288  # of these runs


def read_log(name):
    """{stream: {step: value}} of assets/run/NAME.txt."""
    streams = {}
    for row in (ROOT / f"assets/run/{name}.txt").read_text(encoding="utf-8").splitlines():
        step, stream, value = row.split()
        streams.setdefault(stream, {})[int(step)] = float(value)
    return streams


def fingerprint():
    """Of the logs, whatever their line ends: the picture says from which it was drawn."""
    texts = [(ROOT / f"assets/run/{name}.txt").read_text(encoding="utf-8") for name in RUNS]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def curves():
    """The long runs: val loss and HellaSwag, over tokens and over minutes, as a figure."""
    from matplotlib.figure import Figure  # not needed for the model's drawing

    figure = Figure(figsize=(12, 11), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for name, color in RUNS.items():
        log = read_log(name)
        dashed = "--" if name == "modern_third" else "-"
        flags = " --fp8" if name == "gpt2" else ""
        how = dict(color=color, ls=dashed, marker="o", ms=7, lw=3, label=name + flags, zorder=3)
        for row, stream in zip(axes, ("val", "hella")):
            steps, values = list(log[stream]), list(log[stream].values())
            row[0].plot([step * TOKENS_A_STEP / 1e9 for step in steps], values, **how)
            row[1].plot([log["minutes"][step] for step in steps], values, **how)
        axes[0, 0].plot([step * TOKENS_A_STEP / 1e9 for step in log["train"]],
                        list(log["train"].values()), color=color, lw=1, alpha=0.5)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=19)
    for axis in axes[1]:
        error = (0.25 * 0.75 / 10_042) ** 0.5  # a guess's, for so many questions
        axis.axhspan(0.25 - error, 0.25 + error, color="gray", alpha=0.15, lw=0)
        axis.axhline(0.25, color="gray", ls=":", lw=2.5)
        axis.axhline(0.2955, color="gray", ls="--", lw=2.5)  # hellaswag.py
    axes[1, 0].text(0.02, 0.2962, "OpenAI's GPT-2", size=18, color="dimgray")
    axes[1, 0].text(0.86, 0.2492, "chance", size=18, color="dimgray", va="top", ha="right")
    for words, where, at in (("one of four\nprocesses\nis killed", (4.75, 3.77), (4.3, 4.6)),
                             ("stopped\nand\nresumed", (9.3, 3.47), (8.5, 4.1)),
                             ("modern: a second start", (2.9, 3.8), (2.9, 2.82))):
        axes[0, 1].annotate(words, where, at, size=18, arrowprops=dict(arrowstyle="->", lw=2))
    axes[0, 0].set(ylim=(2.7, 5.6))
    axes[1, 0].set(ylim=(0.235, 0.302))
    axes[0, 0].set_ylabel("val loss (thin: train)", size=21)
    axes[1, 0].set_ylabel("HellaSwag, acc_norm", size=21)
    axes[1, 0].set_xlabel("tokens read, billions", size=21)
    axes[1, 1].set_xlabel("minutes on 4 x H200", size=21)
    axes[0, 0].legend(fontsize=19)
    figure.suptitle("GPT-2 124M, and its modern form, on English books", size=23)
    return figure


if __name__ == "__main__":
    (ROOT / "assets/model.svg").write_text(svg(), encoding="utf-8", newline="\n")
    curves().savefig(ROOT / "assets/curves.png", metadata={"Source": fingerprint()})
