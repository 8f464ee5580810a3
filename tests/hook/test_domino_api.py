"""`builder domino launch` as a process, against both job APIs of a Domino that runs its jobs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from builder.errors import BuilderError, ExitCode, InvalidSettings, PermissionRefused, ServiceUnavailable, TryAgain
from builder.hook import domino_api
from builder.hook.domino_api import DominoApi, Order
from builder.settings import HookSettings
from scripts.launch import clean_environ
from tests.models.http_answers import Answers, answering_server
from tests.servers.domino import API_KEY, PERSONAL_TOKEN, PROJECT
from tests.waiting import HANG

COMMAND = [sys.executable, "-m", "builder", "domino", "launch"]
ORDER = Order(project=PROJECT, command="true")


@pytest.fixture
def outside(domino):
    """Return the environment of somebody outside of Domino."""
    return {
        "DOMINO_API_HOST": domino.host,
        "DOMINO_TOKEN": PERSONAL_TOKEN,
        "DOMINO_PROJECT_ID": PROJECT,
        "LOG_FORMAT": "text",
    }


def launch(*arguments, **environ):
    return subprocess.run(
        [*COMMAND, *arguments], check=False, text=True, capture_output=True, env=clean_environ(**environ), timeout=HANG
    )


def api(**environ):
    return DominoApi.from_settings(HookSettings.from_environ(environ))


@pytest.mark.parametrize(("v1", "v4", "wrapped"), [(True, True, True), (True, False, True), (True, False, False), (False, True, True)])  # fmt: skip
def test_each_release_s_api_starts_a_job_and_tells_its_end(domino, outside, v1, v4, wrapped):
    domino.v1, domino.v4, domino.wrapped = v1, v4, wrapped
    done = launch("pump für 7", "@champion", "--command", "echo asked", **outside)
    assert done.returncode == 0, done.stderr
    (run,) = domino.runs.values()
    assert done.stdout == f"{run.number}\n"
    assert run.output == "asked pump für 7 @champion\n"
    assert shlex.split(run.command) == ["echo", "asked", "pump für 7", "@champion"]


def test_what_the_job_is_to_have_is_asked_for(domino, outside):
    for v1, tier in ((True, "hardwareTierId"), (False, "overrideHardwareTierId")):
        domino.v1 = v1
        options = ("--environment-id", "env-1", "--hardware-tier-id", "small", "--no-wait", "--command", "true")
        assert launch(*options, **outside).returncode == 0
        asked = list(domino.runs.values())[-1].started
        assert (asked["environmentId"], asked[tier], asked["projectId"]) == ("env-1", "small", PROJECT)


def test_a_job_that_fails_fails_the_launch(domino, outside):
    done = launch("--command", "exit 65 #", **outside)
    assert done.returncode == ExitCode.CANNOT_CREATE
    assert "Failed" in done.stderr
    assert "Jobs dashboard" in done.stderr


def test_a_job_that_is_stopped_is_to_be_tried_again(domino, outside):
    run = domino.start("sleep 600")
    domino.stop(run)
    domino.ended(run)
    with api(**outside) as there:
        error = there.follow(run.number, seconds=HANG).failure(run.number)
    assert isinstance(error, TryAgain)


def test_time_that_is_over_leaves_the_job_running(domino, outside):
    done = launch("--command", "sleep 600 #", "--timeout", "0", **outside)
    assert done.returncode == ExitCode.TEMPORARY
    (run,) = domino.runs.values()
    assert run.status == "Running"
    assert run.number in done.stderr
    assert "goes on" in done.stderr


def test_a_signal_ends_the_waiting_and_says_how_to_stop_the_job(domino, outside):
    environ = clean_environ(**outside)
    argv = [*COMMAND, "--command", "sleep 600 #"]
    with subprocess.Popen(argv, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        number = process.stdout.readline().strip()
        line = process.stderr.readline()
        while "Running" not in line:
            assert line, process.wait()
            line = process.stderr.readline()
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=HANG)
    assert process.returncode == ExitCode.TEMPORARY
    assert domino.runs[number].status == "Running"
    assert number in stderr
    assert "/v4/jobs/stop" in stderr


# ---- identity


def sent(domino):
    return [{name.lower(): value for name, value in headers.items()} for _, _, headers in domino.asked]


def test_outside_a_token_proves_the_user(domino, outside):
    with api(**outside, DOMINO_API_PROXY="http://127.0.0.1:1") as there:
        there.start(ORDER)
    assert [each.get("authorization") for each in sent(domino)] == [f"Bearer {PERSONAL_TOKEN}"]


def test_a_file_with_a_token_is_read_for_each_request(domino, outside, tmp_path):
    path = tmp_path / "token"
    path.write_text("stale\n")
    outside.pop("DOMINO_TOKEN")
    with api(**outside, DOMINO_TOKEN_FILE=str(path)) as there:
        with pytest.raises(PermissionRefused):
            there.start(ORDER)
        path.write_text(f"Bearer {PERSONAL_TOKEN}\n")
        there.start(ORDER)


def test_a_token_file_that_is_being_replaced_is_waited_for(domino, outside, tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_text(PERSONAL_TOKEN)
    outside.pop("DOMINO_TOKEN")
    with api(**outside, DOMINO_TOKEN_FILE=str(path)) as there:
        job = there.start(ORDER)
        path.unlink()
        waits = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _seconds: path.write_text(PERSONAL_TOKEN))
        monkeypatch.setattr("builder.hook.domino_api._REPLACED", HANG)
        monkeypatch.setattr("builder.hook.domino_api.time", waits)
        assert there.state(job).status


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), (b"", "empty"), (b"\xff\xfe", "UTF-8")])
def test_a_token_file_that_stays_unreadable_is_a_matter_of_the_settings(domino, outside, tmp_path, content, why):
    path = tmp_path / "token"
    path.write_text(PERSONAL_TOKEN)
    outside.pop("DOMINO_TOKEN")
    with api(**outside, DOMINO_TOKEN_FILE=str(path)) as there:
        job = there.start(ORDER)
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(InvalidSettings, match=f"DOMINO_TOKEN_FILE is .*{why}"):
            there.state(job)


def test_a_legacy_key_is_sent_where_there_is_no_token(domino, outside):
    outside.pop("DOMINO_TOKEN")
    with api(**outside, DOMINO_USER_API_KEY=API_KEY) as there:
        there.start(ORDER)
    assert [each.get("x-domino-api-key") for each in sent(domino)] == [API_KEY]


def test_in_a_run_the_proxy_adds_the_identity(domino):
    run = domino.start("true")
    environ = domino.environment(run.number)
    before = domino.tokens
    with api(**environ) as there:
        there.start(ORDER)
    assert domino.tokens > before
    (headers,) = sent(domino)
    assert headers["authorization"].startswith("Bearer ey")


@pytest.fixture
def behind(domino, outside):
    """A run whose proxy gives tokens, and does not lead to the job APIs: those are at Domino's own address."""
    outside.pop("DOMINO_TOKEN")
    with answering_server(Answers(status=404)) as nowhere:
        outside |= {"DOMINO_API_HOST": domino.host, "DOMINO_API_PROXY": domino.api_proxy}
        domino.host = nowhere
        yield outside


