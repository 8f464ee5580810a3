"""Attempts at a version: one for each Job, however many processes it took, and whatever ended them."""

from __future__ import annotations

import contextlib

import pytest

from builder.cluster.pods import MissedDeadline, PodLost
from builder.errors import BuilderError, BuildFailed, InvalidVersion, OverBudget, ServiceUnavailable, Terminated
from builder.models import ModelVersion
from builder.plan import Build, Plan
from builder.publish.record import Outcome, Record
from builder.reference import Platform, Reference

TARGET, SOURCE = "pltr_foundry", "5" * 64
AMD64 = Platform.parse("linux/amd64")


class Catalog:
    """One version, whose tags are changed in place."""

    def __init__(self):
        self.version = ModelVersion(name="pump", version="1", created_ms=1)

    def find(self, _name, _version):
        return self.version

    def set_tags(self, version, tags):
        self.version = version.model_copy(update={"tags": self.version.tags | tags})

    @property
    def outcome(self):
        return Outcome.of(self.version, TARGET)

    def process(self, attempt):
        """Return the record of a new process of an attempt."""
        return Record(self, self.version, TARGET, SOURCE, attempt=attempt)


@pytest.fixture
def catalog():
    return Catalog()


def plan(catalog):
    return Plan(
        version=catalog.version,
        target=TARGET,
        source_id=SOURCE,
        reference=Reference.parse("registry.example.com/models/pump:v1"),
        action="publish",
        reason="it is new",
        observed=None,
        wanted=(AMD64,),
        platforms=(Build(platform=AMD64, method="wheels"),),
    )


def work(catalog, attempt, error=None):
    """Begin in a new process, and end as an error does; killed where there is none."""
    record = catalog.process(attempt)
    with contextlib.suppress(BuildFailed, Terminated), record.failures():
        record.started(plan(catalog))
        if error:
            raise error


def test_a_process_that_is_asked_to_end_and_its_successor_are_one_attempt(catalog):
    work(catalog, "job-1", Terminated())
    assert catalog.outcome.interrupted
    assert catalog.outcome.attempts == 0
    work(catalog, "job-1", BuildFailed("no"))
    assert catalog.outcome.attempts == 1


def test_a_killed_process_and_its_successor_are_one_attempt(catalog):
    work(catalog, "job-1")
    work(catalog, "job-1", BuildFailed("no"))
    assert catalog.outcome.attempts == 1
    work(catalog, "job-2", BuildFailed("no"))
    assert catalog.outcome.attempts == 2


@pytest.mark.parametrize("last", [None, Terminated()], ids=["killed", "asked to end"])
def test_what_a_version_is_to_blame_for_is_one_attempt_whoever_records_it(catalog, last):
    work(catalog, "job-1", last)
    catalog.process("job-1").not_recorded(MissedDeadline("too slow"))
    assert (catalog.outcome.state, catalog.outcome.attempts) == ("failed", 1)
    assert not catalog.outcome.interrupted


@pytest.mark.parametrize("last", [None, Terminated()], ids=["killed", "asked to end"])
def test_what_a_version_is_not_to_blame_for_is_no_attempt(catalog, last):
    work(catalog, "job-1", last)
    catalog.process("job-1").not_recorded(PodLost("the node is gone"))
    assert (catalog.outcome.state, catalog.outcome.attempts) == ("failed", 0)


def test_an_attempt_that_ended_before_its_platforms_were_known_counts(catalog):
    """Killed for memory while the program was starting."""
    catalog.process("job-1").submitted()
    catalog.process("job-1").not_recorded(OverBudget("no memory"))
    assert catalog.outcome.attempts == 1
    catalog.process("job-2").submitted()
    work(catalog, "job-2", BuildFailed("no"))
    assert catalog.outcome.attempts == 2


def early(catalog, attempt, error):
    """Fail in a new process before there is a plan."""
    with contextlib.suppress(BuilderError), catalog.process(attempt).failures():
        raise error


def test_what_was_away_before_a_plan_was_made_takes_the_attempt_back(catalog):
    for _ in range(3):
        work(catalog, "job-1")
        early(catalog, "job-1", ServiceUnavailable("MLflow is away."))
        assert catalog.outcome.attempts == 0
    work(catalog, "job-1", BuildFailed("no"))
    assert catalog.outcome.attempts == 1


def test_a_fault_found_before_a_plan_is_made_is_the_attempt_that_was_begun(catalog):
    work(catalog, "job-1")
    early(catalog, "job-1", InvalidVersion("no"))
    assert catalog.outcome.attempts == 1


class Away(Catalog):
    """MLflow answers, and takes nothing."""

    def set_tags(self, version, tags):
        message = f"{version} and its {len(tags)} tags"
        raise ServiceUnavailable(message)


def test_what_mlflow_does_not_take_is_said(catalog):
    assert catalog.process("job-1").not_recorded(PodLost("gone"))
    assert not Away().process("job-1").not_recorded(PodLost("gone"))
