"""HellaSwag: many items at a time give the scores of one ending at a time; what a server or a file can do wrong."""
import contextlib
import dataclasses
import hashlib
import http.server
import json
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import hellaswag
import train_gpt2
from common import ROOT, TINY, environment, randomise, ranks, run_here, short_text, talkative
from common import run as run_script
from hellaswag import UserError
from train_gpt2 import GPT, GPTConfig, get_tokenizer

CPU, F32, BYTE = torch.device("cpu"), torch.float32, get_tokenizer("byte")
SMALL = dict(vocab_size=257, n_layer=2, n_head=2, n_embd=32)
two_processes = pytest.mark.skipif(sys.platform == "win32" or not dist.is_gloo_available(), reason="torchrun with gloo")


def make_items(n, seed=0, longest=9):
    """n items as the official file has them: contexts and endings of 1 to `longest` words."""
    rng = np.random.default_rng(seed)

    def text():
        return " ".join("abcdefghijklmnopqrstuvwxyz"[c:c + rng.integers(1, 7)]
                        for c in rng.integers(0, 20, rng.integers(1, longest + 1))) + "."

    return [dict(ind=i, activity_label="a", ctx=text(), split="val", label=int(rng.integers(4)),
                 endings=[text() for _ in range(4)]) for i in range(n)]


def write(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def loaded(items, enc=BYTE):
    return [hellaswag.parse(json.dumps(item), enc, 0, "here") for item in items]


@torch.no_grad()
def one_at_a_time(logits, items, enc=BYTE, S=1024):
    """Summed and mean NLL of each ending, from all logits of one row at a time. S tokens go into the
    model: the last ones but for the very last, which foretells nothing that is asked for."""
    scores = []
    for item in items:
        for text in item["endings"]:
            ending = enc.encode_ordinary(" " + text)
            row = torch.tensor((enc.encode_ordinary(item["ctx"]) + ending)[-(S + 1):])
            assert len(row) > len(ending)
            nll = F.cross_entropy(logits(row[None, :-1])[0], row[1:], reduction="none")[-len(ending):]
            scores.append((nll.sum().item(), nll.mean().item()))
    sums, means = np.array(scores).reshape(-1, 4, 2).transpose(2, 0, 1)
    return sums, means


def assert_same_scores(ours, theirs):
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=2e-5)
        np.testing.assert_array_equal(a.argmin(1), b.argmin(1))


def model_of(make=randomise, block_size=256, **kwargs):
    return make(GPT(GPTConfig(block_size=block_size, **{**SMALL, **kwargs})))


# The scorer

@pytest.mark.parametrize("batch_size", [1, 7, 256, None])
@pytest.mark.parametrize("make", [randomise, talkative])
def test_any_batch_size_gives_the_scores_of_one_ending_at_a_time(make, batch_size):
    items, model = make_items(40), model_of(make)
    theirs = one_at_a_time(model, items)
    assert_same_scores(hellaswag.score(model, loaded(items), CPU, F32, batch_size), theirs)


