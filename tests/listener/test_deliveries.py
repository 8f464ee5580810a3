"""What MLflow delivers, verified and read; and what is refused."""

from __future__ import annotations

import contextlib
import json
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography.fernet import Fernet
from mlflow import MlflowClient

from builder.listener.deliveries import Event, Refused, Unsigned, Verifier, event_of
from builder.models.catalog import MlflowCatalog
from builder.models.webhooks import Webhooks
from builder.settings import ListenSettings
from tests.servers.http_server import in_thread
from tests.servers.mlflow import run_mlflow
from tests.signed import signed, tag_set
from tests.waiting import HANG

SECRET = "a-secret-of-the-tests"
TAG = "EXTERNAL_TARGET_PLTR_FOUNDRY"
ENVIRON = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "REGISTRY_URL": "registry.example.com/models"}
WEBHOOKS_HERE = {
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
    "MLFLOW_WEBHOOK_CACHE_TTL": "1",
    # Whatever is not answered in time is delivered once more.
    "MLFLOW_WEBHOOK_REQUEST_TIMEOUT": f"{HANG:.0f}",
}


def settings(**environ: str) -> ListenSettings:
    return ListenSettings.from_environ({**ENVIRON, **environ})


@dataclass(frozen=True)
class Received:
    """A request as a receiver of MLflow's has it: headers by lower-case names."""

    headers: dict[str, str]
    body: bytes


