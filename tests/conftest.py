"""Tests import the script from the folder above, and use the project's copy of GPT-2's vocabulary if it is there."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: more threads only wait for each other
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if (ROOT.parent / "shared" / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT.parent / "shared" / "tiktoken"))


def pytest_collection_modifyitems(items):
    """The notebook takes longest of all files. One worker begins with it, or the other would wait for it at the end."""
    items.sort(key=lambda item: "test_notebook" not in item.nodeid)
