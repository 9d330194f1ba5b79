"""play.ipynb runs from top to bottom as it stands, with no network, and what it shows is stored in it."""
import base64
import os
import re
import shutil

import pytest

from common import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
PATH = ROOT / "play.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(PATH, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook):
    """The cells that show a picture, by number."""
    return [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"
            and any("image/png" in output.get("data", {}) for output in cell.outputs)]


def headings(notebook):
    return [line for cell in notebook.cells if cell.cell_type == "markdown"
            for line in re.findall(r"^#+ .*", cell.source, re.M)]


def test_it_runs_from_top_to_bottom_and_shows_the_pictures_that_it_stores(stored, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("ipykernel")
    for name in ("train_gpt2.py", "fineweb.py", "hellaswag.py", "input.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")     # one section draws the logs of long runs
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))         # one section reads the history
    monkeypatch.delenv("MPLBACKEND", raising=False)           # agg, say, would show nothing
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")         # nobody listens there
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    ran = nbformat.read(PATH, as_version=4)
    for cell in ran.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(ran, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert not [o for o in outputs(ran) if o.output_type == "error" or o.get("name") == "stderr"]
    assert len(pictures(ran)) > 20
    if (ROOT / ".git").exists():
        assert pictures(ran) == pictures(stored)


def test_what_it_stores_is_small_and_holds_no_error_and_no_path_of_the_machine_that_ran_it(stored):
    assert PATH.stat().st_size < 2_000_000
    assert not [o for o in outputs(stored) if o.output_type == "error" or o.get("name") == "stderr"]
    shown = "\n".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs(stored))
    assert not re.search(r"(^|[\s'\"])(/(home|root|tmp|Users|usr|opt)/|[A-Z]:\\Users)", shown)
    assert os.sep + "site-packages" not in shown


def test_cells_fit_a_screen(stored):
    for cell in stored.cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            assert len(lines) <= 25 and max(map(len, lines)) <= 100, f"{cell.id}: {len(lines)} lines"


def test_the_pictures_that_it_stores_can_be_read(stored):
    narrow = {}
    for cell in stored.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                png = base64.b64decode(output.data["image/png"])
                width = int.from_bytes(png[16:20], "big")    # a PNG begins with its width and height
                if width < 800:
                    narrow[cell.id] = width
    assert not narrow


def test_every_question_has_a_section_of_its_own(stored):
    sections = [h for h in headings(stored) if h.startswith("### ")]
    numbers = [re.match(r"### (\d)\.(\d+) .*\?$", h) for h in sections]
    assert all(numbers) and len(set(sections)) == len(sections) == 57
    last = {m[1]: int(m[2]) for m in numbers}
    assert [(m[1], int(m[2])) for m in numbers] == [(c, n) for c in "1234567" for n in range(1, last[c] + 1)]