@pytest.mark.parametrize(("spared", "tokens"), [(1, 1), (100, 3)])
def test_a_token_of_the_proxy_s_is_replaced_before_it_expires(domino, behind, monkeypatch, spared, tokens):
    # Longer than a pause of the machine, both ways: a token of an hour, which expires soon if that is 100 times longer.
    monkeypatch.setattr("builder.hook.domino_api._SPARE", spared * domino_api._SPARE)
    domino.token_seconds = 3600
    with api(**behind) as there:
        job = there.start(ORDER)
        there.state(job)
        there.state(job)
    assert len({each["authorization"] for each in sent(domino)}) == tokens


def test_a_token_that_is_refused_is_replaced_once(domino, behind):
    domino.token_seconds = 3600
    with api(**behind) as there:
        job = there.start(ORDER)
        there._identity._token = "revoked"
        assert there.state(job).status
    assert [each["authorization"] for each in sent(domino)][1] == "Bearer revoked"


def test_without_an_identity_it_says_what_to_set(outside):
    outside.pop("DOMINO_TOKEN")
    done = launch("--command", "true", **outside)
    assert done.returncode == ExitCode.CONFIG
    assert "DOMINO_TOKEN" in done.stderr


def test_a_token_is_never_printed(domino, outside):
    done = launch("--command", f"echo {PERSONAL_TOKEN}", **outside)
    assert done.returncode == 0
    assert PERSONAL_TOKEN not in done.stdout + done.stderr


