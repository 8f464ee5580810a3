"""A Domino on this machine, as its documentation, its public client and its examples describe it.

Runs are processes with a run's environment: a proxy on loopback adds the identity to requests for the API, another one
to those for MLflow, `/access-token` gives a token of some minutes, and what a run leaves as dominostats.json in the
project's root becomes columns of the dashboard. `dominostats.json` is deleted before each run.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from scripts.launch import clean_environ
from tests.servers.http_server import QuietServer, in_thread
from tests.servers.mlflow import MlflowServer
from tests.waiting import HANG, LONG_HANG

PROJECT = "65a1b2c3d4e5f60718293a4b"
OWNER, PROJECT_NAME, USER = "integration", "pumps", "ada"
PERSONAL_TOKEN = "personal-access-token-0123456789"
API_KEY = "legacy-api-key-0123456789"
_HOP = frozenset({"connection", "transfer-encoding", "keep-alive", "host"})
_IDENTITY = frozenset({"authorization", "x-domino-api-key", "x-domino-execution"})


@dataclass
class Run:
    """One run.

    Attributes:
        number: its id, 24 hexadecimal digits.
        command: what it runs.
        started: the body of the request that started it.
        status: `Running`, `Succeeded`, `Failed` or `Stopped`.
        code: the exit code of its command, which Domino tells nobody.
        output: what it wrote.
        columns: of the Jobs dashboard, from dominostats.json.
    """

    number: str
    command: str
    started: Mapping[str, Any]
    status: str = "Running"
    code: int | None = None
    output: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass
class Domino:
    """A Domino that runs.

    Attributes:
        mlflow: the server behind the runs' proxy.
        root: the project's files.
        environ: variables of each run's environment, beside Domino's own.
        v1: whether it has the API /api/jobs/v1.
        v4: whether it has the API /v4.
        wrapped: whether the newer API wraps a job in another object.
        token_seconds: how long a token of a run lives.
        tokens: how many were given out.
        asked: method, path and headers of the requests that reached the API.
        mlflow_asked: headers of requests as clients in runs sent them to MLflow's proxy.
    """

    mlflow: str
    root: Path
    environ: dict[str, str] = field(default_factory=dict)
    v1: bool = True
    v4: bool = True
    wrapped: bool = True
    token_seconds: float = 300
    tokens: int = 0
    host: str = ""
    api_proxy: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    mlflow_asked: list[dict[str, str]] = field(default_factory=list)
    _processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    # ---- identity

    def new_token(self) -> str:
        """Return a JWT that lives for some seconds."""
        self.tokens += 1
        claims = {"sub": USER, "exp": int(time.time() + self.token_seconds), "n": self.tokens}
        body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        return f"eyJhbGciOiJub25lIn0.{body}.c2lnbmF0dXJl"

    def knows(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request to the API is from somebody."""
        sent = {name.lower(): value for name, value in headers.items()}
        token = sent.get("authorization", "").removeprefix("Bearer ")
        if token == PERSONAL_TOKEN or sent.get("x-domino-api-key") == API_KEY:
            return True
        with contextlib.suppress(IndexError, ValueError):
            part = token.split(".")[1]
            return bool(json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))["exp"] > time.time())
        return False

    # ---- the API

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Any]:
        """Return status and JSON of the API's answer."""
        self.asked.append((method, path, dict(headers)))
        if not self.knows(headers):
            return 401, {"message": "Authentication required"}
        found = re.fullmatch(r"/v4/jobs/(?P<id>[0-9a-f]{24})|/api/jobs/beta/jobs/(?P<beta>[0-9a-f]{24})", path)
        if method == "GET" and found and (self.v4 if found["id"] else self.v1):
            run = self.runs.get(found["id"] or found["beta"])
            return (200, self.told(run, v4=bool(found["id"]))) if run else (404, {"message": "no such job"})
        if method == "POST" and path == "/api/jobs/v1/jobs" and self.v1:
            asked = json.loads(body)
            return self._started(asked, asked.get("runCommand"), v4=False)
        if method == "POST" and path == "/v4/jobs/start" and self.v4:
            asked = json.loads(body)
            return self._started(asked, asked.get("commandToRun"), v4=True)
        return 404, {}

    def _started(self, asked: Mapping[str, Any], command: str | None, *, v4: bool) -> tuple[int, Any]:
        if asked.get("projectId") != PROJECT:
            return 404, {"message": f"project {asked.get('projectId')} was not found"}
        if not command:
            return 400, {"errors": ["a command is needed"]}
        return 200, self.told(self.start(command, started=asked), v4=v4)

    def told(self, run: Run, *, v4: bool) -> Any:
        """Return what the API tells of a run."""
        completed = run.status != "Running"
        if v4:
            return {"id": run.number, "statuses": {"isCompleted": completed, "executionStatus": run.status}}
        if self.wrapped:
            status = {"isCompleted": completed, "executionStatus": run.status}
            return {"job": {"id": run.number, "status": status}, "metadata": {"requestId": "1"}}
        return {"id": run.number, "projectId": PROJECT, "status": run.status}

    # ---- runs

    def start(self, command: str, *, started: Mapping[str, Any] | None = None, **environ: str) -> Run:
        """Start a run of the project."""
        run = Run(number=uuid.uuid4().hex[:24], command=command, started=started or {})
        self.runs[run.number] = run
        (self.root / "dominostats.json").unlink(missing_ok=True)
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.root,
            env={**self.environment(run.number), **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes[run.number] = process
        threading.Thread(target=self._await, args=(run, process), daemon=True).start()
        return run

    def _await(self, run: Run, process: subprocess.Popen[str]) -> None:
        run.output, _ = process.communicate()
        run.code = process.returncode
        with contextlib.suppress(OSError, ValueError):
            columns = json.loads((self.root / "dominostats.json").read_text())
            if isinstance(columns, dict):
                run.columns = {name: value for name, value in columns.items() if not isinstance(value, (dict, list))}
        if run.status == "Running":
            run.status = "Failed" if run.code else "Succeeded"
        run.ended.set()

    def ended(self, run: Run) -> Run:
        """Wait until a run has ended, and return it."""
        assert run.ended.wait(LONG_HANG), run
        return run

    def stop(self, run: Run) -> None:
        """Stop a run, as a person does in the dashboard."""
        run.status = "Stopped"
        self._processes[run.number].terminate()

    def environment(self, number: str) -> dict[str, str]:
        """Return the environment of a run, with a proxy to MLflow of its own."""
        return clean_environ(
            **{
                "HOME": str(self.root.parent),
                "DOMINO_RUN_ID": number,
                "DOMINO_PROJECT_ID": PROJECT,
                "DOMINO_PROJECT_NAME": PROJECT_NAME,
                "DOMINO_PROJECT_OWNER": OWNER,
                "DOMINO_STARTING_USERNAME": USER,
                "DOMINO_WORKING_DIR": str(self.root),
                "DOMINO_API_HOST": self.host,
                "DOMINO_API_PROXY": self.api_proxy,
                "MLFLOW_TRACKING_URI": self._mlflow_proxy(number),
                **self.environ,
            }
        )

    def _mlflow_proxy(self, number: str) -> str:
        def forwarded(handler: _Handler) -> None:
            self.mlflow_asked.append(dict(handler.headers))
            kept = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP | _IDENTITY}
            body = handler.body()
            if handler.path.endswith("/mlflow/runs/create"):
                # Domino tags the runs that are begun in one of its own.
                asked = json.loads(body)
                asked["tags"] = [*asked.get("tags", []), {"key": "mlflow.domino.run_id", "value": number}]
                body = json.dumps(asked).encode()
                kept = {name: value for name, value in kept.items() if name.lower() != "content-length"}
            handler.forward(self.mlflow, {**kept, "Authorization": f"Bearer {self.new_token()}"}, body)

        return self._stack.enter_context(_serving(forwarded))

    @contextlib.contextmanager
    def running(self) -> Iterator[Domino]:
        """Serve the API and its proxy."""

        def api(handler: _Handler) -> None:
            status, found = self.answer(handler.command, handler.path, dict(handler.headers), handler.body())
            handler.reply(status, json.dumps(found).encode())

        def proxy(handler: _Handler) -> None:
            if handler.path == "/access-token":
                handler.reply(200, self.new_token().encode(), "text/plain")
                return
            kept = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP}
            if "authorization" not in {name.lower() for name in kept}:
                kept["Authorization"] = f"Bearer {self.new_token()}"
            handler.forward(self.host, kept, handler.body())

        with self._stack:
            self.host = self._stack.enter_context(_serving(api))
            self.api_proxy = self._stack.enter_context(_serving(proxy))
            try:
                yield self
            finally:
                for process in self._processes.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, 9)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def do_GET(self):
        self.server.serve(self)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def reply(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def forward(self, base: str, headers: Mapping[str, str], body: bytes) -> None:
        connection = http.client.HTTPConnection(base.partition("://")[2], timeout=HANG)
        try:
            connection.request(self.command, self.path, body=body or None, headers=dict(headers))
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {*_HOP, "content-length"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        finally:
            connection.close()


@contextlib.contextmanager
def _serving(serve) -> Iterator[str]:
    server = QuietServer(("127.0.0.1", 0), _Handler)
    server.serve = serve
    with in_thread(server):
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def domino(mlflow_server: MlflowServer, tmp_path: Path) -> Iterator[Domino]:
    """A Domino whose runs reach the tests' MLflow."""
    root = tmp_path / "mnt"
    root.mkdir()
    with Domino(mlflow=mlflow_server.uri, root=root).running() as running:
        yield running