def test_scores_are_those_of_hugging_faces_model(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(vocab_size=257, n_positions=256, n_layer=2, n_head=2, n_embd=32, bos_token_id=256,
                        eos_token_id=256, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    theirs = randomise(GPT2LMHeadModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    items = make_items(20)
    ours = hellaswag.score(train_gpt2.from_pretrained(str(tmp_path)), loaded(items), CPU, F32)
    assert_same_scores(ours, one_at_a_time(lambda idx: theirs(idx).logits, items))


def test_gpt2s_tokens():
    try:
        enc = get_tokenizer("gpt2")
    except train_gpt2.UserError as e:
        pytest.skip(str(e))
    items, model = make_items(5), model_of(vocab_size=50257)
    theirs = one_at_a_time(model, items, enc)
    assert_same_scores(hellaswag.score(model, loaded(items, enc), CPU, F32), theirs)


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("make", [randomise, talkative])
@pytest.mark.parametrize("S, longest", [(34, 5), (64, 9)])
def test_items_longer_than_the_window_lose_the_beginning_of_their_context(S, longest, make, batch_size):
    items, model = make_items(60, longest=longest), model_of(make, block_size=S)
    lengths = [len(item["ctx"] + " " + ending) for item in items for ending in item["endings"]]
    # One more than the window fits: its last token does not go in.
    assert min(lengths) < S < max(lengths) and S + 1 in lengths and S + 2 in lengths
    assert max(len(" " + ending) for item in items for ending in item["endings"]) <= S
    theirs = one_at_a_time(model, items, S=S)
    assert_same_scores(hellaswag.score(model, loaded(items), CPU, F32, batch_size), theirs)
    assert len({*theirs[0].argmin(1)}) == len({*theirs[1].argmin(1)}) == 4  # not one ending all along


@pytest.mark.parametrize("S", [1, 8, 9])
@torch.no_grad()
def test_an_ending_longer_than_the_window_counts_with_all_its_tokens(S):
    """One that just fits goes in whole, and one that is longer by a token in pieces."""
    model, texts = model_of(block_size=S), make_items(1, longest=20)[0]["endings"]
    items = [dict(make_items(1)[0], endings=texts),
             dict(make_items(1)[0], endings=[text[:S - 1 + k] for k, text in enumerate(texts)])]
    sums, means = hellaswag.score(model, loaded(items), CPU, F32, 1)
    for i, item in enumerate(items):
        for k, text in enumerate(item["endings"]):
            row, n, nll = BYTE.encode_ordinary(item["ctx"] + " " + text), len(" " + text), 0.0
            assert n > S if i == 0 else n == S + k
            size = n if n <= S else max(S // 2, 1)             # pieces of half a window
            for start in range(len(row) - n, len(row), size):
                end = min(start + size, len(row))
                piece = torch.tensor(row[max(end - S - 1, 0):end])
                losses = F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="none")
                nll += losses[start - end:].sum().item()
            assert sums[i, k] == pytest.approx(nll, rel=1e-5)
            assert means[i, k] == pytest.approx(nll / n, rel=1e-5)


def test_scores_of_a_model_that_knows_only_how_frequent_bytes_are():
    model = model_of()
    frequency = torch.arange(1.0, 321) ** 2
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.bias[0] = 1
        model.lm_head.weight[:, 0] = frequency.log()
    nll = -(frequency[:257] / frequency[:257].sum()).log()
    items = make_items(3)
    sums, means = hellaswag.score(model, loaded(items), CPU, F32)
    for i, item in enumerate(items):
        for k, ending in enumerate(item["endings"]):
            expected = sum(nll[byte].item() for byte in b" " + ending.encode())
            assert sums[i, k] == pytest.approx(expected, rel=1e-5)
            assert means[i, k] == pytest.approx(expected / (1 + len(ending)), rel=1e-5)


def test_acc_takes_the_lowest_sum_acc_norm_the_lowest_mean_and_of_equals_the_first():
    model = model_of()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # every byte costs ln 257
    items = loaded([dict(ctx="a", endings=["four", "two", "two", "longer"], label=label) for label in (1, 1, 2, 0)])
    sums, means = hellaswag.score(model, items, CPU, F32)
    assert sums[0] == pytest.approx([n * math.log(257) for n in (5, 4, 4, 7)])
    assert hellaswag.accuracy(sums, items) == 0.5     # 1 is right for two of four
    assert hellaswag.accuracy(means, items) == 0.25   # all equal: takes 0
    assert type(hellaswag.accuracy(sums, items)) is float


@torch.no_grad()
def test_an_empty_context_is_the_beginning_of_a_document():
    items, model = make_items(1), model_of()
    sums, _ = hellaswag.score(model, loaded([dict(items[0], ctx=""), items[0]]), CPU, F32)
    for k, text in enumerate(items[0]["endings"]):
        row = torch.tensor([BYTE.eot_token, *BYTE.encode_ordinary(" " + text)])
        nll = F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum")
        assert sums[0, k] == pytest.approx(nll.item(), rel=1e-5)


def test_scoring_takes_no_random_numbers_and_leaves_no_graph():
    model, state = model_of(), torch.get_rng_state()
    hellaswag.score(model, loaded(make_items(3)), CPU, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("in_training", [False, True])  # where a block leaves bfloat16, too
def test_bfloat16_is_for_the_blocks_alone(in_training):
    items, model = make_items(20), model_of()
    if in_training:
        train_gpt2.swap_classes(model, train_gpt2.faster_classes(train_gpt2.TrainConfig()))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()                  # the blocks do not matter
        model.lm_head.weight[:, 0] += 40.0                     # nor does a number that all logits have in common
        model.transformer.ln_f.bias.copy_(torch.linspace(0.9, 1.1, 32).bfloat16())
    sums, _ = hellaswag.score(model, loaded(items), CPU, torch.bfloat16)
    np.testing.assert_allclose(sums, hellaswag.score(model, loaded(items), CPU, F32)[0], rtol=1e-5)


# Several processes

def checkpoint(path, tokenizer="byte", **kwargs):
    """A checkpoint of train_gpt2.py whose training text is gone."""
    model = model_of(**kwargs)
    cfg = train_gpt2.TrainConfig(data="gone.txt", tokenizer=tokenizer, model="demo", n_layer=2, n_head=2, n_embd=32,
                                 block_size=model.config.block_size, batch_size=1, seq_len=8, total_batch_size=8,
                                 max_steps=9, warmup_steps=0, max_lr=1e-3, min_lr=1e-4, save_every=1)
    torch.save({"format": train_gpt2.FORMAT, "step": 5, "model": model.state_dict(),
                "optimizer": {"state": {}, "param_groups": []}, "position": 0, "best": (math.inf, -1), "data": 0,
                "model_config": dataclasses.asdict(model.config),
                "config": {k: v for k, v in vars(cfg).items() if k not in train_gpt2.NOT_SAVED}}, path)
    return path


@contextlib.contextmanager
def script(monkeypatch, cwd):
    """The script in this process: a function of its flags that returns the exit code."""
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *map(str, flags)])
        try:
            hellaswag.main()
        except SystemExit as e:
            return e.code
        return 0

    monkeypatch.chdir(cwd)
    yield run


@pytest.fixture
def here(tmp_path):
    write(tmp_path / "items.jsonl", make_items(9))
    checkpoint(tmp_path / "m.pt")
    return tmp_path


@two_processes
def test_two_processes_share_the_items_and_print_one_table(here, monkeypatch, capsys):
    flags = ["-m", "m.pt", "-d", "cpu", "--data", "items.jsonl", "--batch_size", 4]  # 3 batches: one has less to do
    done = ranks(2, *flags, cwd=here, script=ROOT / "hellaswag.py")
    with script(monkeypatch, here) as run:
        assert run(*flags) == 0
    first, *table = done.stdout.splitlines()
    assert "| 2 x cpu" in first and table == capsys.readouterr().out.splitlines()[1:]


# What a process of several begins with, and what it ends with.
BEGIN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import time, torch, torch.distributed as dist
import hellaswag, train_gpt2
from common import machine_of
from test_28_hellaswag import BYTE, CPU, F32, loaded, make_items, model_of
import numpy as np
cfg = train_gpt2.TrainConfig(device="cpu", parallel="fsdp")
machine = train_gpt2.Machine(cfg)
machine.meet()
model, items = model_of(), loaded(make_items(11))
"""
END = """
dist.barrier()
time.sleep(0.1)  # as in train_gpt2.py
dist.destroy_process_group()
"""


def together(tmp_path, script):
    """Two processes run script; what they printed."""
    (tmp_path / "together.py").write_text(
        BEGIN.format(root=str(ROOT), tests=str(ROOT / "tests")) + script + END)
    return ranks(2, cwd=tmp_path, script=tmp_path / "together.py").stdout


SHARE = """
from collections import Counter
rows, trunk = Counter(), model.trunk
def counted(idx):
    rows["own"] += len(idx)
    return trunk(idx)
for batch_size in (2, 4, 11, None):
    model.trunk = counted
    share = hellaswag.score(model, items, CPU, F32, batch_size)
    model.trunk = trunk
    for rank in range(2):
        dist.barrier()
        if rank == machine.rank:
            np.save(f"{batch_size}_{rank}.npy", share)
            if batch_size == 2:
                # 6 batches of 8 rows, the last one of 4
                assert rows["own"] == (24 if rank == 0 else 20), rows
"""


@two_processes
def test_two_processes_each_do_their_share_and_both_get_all_scores(tmp_path):
    together(tmp_path, SHARE)
    for batch_size in (2, 4, 11, None):
        whole = hellaswag.score(model_of(), loaded(make_items(11)), CPU, F32, batch_size)
        for rank in range(2):
            np.testing.assert_array_equal(np.load(tmp_path / f"{batch_size}_{rank}.npy"), whole)


FSDP = """
whole = hellaswag.score(model, items, CPU, F32, 4)
model = machine.parallelize(model, cfg)
def step():
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
for _ in range(2):
    step()
    share = hellaswag.score(model, items, CPU, F32, 4)
    np.testing.assert_allclose(share, whole, rtol=1e-6)
step()
print("same", flush=True)
"""


@two_processes
def test_a_model_shared_out_by_fsdp_scores_the_same(tmp_path):
    assert together(tmp_path, FSDP).count("same") == 2  # in one line or two


# Files

LINE = json.dumps(make_items(1)[0])


@pytest.mark.parametrize("line", [
    LINE[:40],
    "[1, 2]",
    '{"ctx": "a", "label": 0}',
    '{"ctx": "a", "label": 0, "endings": ["a", "b", "c"]}',
    '{"ctx": "a", "label": 0, "endings": ["a", "b", "c", "d", "e"]}',
    '{"ctx": "a", "label": 0, "endings": ["a", "b", "c", 4]}',
    '{"ctx": 7, "label": 0, "endings": ["a", "b", "c", "d"]}',
    '{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}',
    '{"ctx": "a", "label": "", "endings": ["a", "b", "c", "d"]}',  # the test split has no labels
    "[" * 100_000,
])
def test_a_broken_line_is_named_by_its_number(tmp_path, line):
    (tmp_path / "items.jsonl").write_text(f"{LINE}\n\n{line}\n{LINE}\n")
    with pytest.raises(UserError) as e:
        hellaswag.load_items(BYTE, tmp_path / "items.jsonl")
    says = f"{tmp_path / 'items.jsonl'}, line 3 is not like the official file's: JSON with ctx, a text, endings, "
    assert str(e.value).startswith(says) and "\n" not in str(e.value)
    assert len(hellaswag.load_items(BYTE, tmp_path / "items.jsonl", limit=1)) == 1


def test_bytes_that_are_no_text_are_a_broken_line_and_no_items_are_none(tmp_path):
    (tmp_path / "a").write_bytes(LINE.encode() + b'\n{"ctx": "\xff"}\n')
    (tmp_path / "b").write_bytes(b"\n")
    with pytest.raises(UserError, match="a, line 2"):
        hellaswag.load_items(BYTE, tmp_path / "a")
    with pytest.raises(UserError, match="b holds no items"):
        hellaswag.load_items(BYTE, tmp_path / "b")


def test_a_label_may_be_a_number_or_a_text():
    assert [item["label"] for item in loaded([dict(make_items(1)[0], label=label) for label in (2, "2")])] == [2, 2]


# The download, from a server that does what the test says

OFFICIAL = "".join(json.dumps(item) + "\n" for item in make_items(1500)).encode()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server on this machine. .answers is what it does, one a request, the last one for ever; .ranges what was asked
    for. And a folder where the file is to be."""
    state = SimpleNamespace(answers=["file"], ranges=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked = self.headers["Range"]
            state.ranges.append(asked)
            answer = state.answers.pop(0) if len(state.answers) > 1 else state.answers[0]
            start = int(asked.split("=")[1].split("-")[0]) if asked and answer != "no ranges" else 0
            body, status = OFFICIAL[start:], 206 if start else 200
            if answer == "wrong file":
                body = OFFICIAL.replace(b'"label"', b'"lapel"')[start:]
            elif answer == "page":
                body, status = b"<html>Please log in to the network of this hotel</html>", 200
            elif isinstance(answer, int):
                body, status = b"<html>error</html>", answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(OFFICIAL) - 1}/{len(OFFICIAL)}")
            self.end_headers()
            if answer == "half":
                body = body[:len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{httpd.server_port}/hellaswag_val.jsonl")
        monkeypatch.setattr(hellaswag, "SIZE", len(OFFICIAL))
        monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(OFFICIAL).hexdigest())
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        state.folder = tmp_path / "hellaswag"
        yield state
        httpd.shutdown()


def fails():
    with pytest.raises(UserError, match="cannot download http.* put the file at hellaswag.hellaswag_val.jsonl") as e:
        hellaswag.load_items(BYTE)
    assert "\n" not in str(e.value)
    return str(e.value)


def succeeds(server):
    assert len(hellaswag.load_items(BYTE, limit=20)) == 20
    assert (server.folder / "hellaswag_val.jsonl").read_bytes() == OFFICIAL
    assert not (server.folder / "hellaswag_val.part").exists()


def test_the_file_is_downloaded_once(server):
    succeeds(server)
    succeeds(server)
    assert server.ranges == [None]


@pytest.mark.parametrize("answer", ["page", "wrong file", 403, 404, 500, 503])
def test_an_error_page_or_another_file_is_never_taken_for_data(server, answer):
    server.answers = [answer]
    message = fails()
    assert not (server.folder / "hellaswag_val.jsonl").exists()
    assert {"page": "size", "wrong file": "checksum"}.get(answer, str(answer)) in message
    server.answers = ["file"]
    succeeds(server)


@pytest.mark.parametrize("then", ["file", "no ranges"])
def test_a_broken_connection_is_taken_up_where_it_broke(server, then):
    server.answers = ["half", then]
    succeeds(server)
    assert len(OFFICIAL) > 2**18 and server.ranges == [None, f"bytes={len(OFFICIAL) // 2 // 2**16 * 2**16}-"]


def test_a_download_that_was_given_up_is_continued_by_the_next_run(server):
    server.answers = ["half", 503]
    assert "503" in fails()
    server.answers = ["file"]
    succeeds(server)
    assert server.ranges[-1] == server.ranges[1] and server.ranges[1]


@pytest.mark.parametrize("left, asked", [
    (OFFICIAL[:1000], "bytes=1000-"), (OFFICIAL + b"more", None), (b"", None)])
def test_what_an_earlier_run_left_is_continued(server, left, asked):
    server.folder.mkdir()
    (server.folder / "hellaswag_val.part").write_bytes(left)
    succeeds(server)
    assert server.ranges == [asked]


def test_what_an_earlier_run_left_spoilt_is_dropped(server):
    server.folder.mkdir()
    (server.folder / "hellaswag_val.part").write_bytes(b"x" * 1000)
    assert "checksum" in fails()
    succeeds(server)


def test_no_server_is_one_line(server, monkeypatch):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/hellaswag_val.jsonl")
    fails()


def test_a_file_of_that_name_in_the_way_is_one_line(server):
    server.folder.write_text("")
    fails()


# The program, and what it needs to find the test's server.
WITH_SERVER = """
import sys
sys.path.insert(0, {root!r})
import hellaswag
hellaswag.URL, hellaswag.SIZE, hellaswag.SHA256 = {url!r}, {size}, {sha256!r}
hellaswag.main()
"""


@two_processes
@pytest.mark.parametrize("answer", ["file", 404])
def test_two_processes_download_once_and_fail_together(server, tmp_path, answer):
    server.answers = [answer]
    checkpoint(tmp_path / "m.pt")
    (tmp_path / "with_server.py").write_text(WITH_SERVER.format(
        root=str(ROOT), url=hellaswag.URL, size=hellaswag.SIZE, sha256=hellaswag.SHA256))
    done = ranks(2, "-m", "m.pt", "-d", "cpu", "--limit", 20, cwd=tmp_path, check=False,
                 script=tmp_path / "with_server.py")
    if answer == "file":
        assert server.ranges == [None]
        assert done.returncode == 0 and "| 20 items" in done.stdout
    else:
        assert server.ranges in ([None], [None, None])  # the other one tries, too, if it still can
        assert done.returncode != 0 and "hellaswag.py: cannot download" in done.stderr
        assert 'hellaswag.py", line' not in done.stderr  # no traceback of ours


# The command line

def test_table_and_scores_of_a_checkpoint(here, monkeypatch, capsys):
    score, ours = hellaswag.score, []
    monkeypatch.setattr(hellaswag, "score", lambda *args: ours.append(score(*args)) or ours[0])
    with script(monkeypatch, here) as run:
        assert run("-m", "m.pt", "-d", "cpu", "--data", "items.jsonl", "--limit", 8) == 0
    out, items = capsys.readouterr().out, make_items(9)[:8]
    theirs = one_at_a_time(model_of(), items)
    assert_same_scores(ours[0], theirs)
    assert "HellaSwag | m.pt | 1 x cpu, float32 | 8 items in" in out and "a model of bytes" in out
    for metric, scores in zip(("acc", "acc_norm"), theirs):
        p = np.mean([s.argmin() == item["label"] for s, item in zip(scores, items)])
        assert 0 < p < 1
        assert f"\n{metric:8}  {p:.4f}   {math.sqrt(p * (1 - p) / 8):.4f}\n" in out
    assert sorted(p.name for p in here.iterdir()) == ["items.jsonl", "m.pt"]


def test_newest_checkpoint_and_hugging_face_folder(here, monkeypatch, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel
    (here / "log").mkdir()
    checkpoint(here / "log" / "model_00005.pt")
    config = GPT2Config(vocab_size=257, n_positions=256, n_layer=1, n_head=2, n_embd=32)
    randomise(GPT2LMHeadModel(config)).save_pretrained(here / "hf")
    with script(monkeypatch, here) as run:
        assert run("-d", "cpu", "--data", "items.jsonl") == 0
        assert f"| {Path('log', 'model_00005.pt')} |" in capsys.readouterr().out
        assert run("-m", "hf", "--tokenizer", "byte", "-d", "cpu", "--data", "items.jsonl") == 0
        assert "HellaSwag | hf |" in capsys.readouterr().out


@pytest.mark.parametrize("flags, says", [
    (["-m", "gone.pt"], "gone.pt"), (["-m", "gone", "--tokenizer", "byte"], "neither a folder nor a GPT-2"),
    ([], "no checkpoint in log"), (["-m", "m.pt", "--limit", "0"], "--limit"), (["--batch_size", "-1"], "--batch_size"),
    (["-d", "tpu"], "tpu"), (["-m", "m.pt", "--data", "gone.jsonl"], "gone.jsonl"), (["--what"], "--what"),
    (["-m", "scratch"], "-m scratch"), (["-m", "m.pt", "--data", "."], "cannot read .")])
def test_what_cannot_be_is_one_line_and_exit_code_2(here, monkeypatch, capsys, flags, says):
    with script(monkeypatch, here) as run:
        assert run(*flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("hellaswag.py: ") and err.count("\n") == 1 and says in err


def test_a_model_of_no_numbers_has_no_score(here, monkeypatch, capsys):
    def spoilt(model):
        model.transformer.wpe.weight.data.fill_(math.nan)
        return model

    checkpoint(here / "bad.pt", make=spoilt)
    with script(monkeypatch, here) as run:
        assert run("-m", "bad.pt", "-d", "cpu", "--data", "items.jsonl") == 2
    out, err = capsys.readouterr()
    assert "no numbers" in err and err.count("\n") == 1 and "acc" not in out


def test_importing_does_nothing_not_even_import_the_model_and_help_tells_all(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hellaswag\n"
            "assert 'hellaswag' in sys.modules and 'train_gpt2' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])
    done = subprocess.run([sys.executable, str(ROOT / "hellaswag.py"), "--help"], cwd=tmp_path, env=environment(),
                          capture_output=True, text=True)
    assert done.returncode == 0 and "0.2955" in done.stdout and "--batch_size" in done.stdout


# In a training run ----------------------------------------------------------------------------------------------------

SCORED = [*TINY, "--max_steps", "4", "--eval_every", "0", "--sample_every", "0", "--save_every", "0"]


def rows_of(log_dir):
    return [row.split() for row in (log_dir / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_a_training_run_scores_what_the_script_scores_and_trains_as_without(tmp_path, monkeypatch, flags):
    if flags and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("needs a C++ compiler")
    folder = short_text(tmp_path)
    (folder / "hellaswag").mkdir()
    write(folder / "hellaswag" / "hellaswag_val.jsonl", make_items(40))
    run_here(monkeypatch, folder, *SCORED, *flags, "--log_dir", "without")
    run_here(monkeypatch, folder, *SCORED, *flags, "--hellaswag_every", "2", "--save_every", "4")
    rows = rows_of(folder / "log")
    hella = [float(value) for _, stream, value in rows if stream == "hella"]
    assert [step for step, stream, _ in rows if stream == "hella"] == ["0", "2", "4"]
    assert [row for row in rows if row[1] == "train"] == rows_of(folder / "without")
    if not flags:
        done = run_script("-d", "cpu", cwd=folder, script=ROOT / "hellaswag.py")
        assert f"acc_norm  {hella[-1]:.4f}" in done.stdout


def test_a_training_run_without_the_items_says_so_once_and_trains_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/none.jsonl")
    run_here(monkeypatch, short_text(tmp_path), *SCORED, "--hellaswag_every", "2")
    out = capsys.readouterr().out
    assert out.count("HellaSwag is off") == 1 and "Done" in out
    assert [stream for _, stream, _ in rows_of(tmp_path / "log")] == ["train"] * 4
