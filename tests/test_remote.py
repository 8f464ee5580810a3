"""The listener's client, against one that verifies signatures with the scheme's own library."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys

import httpx2
import pytest

from builder.errors import (
    Defect,
    ExitCode,
    InvalidSettings,
    InvalidVersion,
    PermissionRefused,
    ServiceUnavailable,
    TryAgain,
    VersionNotFound,
)
from builder.http import RetryPolicy
from builder.remote import Listener
from builder.settings import RemoteSettings
from scripts.launch import clean_environ
from tests.hook.responder import IMAGE, PUBLISHED, SECRET, responding
from tests.waiting import HANG

ASKED = {"model": "pump", "version": "3"}


@pytest.fixture
def responder():
    with responding() as running:
        yield running


@pytest.fixture
def listener(responder, monkeypatch):
    # What is not answered in time would be asked once more.
    monkeypatch.setattr("builder.http._TIMEOUT", httpx2.Timeout(HANG))
    with contextlib.ExitStack() as stack:

        def make(**environ):
            settings = RemoteSettings.from_environ(
                {"LISTENER_URL": responder.url, "SUBMIT_SECRET": SECRET, **environ}
            )  # fmt: skip
            policy = RetryPolicy(attempts=3, first=0.01, longest=0.02)
            return stack.enter_context(Listener.from_settings(settings, policy=policy))

        yield make


@pytest.fixture
def submit(responder):
    """Run `builder submit --via` in a process of its own."""

    def run(*arguments, **environ):
        return subprocess.run(
            [sys.executable, "-m", "builder", "submit", *arguments],
            check=False,
            text=True,
            capture_output=True,
            env=clean_environ(SUBMIT_SECRET=SECRET, LOG_FORMAT="text", **environ),
            timeout=HANG,
        )

    return functools.partial(run, "--via", responder.url)


def test_a_version_is_asked_for_and_followed_to_its_end(responder, listener):
    running = {"state": "running", "image": "", "platforms": []}
    responder.outcomes = [{**running, "state": "pending"}, running, PUBLISHED]
    client = listener()
    accepted = client.publish("Pumpe für 7", "@champion")
    assert (accepted.version, accepted.job, accepted.uid) == ("3", "publish-pump-v3-0123456789", "u-1")
    outcome = client.follow(accepted, wait=0)
    assert (outcome.state, outcome.image) == ("published", IMAGE)
    assert outcome.platforms == ("linux/amd64", "linux/arm64")
    assert responder.taken[0] == ("/publish", {"model": "Pumpe für 7", "version": "@champion"})
    about = {"model": "Pumpe für 7", "version": "3", "job": accepted.job, "uid": "u-1", "wait": 0}
    assert responder.taken[1:] == [("/outcome", about)] * 3


def test_a_refused_attempt_is_repeated_under_another_id(responder, listener):
    busy = 503, {"error": "MLflow is away.", "remedy": "Wait.", "exit_code": 69}, {"Retry-After": "0"}
    responder.special = lambda _path, number: busy if number < 3 else None
    assert listener().publish(**ASKED).version == "3"
    assert len(set(responder.ids)) == 3


def test_a_replay_is_never_sent_twice_under_one_id(responder, listener):
    responder.special = lambda _path, number: (409, None, {}) if number == 1 else None
    assert listener().publish(**ASKED).version == "3"


def test_an_address_with_several_secrets_signs_with_the_first(responder, listener):
    client = listener(SUBMIT_SECRET=f"{SECRET} another-secret-of-the-tests")
    assert client.publish(**ASKED).version == "3"


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ((401, None, {}), PermissionRefused, "SUBMIT_SECRET"),
        ((404, None, {}), InvalidSettings, "LISTENER_URL"),
        ((404, {"error": "No such model.", "remedy": "Look.", "exit_code": 66}, {}), VersionNotFound, "No such model"),
        ((422, {"error": "No template.", "remedy": "Look.", "exit_code": 65}, {}), InvalidVersion, "No template"),
        ((403, {"error": "Not yours.", "remedy": "Ask.", "exit_code": 77}, {}), PermissionRefused, "Not yours"),
        ((503, {"error": "MLflow is away.", "remedy": "Wait.", "exit_code": 69}, {}), ServiceUnavailable, "MLflow"),
        ((503, {"error": "Many wait.", "remedy": "Wait.", "exit_code": 75}, {}), TryAgain, "Many wait"),
        ((502, None, {}), ServiceUnavailable, "502"),
        ((302, None, {"Location": "http://elsewhere.example/"}), InvalidSettings, "redirects"),
        ((400, None, {}), ServiceUnavailable, "400"),
        ((409, None, {}), ServiceUnavailable, "had this request"),
        ((200, {"model": "pump"}, {}), ServiceUnavailable, "JSON"),
        ((200, None, {}), ServiceUnavailable, "JSON"),
        ((404, {"error": "x", "exit_code": 0}, {}), InvalidSettings, "takes no requests"),
    ],
)  # fmt: skip
def test_every_refusal_is_one_of_our_errors(responder, listener, answer, kind, said):
    responder.special = lambda _path, _number: answer
    with pytest.raises(kind) as caught:
        listener().publish(**ASKED)
    assert said in str(caught.value)
    assert caught.value.remedy


def test_a_wrong_secret_is_refused_at_once(responder, listener):
    with pytest.raises(PermissionRefused, match="SUBMIT_SECRET"):
        listener(SUBMIT_SECRET="not-the-secret-at-all").publish(**ASKED)
    assert responder.ids == []


def test_what_is_no_digest_reference_is_not_believed(responder, listener):
    client = listener()
    accepted = client.publish(**ASKED)
    for image in ("registry.example.com/models/pump:v3", "", "--option", "a\nb"):
        responder.outcomes = [{**PUBLISHED, "image": image}]
        with pytest.raises(ServiceUnavailable, match="digest reference"):
            client.outcome(accepted)


def test_a_listener_that_is_away_while_a_job_runs_does_not_end_the_job(responder, listener):
    client = listener()
    accepted = client.publish(**ASKED)
    responder.special = lambda _path, _number: (503, None, {})
    with pytest.raises(TryAgain, match="goes on"):
        client.follow(accepted)


@pytest.mark.parametrize(
    ("code", "kind"), [(65, InvalidVersion), (75, TryAgain), (77, PermissionRefused), (0, Defect), (9, Defect)]
)
def test_a_failure_has_the_publisher_s_exit_code(responder, listener, code, kind):
    responder.outcomes = [{"state": "failed", "error": "It\x1b[31m failed.", "remedy": "Mend it.", "exit_code": code}]
    client = listener()
    error = client.follow(client.publish(**ASKED)).failure()
    assert type(error) is kind
    assert "\x1b" not in error.what
    assert error.remedy == "Mend it."


@pytest.mark.parametrize("missing", ["LISTENER_URL", "SUBMIT_SECRET"])
def test_a_missing_setting_is_named(missing):
    there = {"LISTENER_URL": "http://127.0.0.1:1", "SUBMIT_SECRET": SECRET}
    settings = RemoteSettings.from_environ({**there, missing: ""})
    with pytest.raises(InvalidSettings, match=missing):
        Listener.from_settings(settings)


@pytest.mark.parametrize("url", ["builder.example.com", "ftp://builder", "https://user:word@builder", "https://b?q=1"])
def test_an_address_that_is_none_of_the_web_is_malformed(url):
    with pytest.raises(InvalidSettings, match="LISTENER_URL"):
        RemoteSettings.from_environ({"LISTENER_URL": url})


# ---- builder submit --via


def test_submit_needs_neither_mlflow_nor_a_registry(submit, responder):
    done = submit("pump", "3")
    assert (done.returncode, done.stdout) == (0, "publish-pump-v3-0123456789\n"), done.stderr
    done = submit("pump", "3", "--wait")
    assert (done.returncode, done.stdout) == (0, f"{IMAGE}\n"), done.stderr


def test_submit_exits_as_the_publisher_does(submit, responder):
    responder.outcomes = [{"state": "failed", "error": "A folder is missing.", "remedy": "Add it.", "exit_code": 65}]
    done = submit("pump", "3", "--wait")
    assert (done.returncode, done.stdout) == (ExitCode.DATA, "")
    assert "A folder is missing." in done.stderr
    assert "Add it." in done.stderr


def test_an_image_of_others_is_left_alone(submit, responder):
    responder.outcomes = [{"state": "foreign"}]
    done = submit("pump", "3", "--wait")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    "option", [("--force",), ("--rebuild",), ("--method", "wheels"), ("-n", "builder"), ("--context", "here")]
)
def test_what_the_listener_s_account_cannot_do_is_a_usage_error(submit, responder, option):
    done = submit("pump", "3", *option)
    assert done.returncode == ExitCode.USAGE
    assert "--via" in done.stderr
    assert responder.ids == []


def test_the_secret_is_never_printed(submit, responder):
    responder.outcomes = [{"state": "failed", "error": f"It said {SECRET}", "remedy": SECRET, "exit_code": 65}]
    done = submit("pump", "3", "--wait")
    assert SECRET not in done.stdout + done.stderr
    assert "It said" in done.stderr


def test_a_listener_that_is_not_there_is_a_service_that_is_away(dead_port):
    url = f"http://127.0.0.1:{dead_port}"
    settings = RemoteSettings.from_environ({"LISTENER_URL": url, "SUBMIT_SECRET": SECRET})
    policy = RetryPolicy(attempts=2, first=0.01)
    with Listener.from_settings(settings, policy=policy) as client, pytest.raises(ServiceUnavailable) as caught:
        client.publish(**ASKED)
    assert "network policy" in caught.value.remedy


def test_a_signal_ends_the_waiting(responder, tmp_path):
    responder.outcomes = [{"state": "running"}]
    command = [sys.executable, "-m", "builder", "submit", "pump", "3", "--wait", "--via", responder.url]
    environ = clean_environ(SUBMIT_SECRET=SECRET, LOG_FORMAT="text")
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        while "the Job goes on" not in line:
            assert line, process.wait()
            line = process.stderr.readline()
        os.kill(process.pid, signal.SIGTERM)
        _, stderr = process.communicate(timeout=HANG)
    assert process.returncode == ExitCode.TEMPORARY, stderr
