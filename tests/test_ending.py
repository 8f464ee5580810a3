"""The process ends when its work is done, and when it is asked to, whatever its threads hold at that moment."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from scripts.launch import clean_environ
from tests.waiting import HANG, LONG_HANG
from tests.wheels.test_method import ROOT

# How often each way of ending is tried here; CONTRIBUTING.md says how to try it several hundred times.
_TIMES = int(os.environ.get("BUILDER_TEST_ENDINGS", "12"))
# Time for what runs at exit, so that what is missing of the output was lost, and not cut off.
_PATIENT = f"from builder import __main__; __main__._AT_EXIT = {LONG_HANG}\n"
# Threads that always hold a lock which the interpreter takes when it is torn down.
_BUSY_THREADS = """
import logging, sys, threading, time, types
from builder import __main__

def hold():
    lock = logging._lock
    while True:
        with lock:
            time.sleep(0.02)

for _ in range(4):
    threading.Thread(target=hold, daemon=True).start()
while logging._lock.acquire(blocking=False):
    logging._lock.release()
# Its end takes that lock, and it ends with a module that is taken down before logging is.
late = types.ModuleType("late")
late.handler = logging.StreamHandler()
sys.modules["late"] = late
del late
sys.argv = ["builder", *sys.argv[1:]]
__main__.main()
"""
_SWALLOWED = """
import os, signal, sys, time
from builder import __main__, cli

class Cleanup:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

def callback(self):
    Cleanup()
    time.sleep(300)

cli.builder.commands["build"].callback = cli.click.pass_obj(callback)
sys.argv = ["builder", "build"]
__main__.main()
"""

# Python 3.11 raises a RuntimeError for whatever comes while a class is being made, as those of an import are.
_WRAPPED = """
import os, signal, sys, time
from builder import __main__, cli

class Field:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

def callback(self):
    try:
        type("Made", (), {"field": Field()})
    except RuntimeError as error:
        raise ValueError from error

cli.builder.commands["build"].callback = cli.click.pass_obj(callback)
sys.argv = ["builder", "build"]
__main__.main()
"""

_BROKEN_OFF = """
import os, signal, sys, time
from builder import __main__, cli

def callback(self):
    sys.modules["structlog"] = None  # an import that was broken off cannot be made good
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(300)

cli.builder.commands["build"].callback = cli.click.pass_obj(callback)
sys.argv = ["builder", "build"]
__main__.main()
"""


def ended(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    environ = {**clean_environ(), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=HANG, check=False)


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["publish"], 78), (["no-command"], 64)])
def test_no_thread_keeps_the_process_from_ending(arguments, code):
    process = ended(_PATIENT + _BUSY_THREADS, *arguments)
    assert process.returncode == code, process.stderr
    assert process.stdout + process.stderr


def test_what_atexit_has_still_runs_and_output_is_complete():
    code = 'import atexit; atexit.register(print, "x" * 100_000)\n' + _PATIENT + _BUSY_THREADS
    process = ended(code, "--version")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("builder ")
    assert process.stdout.endswith("x" * 100_000 + "\n")


def test_what_hangs_at_exit_is_left():
    code = "import atexit, time; atexit.register(time.sleep, 300)\n" + _BUSY_THREADS
    assert ended(code, "--version").returncode == 0


@pytest.mark.parametrize(
    "code",
    [_SWALLOWED, _WRAPPED, _BROKEN_OFF],
    ids=["in a destructor", "in a class that is being made", "in an import"],
)
def test_a_request_to_end_is_not_lost(code):
    process = ended(code)
    assert process.returncode == 75, process.stderr
    assert "ended by a signal" in process.stderr


def test_publishes_end_at_any_moment(small, small_environ):
    """Each is sent SIGTERM somewhere between its start and its end, under the load of one another."""
    environ = {**clean_environ(), **small_environ(small()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "builder", "publish"]
    moments = random.Random(os.environ.get("BUILDER_TEST_ENDINGS_SEED", "ending"))  # no secret
    took = 0.0
    codes = []
    deadline = time.monotonic() + LONG_HANG
    for number in itertools.count():
        enough = number >= 2 * _TIMES
        if enough and (75 in codes or time.monotonic() > deadline):
            break
        asked = number % 2 == 1 or enough
        # Most that end by themselves have nothing to do, as in a sweep; the first shows how long work takes.
        more = ["--rebuild"] if asked or number == 0 else []
        with subprocess.Popen(
            [*command, *more], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            began = time.monotonic()
            try:
                if asked:
                    # Python's own start leaves SIGTERM as it is: what matters is what comes after.
                    try:
                        process.wait(0.3 + moments.random() * took)
                    except subprocess.TimeoutExpired:
                        process.send_signal(signal.SIGTERM)
                _, log = process.communicate(timeout=LONG_HANG)
            except BaseException:
                process.kill()
                raise
            if more and process.returncode == 0:
                took = time.monotonic() - began  # the machine may be quicker or slower now
            elif enough and process.returncode == -signal.SIGTERM:
                took *= 2
        codes.append(process.returncode)
        assert process.returncode in ({0, 75, -signal.SIGTERM} if asked else {0}), log
    assert 75 in codes
