"""The listener's sockets: TLS, slow and hostile connections, and its end."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import subprocess
import sys
import threading

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from builder.errors import InvalidSettings
from builder.listener import server as listening
from builder.listener.server import Servers, bound
from builder.settings import ListenSettings
from scripts.certificates import for_loopback, self_signed
from scripts.launch import clean_environ
from tests.waiting import HANG, growing

ENVIRON = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "REGISTRY_URL": "registry.example.com/models"}


@contextlib.contextmanager
def serving(app, settings, *, grace=5):
    socket_ = bound("127.0.0.1", 0)
    servers = Servers(settings, [app], [socket_], grace=grace)
    servers.start()
    try:
        yield servers, socket_.getsockname()[1]
    finally:
        servers.end(0)
        servers.join(HANG)


def get(port, **options):
    kind = http.client.HTTPSConnection if options else http.client.HTTPConnection
    connection = kind("localhost" if options else "127.0.0.1", port, timeout=HANG, **options)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read()
    finally:
        connection.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Wait for a server's start and for the head of a request, however slow; a test may have a shorter bound."""
    monkeypatch.setattr(listening, "_STARTS_WITHIN", HANG)
    monkeypatch.setattr(listening, "_SLOWEST_HEAD", HANG)


@pytest.fixture
def settings():
    return ListenSettings.from_environ(ENVIRON)


def tried(port):
    """Return the answer; nothing where the connection was closed before it."""
    try:
        return get(port)
    except (OSError, http.client.HTTPException):
        return b""


