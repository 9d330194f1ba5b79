"""The pages of watch.py show what log.txt and the model say, worked out here in another way."""
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import train_gpt2
import watch
from common import ROOT, TINY, environment, randomise, run_here, short_text
from train_gpt2 import get_tokenizer, load_checkpoint, new_model

RUN = [*TINY, "--eval_every", "2", "--save_every", "2", "--sample_every", "0",
       "--max_new_tokens", "40"]
TEXT = "MIRA: é</script>\n<b>&"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a finished run of each recipe."""
    here = short_text(tmp_path_factory.mktemp("here"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        for recipe in ("gpt2", "modern"):
            run_here(monkeypatch, here, *RUN, "--recipe", recipe, "--log_dir", recipe)
            # Weights so large that heads differ, and no two shares or probabilities are alike.
            path = here / recipe / "model_00006.pt"
            state = load_checkpoint(path)
            model = new_model(recipe, **state["model_config"])
            randomise(model, std=0.5)
            state["model"] = model.state_dict()
            train_gpt2.save_checkpoint(path, state)
    return here


@pytest.fixture
def page(here, monkeypatch, capsys):
    def once(seconds):
        raise KeyboardInterrupt  # the user's Ctrl-C, after the first look

    def page(*flags, sleep=once):
        """Run the script; what it wrote, as a browser reads it."""
        monkeypatch.chdir(here)
        monkeypatch.setattr(sys, "argv", ["watch.py", *map(str, flags)])
        monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep))
        watch.main()
        name = "look.html" if "--look" in flags else "watch.html"
        path = here / str(flags[0]) / name
        assert capsys.readouterr().out == f"open this in a browser: {path.resolve().as_uri()}\n"
        return Page(path.read_text(encoding="utf-8"))
    return page


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text within each kind of tag."""
    def __init__(self, text):
        super().__init__()
        self.tags, self.pieces, self.open = [], [], [""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "html"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.pieces.append((self.open[-1], data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag):
        return "".join(data for name, data in self.pieces if name == tag)


def data_of(page):
    """The JSON of a page that was made by --look."""
    return json.loads(re.search(r"const data = (\{.*\}), \$ =", page.text("script")).group(1))


def rows_of(log):
    rows = [row.split() for row in log.read_text(encoding="utf-8").splitlines()]
    return [(int(step), stream, float(value)) for step, stream, value in rows]


def losses_of(page, last, low, high):
    """(step, loss) of the line's points and of the dots, read off the curve's own scale."""
    (line,) = page.all("polyline")
    line = [tuple(map(float, point.split(","))) for point in line["points"].split()]
    dots = [(float(dot["cx"]), float(dot["cy"])) for dot in page.all("circle")]
    return [[((x - 40) / 750 * last, low + (270 - y) / 260 * (high - low)) for x, y in points]
            for points in (line, dots)]


def test_the_curve_has_the_losses_of_the_log(page, here):
    rows = rows_of(here / "gpt2" / "log.txt")
    values = [value for _, _, value in rows]
    shown = page("gpt2")
    for points, stream in zip(losses_of(shown, 6, min(values), max(values)), ("train", "val")):
        wanted = [(step, value) for step, name, value in rows if name == stream]
        assert len(wanted) > 3
        assert points == [pytest.approx(pair, abs=1e-2) for pair in wanted]
        for (_, value), (_, y) in zip(wanted, points):
            assert y == pytest.approx(value, abs=1e-4 * (max(values) - min(values)))
    # The scale says which losses are at the bottom and at the top, and which step at the right.
    ticks = shown.all("text")
    assert [tick["y"] for tick in ticks[::2]] == ["274", "209", "144", "79", "14"]
    scale = [float(data) for tag, data in shown.pieces if tag == "text"]
    assert scale[:2] == [pytest.approx(min(values), abs=0.006), 0]
    assert scale[-2:] == [pytest.approx(max(values), abs=0.006), 6] and ticks[-1]["x"] == "790.0"


def test_a_long_run_is_drawn_by_means_and_whatever_is_no_row_is_left_out(tmp_path):
    streams = {"train": [(step, float(step % 4)) for step in range(3000)], "val": [(0, 9.0)]}
    page = Page(watch.curve(streams))
    line, _ = losses_of(page, 2997, 1.0, 9.0)
    assert len(line) == 1000 and "a mean of 3 step(s)" in page.text("p")
    assert line[1] == pytest.approx((3, (3 + 0 + 1) / 3), abs=0.02)
    assert "No loss yet" in watch.curve({"hella": [(0, 0.25)]})
    assert len(Page(watch.curve({"train": [(0, 5.5)]})).all("polyline")) == 1


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_it_shows_what_the_newest_checkpoint_writes(page, here, monkeypatch, capsys, recipe):
    run_here(monkeypatch, here, "--prompt", "\n", "--log_dir", recipe, "--device", "cpu")
    said = capsys.readouterr().out[:-1]
    text = page(recipe).text("pre")
    assert text.startswith("model_00006.pt") and text.endswith(f"writes:\n{said}")


def test_the_page_follows_the_run_and_the_run_that_comes_after_it(page, here):
    folder = shutil.copytree(here / "gpt2", here / "again")
    log = folder / "log.txt"
    rows = log.read_text(encoding="utf-8")
    seen = []

    def sleep(seconds):
        """What happens to the folder between two looks."""
        seen.append(Page((folder / "watch.html").read_text(encoding="utf-8")))
        if len(seen) == 1:  # a step more, and half a row
            log.write_bytes(rows.encode() + b"6 train 5.500000\n7 tra\xff")
        elif len(seen) == 2:  # a new run moves it all aside
            (folder / "earlier_run_1").mkdir()
            for path in [log, *folder.glob("model_*.pt")]:
                path.rename(folder / "earlier_run_1" / path.name)
        elif len(seen) == 3:  # and takes a step
            log.write_text("0 train 5.250000\n", encoding="utf-8")
        else:
            raise KeyboardInterrupt
        assert seconds == 5

    page("again", sleep=sleep)
    assert all("5" in [meta.get("content") for meta in p.all("meta")] for p in seen)
    assert ["train: 5.5 at step 6" in p.text("p") for p in seen] == [False, True, True, False]
    assert "train: 5.25 at step 0" in seen[3].text("p")


def test_a_run_without_a_checkpoint_shows_its_losses_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text("0 val 5.500000\n0 train 5.400000\n", encoding="utf-8")

    def sleep(seconds):
        raise KeyboardInterrupt  # the user's Ctrl-C

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep))
    watch.watch(tmp_path)
    shown = Page((tmp_path / "watch.html").read_text(encoding="utf-8"))
    assert "No checkpoint yet" in shown.text("pre") and len(shown.all("circle")) == 1