# ---- refusals


def test_another_project_is_a_matter_of_the_settings(domino, outside):
    done = launch("--command", "true", "--project-id", "none", **outside)
    assert done.returncode == ExitCode.CONFIG
    assert "project none was not found" in done.stderr
    # The older API is not asked to do what the newer one has refused.
    assert [path for _, path, _ in domino.asked] == ["/api/jobs/v1/jobs"]


def test_a_project_is_needed(outside):
    outside.pop("DOMINO_PROJECT_ID")
    done = launch(**outside)
    assert done.returncode == ExitCode.CONFIG
    assert "DOMINO_PROJECT_ID is missing" in done.stderr


def test_a_name_without_a_version_is_a_usage_error(outside):
    assert launch("pump", **outside).returncode == ExitCode.USAGE


@pytest.mark.parametrize(
    ("answers", "kind", "said"),
    [
        (Answers(status=403, body=b'{"message": "You may not start runs"}'), PermissionRefused, "may not start runs"),
        (Answers(status=401), PermissionRefused, "401"),
        (Answers(status=404), InvalidSettings, "No job API"),
        (Answers(status=400, body=b'{"errors": ["bad tier"]}'), InvalidSettings, "bad tier"),
        (Answers(status=302, location="https://domino.example.com/login"), InvalidSettings, "redirects"),
        (Answers(status=503), ServiceUnavailable, "503"),
        (Answers(body=b"<html>"), ServiceUnavailable, "without the id"),
        (Answers(body=b'{"id": "../x"}'), ServiceUnavailable, "without the id"),
    ],
)  # fmt: skip
def test_each_refusal_is_one_of_our_errors(answers, kind, said):
    with (
        answering_server(answers) as host,
        api(DOMINO_API_HOST=host, DOMINO_TOKEN=PERSONAL_TOKEN) as there,
        pytest.raises(kind) as caught,
    ):
        there.start(ORDER)
    assert said in str(caught.value)


def test_a_start_that_may_have_arrived_is_not_repeated():
    answers = Answers(status=503)
    with (
        answering_server(answers) as host,
        api(DOMINO_API_HOST=host, DOMINO_TOKEN=PERSONAL_TOKEN) as there,
        pytest.raises(BuilderError),
    ):
        there.start(ORDER)
    assert len(answers.paths) == 1


@pytest.mark.parametrize(
    ("told", "status", "ended"),
    [
        ({"statuses": {"isCompleted": False, "executionStatus": "Pulling"}}, "Pulling", False),
        ({"statuses": {"isCompleted": True, "executionStatus": "Done"}}, "Done", True),
        ({"job": {"status": {"executionStatus": "Error"}}}, "Error", True),
        ({"status": "Succeeded"}, "Succeeded", True),
    ],
)
def test_each_form_of_a_state_is_read(told, status, ended):
    answers = Answers(body=json.dumps(told).encode())
    with answering_server(answers) as host, api(DOMINO_API_HOST=host, DOMINO_TOKEN=PERSONAL_TOKEN) as there:
        found = there.state("0" * 24)
    assert (found.status, found.has_ended) == (status, ended)
