"""Webhook and listener: what is there, and what is wrong with it."""

import contextlib
import socket
import threading
from types import SimpleNamespace

import pytest
import uvicorn
from starlette.applications import Starlette

from builder.listener.endpoints import App, operations
from builder.models.catalog import MlflowCatalog
from builder.models.webhooks import EVENTS, Webhooks
from tests.servers.mlflow import run_mlflow
from tests.waiting import HANG

URL = "https://192.0.2.7"
SECRET = "at-least-sixteen-characters"


@pytest.fixture(scope="module")
def mlflow_of_webhooks(launcher, tmp_path_factory):
    """An MLflow server of its own, since others make webhooks too."""
    folder = tmp_path_factory.mktemp("mlflow-webhooks")
    artifacts = str(folder / "artifacts")
    options = ("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", artifacts)
    environ = {"MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
    with run_mlflow(launcher, folder, *options, artifacts=artifacts, environ=environ) as server:
        yield server


@pytest.fixture
def webhooks(mlflow_of_webhooks, environ):
    """MLflow's webhooks; those of the test are deleted."""
    environ["MLFLOW_TRACKING_URI"] = mlflow_of_webhooks.uri
    found = Webhooks(MlflowCatalog(mlflow_of_webhooks.uri))
    yield found
    for each in found.all():
        found.delete(each.id)


def make(webhooks, *, url=f"{URL}/webhook", events=EVENTS, status="ACTIVE"):
    return webhooks._client.create_webhook(name="x", url=url, events=list(events), secret=SECRET, status=status)


def test_a_webhook_that_delivers(look, webhooks):
    make(webhooks, url="https://192.0.2.8/other")
    hook = make(webhooks, events=[*EVENTS, "model_version_alias.created"])
    for changes in {"LISTENER_URL": URL}, {"LISTENER_URL": f"{URL}/"}, {}:
        found = look("webhook", **changes)
        # Without LISTENER_URL it may be that of another listener.
        assert found.state == ("ok" if changes else "warn"), found
        assert f"{URL}/webhook" in found.found
        assert f"builder webhook test {hook.webhook_id}" in found.found


def test_no_webhook_is_a_failure_only_where_one_is_wanted(look, webhooks):
    make(webhooks, url="https://192.0.2.8/other")
    assert look("webhook").state == "skipped"
    for changes in {"LISTENER_URL": URL}, {"WEBHOOK_SECRET": SECRET}:
        found = look("webhook", **changes)
        assert (found.state, found.exit_code) == ("fail", 78), found
        assert "builder webhook create" in found.remedy


def test_a_webhook_that_is_disabled(look, webhooks):
    make(webhooks, status="DISABLED")
    found = look("webhook", LISTENER_URL=URL)
    assert (found.state, found.exit_code) == ("fail", 78), found
    assert "disabled" in found.found
    # One that delivers is enough.
    make(webhooks)
    assert look("webhook", LISTENER_URL=URL).state == "ok"


@pytest.mark.parametrize(
    ("event", "state", "code"), [("model_version.created", "fail", 78), ("model_version_tag.set", "warn", 0)]
)
def test_a_webhook_that_does_not_deliver_all(look, webhooks, event, state, code):
    make(webhooks, events=[event])
    found = look("webhook", LISTENER_URL=URL)
    assert (found.state, found.exit_code) == (state, code), found
    assert next(each for each in EVENTS if each != event) in found.found


def test_webhooks_of_a_server_that_is_away(look, dead_port):
    away = f"http://127.0.0.1:{dead_port}"
    assert look("webhook", MLFLOW_TRACKING_URI=away).state == "skipped"
    found = look("webhook", MLFLOW_TRACKING_URI=away, LISTENER_URL=URL)
    assert (found.state, found.exit_code) == ("fail", 69), found


@contextlib.contextmanager
def served(app):
    """Serve an application on a free port; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(HANG)


@pytest.mark.parametrize(
    ("secrets", "state", "code", "outcome"), [([SECRET], "ok", 0, "unsigned"), ([], "fail", 78, "refused")]
)
def test_the_listener_is_asked_without_a_delivery(look, secrets, state, code, outcome):
    seen = []
    # Nothing of the listener is behind these routes: what is not signed does not get that far.
    app = App(None, webhook_secrets=secrets, submit_secrets=[], observe=lambda outcome, _: seen.append(outcome))
    with served(Starlette(routes=app.routes())) as url:
        found = look("listener", LISTENER_URL=url)
    assert (found.state, found.exit_code) == (state, code), found
    assert seen == [outcome]


def test_something_else_than_a_listener(look, mlflow_server):
    found = look("listener", LISTENER_URL=f"{mlflow_server.uri}/health")
    assert (found.state, found.exit_code) == ("fail", 69), found


def test_a_listener_that_is_away_or_not_known(look, dead_port):
    found = look("listener", LISTENER_URL=f"http://127.0.0.1:{dead_port}")
    assert (found.state, found.exit_code) == ("fail", 69), found
    assert look("listener").state == "skipped"
    assert look("listener", WEBHOOK_SECRET=SECRET).remedy == "Set LISTENER_URL."


@pytest.mark.parametrize(("ready", "state", "code"), [(True, "ok", 0), (False, "fail", 69)])
def test_the_listener_of_this_pod(look, ready, state, code, dead_port):
    listener = SimpleNamespace(watch=SimpleNamespace(synced=ready))
    app = App(None, webhook_secrets=[SECRET], submit_secrets=[])
    with served(operations(app, listener)) as url:
        port = url.rpartition(":")[2]
        found = look("listener", in_pod=True, METRICS_PORT=port, WEBHOOK_SECRET=SECRET)
        without = look("listener", in_pod=True, METRICS_PORT=port)
    assert (found.state, found.exit_code) == (state, code), found
    assert without.state == ("warn" if ready else "fail"), without
    # As in the sweep's Pod.
    assert look("listener", in_pod=True, METRICS_PORT=str(dead_port)).state == "skipped"
