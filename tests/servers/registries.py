"""Registries: the distribution project's, configured in the ways that users meet."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import yaml

from scripts.certificates import for_loopback, self_signed
from scripts.go_tools import tool
from scripts.launch import Launcher, Program, Running, free_port, running
from tests.servers.tokens import ISSUER, SERVICE, TokenServer

USER, PASSWORD = "publisher", "correct horse battery"
PULL_USER, PULL_PASSWORD = "puller", "staple"


@dataclass(frozen=True, kw_only=True)
class RegistryServer:
    """A registry that runs.

    Attributes:
        host: `ADDRESS:PORT`.
        storage: folder of its files, as the registry lays them out.
        ca: certificate of the authority that signed its own, alone in its folder; None for plain HTTP.
        user: may pull and push; empty where the registry is anonymous.
        password: of `user`.
        pull_user: may only pull; empty where there is none.
        pull_password: of `pull_user`.
        tokens: the token server, where there is one.
    """

    host: str
    storage: Path
    server: Running
    ca: Path | None = None
    user: str = ""
    password: str = ""
    pull_user: str = ""
    pull_password: str = ""
    tokens: TokenServer | None = None

    @property
    def url(self) -> str:
        """The registry's base URL."""
        return f"{'https' if self.ca else 'http'}://{self.host}"

    def docker_config(self, folder: Path, *, pull_only: bool = False) -> Path:
        """Write a Docker config.json with this registry's credential into `folder`, and return the folder."""
        user, password = (self.pull_user, self.pull_password) if pull_only else (self.user, self.password)
        auth = {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"auths": {self.host: auth} if user else {}}))
        return folder

    def log(self) -> str:
        """Return what the registry logged."""
        return self.server.log()


@contextlib.contextmanager
def run_registry(
    launcher: Launcher,
    folder: Path,
    *,
    kind: str = "registry",
    storage: Path | None = None,
    auth: dict[str, Any] | None = None,
    tls: dict[str, str] | None = None,
    read_only: bool = False,
    address: str = "127.0.0.1",
    **fields: Any,
) -> Iterator[RegistryServer]:
    """Run a registry.

    Args:
        launcher: where it runs.
        folder: of its configuration, certificates and log.
        kind: `registry` for distribution 2.8, `registry-v3` for distribution 3.
        storage: folder of its content; below `folder` where it is not given.
        auth: the configuration's `auth` section.
        tls: the configuration's `http.tls` section.
        read_only: whether it refuses to be written to.
        address: of this machine, where it listens.
        fields: further fields of the `RegistryServer`.
    """
    port = free_port(address)
    storage = storage or folder / "storage"
    storage.mkdir(exist_ok=True)
    # `{listen}` cannot be replaced in a file; a container's loopback cannot be reached from outside it.
    listen = f"{address}:{port}" if launcher.on_this_machine else f":{port}"
    config = {
        "version": 0.1,
        "log": {"level": "info", "accesslog": {"disabled": False}},
        "storage": {
            "filesystem": {"rootdirectory": str(storage)},
            "delete": {"enabled": True},
            "maintenance": {"uploadpurging": {"enabled": False}, "readonly": {"enabled": read_only}},
        },
        "http": {"addr": listen, "secret": "not one", **({"tls": tls} if tls else {})},
        **({"auth": auth} if auth else {}),
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    command = "docker-registry" if kind == "registry" else str(tool("registry"))
    scheme = "https" if tls else "http"
    program = Program(
        name=f"{kind}-{port}",
        kind=kind,
        argv=(command, "serve", str(path)),
        port=port,
        ready=f"{scheme}://{address}:{port}/v2/",
        folder=folder,
        more_folders=(storage,),
        # The v3 registry would look for an OpenTelemetry collector.
        environ={"OTEL_TRACES_EXPORTER": "none"},
        ca=fields.get("ca"),
    )
    with running(launcher, program) as server:
        yield RegistryServer(host=f"{address}:{port}", storage=storage, server=server, **fields)


def htpasswd(folder: Path) -> dict[str, Any]:
    """Return an `auth` section with one user and a password file in `folder`; the registry takes bcrypt only."""
    path = folder / "htpasswd"
    # The least cost that bcrypt knows: the registry checks the password at every request.
    digest = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    path.write_text(f"{USER}:{digest}\n")
    return {"htpasswd": {"realm": "test", "path": str(path)}}


@pytest.fixture(scope="session")
def registry(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """An anonymous registry over plain HTTP on the loopback interface."""
    with run_registry(launcher, tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture(scope="session")
def registry_v3(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """As `registry`, of the distribution project's third major version."""
    with run_registry(launcher, tmp_path_factory.mktemp("registry-v3"), kind="registry-v3") as server:
        yield server


@pytest.fixture(scope="session")
def read_only_registry(
    launcher: Launcher, registry: RegistryServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RegistryServer]:
    """An anonymous registry with the content of `registry` that refuses every write."""
    folder = tmp_path_factory.mktemp("read-only")
    with run_registry(launcher, folder, storage=registry.storage, read_only=True) as server:
        yield server


@pytest.fixture(scope="session")
def basic_registry(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry with basic authentication over plain HTTP on the loopback interface."""
    folder = tmp_path_factory.mktemp("basic")
    with run_registry(launcher, folder, auth=htpasswd(folder), user=USER, password=PASSWORD) as server:
        yield server


@pytest.fixture(scope="session")
def tls_registry(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry with basic authentication over TLS, its certificate signed by a private authority."""
    folder = tmp_path_factory.mktemp("tls")
    authority = self_signed(folder / "ca", "Private test authority")
    # Tools that take a folder of authorities would take a key beside the certificate for a client's.
    authority.key_path.rename(folder / "ca.key")
    certificate = for_loopback(folder, authority)
    tls = {"certificate": str(certificate.path), "key": str(certificate.key_path)}
    fields = {"ca": authority.path, "user": USER, "password": PASSWORD}
    with run_registry(launcher, folder, auth=htpasswd(folder), tls=tls, **fields) as server:
        yield server


@pytest.fixture(scope="session")
def token_registry(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry with token authentication; one user may push and pull, one only pull, and nobody else anything."""
    folder = tmp_path_factory.mktemp("token")
    users = {
        USER: (PASSWORD, frozenset({"pull", "push", "delete"})),
        PULL_USER: (PULL_PASSWORD, frozenset({"pull"})),
    }
    with TokenServer(signer=self_signed(folder, "signer"), users=users) as tokens:
        auth = {
            "token": {
                "realm": tokens.realm,
                "service": SERVICE,
                "issuer": ISSUER,
                "rootcertbundle": str(tokens.signer.path),
            }
        }
        fields = {"user": USER, "password": PASSWORD, "pull_user": PULL_USER, "pull_password": PULL_PASSWORD}
        with run_registry(launcher, folder, auth=auth, tokens=tokens, **fields) as server:
            yield server
