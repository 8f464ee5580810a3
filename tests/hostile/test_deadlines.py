"""A publish in this process ends in time, too: work that takes too long is ended, told which bound it was, and recorded."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from builder.budget import Budget, Deadline
from builder.errors import OverBudget
from builder.settings import Settings
from scripts.launch import clean_environ
from tests.package_index.server import running
from tests.servers.small import small_files
from tests.versions import register
from tests.waiting import HANG, LONG_HANG

GENEROUS = Budget(seconds=600, processor=600, memory=4 << 30, size=1 << 30)


@contextmanager
def alarms():
    """Hold this process's timers, handlers and limits against what they were; a test runner may have set some."""
    handlers = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGPROF)]
    armed = [bool(signal.getitimer(timer)[0]) for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF)]
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGPROF)] == handlers
    assert [bool(signal.getitimer(timer)[0]) for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF)] == armed
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit


def wait():
    with suppress(Exception):
        threading.Event().wait(200)


def compute():
    while True:
        pass


@pytest.mark.parametrize(
    ("budget", "work", "says"),
    [
        ({"seconds": 0.3}, wait, r"The work on x .*0.3 seconds \(VERSION_TIMEOUT\).*raise VERSION_TIMEOUT"),
        ({"processor": 0.3}, compute, r"0.3 \(VERSION_PROCESSOR_TIME\).*raise VERSION_PROCESSOR_TIME"),
    ],
)
def test_time_that_is_up_ends_the_work(budget, work, says):
    with alarms(), pytest.raises(OverBudget, match=says), Deadline(replace(GENEROUS, **budget), "x").running():
        work()


def test_memory_is_bounded():
    with alarms(), pytest.raises(MemoryError), Deadline(replace(GENEROUS, memory=256 << 20), "x").running():
        bytearray(2 << 30)
    assert len(bytearray(300 << 20)) == 300 << 20


def test_what_one_part_took_is_not_there_for_the_next():
    deadline = Deadline(replace(GENEROUS, seconds=HANG), "x")
    before = time.monotonic()
    with deadline.running():
        began = time.monotonic()
        time.sleep(0.9)
        least = time.monotonic() - began
    most = time.monotonic() - before
    time.sleep(most + 0.5)  # an engine's: as long as all else, and more
    before = time.monotonic()
    with deadline.running():
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        most += time.monotonic() - before
    assert least <= HANG - left <= most + 0.01


def test_a_timer_of_others_is_as_before():
    rung = []
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000, 7)
        with Deadline(GENEROUS, "x").running():
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 600
        timer = signal.getitimer(signal.ITIMER_REAL)
        assert 900 < timer[0] <= 1000
        assert timer[1] == 7
        # One that ends earlier is whoever's it was.
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with Deadline(GENEROUS, "x").running():
            while not rung:
                time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)


def test_another_thread_than_the_main_one_is_let_be():
    done = []

    def work():
        with Deadline(replace(GENEROUS, seconds=0.01), "x").running():
            done.append(signal.getsignal(signal.SIGALRM))

    before = signal.getsignal(signal.SIGALRM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]


def trickle(handler, stop):
    """Answer a byte now and then."""
    while not stop.wait(0.5):
        handler.wfile.write(b" ")


def flood(handler, _stop):
    """Answer what fills the memory of whoever reads it to the end."""
    while True:
        handler.wfile.write(b" " * (1 << 20))


@pytest.fixture
def index():
    """An index whose `answers` decides what it says, and never to the end."""
    stop = threading.Event()

    def endlessly(handler, _path):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
        handler.end_headers()
        handler.close_connection = True
        with suppress(OSError):
            index.answers(handler, stop)
        return True

    with running() as index:
        index.faults = endlessly
        yield index
        stop.set()


@pytest.mark.parametrize(
    ("answers", "environ", "code", "says"),
    [
        (trickle, {"VERSION_TIMEOUT": "12"}, 65, "VERSION_TIMEOUT"),
        (flood, {"VERSION_MEMORY": "1GiB", "VERSION_TIMEOUT": "1200"}, 73, "it took more than 512 MiB of memory"),
    ],
)
def test_an_endless_index_ends_nothing_but_its_version(
    answers, environ, code, says, index, mlflow_server, registry, tiny_base
):
    index.answers = answers
    model = register(mlflow_server.uri, small_files(**{"mymodel/requirements.txt": "small-app\n"}))
    environ = {
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": f"{registry.host}/deadline",
        "BASE_IMAGE": tiny_base,
        "UV_DEFAULT_INDEX": index.simple,
        **environ,
        "MODEL_NAME": model.name,
        "MODEL_VERSION": model.version,
    }
    run = subprocess.run(
        [sys.executable, "-m", "builder", "publish"],
        env=clean_environ(**environ, LOG_FORMAT="json", PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        capture_output=True,
        text=True,
        timeout=LONG_HANG,
        check=False,
    )
    assert run.returncode == code, run.stderr
    outcome = model.outcome(Settings.from_environ(environ).target)
    assert (outcome["state"], outcome["attempts"]) == ("failed", "1")
    assert says in outcome["error"]