def naive_look(model, recipe, ids):
    """(the shares of each head, the probabilities), one position at a time, from the weights."""
    weights = {name: w.double() for name, w in model.state_dict().items()}
    C, nh, hs = 32, 2, 16

    def norm(x, name):
        if recipe == "modern":
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def layer(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def turned(x, t):
        z = torch.complex(x[:hs // 2], x[hs // 2:])
        angles = torch.tensor([t * 10_000 ** (-2 * i / hs) for i in range(hs // 2)]).double()
        z = z * torch.polar(torch.ones_like(angles), -angles)
        return torch.cat((z.real, z.imag))

    x = weights["transformer.wte.weight"][ids]
    x = norm(x, "") if recipe == "modern" else x + weights["transformer.wpe.weight"][:len(ids)]
    h = "transformer.h.0"
    y = norm(x, f"{h}.ln_1")
    if recipe == "modern":
        q, k, v = (layer(y, f"{h}.attn.c_{name}") for name in "qkv")
    else:
        q, k, v = layer(y, f"{h}.attn.c_attn").split(C, dim=1)
    shares, out = torch.zeros(nh, len(ids), len(ids)).double(), torch.zeros(len(ids), C).double()
    for head in range(nh):
        at = slice(head * hs, head * hs + hs)
        for t in range(len(ids)):
            scores = []
            for s in range(t + 1):
                a, b = q[t, at], k[s, at]
                if recipe == "modern":
                    a, b = norm(turned(a, t), ""), norm(turned(b, s), "")
                scores.append(math.exp(a @ b / math.sqrt(hs)))
            for s in range(t + 1):
                shares[head, t, s] = scores[s] / sum(scores)
                out[t, at] += shares[head, t, s] * v[s, at]
    x = x + layer(out, f"{h}.attn.c_proj")
    y = layer(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
    y = y.relu() ** 2 if recipe == "modern" else torch.nn.functional.gelu(y, approximate="tanh")
    x = norm(x + layer(y, f"{h}.mlp.c_proj"), "transformer.ln_f")
    logits = (x @ weights["lm_head.weight"].T)[:, :257]
    logits = 15 * torch.tanh(logits / 15) if recipe == "modern" else logits
    return shares, logits.softmax(-1)


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_look_shows_the_shares_and_probabilities_that_follow_from_the_weights(page, here, recipe):
    shown = page(recipe, "--look", TEXT)
    data = data_of(shown)
    state = load_checkpoint(here / recipe / "model_00006.pt")
    model = new_model(recipe, **state["model_config"])
    model.load_state_dict(state["model"])
    enc = get_tokenizer("byte")
    ids = enc.encode_ordinary(TEXT)
    wanted, probs = naive_look(model, recipe, ids)
    (shares,) = torch.tensor(data["shares"]).double()  # one layer
    assert shares.shape == (2, len(ids), len(ids))
    assert (shares.sum(-1) - 1).abs().max() < 1e-3  # rounded to 4 digits each
    assert (shares - wanted).abs().max() < 1e-3
    # Heads and rows that are alike would not show a mix-up.
    assert (wanted[0] - wanted[1]).abs().max() > 0.05
    assert (wanted - torch.eye(len(ids))).abs().max() > 0.05
    assert len(data["next"]) == len(ids)
    for following, p in zip(data["next"], probs):
        top = p.topk(10)
        assert [share for _, share in following] == pytest.approx(top.values.tolist(), abs=1e-3)
        for (text, share), value, token in zip(following, *top):
            # Where two are as probable as each other, their order is open.
            near = [i for i, q in enumerate(p) if abs(q - value) < 1e-3]
            assert text in [shown_by_hand(i) for i in near]


def shown_by_hand(token):
    """A byte as the page shows it."""
    if token == 256:
        return "<|endoftext|>"
    special = {9: "\\t", 10: "\\n", 13: "\\r", 32: "␣"}
    return special.get(token, chr(token) if 32 < token < 127 else f"\\x{token:02x}")


def test_any_text_is_shown_and_none_of_it_is_taken_for_html(page):
    shown = page("gpt2", "--look", TEXT)
    tokens = ["\\xc3", "\\xa9"] + list("</script>") + ["\\n"] + list("<b>&")
    assert data_of(shown)["tokens"] == list("MIRA:") + ["␣"] + tokens
    # Nothing in it could end the script, whatever a token's text may be, and no tag begins there.
    assert "<" not in re.search(r"const data = .*", shown.text("script")).group()
    assert shown.open == [""] and not shown.all("b") and len(shown.all("script")) == 1


def test_a_sample_is_escaped_too(page, monkeypatch):
    monkeypatch.setattr(train_gpt2, "stream_text", lambda *args: iter(["</pre><b>", "&amp;", "é"]))
    shown = page("gpt2")
    assert shown.text("pre").endswith("writes:\n\n</pre><b>&amp;é") and not shown.all("b")


@pytest.mark.vocabulary
def test_gpt2s_tokens_may_be_half_characters_and_words(here, monkeypatch, capsys):
    flags = [*RUN[:-2], "--tokenizer", "gpt2", "--max_steps", "2", "--log_dir", "words"]
    run_here(monkeypatch, here, *flags)
    watch.look(here / "words", "The sea 雪")
    page = Page((here / "words" / "look.html").read_text(encoding="utf-8"))
    assert data_of(page)["tokens"] == ["The", "␣sea", "␣\\xe9", "\\x9b", "\\xaa"]


@pytest.mark.parametrize("flags, says", [
    (["nowhere"], "no log.txt in nowhere"), (["bare", "--look", "x"], "no checkpoint in bare"),
    (["gpt2", "--look", ""], "0 tokens"), (["gpt2", "--look", "x" * 129], "129 tokens"),
    (["gpt2", "--look", "x" * 33], "block_size=32"), (["gpt2", "--lo"], "--lo"),
    (["gpt2", "--what"], "--what")], ids=str)
def test_what_cannot_be_is_one_line_and_exit_code_2(here, flags, says):
    (here / "bare").mkdir(exist_ok=True)
    (here / "bare" / "log.txt").write_text("", encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "tests" / "watch.py", *flags], cwd=here,
                          env=environment(), capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("watch.py: ") and done.stderr.count("\n") == 1
    assert says in done.stderr
