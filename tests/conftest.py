"""Tests import the script from the folder above, and use the project's copy of GPT-2's vocabulary if it is there.

    python -m pytest               all of them; two at a time if pytest-xdist is there
    python -m pytest -m lesson     those of the steps 01 to 24 that start no process: a minute
"""
import os
import re
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # two workers on two cores: more threads only wait for each other
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no processes that compile, which would import torch, too
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if (ROOT.parent / "shared" / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT.parent / "shared" / "tiktoken"))


def pytest_configure(config):
    config.addinivalue_line("markers", "lesson: of the steps 01 to 24, and starts no process (set by conftest.py)")
    config.addinivalue_line("markers", "process: starts a process")
    config.addinivalue_line("markers", "vocabulary: needs GPT-2's, from the disk or the network; skipped without")
    config.addinivalue_line("markers", "exercise: of README's exercises, red until solved; only with -m exercise")


def pytest_runtest_setup(item):
    if item.get_closest_marker("vocabulary"):
        import train_gpt2
        try:
            train_gpt2.get_tokenizer("gpt2")
        except train_gpt2.UserError as e:
            pytest.skip(str(e))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Where no file is named: -n 2 --dist loadfile --no-loadscope-reorder. Each file has one worker, and its fixtures
    are made once. A worker itself comes here, too."""
    option = config.option
    if (config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput") and not option.usepdb
            and option.numprocesses is None and option.dist == "no" and all(map(os.path.isdir, option.file_or_dir))
            and "exercise" not in option.markexpr):
        option.numprocesses, option.dist, option.loadscopereorder = 2, "loadfile", False


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config, items):
    named = any("::test_exercise_" in str(argument) for argument in config.args)
    if "exercise" not in config.option.markexpr and not named:
        exercises = [item for item in items if item.get_closest_marker("exercise")]
        config.hook.pytest_deselected(items=exercises)
        items[:] = [item for item in items if item not in exercises]
    for item in items:
        step = re.match(r"test_(\d\d)_", item.path.name)
        if step and int(step.group(1)) <= 24 and not item.get_closest_marker("process"):
            item.add_marker("lesson")
    # The notebook takes longest of all files. One worker begins with it, or the other would wait for it at the end.
    items.sort(key=lambda item: "test_notebook" not in item.nodeid)
