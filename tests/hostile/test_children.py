"""Work in a child of its own: however it ends, it says so, leaves nothing, and the next is done."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from builder import batch, log
from builder.batch import Batch, Children, Result
from builder.budget import Budget
from builder.errors import (
    BuildFailed,
    Defect,
    ExitCode,
    InvalidSettings,
    InvalidVersion,
    OverBudget,
    RootRefused,
    Terminated,
    TryAgain,
    VersionCrashed,
)
from builder.models import ModelVersion
from tests.waiting import LONG_HANG, until


class Odd(InvalidVersion):
    """An error that is made of other arguments than most."""

    def __init__(self, number):
        super().__init__(f"No {number}.")


GENEROUS = Budget(seconds=900, processor=120, memory=2 << 30, size=1 << 30)
CRASHES = {
    "signal.raise_signal(signal.SIGSEGV)": "was killed by SIGSEGV",
    "signal.raise_signal(signal.SIGABRT)": "was killed by SIGABRT",
    "os.kill(os.getpid(), signal.SIGKILL)": "was killed by SIGKILL.*probably memory ran out",
    "os._exit(0)": "ended with exit code 0, without an outcome",
    "os._exit(7)": "ended with exit code 7",
    "sys.exit(3)": "ended with exit code 70",
    "1 // 0": "ended with exit code 70",
    # Not of the type that was asked for.
    "[1, 2]": "gave an answer that cannot be read",
}


# Starts a supervisor that gives a child any time to end in its own way.
PATIENT = batch._START.replace(
    "\nmain(", f"\nfrom builder.batch import supervisor; supervisor.GRACE = {LONG_HANG}\nmain("
)


def code(text):
    """Return work that runs Python code, whose last line is an expression: what it answers."""
    *lines, last = text.strip().splitlines()
    names = "import os, pathlib, signal, subprocess, sys, tempfile, threading, time"
    return partial(eval, f"(exec({names + chr(10) + chr(10).join(lines)!r}, g := {{}}), eval({last!r}, g))[1]")


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def children():
    with Children(GENEROUS) as made:
        yield made


def run(children, text, kind=str, **options):
    return children.run(code(text), kind, whose="model 'x' version 1", **options)


def test_what_work_returns_comes_back(children):
    assert [run(children, f"{number} + 1", int) for number in range(3)] == [1, 2, 3]
    assert run(children, "str(os.getpid())") != run(children, "str(os.getpid())")


@pytest.mark.parametrize(("text", "said"), CRASHES.items())
def test_a_crash_says_how_it_ended_and_the_next_is_done(children, text, said):
    with pytest.raises(VersionCrashed, match=f"model 'x' version 1.*{said}") as caught:
        run(children, text)
    assert caught.value.exit_code == ExitCode.DATA
    assert run(children, "'next'") == "next"


def test_an_unreadable_error_of_a_child_is_a_crash_and_counts(children):
    """The caller has to hear of it: a sweep records an attempt, a download removes what is unfinished."""
    heard = []
    text = """
import stat, struct
pipes = [int(fd) for fd in os.listdir("/proc/self/fd") if fd.isdigit()]
pipes = [fd for fd in pipes if os.path.exists(f"/proc/self/fd/{fd}") and stat.S_ISFIFO(os.fstat(fd).st_mode)]
for fd in pipes:
    try:
        os.write(fd, struct.pack(">I", 5) + b"Fnope")
    except OSError:
        pass
