"""What is written back to a version."""

from __future__ import annotations

import pytest

from builder import log
from builder.errors import ServiceUnavailable
from builder.models import ModelVersion
from builder.publish.record import Outcome, record

PUBLISHED = Outcome(
    target="pltr_foundry",
    state="published",
    image=f"quay.io/domino/model@sha256:{'a' * 64}",
    tag="quay.io/domino/model:v3",
    source_id="b" * 64,
    platforms=("linux/amd64", "linux/arm64"),
    attempts=1,
    finished="2026-01-02T03:04:05Z",
    smoke_test=f"passed: linux/amd64 sha256:{'c' * 64} runs after 2.1 s",
    log="https://logs.example.com/?pod=publish-pump-v3-abcde",
)
FAILED = PUBLISHED.model_copy(update={"state": "failed", "image": "", "error": "BuildFailed: RUN false", "attempts": 2})


def version(tags=None):
    return ModelVersion(name="m", version="3", created_ms=1, tags=tags or {})


@pytest.mark.parametrize("outcome", [PUBLISHED, FAILED, Outcome(target="pltr_foundry")])
def test_tags_are_read_back(outcome):
    assert Outcome.of(version(outcome.tags()), "pltr_foundry") == outcome
    assert Outcome.of(version(outcome.tags()), "another") == Outcome(target="another")


def test_the_tags_are_those_of_the_contract_and_the_state_comes_last():
    assert list(PUBLISHED.tags()) == [
        f"publish.pltr_foundry.{name}"
        for name in (
            "image",
            "tag",
            "source",
            "platforms",
            "error",
            "wanted",
            "attempts",
            "attempt",
            "finished",
            "smoke_test",
            "log",
            "state",
        )
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", "done"),
        ("attempts", "many"),
        ("attempts", "-1"),
        ("attempts", "9" * 30),
        ("attempts", "²"),
        ("log", "javascript:alert(1)"),
        ("log", 'https://logs.example.com/"onclick="alert(1)'),
        ("log", "file:///etc/passwd"),
    ],
)
def test_a_tag_that_somebody_edited_counts_as_not_there(name, value):
    tags = {**PUBLISHED.tags(), f"publish.pltr_foundry.{name}": value}
    assert getattr(Outcome.of(version(tags), "pltr_foundry"), name) == {"state": "", "attempts": 0, "log": ""}[name]


def test_an_error_is_one_short_line_without_secrets():
    log.mask(["hunter2222"])
    error = "BuildFailed: a\nb\x1b[31m https://me:pw@host/ hunter2222 " + "é" * 5000
    tag = FAILED.model_copy(update={"error": error}).tags()["publish.pltr_foundry.error"]
    assert tag.isprintable()
    assert len(tag) <= 1000
    assert "hunter2222" not in tag
    assert "pw@" not in tag


class Board:
    """A catalog that holds one version; what MLflow does with tags is tested with the real one."""

    def __init__(self, held, failing=None):
        self.held, self.failing, self.calls = held, failing, []

    def find(self, name, number):
        return self.held

    def set_tags(self, held, tags):
        self.calls.append(dict(tags))
        if self.failing:
            raise self.failing
        self.held = held.model_copy(update={"tags": {**self.held.tags, **tags}})


def test_only_what_differs_from_what_mlflow_holds_now_is_set():
    board = Board(version())
    before = board.held
    running = Outcome(target="pltr_foundry", state="running", attempts=1)
    record(board, before, running)
    assert board.calls == [{"publish.pltr_foundry.attempts": "1", "publish.pltr_foundry.state": "running"}]
    # `before` no longer says what MLflow holds.
    record(board, before, Outcome(target="pltr_foundry"))
    assert Outcome.of(board.held, "pltr_foundry") == Outcome(target="pltr_foundry")
    record(board, before, Outcome(target="pltr_foundry"))
    assert len(board.calls) == 2


@pytest.mark.parametrize("error", [ServiceUnavailable("away"), RuntimeError("a defect")])
def test_a_failure_to_record_is_logged_and_not_raised(error, capsys):
    log.configure("text")
    board = Board(version(), failing=error)
    record(board, version(), PUBLISHED)
    assert board.calls
    assert "could not be recorded" in capsys.readouterr().err


def test_another_version_of_the_same_number_is_left_alone(capsys):
    log.configure("text")
    board = Board(version().model_copy(update={"created_ms": 2}))
    record(board, version(), PUBLISHED)
    assert not board.calls
    assert "was deleted" in capsys.readouterr().err


def test_outcomes_on_a_real_server(shelf):
    made = shelf.version("s3://bucket/x", tags={"kept": "1"})
    record(shelf.catalog, made, FAILED)
    record(shelf.catalog, made, PUBLISHED)
    now = shelf.catalog.find(made.name, "1")
    assert Outcome.of(now, "pltr_foundry") == PUBLISHED
    assert now.tags["kept"] == "1"
    assert now.source_id() == made.source_id()
    changed = shelf.client.get_model_version(made.name, "1").last_updated_timestamp
    record(shelf.catalog, made, PUBLISHED)
    assert shelf.client.get_model_version(made.name, "1").last_updated_timestamp == changed


def test_a_deleted_version_hides_nothing(shelf, capsys):
    log.configure("text")
    made = shelf.version("s3://bucket/x")
    shelf.client.delete_model_version(made.name, "1")
    record(shelf.catalog, made, PUBLISHED)
    assert "could not be recorded" in capsys.readouterr().err
