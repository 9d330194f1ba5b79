"""See it learn: a web page without a server, one file, which a browser opens from the disk.

    python tests/watch.py                   writes log/watch.html, every 5 seconds until Ctrl-C:
                                            a run's losses, and what its newest checkpoint writes
    python tests/watch.py --look "MIRA:"    writes log/look.html: point at a token, and see which
                                            others each head attends to, and what may come next
"""
import argparse
import contextlib
import html
import json
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt2 as tg

HEAD = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>See it learn</title><style>
body { font: 15px sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em }
pre { background: #eee; padding: 1em; white-space: pre-wrap; overflow-wrap: anywhere }
.token, .bar { font: 15px monospace; white-space: pre; padding: 2px }
polyline { fill: none; stroke: #4a90d9 } circle { fill: #c33 } .chosen { outline: 2px solid }
.token { display: inline-block; cursor: pointer } .head { margin-top: 6px }
.bar { background: linear-gradient(#9cf, #9cf) no-repeat }</style>"""
LOOK = """<p>Point at a token of this text; a click keeps it. A blank is ␣.</p><div id="text"></div>
<h3>What comes after it?</h3><div id="next"></div>
<h3>Which tokens does it attend to? The darker, the larger their share.</h3><div id="heads"></div>
<script>
const data = DATA, $ = id => document.getElementById(id);
const add = (parent, tag, className, textContent, title = "") => parent.appendChild(
  Object.assign(document.createElement(tag), {className, textContent, title}));
let kept = null;
function show(t) {
  $("next").replaceChildren(); $("heads").replaceChildren();
  [...$("text").children].forEach((e, i) => e.classList.toggle("chosen", i === t));
  for (const [text, p] of data.next[t]) add($("next"), "div", "bar",
    `${(100 * p).toFixed(2).padStart(6)} %  ${text}`).style.backgroundSize = 100 * p + "%";
  data.shares.forEach((heads, layer) => heads.forEach((rows, head) => {
    const row = add($("heads"), "div", "head", `layer ${layer}, head ${head} `);
    rows[t].forEach((share, s) => add(row, "span", "token", data.tokens[s], share)
      .style.background = `rgba(255, 140, 0, ${share})`);
  }));
}
data.tokens.forEach((text, t) => Object.assign(add($("text"), "span", "token", text), {
  onmouseenter: () => kept === null && show(t),
  onclick: () => { kept = kept === t ? null : t; show(t); }}));
show(data.tokens.length - 1);
</script>"""

def load(folder):
    """The newest checkpoint: its path, its state, its model and its tokenizer."""
    path, state = tg.newest_checkpoint(folder)
    tg.require(state, f"no checkpoint in {folder}: train one, or name another folder")
    model = tg.model_like(state)
    model.load_state_dict(state["model"])
    return path, state, model, tg.get_tokenizer(state["config"]["tokenizer"])

def write(path, *parts):
    """The page is complete before it takes its name: a browser may read it at any moment."""
    beside = path.with_suffix(".tmp")
    beside.write_text("\n".join((HEAD, *parts)), encoding="utf-8", errors="replace")
    beside.replace(path)

def curve(streams):
    """The losses as an SVG; of more than 1,000 steps, a point is a mean of several."""
    train, val = streams.get("train", []), streams.get("val", [])
    n = len(train) // 1001 + 1
    means = [train[i:i + n] for i in range(0, len(train), n)]
    train = [(some[0][0], sum(value for _, value in some) / len(some)) for some in means]
    if not train + val:
        return "<p>No loss yet.</p>"
    last, losses = max(train + val)[0] or 1, [value for _, value in train + val]
    low, height = min(losses), max(losses) - min(losses) or 1
    spot = [(40 + 750 * s / last, 270 - 260 * (value - low) / height) for s, value in train + val]
    line = " ".join(f"{x:.2f},{y:.2f}" for x, y in spot[:len(train)])
    dots = "".join(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="4"/>' for x, y in spot[len(train):])
    scale = "".join(f'<text y="{274 - 65 * i}">{low + height * i / 4:.2f}</text><text y="295" '
                    f'x="{40 + 750 * i / 4}" text-anchor="middle">{last * i // 4}</text>'
                    for i in range(5))
    return (f'<svg viewBox="0 0 820 300" font-size="12"><polyline points="{line}"/>{dots}{scale}'
            f"</svg><p>Loss: a dot is a validation, a point of the line a mean of {n} step(s) of "
            "training.</p>")

def watch(folder):
    """Write watch.html every 5 seconds, until Ctrl-C."""
    seen, sample = [], "No checkpoint yet."
    print(f"open this in a browser: {(folder / 'watch.html').resolve().as_uri()}")
    while True:
        # A run may move its files aside or delete them at any moment. Then the next look will do.
        with contextlib.suppress(OSError, tg.UserError):
            streams = {}
            log = (folder / "log.txt").read_text("utf-8", "replace")
            for step, stream, value in re.findall(r"(?m)^(\d+) ([a-z]+) (-?\d+\.\d+)\n", log):
                streams.setdefault(stream, []).append((int(step), float(value)))
            newest = [(p, p.stat().st_mtime) for p in [*tg.checkpoints(folder).values()][-1:]]
            if newest and newest != seen:
                path, state, model, enc = load(folder)
                cfg, seen = tg.TrainConfig(**state["config"]), newest
                prompt = "\n" if enc.name == "byte" else "The first thing to know is"
                sample = (f"{path.name} (the run is to have {cfg.max_steps} steps) writes:\n"
                          + prompt + "".join(tg.stream_text(model, enc, prompt, cfg, cfg.seed)))
            table = "".join(f"<p>{name}: {rows[-1][1]} at step {rows[-1][0]}</p>"
                            for name, rows in streams.items())
            write(folder / "watch.html", '<meta http-equiv="refresh" content="5">',
                  f"<h2>{html.escape(str(folder))}</h2>", table, curve(streams),
                  f"<pre>{html.escape(sample)}</pre>")
        try:
            time.sleep(5)
        except KeyboardInterrupt:
            return

@torch.no_grad()
def look(folder, text):
    path, _, model, enc = load(folder)
    ids = enc.encode_ordinary(text)
    tg.require(0 < len(ids) <= 128, f"--look: {len(ids)} tokens, and 1 to 128 can be shown")

    def shown(token):  # half of a character, and what cannot be seen, as Python writes it
        text = enc.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace(" ", "␣")

    def rounded(x):
        return x.double().round(decimals=4).tolist()

    shares = []
    for block in model.transformer.h:
        # Of attention's input, queries and keys. Where each token's value is a 1 in a place of its
        # own, what attention() returns are the shares.
        block.attn.register_forward_pre_hook(lambda attn, args: shares.append(rounded(
            tg.attention(*attn.heads(args[0])[:2], torch.eye(len(ids)))[0])))
    probs, top = model(torch.tensor([ids]))[0].softmax(-1).topk(10)
    following = [[*zip(map(shown, t), p)] for t, p in zip(top.tolist(), rounded(probs))]
    data = {"tokens": [*map(shown, ids)], "next": following, "shares": shares}
    # "<" could end the script.
    write(folder / "look.html", f"<h2>{html.escape(str(path))}</h2>",
          LOOK.replace("DATA", json.dumps(data).replace("<", "\\u003c")))
    print(f"open this in a browser: {(folder / 'look.html').resolve().as_uri()}")

def main():
    parser = tg.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log_dir", nargs="?", type=Path, default="log", help="a run's folder (log)")
    parser.add_argument("--look", metavar="TEXT", help="show attention and probabilities of this")
    with tg.exit_codes("watch.py"):
        folder, text = vars(parser.parse_args()).values()
        tg.require((folder / "log.txt").is_file(), f"no log.txt in {folder}: is it a run's folder?")
        torch.set_num_threads(1)  # the run may need the other cores
        watch(folder) if text is None else look(folder, text)

if __name__ == "__main__":
    main()
