"""bench.py with the demo's shape on a CPU: it compares like with like, and says where time goes."""
import json
import re
from collections import Counter

import pytest

from common import ROOT, run


def bench(*flags, cwd, check=True):
    return run(*flags, cwd=cwd, check=check, script=ROOT / "tests" / "bench.py")


CPU = ["--device", "cpu", "--model", "demo", "--batch_size", "2"]
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def test_profile_says_where_the_time_of_one_pass_goes(tmp_path):
    out = bench("profile", *CPU, cwd=tmp_path).stdout
    assert "demo, B=2, T=128, float32: one forward and backward pass" in out
    heading = re.search(r"^ +Name {2,}(.*)$", out, re.M).group(1)
    rows = dict(re.findall(r"^ *(\S.*?) {2,}([\d.]+% .*)$", out, re.M))
    assert len(rows) == 15 and {"aten::addmm", "aten::mm", "aten::gelu_backward"} <= rows.keys()
    place = re.split(" {2,}", heading).index("Self CPU")
    cells = [re.split(" {2,}", row)[place] for row in rows.values()]
    took = [re.fullmatch(r"([\d.]+)(us|ms|s)", cell).groups() for cell in cells]
    took = [float(number) * UNITS[unit] for number, unit in took]
    assert took == sorted(took, reverse=True) and took[-1] > 0


def test_profile_writes_a_trace_of_one_forward_and_one_backward_pass(tmp_path):
    bench("profile", *CPU, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = Counter(event.get("name") for event in events)
    # Two blocks, with two LayerNorms and four matrices each; a LayerNorm and a matrix at the end.
    assert names["aten::linear"] == 9 and names["aten::native_layer_norm"] == 5
    assert names["autograd::engine::evaluate_function: AddmmBackward0"] == 8
    assert names["autograd::engine::evaluate_function: NativeLayerNormBackward0"] == 5
    # And no gradients were there already, to add those of 28 parameters to.
    assert names["torch::autograd::AccumulateGrad"] == 28 and names["aten::add_"] < 10


def test_train_compares_two_models_that_learn_the_same(tmp_path):
    out = bench("train", *CPU, "--steps", "2", cwd=tmp_path).stdout
    rows = dict(re.findall(r"^\| (train_gpt2\.py|textbook) \|.*\| ([\d. ]+) \|$", out, re.M))
    ours, theirs = ([float(loss) for loss in row.split()] for row in rows.values())
    assert len(ours) == 4 and ours[0] == pytest.approx(5.55, abs=0.1) and ours[-1] < ours[0] - 0.1
    # The textbook's may also say one of 63 tokens that there are not: ln(320 / 257) more at first.
    assert [t - o for o, t in zip(ours, theirs)] == pytest.approx([0.22] * 4, abs=0.03)
    assert not [*tmp_path.iterdir()]


def test_8_bit_floats_without_their_hardware_are_refused(tmp_path):
    flags, says = ["train", "--device", "cpu", "--fp8"], "--fp8 needs an H100 or newer"
    done = bench(*flags, cwd=tmp_path, check=False)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
