"""Compiling changes the speed, not the numbers, and nothing that is ragged trips over the compiled shape."""
import shutil

import pytest

from common import TINY, losses, run, short_text


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="needs a C++ compiler")
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path):
    plain, compiled = (run(*TINY, flag, cwd=short_text(tmp_path)).stdout for flag in ("--no-compile", "--compile"))
    assert ", compiled" in compiled and ", compiled" not in plain
    assert len(losses(plain)) == 6
    assert losses(compiled) == pytest.approx(losses(plain), abs=1.5e-4)  # printed with four decimals
    # From lesson 21 on the same run evaluates 62 windows by fours, from lesson 22 on it samples too.
    reports = [[line for line in out.splitlines() if "val loss" in line] for out in (plain, compiled)]
    assert [r.split("|")[0] for r in reports[0]] == [r.split("|")[0] for r in reports[1]]
    for a, b in zip(*reports, strict=True):
        assert float(a.split()[5]) == pytest.approx(float(b.split()[5]), abs=1.5e-4)
    assert ("sample:" in compiled) == ("sample:" in plain)
