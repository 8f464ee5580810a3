"""What is shown on a terminal while a publish goes on, and what it is made from."""

from __future__ import annotations

import hashlib
import io
import threading
import time
import uuid
from collections import Counter

import pytest

from builder import log, report
from builder.clients import Registries
from builder.errors import ServiceUnavailable
from builder.http import Retry, RetryPolicy
from builder.log import metered, moved
from builder.oci import FileBlob
from builder.oci.registry import Registry
from builder.publish import publish
from builder.reference import Digest, Repository
from tests.waiting import HANG


class Totals:
    """A meter that adds up."""

    def __init__(self):
        self.done, self.known = Counter(), Counter()
        self._lock = threading.Lock()

    def __call__(self, what, done, more):
        with self._lock:
            self.done[what] += done
            self.known[what] += more


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    """Give what makes stderr a terminal; to be called in the test, since pytest puts its own stderr there before."""

    def begin():
        found = Terminal()
        monkeypatch.setattr("sys.stderr", found)
        return found

    for name, value in {"TERM": "xterm-256color", "COLUMNS": "150", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    return begin


def until(terminal, text):
    ends = time.monotonic() + HANG
    while text not in terminal.getvalue():
        assert time.monotonic() < ends, terminal.getvalue()
        time.sleep(0.02)


def test_all_that_moves_in_a_publish_is_counted_to_its_end(small, small_settings):
    totals = Totals()
    with metered(totals):
        publish(small_settings(small(), SMOKE_TEST="off"))
    assert totals.done == totals.known
    assert set(totals.done) == {"wheels", "layers", "uploads"}
    assert totals.done["layers"] == 2
    assert totals.done["wheels"] > 150_000
    assert totals.done["uploads"] > totals.done["wheels"]


def test_an_upload_that_begins_again_is_counted_once(registry, tmp_path, monkeypatch):
    content = b"0123456789" * 100_000
    (tmp_path / "blob").write_bytes(content)
    blob = FileBlob(path=tmp_path / "blob", digest=Digest.of(content), size=len(content))
    real, tried = Registry._put, []

    def breaking(self, what, repository, blob, upload, until):
        tried.append(len(next(iter(blob.stream()))))
        if len(tried) == 1:
            raise Retry(ServiceUnavailable("broken"))
        return real(self, what, repository, blob, upload, until)

    monkeypatch.setattr(Registry, "_put", breaking)
    totals = Totals()
    with Registries(policy=RetryPolicy(first=0.001)) as registries, metered(totals):
        sent = registries.for_host(registry.host).push_blob(Repository(registry.host, f"p/{uuid.uuid4().hex}"), blob)
    assert (len(tried), sent) == (2, len(content))
    assert totals.done["uploads"] == totals.known["uploads"] == len(content)


def test_each_kind_has_a_line_while_there_is_something_to_wait_for(on_terminal):
    terminal = on_terminal()
    with report.progress() as of_artifacts:
        of_artifacts(1_000_000, 4_000_000)
        moved("wheels", 500_000, more=2_000_000)
        moved("layers", 1, more=3)
        moved("uploads", more=7_000_000)
        for text in ("1.0 MB of 4.0 MB", "500.0 kB of 2.0 MB", "1 of 3", "0 B of 7.0 MB"):
            until(terminal, text)
        of_artifacts(4_000_000, 4_000_000)
        moved("wheels", 1_500_000)
        moved("layers", 2)
        moved("uploads", 7_000_000)
    # Nothing is left on the screen, nor said of what is over.
    assert "3 of 3" not in terminal.getvalue()
    moved("wheels", 1)


def test_a_line_of_the_log_stays_beside_the_progress(on_terminal):
    terminal = on_terminal()
    log.configure("text")
    with report.progress():
        moved("layers", 1, more=3)
        until(terminal, "1 of 3")
        log.get_logger("x").warning("something happened", why=hashlib.sha256(b"").hexdigest())
    line = next(line for line in terminal.getvalue().splitlines() if "something happened" in line)
    assert hashlib.sha256(b"").hexdigest() in line
    assert "1 of 3" not in line


def test_however_much_moves_it_is_drawn_ten_times_a_second(on_terminal):
    terminal = on_terminal()
    began = time.monotonic()
    with report.progress():
        for _ in range(50_000):
            moved("wheels", 1, more=2)
    assert 0 < terminal.getvalue().count("wheels") <= 11 * (time.monotonic() - began) + 5


def test_where_there_is_no_terminal_nothing_is_shown(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stderr", pipe)
    with report.progress() as of_artifacts:
        assert of_artifacts is None
        moved("wheels", 1, more=2)
    assert pipe.getvalue() == ""
