"""Package indexes: which are asked, what they say, and the files that come from them."""

import hashlib
import os
import socket
import subprocess
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.clients import Registries
from builder.errors import BuilderError, InvalidSettings, PermissionRefused, ServiceUnavailable, TryAgain
from builder.http import RetryPolicy, _authorities
from builder.package_index import Indexes, IndexUrl
from builder.package_index.client import IndexClient, NoPage, WheelMismatch, WheelNotFound, parse_page
from builder.package_index.wheel_file import LockedWheel
from builder.reference import Repository
from builder.settings import Network
from scripts.certificates import for_loopback, self_signed
from tests.package_index.server import make_wheel, running
from tests.waiting import HANG

QUICK = RetryPolicy(attempts=4, first=0.001, longest=0.01, deadline=HANG)
PADDING = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index-ca")
    authority = self_signed(folder, "index authority")
    return authority, for_loopback(folder, authority)


@pytest.fixture
def index():
    with running() as found:
        yield found


@pytest.fixture
def locked(index):
    """Put a wheel of about 1 MiB into the index; return it as a lock names it."""
    name, sha256 = index.add("big", "1.0", padding=PADDING)
    return LockedWheel(name="big", version="1.0", filename=name, sha256=sha256)


def client(*urls, **fields):
    *extra, default = (IndexUrl(url) if isinstance(url, str) else url for url in urls)
    return IndexClient(Indexes(extra=tuple(extra), default=default, **fields), policy=QUICK)


def content(index, wheel):
    return index.files[wheel.name][wheel.filename][0]


@pytest.mark.parametrize("json", [True, False])
@pytest.mark.parametrize("hashes", [True, False])
def test_what_an_index_says(index, locked, json, hashes):
    index.json, index.hashes = json, hashes
    with client(index.simple) as asked:
        (file,) = asked.files("big")
        assert asked.find(locked) == file
        assert asked.files("nothing") == ()
    assert file.filename == locked.filename
    assert file.url == f"{index.url}/files/big/{locked.filename}"
    assert file.sha256 == (locked.sha256 if hashes else "")
    assert file.size == (len(content(index, locked)) if json else None)
    assert (file.uploaded.year if file.uploaded else None) == (2020 if json else None)


def test_a_page_is_asked_for_once(index, locked):
    with client(index.simple) as asked, ThreadPoolExecutor(4) as pool:
        asked.files("big")
        list(pool.map(lambda _: asked.find(locked), range(8)))
    assert len(index.requests) == 1


def test_the_machine_s_own_index(machine):
    with IndexClient(machine) as asked:
        files = asked.files("iniconfig")
    found = next(file for file in files if file.filename == "iniconfig-2.0.0-py3-none-any.whl")
    assert found.sha256 == "b6a85871a79d2e3b22d2d1b94ac2824226a63c6b741c88f7ae975f18b6778374"


@pytest.fixture(scope="module")
def machine():
    from tests.package_index.server import machine_indexes

    return machine_indexes()


def test_download(index, locked, tmp_path):
    told = []
    with client(index.simple) as asked:
        asked.download(locked, tmp_path / "wheel", progress=told.append)
    assert (tmp_path / "wheel").read_bytes() == content(index, locked)
    assert sum(told) == len(content(index, locked))
    assert [path.name for path in tmp_path.iterdir()] == ["wheel"]


def test_connections_are_kept(index, tmp_path, monkeypatch):
    # However long the machine pauses between two of them.
    limits = httpx2.Limits(max_connections=32, max_keepalive_connections=24, keepalive_expiry=HANG)
    monkeypatch.setattr("builder.http._LIMITS", limits)
    connections = set()
    index.faults = lambda handler, path: connections.add(handler.client_address) and False
    wheels = [
        LockedWheel(name=f"p{n}", version="1", filename=index.add(f"p{n}", "1")[0], sha256=index.add(f"p{n}", "1")[1])
        for n in range(10)
    ]
    with client(index.simple) as asked:
        for wheel in wheels:
            asked.download(wheel, tmp_path / wheel.filename)
    assert len(connections) == 1


