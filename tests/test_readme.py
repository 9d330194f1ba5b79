"""The README's links, line numbers and commits are right, and each step of the history still runs."""
import re
import subprocess

import pytest

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


def test_each_question_of_the_guide_has_its_row():
    rows = re.findall(r"^\| (\d)\.(\d+) \| (.+?\?) \(", README, re.M)
    chapters = dict(zip("123456", (9, 9, 9, 7, 9, 7)))
    assert [(c, n) for c, n, _ in rows] == [(c, str(n)) for c, last in chapters.items() for n in range(1, last + 1)]
    notebook = (ROOT / "play.ipynb").read_text(encoding="utf-8")
    for chapter, number, question in rows:
        assert f"### {chapter}.{number} {question}" in notebook, question


def test_the_steps_are_the_commits_that_it_lists():
    titles = history()
    assert [number for number, *_ in STEPS] == [f"{n:02}" for n in range(1, 38)]
    for number, shown, linked, idea in STEPS:
        full = git("rev-parse", "--short", linked).stdout.decode().strip()
        assert shown == linked and titles[full] == f"{number}: {idea}"


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
