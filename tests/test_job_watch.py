"""The watch of Jobs goes on, whatever an API server answers; what a real one answers is in tests/cluster/."""

from __future__ import annotations

import threading

import pytest

from builder.cluster import job_watch
from builder.cluster.job_watch import JobWatch
from builder.errors import ServiceUnavailable
from tests.waiting import HANG

JOB = {
    "metadata": {
        "name": "publish-pump-v1-0123456789",
        "uid": "1",
        "resourceVersion": "2",
        "labels": {"builder/target": "pltr_foundry", "builder/method": "wheels"},
    },
    "spec": {},
}


class Answers:
    """An API server whose answers a test decides: an error is raised, a list of changes is sent."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.listed = 0

    def jobs_as_of(self, _selector):
        self.listed += 1
        if self.answers and isinstance(self.answers[0], Exception):
            raise self.answers.pop(0)
        return [], "1"

    def job_changes(self, _selector, _version, *, seconds):
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            yield "OPENED", {}
            yield from answer
        else:
            yield "OPENED", {}
            threading.Event().wait(HANG)


@pytest.fixture
def watching(monkeypatch):
    monkeypatch.setattr(job_watch, "_PAUSE", 0.01)
    made = []

    def run(*answers, server=None, **options):
        made.append(JobWatch(server or Answers(*answers), "pltr_foundry", **options))
        made[-1]._pause = 0.01
        made[-1].start()
        return made[-1]

    yield run
    for each in made:
        each.close()


@pytest.mark.parametrize("error", [ValueError("no JSON"), OSError("no token"), ServiceUnavailable("It is away.")])
def test_it_goes_on_after_any_failure(watching, error):
    watch = watching(error, [("ADDED", JOB)])
    assert watch.wait_for(lambda: watch.job(JOB["metadata"]["name"]) is not None, HANG)
    assert watch.synced
    assert watch.error is None
    assert watch.active() == {JOB["metadata"]["name"]}


def test_it_goes_on_after_a_failure_of_the_one_who_hears(watching):
    heard = []

    def changed(job, deleted):
        heard.append(deleted)
        if len(heard) == 1:
            message = "a defect"
            raise RuntimeError(message)

    watch = watching([("ADDED", JOB)], [("ADDED", JOB)], [("DELETED", JOB)], changed=changed)
    assert watch.wait_for(lambda: True in heard, HANG)
    assert watch.job(JOB["metadata"]["name"]) is None


class Cutting(Answers):
    """An API server that lists Jobs, and does not let them be watched, or for a while only."""

    def __init__(self, seconds=None) -> None:
        super().__init__()
        self.seconds = seconds

    def job_changes(self, _selector, _version, *, seconds):
        if self.seconds is not None:
            yield "OPENED", {}
            threading.Event().wait(self.seconds)
        message = "The watch is refused."
        raise ServiceUnavailable(message)


def test_a_watch_that_is_refused_is_a_failure_until_it_is_taken(watching, monkeypatch):
    monkeypatch.setattr(job_watch, "_LONGEST_PAUSE", 60)
    server = Cutting()
    watch = watching(server=server)
    assert watch.wait_for(lambda: server.listed >= 2, HANG)
    since = watch.failing_since
    assert watch.wait_for(lambda: server.listed >= 6, HANG)
    # To be listed is not to be watched: it fails since then, and is tried ever less often.
    assert (watch.failing_since, watch.error is None) == (since, False)
    assert watch._pause >= 0.01 * 2**4


def test_a_watch_that_is_cut_as_soon_as_it_is_taken_is_a_failure_that_lasts(watching, monkeypatch):
    monkeypatch.setattr(job_watch, "_PAUSE", HANG)
    monkeypatch.setattr(job_watch, "_LONGEST_PAUSE", HANG)
    server = Cutting(seconds=0)
    watch = watching(server=server)
    # Once may be by chance.
    assert watch.wait_for(lambda: server.listed >= 4, HANG)
    since = watch.failing_since
    assert watch.wait_for(lambda: server.listed >= 8, HANG)
    assert (watch.failing_since, watch.error is None) == (since, False)


def test_many_cuts_do_not_make_it_slow(watching, monkeypatch):
    monkeypatch.setattr(job_watch, "_LONGEST_PAUSE", 0.02)
    server = Cutting(seconds=0.03)
    watch = watching(server=server)
    assert watch.wait_for(lambda: server.listed >= 8, HANG)
    assert watch._pause <= 0.02


def test_a_watch_that_ends_as_soon_as_it_begins_is_a_failure(watching, monkeypatch):
    # However long it is until that is seen.
    monkeypatch.setattr(job_watch, "_PAUSE", HANG)
    monkeypatch.setattr(job_watch, "_LONGEST_PAUSE", HANG)
    watch = watching([], [], [("ADDED", JOB)])
    assert watch.wait_for(lambda: bool(watch.jobs()), HANG)
    assert watch._cluster.listed == 3


def test_a_job_that_was_made_again_in_a_gap_has_ended_before(watching):
    heard, again = [], {**JOB, "metadata": {**JOB["metadata"], "uid": "2"}}
    server = Answers([("ADDED", JOB)], ServiceUnavailable("The watch was cut off."))
    listed = iter([[], [again]])
    server.jobs_as_of = lambda _selector: (next(listed, [again]), "1")
    watch = watching(server=server, changed=lambda job, deleted: heard.append((job["metadata"]["uid"], deleted)))
    assert watch.wait_for(lambda: ("2", False) in heard, HANG)
    assert heard[:3] == [("1", False), ("1", True), ("2", False)]
