"""Processes that begin with torch in them, for importing it takes longer than most tests.

A server of the standard library's imports it once, and then forks: each process is one of its own, with an id,
signals and an exit code, and nobody has imported train_gpt2 in it. Where that may fail, which is anywhere but on
Linux, Python is started, with the same result.
"""
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FORKS = sys.platform == "linux"
if FORKS:
    SERVER = multiprocessing.get_context("forkserver")
    SERVER.set_forkserver_preload(["numpy", "tiktoken", "tqdm", "torch", "torch._dynamo"])  # which an optimizer imports


def start(script, *flags, cwd, env, streams):
    """Like subprocess.Popen; stdin, stdout and stderr are files of these names in the folder streams."""
    flags, files = [*map(str, flags)], [str(Path(streams, name)) for name in ("stdin", "stdout", "stderr")]
    Path(files[0]).touch()
    if FORKS:
        return Forked(str(script), flags, cwd, env, files)
    with open(files[0]) as stdin, open(files[1], "a") as stdout, open(files[2], "a") as stderr:
        return subprocess.Popen([sys.executable, str(script), *flags], cwd=cwd, env=env, stdin=stdin, stdout=stdout,
                                stderr=stderr)


class Forked:
    """What tests need of subprocess.Popen."""
    def __init__(self, *how):
        process = self.process = SERVER.Process(target=become, args=how)
        process.start()
        self.pid, self.kill, self.terminate = process.pid, process.kill, process.terminate

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode

    def send_signal(self, signum):
        os.kill(self.pid, signum)


def become(script, flags, cwd, env, files):
    """Make of this process, which was just forked, what `python script *flags` is."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for fd, (file, how) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT | os.O_APPEND] * 2))):
        os.dup2(os.open(file, how), fd)
    sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    sys.argv = [script, *flags]
    ours = {"", str(TESTS), str(TESTS.parent)}  # pytest's, and those of the tests
    sys.path[:] = [str(Path(script).parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)),
                   *(path for path in sys.path if path not in ours)]
    try:
        runpy.run_path(script, run_name="__main__")  # SystemExit: multiprocessing does with it what Python does
    except Exception as e:
        trace = e.__traceback__
        while trace.tb_next and trace.tb_frame.f_code.co_filename != script:
            trace = trace.tb_next  # it begins in the script, not here
        sys.excepthook(type(e), e.with_traceback(trace), trace)
        sys.exit(1)