def break_off(after, times):
    """Return a fault that ends the connection after so many bytes of a file, so many times."""
    left = [times]

    def fault(handler, path):
        if not path.startswith("/files/") or not left[0]:
            return False
        left[0] -= 1
        project, name = path.split("/")[2:]
        whole = handler.server.index.files[project][name][0]
        begin = int(handler.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        handler.send_response(206 if begin else 200)
        handler.send_header("Content-Length", str(len(whole) - begin))
        handler.send_header("Content-Range", f"bytes {begin}-{len(whole) - 1}/{len(whole)}")
        handler.end_headers()
        handler.wfile.write(whole[begin : begin + after])
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True
        return True

    return fault


def test_a_download_goes_on_where_it_broke(index, locked, tmp_path):
    index.faults = break_off(400_000, 2)
    told = []
    with client(index.simple) as asked:
        asked.download(locked, tmp_path / "wheel", progress=told.append)
    assert (tmp_path / "wheel").read_bytes() == content(index, locked)
    ranges = [headers.get("Range") for _, path, headers in index.requests if path.startswith("/files/")]
    assert ranges[0] is None
    begun = [int(value[6:-1]) for value in ranges[1:]]
    assert begun == sorted(begun)
    assert begun[0] > 0
    assert sum(told) == len(content(index, locked))


def test_a_server_without_ranges_is_read_again_and_no_byte_counts_twice(index, locked, tmp_path):
    break_once = break_off(400_000, 1)

    def fault(handler, path):
        if break_once(handler, path):
            return True
        handler.headers.replace_header("Range", "") if "Range" in handler.headers else None
        return False

    index.faults = fault
    told = []
    with client(index.simple) as asked:
        asked.download(locked, tmp_path / "wheel", progress=told.append)
    assert (tmp_path / "wheel").read_bytes() == content(index, locked)
    assert min(told) > 0
    assert sum(told) == len(content(index, locked))


@pytest.mark.parametrize(("second", "error"), [("v1", None), ("v2", "changed meanwhile"), ("", "changed meanwhile")])
def test_a_file_of_unknown_hash_that_changes_on_the_way_is_refused(index, tmp_path, second, error):
    """Half of one file and half of another would have the right size and a hash that nothing contradicts."""
    body, begun = PADDING, []

    def fault(handler, path):
        begin = int(handler.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        begun.append(begin)
        handler.send_response(206 if begin else 200)
        handler.send_header("Content-Length", str(len(body) - begin))
        handler.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        handler.send_header("ETag", second if begin else "v1")
        handler.end_headers()
        handler.wfile.write(body[begin:] if begin else body[:600_000])
        handler.close_connection = not begin
        return True

    index.faults = fault
    with client(index.simple) as asked:
        if error is None:
            assert asked.digest("x-1-py3-none-any.whl", f"{index.url}/x") == (
                hashlib.sha256(body).hexdigest(),
                len(body),
            )
        else:
            with pytest.raises(ServiceUnavailable, match=error):
                asked.digest("x-1-py3-none-any.whl", f"{index.url}/x")
    assert begun == [0, 600_000]


def answer(status, body=b"", kind="text/plain", **headers):
    return lambda handler, path: path.startswith("/files/") and (handler.answer(status, body, kind, **headers) or True)


@pytest.mark.parametrize(
    ("fault", "error", "why"),
    [
        (answer(200, b"short"), ServiceUnavailable, "after 5 of"),
        (answer(200, PADDING * 3), WheelMismatch, "is larger than"),
        (answer(503), ServiceUnavailable, "HTTP 503"),
        (answer(429, Retry_After="0"), ServiceUnavailable, "HTTP 429"),
        (answer(404), WheelNotFound, "HTTP 404"),
        (answer(401), PermissionRefused, "netrc"),
        (answer(403), PermissionRefused, "HTTP 403"),
        (answer(418), ServiceUnavailable, "HTTP 418"),
        (answer(302, Location="/files/x"), ServiceUnavailable, "too many redirects"),
        (answer(302, Location="file:///etc/passwd"), ServiceUnavailable, "redirect away"),
        (answer(302, Location="http://me:secret@127.0.0.1/x"), ServiceUnavailable, "redirect away"),
        (answer(302, Location="http://192.0.2.1/x"), InvalidSettings, "plain HTTP"),
        (answer(200, b"x", Content_Encoding="gzip"), ServiceUnavailable, "encoding"),
        (break_off(0, 99), ServiceUnavailable, "cannot be reached"),
    ],
)
def test_a_failed_download_says_why_and_leaves_no_file(index, locked, tmp_path, fault, error, why):
    index.faults = fault
    with client(index.simple) as asked, pytest.raises(error, match=why) as caught:
        asked.download(locked, tmp_path / "wheel")
    assert not list(tmp_path.iterdir())
    assert "secret" not in caught.value.one_line()


def test_a_changed_file_is_noticed_where_sizes_are_the_same(index, locked, tmp_path):
    changed = bytearray(content(index, locked))
    changed[-1] ^= 1
    index.faults = answer(200, bytes(changed))
    with client(index.simple) as asked, pytest.raises(WheelMismatch, match="sha256"):
        asked.download(locked, tmp_path / "wheel")
    assert not list(tmp_path.iterdir())


def test_an_index_that_is_overloaded_is_asked_again(index, locked, tmp_path):
    left = [2]

    def fault(handler, path):
        if left[0]:
            left[0] -= 1
            handler.answer(503, Retry_After="0")
            return True
        return False

    index.faults = fault
    with client(index.simple) as asked:
        asked.download(locked, tmp_path / "wheel")
    assert (tmp_path / "wheel").exists()


def test_a_file_that_moved_is_looked_up(index, locked, tmp_path):
    moved = locked.model_copy(update={"url": f"{index.url}/files/elsewhere/{locked.filename}"})
    with client(index.simple) as asked:
        asked.download(moved, tmp_path / "wheel")
    assert (tmp_path / "wheel").exists()


@pytest.mark.parametrize("has_address", [True, False])
@pytest.mark.parametrize("status", [404, 403])
def test_a_file_that_moved_after_its_page_was_read_is_looked_up_again(index, locked, tmp_path, status, has_address):
    """A client lives for a whole publish; links may expire meanwhile, which many servers answer with 403."""
    old, new = "/files/big/", "/files/new/"

    def fault(handler, path):
        if path.startswith("/simple/big"):
            kind, body = index.page("big")
            handler.answer(200, body.replace(old.encode(), new.encode()), kind)
        elif path.startswith(old):
            handler.answer(status)
        elif path.startswith(new):
            handler.file(content(index, locked))
        else:
            return False
        return True

    with client(index.simple) as asked:
        (file,) = asked.files("big")
        index.faults = fault
        wanted = locked.model_copy(update={"url": file.url}) if has_address else locked
        asked.download(wanted, tmp_path / "wheel")
    assert (tmp_path / "wheel").read_bytes() == content(index, locked)


@pytest.mark.parametrize("of_folder", [False, True])
def test_a_file_that_came_after_its_page_was_read_is_looked_up_again(index, tmp_path, of_folder):
    folder = tmp_path / "wheels"
    folder.mkdir()
    links = (IndexUrl(folder.as_uri()),) if of_folder else ()
    name, sha256 = index.add("late", "1.0")
    files = index.files.pop("late")
    with client(index.simple, find_links=links) as asked:
        assert asked.files("late") == ()
        if of_folder:
            (folder / name).write_bytes(files[name][0])
        else:
            index.files["late"] = files
        asked.download(LockedWheel(name="late", version="1.0", filename=name, sha256=sha256), tmp_path / "wheel")
    assert (tmp_path / "wheel").read_bytes() == files[name][0]


def test_a_file_that_is_absent_is_looked_up_once_more_and_no_more(index, locked, tmp_path):
    index.faults = answer(404)
    with client(index.simple) as asked, pytest.raises(WheelNotFound, match="HTTP 404"):
        asked.download(locked, tmp_path / "wheel")
    paths = [path for _, path, _ in index.requests]
    assert paths == ["/simple/big/", f"/files/big/{locked.filename}"] * 2


def test_a_full_disk(index, locked):
    with client(index.simple) as asked, pytest.raises(TryAgain, match="cannot be written"):
        asked.download(locked, Path("/proc/wheel"))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html", b"\xff<a href='../../files/x-1.tar.gz'>"),
        ("application/json", b"[]"),
        ("application/json", b'{"files": [1]}'),
        ("application/json", b'{"files": [{"filename": "x", "url": 1}]}'),
        ("application/json", b"{"),
        ("application/json", b"[" * 5000),
        ("image/png", b""),
        ("text/html; charset=x", b"<a href='http://[::1'>y</a><base href='javascript:x'><a href='data:,'>"),
    ],
)
def test_invalid_index_pages_are_refused(index, kind, body):
    index.faults = lambda handler, path: handler.answer(200, body, kind) or True
    wanted = LockedWheel(name="x", version="1", filename="x-1-py3-none-any.whl", sha256="0" * 64)
    with client(index.simple) as asked, pytest.raises((ServiceUnavailable, WheelNotFound)):
        asked.find(wanted)


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_a_page_of_too_many_files_is_refused(monkeypatch, kind):
    monkeypatch.setattr("builder.package_index.client._MOST_FILES", 3)
    file = b'{"filename": "x", "url": "x"}'
    bodies = {"application/json": b'{"files": [%s]}', "text/html": b"%s"}
    one, between = {"application/json": (file, b","), "text/html": (b"<a href=x>", b"")}[kind]
    assert len(parse_page(bodies[kind] % between.join([one] * 3), kind, "https://example.com/simple/x/")) == 3
    with pytest.raises(NoPage, match="more than 3 files"):
        parse_page(bodies[kind] % between.join([one] * 4), kind, "https://example.com/simple/x/")


