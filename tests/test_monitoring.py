"""Looking into a run while it lasts: Weights & Biases, only when asked for."""
import json

import pytest

from common import TINY, losses, ranks, run, short_text

FAKE_WANDB = """
import json, pathlib
class Run:
    def log(self, values, step):
        with open("calls.txt", "a") as f:
            f.write(json.dumps([step, values]) + chr(10))
def init(project, dir, config):
    pathlib.Path("init.txt").write_text(json.dumps([str(dir), config["max_steps"]]))
    return Run()
"""
FLAGS = [*TINY, "--eval_every", "3", "--val_tokens", "2000", "--sample_every", "0", "--save_every", "0"]


def test_wandb_gets_the_rows_of_the_log(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(FAKE_WANDB)
    run(*FLAGS, "--wandb", cwd=short_text(tmp_path), PYTHONPATH=str(tmp_path / "modules"))
    assert json.loads((tmp_path / "init.txt").read_text()) == ["log", 6]
    rows = [row.split() for row in (tmp_path / "log" / "log.txt").read_text().splitlines()]
    calls = [json.loads(line) for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert [(int(step), stream) for step, stream, _ in rows] == [(step, *values) for step, values in calls]
    for (_, stream, value), (_, values) in zip(rows, calls, strict=True):
        assert values[stream] == pytest.approx(float(value), abs=1e-6)
    assert {stream for _, stream, _ in rows} == {"train", "val"}


def test_wandb_itself_keeps_an_offline_run(tmp_path):
    pytest.importorskip("wandb")
    done = run(*FLAGS, "--wandb", cwd=short_text(tmp_path), WANDB_MODE="offline")
    files = list((tmp_path / "log" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0 and len(losses(done.stdout)) == 6


def test_two_processes_have_one_board_and_give_up_together(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(FAKE_WANDB)
    short_text(tmp_path)
    ranks(2, *FLAGS, "--wandb", "--batch_size", "2", cwd=tmp_path, PYTHONPATH=str(tmp_path / "modules"))
    rows = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert len((tmp_path / "calls.txt").read_text().splitlines()) == len(rows) == 9
    (tmp_path / "modules" / "wandb.py").write_text("def init(**_): raise ValueError('No API key')")
    done = ranks(2, *FLAGS, "--wandb", "--batch_size", "2", cwd=tmp_path, check=False,
                 PYTHONPATH=str(tmp_path / "modules"))
    assert done.returncode and "No API key" in done.stderr and "[rank1]: Traceback" not in done.stderr
    assert (tmp_path / "log" / "log.txt").read_text().splitlines() == rows  # the earlier run stays where it was


def test_a_run_that_goes_on_has_the_board_of_its_flags(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(FAKE_WANDB)
    flags = [*FLAGS[:-1], "3"]                              # --save_every 3
    run(*flags, "--wandb", cwd=short_text(tmp_path), PYTHONPATH=str(tmp_path / "modules"))
    (tmp_path / "modules" / "wandb.py").write_text("raise ImportError('gone')")
    refused = run("--resume", "--max_steps", "8", cwd=tmp_path, check=False, PYTHONPATH=str(tmp_path / "modules"))
    assert refused.returncode == 2 and "gone" in refused.stderr and "--no-wandb" in refused.stderr
    done = run("--resume", "--max_steps", "8", "--no-wandb", cwd=tmp_path, PYTHONPATH=str(tmp_path / "modules"))
    assert len(losses(done.stdout)) == 2


@pytest.mark.parametrize("module, says", [
    ("raise ImportError('no such package')", "no such package"),
    ("def init(**_): raise ValueError('No API key' + chr(10) + 'Longer')", "No API key")])
def test_no_wandb_to_be_had_is_one_line_and_no_run(tmp_path, module, says):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(module)
    done = run(*FLAGS, "--wandb", cwd=short_text(tmp_path), check=False, PYTHONPATH=str(tmp_path / "modules"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert says in done.stderr and "WANDB_MODE=offline" in done.stderr and not losses(done.stdout)


def test_without_the_flag_wandb_is_not_even_imported(tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text("raise SystemExit('imported')")
    run(*FLAGS, cwd=short_text(tmp_path), PYTHONPATH=str(tmp_path / "modules"))