os._exit(0)
"""
    with pytest.raises(VersionCrashed, match="cannot be read") as caught:
        run(children, text, ended=heard.append)
    assert heard == [caught.value]


def test_a_supervisor_that_is_gone_is_heard_of(children):
    heard = []
    assert run(children, "'first'") == "first"
    children._supervisor.kill()
    with pytest.raises(Defect, match="supervises") as caught:
        run(children, "'second'", ended=heard.append)
    assert heard == [caught.value]


def test_memory_that_the_parent_lacks_fails_one_version():
    def work():
        raise MemoryError

    failing = Batch(kind=Result, logger="sweep", modules=())
    result = failing.result(ModelVersion(name="m", version="1", created_ms=0), work)
    assert (result.state, type(result.error)) == ("failed", OverBudget)


@pytest.mark.parametrize(
    ("bound", "budget", "text"),
    [
        ("VERSION_TIMEOUT", {"seconds": 0.5}, "time.sleep(600)"),
        ("VERSION_PROCESSOR_TIME", {"processor": 0.5}, "[None for _ in iter(int, 1)]"),
        # In a process of its own as well: what counts is the sum.
        (
            "VERSION_PROCESSOR_TIME",
            {"processor": 1},
            "subprocess.run([sys.executable, '-c', 'while True: pass'])",
        ),
        ("VERSION_MEMORY", {"memory": 300 << 20}, "(b'x' * (400 << 20), time.sleep(600))"),
        (
            "VERSION_MEMORY",
            {"memory": 300 << 20},
            (
                "[subprocess.Popen([sys.executable, '-c', 'import time; x = b\"x\" * (120 << 20); time.sleep(600)'])"
                " for _ in range(3)][0].wait()"
            ),
        ),
        (
            "VERSION_BYTES",
            {"size": 50 << 20},
            "(pathlib.Path(tempfile.mkdtemp(), 'big').write_bytes(b'x' * (60 << 20)), time.sleep(600))",
        ),
    ],
)
def test_a_child_over_budget_is_ended_and_the_bound_is_named(bound, budget, text):
    with Children(replace(GENEROUS, **budget)) as children:
        with pytest.raises(OverBudget, match=rf"model 'x' version 1.*\({bound}\).*raise {bound}"):
            run(children, text)
        if bound != "VERSION_TIMEOUT":  # half a second may be too little for what is honest, too
            assert run(children, "'next'") == "next"


def test_memory_that_is_taken_at_once_is_refused(children):
    # 20 GiB would be there before anybody measures.
    with pytest.raises(OverBudget, match="VERSION_MEMORY"):
        run(children, "b'x' * (20 << 30)")


def test_nothing_of_the_work_is_left(children, tmp_path):
    text = f"""