def test_another_file_of_the_same_name_is_not_taken(index, locked):
    other = locked.model_copy(update={"sha256": "0" * 64})
    with client(index.simple) as asked, pytest.raises(WheelNotFound, match="only another file"):
        asked.find(other)


def test_the_first_index_that_has_a_package_has_it(index, locked):
    with running() as private:
        private.add("big", "0.9")
        with client(private.simple, index.simple) as asked:
            assert [file.filename for file in asked.files("big")] == ["big-0.9-py3-none-any.whl"]
            assert asked.find(locked).url.startswith(index.url)
        with client(private.simple, index.simple, strategy="unsafe-best-match") as asked:
            assert len(asked.files("big")) == 2


def test_folders_of_wheels(tmp_path):
    name, body = make_wheel("linked", "1.0")
    (tmp_path / name).write_bytes(body)
    wanted = LockedWheel(name="linked", version="1.0", filename=name, sha256=hashlib.sha256(body).hexdigest())
    network = Network(index_variables={"PIP_FIND_LINKS": f"{tmp_path} /nonexistent/wheels", "PIP_NO_INDEX": "true"})
    with IndexClient(Indexes.of(network)) as asked:
        asked.download(wanted, tmp_path / "copy")
        with pytest.raises(WheelNotFound, match="does not have it"):
            asked.find(wanted.model_copy(update={"filename": "linked-1.0-py2-none-any.whl"}))
    assert (tmp_path / "copy").read_bytes() == body


