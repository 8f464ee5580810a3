"""The listener's HTTP by itself: what its bounds are, and that nothing of a request escapes them."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from builder.batch import Result
from builder.errors import BuildFailed, InvalidSettings, ServiceUnavailable, TryAgain, VersionNotFound
from builder.listener import endpoints
from builder.listener import server as listening
from builder.listener.endpoints import App
from builder.listener.submissions import Submissions
from builder.settings import ListenSettings
from tests.listener.test_server import ENVIRON, serving
from tests.signed import signed, tag_set
from tests.waiting import HANG

DELIVERIES, CALLERS = "deliveries-of-the-tests", "callers-of-the-tests"
TAG = "EXTERNAL_TARGET_PLTR_FOUNDRY"
JOB = {
    "metadata": {"name": "publish-pump-v1-0123456789", "uid": "0b6f1a5e", "annotations": {"builder/model-version": "1"}}
}


class Doing:
    """A listener whose work a test decides; requests are real."""

    def __init__(self, work):
        self.settings = ListenSettings.from_environ(ENVIRON)
        self.submissions = Submissions(work)
        self.published = []

    def publish(self, name, version):
        self.published.append((name, version))
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(job=JOB, name=JOB["metadata"]["name"], created=True)

    answer: Exception | None = None


def submitted(_event):
    return Result(name="pump 1", state="submitted")


@pytest.fixture
def make(monkeypatch):
    """Return an application, and what is observed of its deliveries; it waits for their work, however slow."""
    monkeypatch.setattr(endpoints, "_PATIENCE", HANG)
    monkeypatch.setattr(listening, "_STARTS_WITHIN", HANG)
    monkeypatch.setattr(listening, "_SLOWEST_HEAD", HANG)

    def run(work=submitted):
        seen = []
        listener = Doing(work)
        listener.submissions.start()
        app = App(
            listener,
            webhook_secrets=[DELIVERIES],
            submit_secrets=[CALLERS],
            observe=lambda outcome, _seconds: seen.append(outcome),
        )
        return listener, Starlette(routes=app.routes()), seen

    return run


def post(client, path, body, secret):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(path, content=raw, headers=signed(raw, secret))


def test_a_delivery_is_answered_once_its_job_is_there(make):
    _, app, seen = make()
    with TestClient(app) as client:
        assert post(client, "/webhook", tag_set("pump", "1", TAG), DELIVERIES).status_code == 204
        assert client.post("/webhook", content=b"{}").status_code == 401
        assert post(client, "/webhook", tag_set("pump", "1", TAG), CALLERS).status_code == 401
        assert post(client, "/webhook", b"{", DELIVERIES).status_code == 400
    assert seen == ["taken", "unsigned", "refused", "refused"]


@pytest.mark.parametrize("error", [ServiceUnavailable("MLflow is away."), TryAgain("It is deleted all the time.")])
def test_what_cannot_be_done_now_is_sent_again_with_the_same_signature(make, error):
    errors = [error]

    def work(event):
        if errors:
            raise errors.pop()
        return submitted(event)

    _, app, seen = make(work)
    raw = json.dumps(tag_set("pump", "1", TAG)).encode()
    headers = signed(raw, DELIVERIES)
    with TestClient(app) as client:
        first = client.post("/webhook", content=raw, headers=headers)
        assert (first.status_code, first.headers["Retry-After"]) == (503, "5")
        assert client.post("/webhook", content=raw, headers=headers).status_code == 204
        assert client.post("/webhook", content=raw, headers=headers).status_code == 409
    assert seen == ["unavailable", "taken", "replayed"]


def test_what_cannot_be_done_at_all_is_taken(make):
    def work(_event):
        message = "There is no template."
        raise InvalidSettings(message)

    _, app, _ = make(work)
    with TestClient(app) as client:
        assert post(client, "/webhook", tag_set("pump", "1", TAG), DELIVERIES).status_code == 204


def test_a_question_for_an_outcome_is_no_request_to_publish(make):
    listener, app, _ = make()
    asked = {"model": "pump", "version": "1", "job": "publish-pump-v1-0123456789", "uid": "0b6f1a5e", "wait": 0}
    with TestClient(app) as client:
        assert post(client, "/publish", asked, CALLERS).status_code == 400
        assert post(client, "/publish", {"model": "pump", "version": "1"}, CALLERS).status_code == 200
    assert listener.published == [("pump", "1")]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (VersionNotFound("No such version."), 404),
        (InvalidSettings("There is no template."), 422),
        (BuildFailed("It failed."), 422),
        (ServiceUnavailable("MLflow is away."), 503),
    ],
)
def test_a_caller_hears_what_failed(make, error, status):
    listener, app, _ = make()
    listener.answer = error
    with TestClient(app) as client:
        answer = post(client, "/publish", {"model": "pump", "version": "1"}, CALLERS)
    assert answer.status_code == status
    assert answer.json() == {"error": error.what, "remedy": error.remedy, "exit_code": int(error.exit_code)}


def test_too_many_callers_are_asked_to_come_again(make, monkeypatch):
    monkeypatch.setattr(endpoints, "_MOST_CALLERS", 0)
    _, app, _ = make()
    with TestClient(app) as client:
        answer = post(client, "/publish", {"model": "pump", "version": "1"}, CALLERS)
    assert (answer.status_code, answer.json()["exit_code"]) == (503, 75)


def test_a_body_that_is_unsigned_is_not_read(make):
    listener, app, _ = make()
    head = "POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with (
        serving(app, listener.settings) as (_, port),
        socket.create_connection(("127.0.0.1", port), timeout=HANG) as sock,
    ):
        sock.sendall(head.encode())
        # Nothing of its body was sent.
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("length", ["131073", "-1", "1e3"])
def test_a_length_that_is_no_use_is_refused(make, length):
    _, app, _ = make()
    with TestClient(app) as client:
        headers = {**signed(b"{}", DELIVERIES), "Content-Length": length}
        assert client.post("/webhook", content=b"{}", headers=headers).status_code == 413


def test_a_body_that_is_slow_is_refused(make, monkeypatch):
    monkeypatch.setattr(endpoints, "_SLOWEST_BODY", 0.3)
    listener, app, seen = make()
    lines = [f"{name}: {value}" for name, value in signed(b"{}", DELIVERIES).items()]
    head = "\r\n".join(["POST /webhook HTTP/1.1", "Host: x", "Content-Length: 2", *lines, "", ""])
    with (
        serving(app, listener.settings) as (_, port),
        socket.create_connection(("127.0.0.1", port), timeout=HANG) as sock,
    ):
        sock.sendall(head.encode() + b"{")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 408")
    assert seen == ["refused"]