def closed(sock):
    """Wait until the server has closed a connection; what it has not read by then resets it."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


async def hello(_request):
    return PlainTextResponse("hello")


APP = Starlette(routes=[Route("/", hello)])


def test_a_connection_that_sends_no_request_is_closed(settings, monkeypatch):
    for seconds in growing(0.5):
        monkeypatch.setattr(listening, "_SLOWEST_HEAD", seconds)
        with serving(APP, settings) as (_, port), socket.create_connection(("127.0.0.1", port), timeout=HANG) as slow:
            with contextlib.suppress(ConnectionError):
                slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            # One that is in time is served meanwhile.
            answer = tried(port)
            assert closed(slow)
        if answer:
            assert answer == b"hello"
            break


def test_a_second_request_that_never_comes_to_an_end_is_closed(settings, monkeypatch):
    for seconds in growing(0.5):
        monkeypatch.setattr(listening, "_SLOWEST_HEAD", seconds)
        with serving(APP, settings) as (_, port), socket.create_connection(("127.0.0.1", port), timeout=HANG) as slow:
            answer = b""
            with contextlib.suppress(ConnectionError):
                slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                while not answer.endswith(b"hello") and (more := slow.recv(1 << 16)):
                    answer += more
            if not answer.endswith(b"hello"):
                continue  # it was too slow with the first one
            with contextlib.suppress(ConnectionError):
                slow.sendall(b"G")
            assert closed(slow)
            break


def test_a_request_that_takes_long_is_not_closed(settings, monkeypatch):
    begun, let_go = threading.Event(), threading.Event()

    def wait(_request):
        begun.set()
        assert let_go.wait(HANG)
        return PlainTextResponse("done")

    with serving(Starlette(routes=[Route("/", wait)]), settings) as (_, port):
        answers = []
        asking = threading.Thread(target=lambda: answers.append(get(port)))
        asking.start()
        assert begun.wait(HANG)
        monkeypatch.setattr(listening, "_SLOWEST_HEAD", 0.2)
        with socket.create_connection(("127.0.0.1", port), timeout=HANG) as slow:
            # Closed after the bound: the request has been open for as long.
            assert closed(slow)
        let_go.set()
        asking.join(HANG)
        assert answers == [b"done"]


def test_open_requests_are_answered_at_the_end(settings):
    begun, let_go = threading.Event(), threading.Event()

    def wait(_request):
        begun.set()
        assert let_go.wait(HANG)
        return PlainTextResponse("done")

    with serving(Starlette(routes=[Route("/", wait)]), settings, grace=int(HANG)) as (servers, port):
        answers = []
        asking = threading.Thread(target=lambda: answers.append(get(port)))
        asking.start()
        assert begun.wait(HANG)
        servers.end(0)
        let_go.set()
        servers.join(HANG)
        asking.join(HANG)
        assert answers == [b"done"]
        # Whoever listens at the port from now on is somebody else.
        assert servers._sockets[0].fileno() == -1


def test_it_speaks_tls_with_its_certificate(tmp_path):
    authority = self_signed(tmp_path, "authority")
    own = for_loopback(tmp_path, authority)
    files = {"LISTEN_CERTIFICATE": str(own.path), "LISTEN_KEY": str(own.key_path)}
    with serving(APP, ListenSettings.from_environ({**ENVIRON, **files})) as (_, port):
        context = ssl.create_default_context(cafile=str(authority.path))
        assert get(port, context=context) == b"hello"
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            get(port)


def test_an_address_that_is_taken_is_told():
    with bound("127.0.0.1", 0) as taken, pytest.raises(InvalidSettings, match="Address already in use"):
        bound("127.0.0.1", taken.getsockname()[1])


def test_all_addresses_are_those_of_both_families():
    with bound("", 0) as both:
        port = both.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=HANG).close()
        if socket.has_dualstack_ipv6():
            socket.create_connection(("::1", port), timeout=HANG).close()


def listen(**environ):
    done = subprocess.run(
        [sys.executable, "-m", "builder", "listen"],
        check=False,
        capture_output=True,
        text=True,
        timeout=HANG,
        env=clean_environ(**{**ENVIRON, "LOG_FORMAT": "text", "NO_COLOR": "1", **environ}),
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"WEBHOOK_SECRET": "too short"}, "WEBHOOK_SECRET is malformed (shorter than 16 characters)"),
        ({"SUBMIT_SECRET": "long-enough-for-anybody short"}, "SUBMIT_SECRET is malformed"),
        ({"LISTEN_CERTIFICATE": "/etc/hostname"}, "LISTEN_KEY is missing: LISTEN_CERTIFICATE is set, and needs it"),
        ({"STATUS_ACCESS": "token"}, "STATUS_TOKEN is missing: STATUS_ACCESS is token, and needs it"),
        ({"STATUS_ACCESS": "everybody"}, "STATUS_ACCESS is malformed"),
        ({"MLFLOW_UI_URL": "javascript:alert(1)"}, "MLFLOW_UI_URL is malformed"),
        ({"LISTEN_PORT": "80800"}, "LISTEN_PORT is malformed"),
        ({"LISTEN_PARALLEL": "0"}, "LISTEN_PARALLEL is malformed"),
    ],
)
def test_settings_that_cannot_be_used_are_told_together(environ, said):
    code, stderr = listen(**environ, REGISTRY_URL="")
    assert code == 78
    assert said in stderr
    assert "REGISTRY_URL is missing" in stderr
    assert "long-enough-for-anybody" not in stderr


def test_a_certificate_that_is_none_is_told(tmp_path):
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).write_text("no certificate")
    config = tmp_path / "kubeconfig"
    config.write_text(KUBECONFIG)
    files = {"LISTEN_CERTIFICATE": str(tmp_path / "tls.crt"), "LISTEN_KEY": str(tmp_path / "tls.key")}
    code, stderr = listen(**files, KUBECONFIG=str(config))
    assert code == 78
    assert "LISTEN_CERTIFICATE and LISTEN_KEY cannot be used" in stderr


def test_without_a_cluster_it_says_so(tmp_path):
    code, stderr = listen(KUBECONFIG=str(tmp_path / "none"))
    assert code == 78
    assert "No cluster can be reached" in stderr


KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: here
contexts: [{name: here, context: {cluster: here, user: me}}]
clusters: [{name: here, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: me, user: {}}]
"""