def test_of_a_local_wheel_only_the_end_is_read(index, tmp_path):
    wheel = tmp_path / "large-1.0-py3-none-any.whl"
    with wheel.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b"the end")
    locked = LockedWheel(name="large", version="1.0", filename=wheel.name, sha256="0" * 64, url=wheel.as_uri())
    tracemalloc.start()
    with client(index.simple) as asked:
        assert asked.tail(locked, 9) == (b"\0\0the end", (64 << 20) + 7)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 8 << 20
        wheel.write_bytes(b"short")
        assert asked.tail(locked, 9) == (b"short", 5)
        wheel.unlink()
        with pytest.raises(WheelNotFound, match=r"large-1\.0"):
            asked.tail(locked, 9)


def test_a_link_in_place_of_the_model_s_wheel_is_not_followed(tmp_path):
    (tmp_path / "x-1-py3-none-any.whl").symlink_to("/etc/passwd")
    wanted = LockedWheel(
        name="x",
        version="1",
        filename="x-1-py3-none-any.whl",
        sha256="0" * 64,
        origin="model",
        url=(tmp_path / "x-1-py3-none-any.whl").as_uri(),
    )
    with IndexClient(Indexes()) as asked, pytest.raises(WheelNotFound, match="cannot be read"):
        asked.download(wanted, tmp_path / "copy")


# Credentials, TLS, proxies.