class Receiver(ThreadingHTTPServer):
    """Takes every delivery, once."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taking)
        self.received: queue.Queue[Received] = queue.Queue()
        self.known: set[str] = set()

    def next(self) -> Received:
        """Wait for a delivery."""
        return self.received.get(timeout=HANG)


class _Taking(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if (identity := headers["x-mlflow-delivery-id"]) not in self.server.known:
            self.server.known.add(identity)
            self.server.received.put(Received(headers, body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_arguments) -> None:
        pass


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    with in_thread(receiver):
        yield receiver


@pytest.fixture(scope="module")
def delivered(launcher, tmp_path_factory):
    """Deliveries of a real MLflow, by what they are about."""
    folder = tmp_path_factory.mktemp("mlflow-webhooks")
    options = ("--backend-store-uri", f"sqlite:///{folder}/mlflow.db")
    with (
        run_mlflow(launcher, folder, *options, artifacts=str(folder), environ=WEBHOOKS_HERE) as server,
        receiving() as receiver,
    ):
        webhooks = Webhooks(MlflowCatalog(server.uri))
        events = ("model_version.created", "model_version_tag.set", "model_version_tag.deleted")
        url = f"http://127.0.0.1:{receiver.server_address[1]}/webhook"
        made = webhooks.create("tests", url, SECRET, events=(*events, "model_version_alias.created"))
        found = {}
        assert webhooks.test(made.id).delivered
        found["example tag"] = receiver.next()
        assert webhooks.test(made.id, "model_version.created").delivered
        found["example version"] = receiver.next()
        client = MlflowClient(server.uri)
        client.create_registered_model("pump")
        client.create_model_version("pump", source="s3://models/1", tags={TAG: "True"})
        found["tagged version"] = receiver.next()
        client.create_model_version("pump", source="s3://models/2")
        found["version"] = receiver.next()
        client.set_model_version_tag("pump", "2", TAG, "true")
        found["tag"] = receiver.next()
        client.set_model_version_tag("pump", "2", "publish.pltr_foundry.state", "running")
        found["own tag"] = receiver.next()
        client.set_model_version_tag("pump", "2", "MODEL_PLATFORMS", "linux/arm64")
        found["input tag"] = receiver.next()
        client.set_model_version_tag("pump", "2", TAG, "false")
        found["deselected"] = receiver.next()
        client.delete_model_version_tag("pump", "2", TAG)
        found["tag deleted"] = receiver.next()
        client.set_registered_model_alias("pump", "champion", "2")
        found["alias"] = receiver.next()
        client.create_registered_model("example_model")
        client.create_model_version("example_model", source="s3://models/3", tags={TAG: "true"})
        found["called as the example"] = receiver.next()
        yield found


@pytest.mark.parametrize(
    ("what", "event"),
    [
        ("tagged version", Event(kind="publish", name="pump", version="1")),
        ("tag", Event(kind="publish", name="pump", version="2", again=True)),
        ("input tag", Event(kind="look", name="pump", version="2")),
        ("version", None),
        ("own tag", None),
        ("deselected", None),
        ("tag deleted", None),
        ("alias", None),
        ("called as the example", Event(kind="publish", name="example_model", version="1")),
        ("example tag", None),
        ("example version", None),
    ],
)
def test_what_mlflow_delivers_is_verified_and_read(delivered, what, event):
    received = delivered[what]
    assert Verifier([SECRET]).verify(received.headers, received.body) == received.headers["x-mlflow-delivery-id"]
    assert event_of(settings(), received.body) == event


def test_layers_are_made_ahead_of_time_where_that_is_wanted(delivered):
    wanted = settings(WARM_ON_CREATE="true")
    assert event_of(wanted, delivered["version"].body) == Event(kind="warm", name="pump", version="2")
    assert event_of(wanted, delivered["tagged version"].body) == Event(kind="publish", name="pump", version="1")
    assert event_of(wanted, delivered["example version"].body) is None


def test_another_target_is_another_tag(delivered):
    other = settings(TARGET_TAG="EXTERNAL_TARGET_SECOND")
    assert event_of(other, delivered["tag"].body) is None
    assert event_of(other, delivered["tagged version"].body) is None


def refused(verifier: Verifier, headers: dict[str, str], body: bytes) -> int:
    with pytest.raises(Refused) as caught:
        verifier.verify({name.lower(): value for name, value in headers.items()}, body)
    return caught.value.status


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def test_a_delivery_is_taken_once_unless_it_could_not_be_served():
    verifier = Verifier([SECRET])
    headers = signed(b"{}", SECRET, identity="one")
    assert verifier.verify(lower(headers), b"{}") == "one"
    assert refused(verifier, headers, b"{}") == 409
    verifier.release("one")
    assert verifier.verify(lower(headers), b"{}") == "one"


def test_both_secrets_count_while_one_follows_the_other():
    verifier = Verifier([SECRET, "the-secret-that-came-before"])
    for secret in (SECRET, "the-secret-that-came-before"):
        assert verifier.verify(lower(signed(b"{}", secret)), b"{}")


@pytest.mark.parametrize("name", ["X-MLflow-Delivery-Id", "X-MLflow-Timestamp", "X-MLflow-Signature"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "v1,",
        "v1,!!!",
        "v2,AAAA",
        "nan",
        "inf",
        "-1e308",
        "1e400",
        "9" * 400,
        "v1,AAAA v1,BBBB",
        "a,b,c",
        "\x00",
        "ü",
    ],
)
def test_a_header_that_is_wrong_is_refused_and_nothing_else(name, value):
    body = b'{"entity": "model_version"}'
    assert refused(Verifier([SECRET]), {**signed(body, SECRET), name: value}, body) == 401


def test_what_is_forged_stale_or_no_text_is_refused():
    verifier = Verifier([SECRET])
    body = json.dumps(tag_set("pump", "1", TAG)).encode()
    assert refused(verifier, signed(body, "another-secret-of-the-tests"), body) == 401
    assert refused(verifier, signed(body, SECRET), body + b" ") == 401
    assert refused(verifier, signed(body, SECRET, when=0), body) == 401
    assert refused(verifier, signed(b"\xff\xfe", SECRET), b"\xff\xfe") == 401
    assert refused(verifier, signed(body, SECRET, identity="i" * 257), body) == 401
    assert refused(Verifier([]), signed(body, SECRET), body) == 401
    with pytest.raises(Unsigned):
        verifier.verify({}, body)
    # None of them has used up its id.
    assert verifier.verify(lower(signed(body, SECRET)), body)


def test_ids_are_forgotten_once_their_signature_is_stale():
    now = [0.0]
    verifier = Verifier([SECRET], clock=lambda: now[0])
    first = signed(b"{}", SECRET, identity="first")
    verifier.verify(lower(first), b"{}")
    now[0] = 3600.0
    verifier.verify(lower(signed(b"{}", SECRET)), b"{}")
    assert len(verifier._seen) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"entity": "model_version_tag", "action": "set"}',
        b'{"entity": "model_version_tag", "action": "set", "data": []}',
        b'{"entity": 1, "action": "set", "data": {}}',
        json.dumps(tag_set("", "1", TAG)).encode(),
        json.dumps(tag_set("p" * 1025, "1", TAG)).encode(),
        json.dumps(tag_set("pump", "../1", TAG)).encode(),
        json.dumps(tag_set("pump", "1" * 11, TAG)).encode(),
        json.dumps(tag_set("pump", "@champion", TAG)).encode(),
        b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"entity": "\xff", "action": "set", "data": {}}',
    ],
)
def test_what_mlflow_does_not_send_is_refused(body):
    with pytest.raises(Refused) as caught:
        event_of(settings(), body)
    assert caught.value.status == 400


def test_another_workspace_is_not_ours():
    body = {**tag_set("pump", "1", TAG), "workspace": "others"}
    assert event_of(settings(), json.dumps(body).encode()) is None
    ours = settings(MLFLOW_WORKSPACE="others")
    assert event_of(ours, json.dumps(body).encode()) == Event(kind="publish", name="pump", version="1", again=True)
