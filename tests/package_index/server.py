"""A package index that only the tests know: PEP 503 and PEP 691, credentials, TLS, and the faults that real ones have."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import ssl
import tarfile
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from builder.package_index import Indexes
from builder.settings import BuildSettings, Network
from tests.servers.http_server import QuietServer, in_thread

JSON = "application/vnd.pypi.simple.v1+json"


def make_wheel(name, version, *, tag="py3-none-any", requires=(), requires_python="", files=None, padding=b""):
    """Return a wheel's file name and bytes; the same arguments give the same bytes."""
    distribution = name.replace("-", "_")
    content = io.BytesIO()
    info = f"{distribution}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Python: {requires_python}"] if requires_python else []
    metadata += [f"Requires-Dist: {line}" for line in requires]
    entries = {
        f"{distribution}/__init__.py": b"",
        f"{distribution}/padding": padding,
        **(files or {}),
        f"{info}/METADATA": "\n".join([*metadata, ""]).encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for path, data in entries.items()
    )
    entries[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    with zipfile.ZipFile(content, "w") as archive:
        for path, data in entries.items():
            archive.writestr(zipfile.ZipInfo(path, (1980, 1, 2, 0, 0, 0)), data)
    return f"{distribution}-{version}-{tag}.whl", content.getvalue()


@dataclass
class PackageIndex:
    """What it holds, and how it behaves; may be changed while it runs.

    Attributes:
        times: whether it gives upload times.
        json: whether it knows PEP 691.
        hashes: whether it gives hashes.
        credential: user and password; None for anybody.
        faults: called with the handler and the request's path before it is answered; True means that it was.
    """

    url: str = ""
    ca: object = None
    times: bool = True
    json: bool = True
    hashes: bool = True
    credential: tuple[str, str] | None = None
    faults: object = None
    files: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)

    def add(self, name, version, *, uploaded="2020-01-01T00:00:00Z", yanked=False, **wheel):
        filename, content = make_wheel(name, version, **wheel)
        self.files.setdefault(name, {})[filename] = (content, uploaded, yanked)
        return filename, hashlib.sha256(content).hexdigest()

    def add_source(self, name, version):
        """Add a source distribution that says what it is, and that nothing could build."""
        content = io.BytesIO()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            entry = tarfile.TarInfo(f"{name.replace('-', '_')}-{version}/PKG-INFO")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
        filename = f"{name.replace('-', '_')}-{version}.tar.gz"
        self.files.setdefault(name, {})[filename] = (content.getvalue(), "2020-01-01T00:00:00Z", False)

    @property
    def simple(self):
        return f"{self.url}/simple"

    @property
    def with_credential(self):
        return self.simple.replace("://", f"://{':'.join(self.credential)}@")

    def page(self, project):
        files = self.files[project]
        if self.json:
            entries = [
                {
                    "filename": name,
                    "url": f"../../files/{project}/{name}",
                    "hashes": {"sha256": hashlib.sha256(content).hexdigest()} if self.hashes else {},
                    "size": len(content),
                    **({"upload-time": uploaded} if self.times else {}),
                    "yanked": yanked,
                }
                for name, (content, uploaded, yanked) in files.items()
            ]
            body = {"meta": {"api-version": "1.1"}, "name": project, "files": entries, "versions": []}
            return JSON, json.dumps(body).encode()
        links = "".join(
            f'<a href="../../files/{project}/{name}{f"#sha256={hashlib.sha256(content).hexdigest()}" if self.hashes else ""}"'
            f"{' data-yanked=reason' if yanked else ''}>{name}</a><br>"
            for name, (content, _, yanked) in files.items()
        )
        return "text/html", f"<!DOCTYPE html><html><body>{links}</body></html>".encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def answer(self, status, body=b"", kind="text/plain", **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        index = self.server.index
        index.requests.append((self.command, self.path, dict(self.headers)))
        if index.faults and index.faults(self, self.path):
            return
        if index.credential:
            expected = base64.b64encode(":".join(index.credential).encode()).decode()
            if self.headers.get("Authorization") != f"Basic {expected}":
                self.answer(401, WWW_Authenticate='Basic realm="index"')
                return
        parts = self.path.strip("/").split("/")
        if parts[0] == "simple" and len(parts) == 2 and parts[1] in index.files:
            kind, body = index.page(parts[1])
            self.answer(200, body, kind)
        elif parts[0] == "files" and len(parts) == 3 and parts[2] in index.files.get(parts[1], {}):
            self.file(index.files[parts[1]][parts[2]][0])
        else:
            self.answer(404)

    def file(self, content):
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted[6:].partition("-")
            begin = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last) if first and last else len(content) - 1, len(content) - 1)
            if begin >= len(content):
                self.answer(416, Content_Range=f"bytes */{len(content)}")
                return
            part = content[begin : end + 1]
            span = f"bytes {begin}-{end}/{len(content)}"
            self.answer(206, part, "application/octet-stream", Content_Range=span, Accept_Ranges="bytes")
        else:
            self.answer(200, content, "application/octet-stream", Accept_Ranges="bytes")


@contextmanager
def running(*, certificate=None, **behaviour):
    """Run an index on a free port; with a certificate it speaks TLS."""
    server = QuietServer(("127.0.0.1", 0), _Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.path, certificate.key_path)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "https" if certificate else "http"
    server.index = PackageIndex(url=f"{scheme}://127.0.0.1:{server.server_address[1]}", **behaviour)
    with in_thread(server):
        yield server.index


def machine_indexes():
    """Return the indexes that this machine is configured for."""
    settings = BuildSettings.from_environ(os.environ)
    variables = {name: value.get_secret_value() for name, value in settings.index_variables.items()}
    network = Network(
        ca_bundle=settings.ssl_cert_file,
        pip_config=settings.pip_config_file,
        proxies=settings.proxies,
        index_variables=variables,
    )
    return Indexes.of(network)