@pytest.mark.parametrize("where", ["url", "netrc", "pip.conf", "uv"])
def test_a_private_index_under_its_own_authority(certificate, tmp_path, where):
    authority, server = certificate
    with running(certificate=server, credential=("me", "p@ss:word")) as index:
        name, sha256 = index.add("inhouse", "1.0")
        with_credential = index.simple.replace("://", "://me:p%40ss%3Aword@")
        variables, config, netrc = {}, None, None
        if where == "url":
            variables["PIP_INDEX_URL"] = with_credential
        elif where == "uv":
            variables = {"UV_INDEX": f"ours={with_credential}", "UV_DEFAULT_INDEX": with_credential}
        elif where == "pip.conf":
            config = tmp_path / "pip.conf"
            config.write_text(f"[global]\nindex_url = {with_credential}\ncert = {authority.path}\n")
        else:
            netrc = tmp_path / "netrc"
            netrc.write_text("machine 127.0.0.1 login me password p@ss:word\n")
            variables["PIP_INDEX_URL"] = index.simple
        network = Network(
            ca_bundle=None if config else authority.path, pip_config=config, index_variables=variables, netrc=netrc
        )
        indexes = Indexes.of(network)
        wanted = LockedWheel(name="inhouse", version="1.0", filename=name, sha256=sha256)
        with IndexClient(indexes, policy=QUICK) as asked:
            asked.download(wanted, tmp_path / "wheel")
            assert "p@ss" not in repr(indexes) + str(asked.find(wanted))
    assert (tmp_path / "wheel").exists()


def test_a_certificate_that_is_not_trusted(certificate, locked):
    with running(certificate=certificate[1]) as index:
        index.files = {"big": {}}
        with client(index.simple) as asked, pytest.raises(InvalidSettings, match="SSL_CERT_FILE"):
            asked.find(locked)
        with client(index.simple, trusted=frozenset({"127.0.0.1"})) as asked, pytest.raises(WheelNotFound):
            asked.find(locked)