processes = [subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sleep", "600"], start_new_session=True)]
# One whose parent has ended, in a session of its own.
subprocess.run(["sh", "-c", "setsid sleep 600 & echo $! > {tmp_path}/orphan; echo"], stdout=subprocess.DEVNULL)
pathlib.Path("{tmp_path}/folder").write_text(tempfile.mkdtemp())
pathlib.Path("{tmp_path}/pids").write_text(" ".join(str(each.pid) for each in processes))
signal.raise_signal(signal.SIGSEGV)
"""
    with pytest.raises(VersionCrashed):
        run(children, text)
    pids = [int(pid) for name in ("pids", "orphan") for pid in (tmp_path / name).read_text().split()]
    assert len(pids) == 3
    assert not any(map(alive, pids))
    assert not Path((tmp_path / "folder").read_text()).exists()


def test_what_a_child_logs_and_prints_is_logged_here_masked_and_bounded(children, caplog, monkeypatch):
    log.mask(["a-secret-of-ours"])
    monkeypatch.setattr("builder.batch._MOST_LOGGED", 200_000)
    text = """
exec("from builder.log import get_logger; get_logger('publish').error('it is a-secret-of-ours', n=1, odd=chr(0xdc80))")
exec("print('printed a-secret-of-ours \\\\x1b[31m'); sys.stdout.flush()", globals())
exec("from builder.log import get_logger; [get_logger('publish').error('flood ' + 'x' * 1000) for _ in range(5000)]")
'done'
"""
    with caplog.at_level(logging.WARNING, "builder"):
        assert run(children, text) == "done"
    assert "a-secret-of-ours" not in caplog.text
    assert "it is *****" in caplog.text
    assert "\x1b" not in caplog.text
    assert "printed *****" in caplog.text
    assert "logged too much" in caplog.text
    assert caplog.text.count("flood") < 300


def test_a_child_that_is_asked_to_end_by_others_is_no_attempt(children):
    with pytest.raises(TryAgain, match="asked to end"):
        run(children, "os.kill(os.getpid(), signal.SIGTERM)")


def test_a_request_to_end_reaches_the_child_first(children, tmp_path, monkeypatch):
    """The child hears of it, ends what it does in its own way, and only then it is raised here."""
    monkeypatch.setattr(batch, "_START", PATIENT)
    text = f"""
def work():
    from builder.errors import Terminated
    try:
        os.kill(os.getppid_of_ours, signal.SIGTERM)
        time.sleep(600)
    except Terminated:
        pathlib.Path("{tmp_path}/recorded").touch()
        raise
os.getppid_of_ours = {os.getpid()}
work()
"""

    def terminated(*_):
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        with pytest.raises(Terminated):
            run(children, text)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "recorded").exists()


def test_who_is_killed_takes_the_child_with_it(tmp_path):
    text = f"""
import os, pathlib
from functools import partial
from builder.budget import Budget
from builder.batch import Children
from tests.hostile.test_children import code
work = code('''
child = subprocess.Popen(["sleep", "600"])
pathlib.Path("{tmp_path}/folder").write_text(tempfile.mkdtemp())
pathlib.Path("{tmp_path}/new").write_text(f"{{os.getpid()}} {{child.pid}}")
pathlib.Path("{tmp_path}/new").rename("{tmp_path}/pids")
time.sleep(600)
''')
with Children(Budget(seconds=600, processor=600, memory=1 << 31, size=1 << 31)) as children:
    children.run(work, str, whose="x")
"""
    parent = subprocess.Popen([sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    pids = tmp_path / "pids"
    while not pids.exists():
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    numbers = [int(pid) for pid in pids.read_text().split()]
    folder = Path((tmp_path / "folder").read_text())
    until(lambda: not any(map(alive, numbers)) and not folder.exists())


@pytest.mark.parametrize("error", [InvalidVersion, RootRefused, TryAgain])
def test_an_error_of_the_work_is_raised_here_masked_and_is_no_crash(children, error):
    log.mask(["a-secret-of-ours"])
    ended = []
    text = f"""
from builder.errors import {error.__name__}
def fail():
    raise {error.__name__}("a-secret-of-ours is wrong.", remedy="Correct it.")
fail()
"""
    with pytest.raises(error, match=r"\*\*\*\*\* is wrong\. Correct it\.") as caught:
        run(children, text, ended=ended.append)
    assert (caught.value.exit_code, caught.value.of_version) == (error.exit_code, error.of_version)
    assert not ended
    with pytest.raises(VersionCrashed):
        run(children, "os._exit(7)", ended=ended.append)
    assert [type(error) for error in ended] == [VersionCrashed]


@pytest.mark.parametrize(
    ("base", "body", "own", "kind"),
    [
        ("BuildFailed", "{}", False, BuildFailed),
        ("InvalidSettings", "{'of_version': True}", True, InvalidSettings),
        ("BuilderError", "{}", False, Defect),
        # There is a class of that name and exit code here, which is made of something else.
        ("InvalidVersion", "{}", False, InvalidVersion),
    ],
)
def test_an_error_of_a_class_that_only_the_child_knows_keeps_name_and_exit_code(children, base, body, own, kind):
    text = f"""
exec("import builder.errors; E = type('Odd', (builder.errors.{base},), {body})", g := {{}})
(_ for _ in ()).throw(g["E"]("It is odd.", remedy="Look."))
"""
    with pytest.raises(kind) as caught:
        run(children, text)
    assert (caught.value.one_line(), caught.value.of_version) == ("Odd: It is odd. Look.", own)
    assert caught.value.exit_code == kind.exit_code
