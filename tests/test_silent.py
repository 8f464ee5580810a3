"""Services that accept a connection and never answer: an end in time, typed, and no version that stays `running`."""

from __future__ import annotations

import contextlib
import socket
import threading

import httpx2
import pytest

from builder.clients import Registries
from builder.errors import ServiceUnavailable
from builder.http import RetryPolicy
from builder.models.catalog import MlflowCatalog
from builder.oci.registry import published
from builder.package_index import Indexes, IndexUrl
from builder.package_index.client import IndexClient
from builder.publish import publish
from builder.reference import Platform, Reference
from builder.wheels.requirements import Requirements
from builder.wheels.resolve import lock
from tests.waiting import HANG, growing, until

NO_PAUSE = RetryPolicy(sleep=lambda _: None)


class Silent:
    """Listens, and keeps what it accepted."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.host = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.accepted: list[tuple[socket.socket, tuple[str, int]]] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def connections(self) -> int:
        """Return how many connections were made, also those that only the kernel has taken yet."""
        with socket.create_connection(self._socket.getsockname()) as last:
            ours = last.getsockname()
            until(lambda: ours in [peer for _, peer in self.accepted])
        return len(self.accepted) - 1

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.accepted.append(self._socket.accept())

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (self._socket, *(connection for connection, _ in self.accepted)):
            each.close()


@pytest.fixture
def silent():
    found = Silent()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Let requests wait for tenths of a second, as often as they do else."""
    monkeypatch.setattr("builder.http._TIMEOUT", httpx2.Timeout(0.3, connect=HANG))
    monkeypatch.setattr("builder.wheels.uv.HTTP_SECONDS", 1)
    monkeypatch.setattr("builder.wheels.uv.HTTP_RETRIES", 0)


def test_a_registry_is_asked_twice(silent):
    reference = Reference.parse(f"{silent.host}/a/b:1")
    with Registries(policy=NO_PAUSE) as registries, pytest.raises(ServiceUnavailable, match="cannot be reached"):
        published(registries.for_host(silent.host), reference)
    assert silent.connections() == 2


def test_a_package_index_is_asked_twice(silent):
    indexes = Indexes(default=IndexUrl(f"http://{silent.host}/simple"))
    with (
        IndexClient(indexes, policy=NO_PAUSE) as client,
        pytest.raises(ServiceUnavailable, match="cannot be reached"),
    ):
        client.files("six")
    assert silent.connections() == 2


@pytest.mark.parametrize("platform", ["linux/amd64", "linux/arm/v7"], ids=["named", "universal"])
def test_a_resolver_gives_up(silent, tmp_path, platform):
    indexes = Indexes(default=IndexUrl(f"http://{silent.host}/simple"))
    with IndexClient(indexes, policy=NO_PAUSE) as client, pytest.raises(ServiceUnavailable):
        lock(
            Requirements.of("six"), platform=Platform.parse(platform), indexes=indexes, model=tmp_path,
            python="3.11", glibc=(2, 36), client=client,
        )  # fmt: skip


def test_mlflow_is_asked_as_often_as_its_variables_say(silent, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(ServiceUnavailable, match="find model 'a' version 1") as caught:
        MlflowCatalog(f"http://{silent.host}").find("a", "1")
    assert "MLFLOW_TRACKING_URI" in caught.value.remedy
    assert silent.connections() == 2


@pytest.mark.parametrize("what", ["registry", "package index"])
def test_no_version_stays_running(silent, small, small_settings, what, monkeypatch):
    """The registry is asked before work begins, and the index after: the state is `running` then."""
    model = small()
    where = f"http://{silent.host}/simple"
    changes = {"REGISTRY_URL": f"{silent.host}/x"} if what == "registry" else {"UV_DEFAULT_INDEX": where}
    # Those that do answer are asked before.
    for probes, seconds in enumerate(growing(0.3)):
        monkeypatch.setattr("builder.http._TIMEOUT", httpx2.Timeout(seconds, connect=HANG))
        with pytest.raises(ServiceUnavailable) as caught:
            publish(small_settings(model, **changes))
        if silent.connections() > probes:
            break
    assert caught.value.exit_code == 69
    outcome = model.outcome()
    assert outcome["state"] == "failed"
    assert outcome["error"].startswith("ServiceUnavailable")
    assert outcome["attempts"] in {"0", ""}
