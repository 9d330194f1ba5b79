"""The README's links, numbers, commands, drawing are right; each step of the history still runs."""
import math
import os
import re
import subprocess

import pytest
import torch

import draw
import train_gpt2
from common import ROOT, run
from links import with_lines

README = (ROOT / "README.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\| (\d\d) \| \[`(\w+)`\]\(../../commit/(\w+)\) \| (.+?) \|", README, re.M)


def git(*args):
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True)


def history():
    """The lecture's commits, {hash: title}, or a skip where there is no history, as in a shallow clone or a tarball."""
    log = git("log", "--format=%h%x09%s").stdout.decode() if (ROOT / ".git").exists() else ""
    found = dict(line.split("\t") for line in log.splitlines() if re.match(r"\w+\t\d\d: ", line))
    return found if len(found) >= 30 else pytest.skip("no git history here")


def test_each_link_into_a_file_points_at_the_line_that_it_names():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 40
    for name, file, line in links:
        text = (ROOT / file).read_text(encoding="utf-8")
        there = text.splitlines()[int(line) - 1]
        assert re.search(rf"\b{re.escape(name)}\b", there), f"{file}:{line} is not {name}: {there}"
        if re.search(rf"^ *(class|def) {re.escape(name)}\b", text, re.M):
            assert re.match(rf" *(class|def) {re.escape(name)}\b", there), f"{file}:{line} only uses {name}"


def test_the_line_numbers_are_those_that_links_py_would_write():
    assert with_lines(README) == README
    assert with_lines("[`GPTConfig`](train_gpt2.py#L1)") != "[`GPTConfig`](train_gpt2.py#L1)"


def test_files_and_pictures_that_it_links_are_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert target.startswith("../../commit/") or (ROOT / target).exists(), target


def test_links_within_it_lead_to_headings():
    headings = [re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
                for h in re.findall(r"^## (.+)$", README, re.M)]
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert links and set(links) <= set(headings)


def test_it_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 280


def test_the_two_commands_are_a_line_each_and_install_what_they_need():
    commands = re.findall(r"^pip install -r (\S+) && (.+)$", README, re.M)
    assert commands == [("requirements.txt", "python train_gpt2.py"),
                        ("tests/requirements.txt", "python -m pytest")]
    needed, tests = ((ROOT / file).read_text(encoding="utf-8").splitlines() for file, _ in commands)
    names = [line.split("==")[0] for line in needed]
    assert names == "torch numpy tiktoken transformers datasets tqdm".split()
    assert tests[0] == "-r ../requirements.txt"
    pins = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?==([\d.]+)", line) for line in needed + tests[1:]]
    assert all(pins)
    version = {pin[2] for pin in pins if pin[1] == "transformers"}
    assert len(version) == 1  # the tests have no other one
    assert f'"transformers[serving]=={version.pop()}"' in README