@pytest.fixture
def fresh_authorities():
    """What is trusted is read once in a process, so it is read again before and after."""
    _authorities.cache_clear()
    yield
    _authorities.cache_clear()


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
@pytest.mark.usefixtures("fresh_authorities")
def test_the_system_s_authorities_are_those_that_openssl_s_variables_name(certificate, tmp_path, monkeypatch, variable):
    """In the builder image they are in a folder of its own, which SSL_CERT_DIR names."""
    authority, server = certificate
    hashed = subprocess.run(
        ["openssl", "x509", "-noout", "-subject_hash", "-in", authority.path],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (tmp_path / f"{hashed}.0").write_bytes(authority.path.read_bytes())
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv(variable, str(authority.path if variable == "SSL_CERT_FILE" else tmp_path))
    with running(certificate=server) as index, client(index.simple) as asked:
        assert asked.files("nothing") == ()
        host = index.url.removeprefix("https://")
        with Registries(policy=QUICK) as registries, pytest.raises(ServiceUnavailable, match="404"):
            registries.for_host(host).manifest(Repository(host, "x").tag("v1"))
        monkeypatch.setenv(variable, "/nonexistent")
        _authorities.cache_clear()
        with client(index.simple) as other, pytest.raises(InvalidSettings, match="is not trusted"):
            other.files("nothing")


def test_a_wrong_credential_is_no_absence_and_is_not_shown(index, locked):
    index.credential = ("me", "right-password")
    with client(IndexUrl(index.simple, "me", "wrong-password")) as asked, pytest.raises(PermissionRefused) as caught:
        asked.find(locked)
    assert "password" not in caught.value.one_line()


def test_the_credential_stays_at_its_origin(index, locked, tmp_path):
    with running(credential=("me", "secret-word")) as private:
        private.files = index.files
        private.faults = lambda handler, path: (
            path.startswith("/files/") and (handler.answer(302, Location=f"{index.url}{path}") or True)
        )
        with client(IndexUrl(private.simple, "me", "secret-word")) as asked:
            asked.download(locked, tmp_path / "wheel")
    assert all("Authorization" not in headers for _, _, headers in index.requests)
    assert any("Authorization" in headers for _, _, headers in private.requests)


def test_proxy(index, locked):
    seen = threading.Event()
    with running() as proxy:
        proxy.faults = lambda handler, path: seen.set() or handler.answer(502) or True
        indexes = Indexes(
            default=IndexUrl("http://index.invalid/simple"),
            trusted=frozenset({"index.invalid"}),
            proxies={"HTTP_PROXY": proxy.url},
        )
        with IndexClient(indexes, policy=QUICK) as asked, pytest.raises(ServiceUnavailable, match="502"):
            asked.find(locked)
    assert seen.is_set()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_has_to_be_trusted_even_on_the_way_to_an_index_that_need_not_be(certificate, locked, scheme):
    authority, server = certificate
    with running(certificate=server) as proxy:
        indexes = Indexes(
            default=IndexUrl(f"{scheme}://index.invalid/simple"),
            trusted=frozenset({"index.invalid"}),
            proxies={f"{scheme.upper()}_PROXY": proxy.url.replace("://", "://user:secret@")},
        )
        with IndexClient(indexes, policy=QUICK) as asked, pytest.raises(InvalidSettings, match="is not trusted"):
            asked.find(locked)
        assert not proxy.requests
        # It answers HTTP 404 to a GET and 501 to a CONNECT.
        known = replace(indexes, ca_bundle=authority.path)
        with IndexClient(known, policy=QUICK) as asked, pytest.raises((WheelNotFound, ServiceUnavailable)) as caught:
            asked.find(locked)
        assert scheme == "http" or "501" in str(caught.value)


# Which indexes.


def test_uv_s_words_win_over_pip_s(tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://a.example.com/simple\nextra-index-url =\n  https://b.example.com/simple\n  https://c.example.com/simple/\n[install]\ntrusted-host = t.example.com\n"
    )
    only_pip = Indexes.of(Network(pip_config=config))
    assert [str(url) for url in only_pip.all] == [
        "https://b.example.com/simple",
        "https://c.example.com/simple",
        "https://a.example.com/simple",
    ]
    assert only_pip.trusts("t.example.com:443")
    variables = {
        "UV_DEFAULT_INDEX": "https://u.example.com/simple",
        "PIP_EXTRA_INDEX_URL": "https://e.example.com",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    both = Indexes.of(Network(pip_config=config, index_variables=variables))
    assert [str(url) for url in both.all] == ["https://e.example.com", "https://u.example.com/simple"]
    assert both.strategy == "unsafe-best-match"


@pytest.mark.parametrize(
    "variables",
    [
        {"PIP_INDEX_URL": "http://me:secret-word@plain.example.com/simple"},
        {"PIP_INDEX_URL": "ftp://me:secret-word@x.example.com"},
        {"UV_INDEX": "https://me:secret-word@[::1/simple"},
        {"PIP_EXTRA_INDEX_URL": "secret-word"},
        {"UV_INDEX": "/srv/wheels-secret-word"},
        {"UV_INDEX_STRATEGY": "secret-word"},
    ],
)
def test_settings_that_cannot_be_used(variables):
    with pytest.raises(InvalidSettings) as caught:
        Indexes.of(Network(index_variables=variables))
    assert "secret-word" not in caught.value.one_line()


def test_identity_is_that_of_addresses_and_order():
    a, b = IndexUrl("https://a.example.com"), IndexUrl("https://b.example.com")
    assert Indexes(default=a).identity == Indexes(default=IndexUrl(a.url, "me", "secret")).identity
    kinds = [
        Indexes(),
        Indexes(default=a),
        Indexes(default=b),
        Indexes(extra=(a, b)),
        Indexes(extra=(b, a)),
        Indexes(default=a, no_index=True),
        Indexes(default=a, strategy="unsafe-best-match"),
    ]
    assert len({indexes.identity for indexes in kinds}) == len(kinds)


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_address_is_one_or_refused(text, rest):
    try:
        url = IndexUrl.parse(f"https://{text}/{rest}", "X")
    except BuilderError:
        return
    assert IndexUrl.parse(url.with_credential, "X") == url


@given(
    st.binary(max_size=300), st.sampled_from(["text/html", "application/json", "application/vnd.pypi.simple.v1+json"])
)
def test_any_page_is_read_or_refused(body, kind):
    try:
        files = parse_page(body, kind, "https://example.com/simple/x/")
    except NoPage:
        return
    assert all(file.url.startswith(("http://", "https://")) for file in files)