@pytest.mark.skipif(os.name == "nt", reason="a script for bash")
def test_ci_runs_the_command_of_the_readme():
    line = re.search(r"^command=.+$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M).group()
    done = subprocess.run(["bash", "-c", f'{line}; echo "$command"'], cwd=ROOT,
                          capture_output=True, encoding="utf-8")
    assert done.stdout == "pip install -r tests/requirements.txt && python -m pytest\n"


def test_the_drawing_is_what_the_script_makes_of_the_code_as_it_is():
    drawn = (ROOT / "assets/model.svg").read_text(encoding="utf-8")
    assert draw.svg() == drawn, "python tests/draw.py"
    # The boxes hold all parameters; of two blocks, the one at the right is the first once more.
    counts = [int(n.replace(",", "")) for n in re.findall(r">([\d,]+)</text>", drawn)]
    left = [n for n, x in zip(counts, re.findall(r'x="(\d+)"[^>]*>[\d,]+</text>', drawn)) if int(x) < 424]
    cfg = draw.default_run()
    model = train_gpt2.new_model(cfg.recipe, vocab_size=257, **{name: getattr(cfg, name) for name in train_gpt2.SHAPE})
    assert sum(left) == train_gpt2.num_params(model) == 446_080


def test_the_words_have_the_numbers_of_the_default_run():
    words = dict(re.findall(r"^\| \*\*([\w ]+)\*\* \| (.+?) \|$", README, re.M))
    assert len(words) >= 20
    cfg = draw.default_run()
    enc = train_gpt2.get_tokenizer(cfg.tokenizer)
    (text,), (kept,) = train_gpt2.open_data(ROOT / "input.txt", enc)
    model = train_gpt2.new_model(cfg.recipe, vocab_size=enc.n_vocab,
                                 **{name: getattr(cfg, name) for name in train_gpt2.SHAPE})
    windows = (len(text) - 1) // cfg.seq_len
    last = r"^step  3600 \| val loss ([\d.]+) \| perplexity ([\d.]+) \| ([\d.]+) bits"
    val_loss, perplexity, bits = map(float, re.search(last, README, re.M).groups())
    assert perplexity == pytest.approx(math.exp(val_loss), abs=0.005)
    assert bits == pytest.approx(val_loss / math.log(2), abs=0.0005)
    steps = windows * cfg.seq_len / cfg.total_batch_size  # of an epoch
    count, large = f"{train_gpt2.num_params(model):,}", train_gpt2.GPTConfig
    for word, numbers in {
        "token": [f"{len(text) + len(kept):,}", f"{large.vocab_size:,}"],
        "context": [cfg.block_size, f"{large.block_size:,}"],
        "batch": [f"{cfg.total_batch_size // cfg.seq_len} of {cfg.seq_len}",
                  f"{cfg.total_batch_size:,}"],
        "epoch": [f"{steps:.0f} steps", f"{cfg.max_steps / steps:.1f}"],
        "parameter": [count], "gradient": [count], "embedding": [cfg.n_embd, enc.n_vocab],
        "block": [cfg.n_layer, large.n_layer], "head": [cfg.n_head, cfg.n_embd // cfg.n_head],
        "logit": [enc.n_vocab], "val loss": [val_loss],
        "nat": [f"ln {enc.n_vocab} = {math.log(enc.n_vocab):.2f}", f"{1 / math.log(2):.3f}"],
        "perplexity": [perplexity], "bits per byte": [bits], "step": [f"{cfg.max_steps:,}"],
        "learning rate": [f"{cfg.max_lr:.2e}", f"{cfg.warmup_steps} steps", f"{cfg.min_lr:.2e}"],
        "norm": [f"than {cfg.grad_clip:.0f} "], "checkpoint": [f"{cfg.save_every} steps"],
    }.items():
        for number in numbers:
            whole = rf"(?<![\d.,]){re.escape(str(number))}(?!\d|[.,]\d)"
            assert re.search(whole, words[word]), (word, number)


def test_the_hours_on_a_gpu_follow_from_its_peak_or_from_what_was_measured():
    rows = re.findall(r"^\| ([\w ]+) \| ([\d.,]+) \| ([\d.]+) \| ([\d.]+) \| "
                      r"(computed|.*?([\d.]+) (k|M) tokens/s)", README, re.M)
    assert len(rows) == 9
    with torch.device("meta"):
        flops = train_gpt2.flops_per_token(train_gpt2.GPT(train_gpt2.GPTConfig()), 1024)
    factors = re.search(r"is that of `gpt2` x ([\d.]+) x ([\d.]+)\.", README)
    share, longer = map(float, factors.groups())
    for gpu, peak, hours, modern, how, speed, unit in rows:
        cards, name = re.fullmatch(r"(?:(\d) x )?(.+)", gpu).groups()
        peak = float(peak.replace(",", "")) / int(cards or 1)
        assert train_gpt2.PEAK_TFLOPS.get(name, peak) == pytest.approx(peak, abs=0.05)
        tokens = 0.48 * peak * 1e12 / flops
        if how != "computed":
            times = 2 if how.startswith("twice") else 1
            tokens = float(speed) * {"k": 1e3, "M": 1e6}[unit] * times
        takes = 10e9 / tokens / 3600
        for shown, true in ((hours, takes), (modern, takes * share * longer)):
            digits = len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(true, abs=0.51 / 10 ** digits), (gpu, shown, true)


LONG = {name: draw.read_log(name) for name in draw.RUNS}
LONG_README = (ROOT / "assets/run/README.md").read_text(encoding="utf-8")


def step_after(tokens):
    """The validated step after so many million tokens, which are rounded."""
    millions = {round(step * draw.TOKENS_A_STEP / 1e6): step for step in range(0, 1601, 80)}
    return millions[int(tokens)]


def cells(text, first):
    """The rows of the table whose first row begins with these words, as lists of words."""
    table = text[text.index(f"\n| {first}") + 1:].split("\n\n")[0].splitlines()
    rows = [row.strip("|").split("|") for row in table if "---" not in row]
    return [[cell.strip() for cell in row] for row in rows]


def shows(shown, true):
    return float(shown) == pytest.approx(true, abs=0.51 / 10 ** len(shown.partition(".")[2]))


def test_the_logs_of_the_long_runs_are_whole():
    every = {"gpt2": (1600, 160, 320), "modern_third": (480, 80, 240), "modern": (1600, 160, 320)}
    for name, (end, evals, scores) in every.items():
        path = ROOT / f"assets/run/{name}.txt"
        rows = [row.split() for row in path.read_text(encoding="utf-8").splitlines()]
        assert path.stat().st_size < 200_000 and all(len(row) == 3 for row in rows)
        vals, hellas = range(0, end + 1, evals), range(0, end + 1, scores)
        for stream, steps in {"train": [*range(0, end, 10), end - 1], "val": vals, "minutes": vals,
                              "hella": hellas}.items():
            found = [int(step) for step, its, _ in rows if its == stream]
            if name == "modern":  # begins as modern_third, which validates at step 80, too
                found = [step for step in found if step != 80 or stream == "train"]
            assert found == list(steps), (name, stream)
        minutes = list(LONG[name]["minutes"].values())
        assert minutes == sorted(minutes)
    shared = [step for step in LONG["modern"]["train"] if step <= 240]
    assert len(shared) == 25
    modern, third = LONG["modern"]["train"], LONG["modern_third"]["train"]
    assert all(modern[step] == third[step] for step in shared)


def test_the_numbers_of_the_long_runs_are_those_of_their_logs():
    runs = cells(LONG_README, "log | flags")[1:]
    assert len(runs) == 3
    for name, _, steps, tokens, *_, val, hella in runs:
        log = LONG[re.match(r"\[(\w+)", name)[1]]
        end = int(steps.replace(",", ""))
        assert max(log["val"]) == end == step_after(tokens.split()[0])
        assert shows(val, log["val"][end]) and shows(hella, log["hella"][end])
    table = cells(LONG_README, "tokens | val loss, gpt2")[1:]
    assert len(table) == 11
    for tokens, *values in table:
        step = step_after(tokens.split()[0])
        columns = zip(("gpt2", "modern") * 2, ("val", "val", "hella", "hella"))
        for shown, (name, stream) in zip(values, columns, strict=True):
            assert bool(shown) == (step in LONG[name][stream]), (step, stream)
            assert not shown or shows(shown, LONG[name][stream][step]), (step, name, shown)
    for step, _, after in cells(LONG_README, "step | loss before")[1:]:
        assert shows(after, LONG["gpt2"]["train"][int(step)])


def test_the_readme_says_of_the_long_runs_what_their_logs_say():
    head, *lines = cells(README, "tokens | 0 | 84 M")
    assert len(lines) == 2
    for name, line in zip(("gpt2", "modern"), lines):
        assert f"`{name}`" in line[0]
        for tokens, shown in zip(head[1:], line[1:], strict=True):
            assert shows(shown, LONG[name]["val"][step_after(tokens.split()[0])]), (name, tokens)
    row = re.search(r"^\| GPT-2's size, books, steps of 524.*", README, re.M).group()
    claims = re.findall(r"(\d\.\d+) after (\d+) M", row)
    for (shown, tokens), name in zip(claims, ("gpt2", "modern_third", "modern"), strict=True):
        val = LONG[name]["val"]
        assert max(val) == step_after(tokens) and shows(shown, val[max(val)]), name
    scores = re.search(r"After (\d+) M tokens `gpt2` had ([\d.]+) and `modern` ([\d.]+):", README)
    for name, shown in zip(("gpt2", "modern"), scores.groups()[1:]):
        assert shows(shown, LONG[name]["hella"][step_after(scores[1])])
    tokens, loss, theirs, end = re.search(
        r"`modern` read (\d+) M tokens to be at ([\d.]+), and `gpt2` was at ([\d.]+) after (\d+) M",
        README).groups()
    third = LONG["modern_third"]["val"][step_after(tokens)]
    gpt2 = LONG["gpt2"]["val"][step_after(end)]
    assert shows(loss, third) and shows(theirs, gpt2) and third < gpt2
    share = float(re.search(r"is that of `gpt2` x ([\d.]+) x", README)[1])
    assert share == pytest.approx(step_after(tokens) / step_after(end))


def test_the_speeds_of_the_long_runs_follow_from_each_other():
    def speed(shown):
        number, unit = shown.split()[:2]
        return float(number) * {"k": 1e3, "M": 1e6}[unit]

    def close(shown, true):
        return shown == pytest.approx(true, rel=3e-3)

    for _, _, _, _, ms, _, fast, _, _ in cells(LONG_README, "log | flags")[1:]:
        assert close(speed(fast), draw.TOKENS_A_STEP / float(ms.split(",")[0]) * 1000)
    rows = {row[0]: row[1:] for row in cells(LONG_README, "| 1 GPU")}
    ms = {name: [float(re.match(r"[\d.]+", cell)[0]) if cell else None for cell in row[:3]]
          for name, row in rows.items() if "recipe" in name}
    assert len(ms) == 3
    for name, (one, _, four) in ms.items():
        _, fast = rows[name][2].split(", ")
        assert close(speed(fast), draw.TOKENS_A_STEP / four * 1000), name
        assert float(rows[name][3].split()[0]) == pytest.approx(one / four, abs=0.006), name
    gpt2, modern = ms["`--recipe gpt2`"], ms["`--recipe modern`"]
    ratios = rows["a step of `modern`, in steps of `gpt2`"][:3]
    assert all(shows(a, m / g) for a, m, g in zip(ratios, modern, gpt2, strict=True))
    # Later and on other cards; README repeats these.
    rows = {row[0]: row[1:] for row in cells(LONG_README, "four H100")}
    later = {name: [float(cell.split()[0].replace(",", "")) for cell in rows[f"`--recipe {name}`"]]
             for name in ("gpt2", "modern")}
    ratios = rows["a step of `modern`, in steps of `gpt2`"]
    assert all(shows(a, m / g) for a, m, g in zip(ratios, later["modern"], later["gpt2"], strict=True))
    said = re.search(r"took ([\d.]+), ([\d.]+) and ([\d.]+) times as long", README).groups()
    assert list(said) == ratios
    longer = float(re.search(r"is that of `gpt2` x [\d.]+ x ([\d.]+)\.", README)[1])
    assert longer == pytest.approx(float(ratios[-1]), abs=0.006)
    four, one, times = re.search(r"measured, ([\d.]+) ms a step.*? one of them .*?took ([\d.]+) ms, "
                                 r"([\d.]+) times", README).groups()
    assert (float(one), float(four)) == (gpt2[0], gpt2[2]) and shows(times, gpt2[0] / gpt2[2])
    xl = {}
    with torch.device("meta"):
        flops = train_gpt2.flops_per_token(train_gpt2.GPT(train_gpt2.GPTConfig(**train_gpt2.SIZES["gpt2-xl"])), 1024)
    for name, tokens, ms_xl, fast, mfu in cells(LONG_README, "| tokens a step")[1:]:
        tokens, ms_xl = float(tokens.replace(",", "")), float(ms_xl.replace(",", ""))
        assert close(speed(fast), tokens / ms_xl * 1000)
        gpus = 1 if name.startswith("1 GPU") else 4
        assert shows(mfu.split()[0], 100 * speed(fast) * flops / gpus / 989.5e12), name
        xl[name] = float(fast.split()[0]), float(mfu.split()[0])
    one, small = re.search(r"tokens a step: (\d+ k tokens/s, \d+ % MFU) \(one without FSDP: 46 %\); "
                           r"in steps of 65,536 tokens (\d+) k\.", README).groups()
    fast, mfu = re.findall(r"\d+", one)
    fsdp = xl["4 GPUs, `--parallel fsdp --batch_size 16`"]
    assert shows(fast, fsdp[0]) and shows(mfu, fsdp[1]) and 45.5 < xl["1 GPU, `--batch_size 8`"][1] < 46.5
    assert shows(small, xl["the same, in steps of one pass*"][0])
    after = re.search(r"(\d+) seconds since the kill", LONG_README)[1]
    assert f"{after} seconds later the next step was done" in README


def test_the_curves_are_drawn_from_the_logs_as_they_are():
    png = (ROOT / "assets/curves.png").read_bytes()
    assert int.from_bytes(png[16:20], "big") >= 1200
    assert draw.fingerprint().encode() in png, "python tests/draw.py"
    pytest.importorskip("matplotlib")
    axes = draw.curves().axes
    for axis, stream in zip(axes, ("val", "val", "hella", "hella")):
        ends = {line.get_label().split()[0]: line.get_ydata()[-1] for line in axis.lines}
        for name, log in LONG.items():
            assert ends[name] == list(log[stream].values())[-1]
    assert [line.get_xdata()[-1] for line in axes[0].lines
            if line.get_label().split()[0] in LONG] == \
        [max(log["val"]) * draw.TOKENS_A_STEP / 1e9 for log in LONG.values()]


def test_each_question_of_the_guide_has_its_place():
    rows = re.findall(r"(?:\| |<br> )(\d)\.(\d+) (.+?\?) \(.+?\) (.+?)(?= <br>| \|$)", README, re.M)
    chapters = dict(zip("123456", (9, 9, 9, 7, 9, 7)))
    numbers = [(c, str(n)) for c, last in chapters.items() for n in range(1, last + 1)]
    assert [(c, n) for c, n, *_ in rows] == numbers
    notebook = (ROOT / "play.ipynb").read_text(encoding="utf-8")
    for chapter, number, question, place in rows:
        assert f"### {chapter}.{number} {question}" in notebook, question
        link = re.match(r"\[`.+`\]\(\w+\.py#L\d+\),.* \d\d", place)
        assert link or (chapter, number) == ("5", "3"), question


def test_each_exercise_has_its_test():
    section = README.split("\n## Exercises\n")[1].split("\n## ")[0]
    numbers = re.findall(r"^\| (\d\d) \| ", section, re.M)
    tests = (ROOT / "tests" / "test_exercises.py").read_text(encoding="utf-8")
    assert numbers == re.findall(r"^def test_exercise_(\d\d)_", tests, re.M) and len(numbers) == 18


def test_the_steps_are_the_commits_that_it_lists():
    titles = history()
    assert [number for number, *_ in STEPS] == [f"{n:02}" for n in range(1, len(titles) + 1)]
    for number, shown, linked, idea in STEPS:
        full = git("rev-parse", "--short", linked).stdout.decode().strip()
        assert shown == linked and titles[full] == f"{number}: {idea}"


def test_its_chapters_end_with_programs_of_the_length_that_it_says():
    history()
    ends = re.findall(r"(\d\d) \(([\d,]+) lines: ", README)
    assert len(ends) > 5
    commits = {number: commit for number, commit, *_ in STEPS}
    for number, lines in ends:
        program = git("show", f"{commits[number]}:train_gpt2.py").stdout.decode()
        assert len(program.splitlines()) == int(lines.replace(",", "")), number
    assert ends[-1][0] == STEPS[-1][0]


def test_every_step_runs_when_it_is_checked_out(tmp_path):
    history()
    for number, commit, *_ in STEPS:
        folder = tmp_path / number
        folder.mkdir()
        for name in ("train_gpt2.py", "input.txt"):
            show = git("show", f"{commit}:{name}")
            if show.returncode == 0:                       # the first steps have no text yet
                (folder / name).write_bytes(show.stdout)
        if (folder / "input.txt").exists():                # short: the validation split is a tenth of it
            (folder / "input.txt").write_bytes((folder / "input.txt").read_bytes()[:30_000])
        trains = int(number) >= 8
        done = run(*["--max_steps", "2"][:2 * trains], cwd=folder, check=False, script=folder / "train_gpt2.py")
        assert done.returncode == 0 and done.stdout.strip(), f"step {number}: {done.stderr}"
        assert not trains or "loss" in done.stdout
