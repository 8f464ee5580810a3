"""Addresses of an author's: read as uv reads them, and no credential goes where one leads."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import BuilderError, InvalidSettings, InvalidVersion, PermissionRefused
from builder.http import RetryPolicy
from builder.package_index import Indexes, IndexUrl
from builder.package_index.client import IndexClient, WheelNotFound
from builder.package_index.wheel_file import LockedWheel
from builder.process import run
from builder.reference import Platform
from builder.settings import Network
from builder.urls import Ambiguous, canonical, is_within, linked
from builder.wheels.pip_syntax import Unusable, checked_url, parse_requirement
from builder.wheels.requirements import Requirements
from builder.wheels.resolve import lock
from tests.package_index.server import make_wheel, running
from tests.waiting import HANG

AMD64, ARMV7 = Platform.parse("linux/amd64"), Platform.parse("linux/arm/v7")
BOTH = pytest.mark.parametrize("platform", [AMD64, ARMV7], ids=["named", "universal"])
QUICK = RetryPolicy(attempts=2, first=0.001, longest=0.01, deadline=HANG)
SECRET = ("me", "index-p4ssword")
SENT = f"Basic {base64.b64encode(':'.join(SECRET).encode()).decode()}"


@pytest.fixture
def stranger():
    """The attacker's server, which records what it is sent."""
    with running() as server:
        server.add("e", "1.0")
        yield server


@pytest.fixture
def index():
    """An index with a credential."""
    with running(credential=SECRET) as found:
        found.add("lib", "1.0")
        found.add("private", "1.0")
        yield found


def ours(index, **fields):
    return Indexes(default=IndexUrl(index.simple, *SECRET), **fields)


def locked(*lines, indexes, platform=AMD64, **options):
    requirements = lines[0] if isinstance(lines[0], Requirements) else Requirements.of(*lines)
    options = {"python": "3.11", "glibc": (2, 36), "model": Path("/nonexistent"), **options}
    return lock(requirements, platform=platform, indexes=indexes, **options)


def at(name, url):
    """Return requirements on a wheel at an address, which in a test is over plain HTTP."""
    (one,) = Requirements.of(name).required
    return Requirements(required=(replace(one, url=url),))


# What an address is.

BASE = "https://nexus.example.com/simple"


@pytest.mark.parametrize(
    "text",
    [
        f"{BASE}/..\\..\\evil/simple",
        f"{BASE}\\..\\evil",
        f"{BASE}/../evil",
        f"{BASE}/..",
        f"{BASE}/./x",
        f"{BASE}/%2e%2e/evil",
        f"{BASE}/.%2E/evil",
        f"{BASE}/%2e/evil",
        f"{BASE}/%252e%252e/evil",
        f"{BASE}/..%2fevil",
        f"{BASE}/..%2f..%2fevil",
        f"{BASE}/..%5cevil",
        f"{BASE}/%5c..%5cevil",
        f"{BASE}/..;/evil",
        f"{BASE}/%2e%2e;/evil",
        f"{BASE}/%00",
        f"{BASE}/%0d%0aHost:%20evil",
        f"{BASE}/%c0%ae%c0%ae/evil",
        f"{BASE}/.\t./evil",
        f"{BASE}/.\n./evil",
        f"{BASE}/\t",
        f"{BASE}/$\t{{VARIABLE}}",
        f"{BASE}/${{VARIABLE}}",
        f"{BASE}/$VARIABLE",
        f"{BASE}/%VARIABLE%",
        f"{BASE}/ -r x",
        f"{BASE}/'x'",
        f'{BASE}/"x"',
        f"{BASE}/`x`",
        f"{BASE}/\u2025/x",
        f"{BASE}/\uff0e\uff0e/x",
        f"{BASE}?x=1",
        f" {BASE}",
        f"{BASE} ",
        f"\x01{BASE}",
        "https:nexus.example.com/simple",
        "https:/nexus.example.com/simple",
        "https:\\\\nexus.example.com/simple",
        "https:///nexus.example.com/simple",
        "https://nexus.example.com\\@evil.example.com/simple",
        "https://evil.example.com\\.nexus.example.com/simple",
        "https://nexus.example.com@evil.example.com/simple",
        "https://@nexus.example.com/simple",
        "https://nexus.example.com:443@evil.example.com/simple",
        "https://nexus.example.com:/simple",
        "https://nexus.example.com:0443/simple",
        "https://nexus.example.com:65536/simple",
        "https://nexus.example.com:4\t43/simple",
        "https://nexus.example.com./simple",
        "https://nexus%2eexample.com/simple",
        "https://nexus.example。com/simple",
        "https://nexus.example.com\u00ad/simple",
        "https://NEXUS.EXAMPLE.COM\u2100/simple",
        "https://127.1/simple",
        "https://2130706433/simple",
        "https://0x7f.0.0.1/simple",
        "https://0177.0.0.1/simple",
        "https://127.0.0.1.0x/simple",
        "https://[::ffff:127.0.0.1]/simple",
        "https://[::1%25eth0]/simple",
        "https://[::1/simple",
        "ftp://nexus.example.com/simple",
        "http://nexus.example.com/simple",
        "file:///etc/passwd",
        "//nexus.example.com/simple",
        "https://",
        "https://nexus.example.com/" + "a" * 5000,
    ],
)
def test_what_can_be_read_in_two_ways_is_no_address(text):
    with pytest.raises(Unusable):
        checked_url(text)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (BASE, BASE),
        ("HTTPS://Nexus.Example.com:443/simple/", f"{BASE}/"),
        (f"{BASE}#sha256=x", BASE),
        ("https://nexus.example.com:8443/a%2bb/c+d~e", "https://nexus.example.com:8443/a%2Bb/c+d~e"),
        (
            "https://git.example.com/api/v4/projects/group%2fproject/simple",
            "https://git.example.com/api/v4/projects/group%2Fproject/simple",
        ),
        ("https://[2001:DB8:0::1]/x", "https://[2001:db8::1]/x"),
        ("https://192.0.2.1:1/x", "https://192.0.2.1:1/x"),
        ("https://xn--e1afmkfd.example/x", "https://xn--e1afmkfd.example/x"),
    ],
)
def test_an_address_has_one_form(text, same):
    assert checked_url(text) == same == checked_url(same)
    assert str(httpx2.URL(same)) == same


_PIECES = [*"ab.:/\\@?#%2e5c[]0x7f \t\n$ {}'\"~", "..", "%2e", "%2f", "%25", "nexus.example.com"]
_TEXT = st.lists(st.sampled_from(_PIECES), max_size=24).map("".join)


@given(_TEXT)
def test_any_text_is_one_address_to_every_reader_or_none(text):
    try:
        url = canonical(f"https://{text}", query=True)
    except Ambiguous:
        return
    assert canonical(url, query=True) == url
    read = httpx2.URL(url)
    assert read.scheme == "https"
    assert f"://{read.netloc.decode()}/" in f"{url.partition('?')[0]}/"
    assert not read.userinfo
    assert "\\" not in url
    assert not {".", ".."} & set(read.path.split("/"))


@given(_TEXT, _TEXT)
def test_what_is_within_a_prefix_begins_with_it(prefix, rest):
    base = f"https://nexus.example.com/{prefix}"
    for text in (f"{base}{rest}", f"{base}/{rest}", f"https://{rest}"):
        try:
            url = canonical(text)
        except Ambiguous:
            continue
        if is_within(url, base):
            assert str(httpx2.URL(url)).startswith(canonical(base).rstrip("/"))
            assert httpx2.URL(url).host == "nexus.example.com"


@given(_TEXT)
def test_a_link_keeps_to_one_origin_in_every_reading(text):
    found = linked("https://nexus.example.com/simple/x/", text)
    if found is not None:
        read = httpx2.URL(found)
        assert read.scheme in {"http", "https"}
        assert not read.userinfo
        assert "\\" not in found


@pytest.mark.parametrize(
    "url",
    [
        f"{BASE}2",
        "https://nexus.example.com/simpl",
        "https://nexus.example.com.evil/simple",
        "https://nexus.example.com:8443/simple",
    ],
)
def test_beside_a_prefix_is_not_below_it(url):
    assert is_within(f"{BASE}/x", BASE)
    assert is_within(BASE, f"{BASE}/")
    assert not is_within(url, BASE)


def test_uv_and_the_check_agree_on_paths(index):
    """What the check lets pass, uv asks for just so: dots, slashes and encoded characters do not move it."""
    paths = [
        "/simple/a%2Fb",
        "/simple/a%2Bb",
        "/simple//x",
        "/simple/a:b",
        "/simple/~x",
        "/simple/a@b",
        "/simple/(x)*!",
    ]
    for path in paths:
        assert canonical(f"{index.url}{path}") == f"{index.url}{path}"
        index.requests.clear()
        with pytest.raises(BuilderError):
            locked("lib", indexes=Indexes(default=IndexUrl(f"{index.url}{path}")))
        assert {asked for _, asked, _ in index.requests} == {f"{path}/lib/"}


# What a setting names is written without doubt, too.


@pytest.mark.parametrize(
    "variables",
    [
        {"PIP_INDEX_URL": "https://me:secret-word@h.example.com/$X/simple"},
        {"PIP_INDEX_URL": "https://me:secret-word@h.example.com/${X}"},
        {"PIP_INDEX_URL": "https://me:secret-word@h.example.com\\simple"},
        {"PIP_INDEX_URL": "https://me:secret-word@h.example.com/'x'"},
        {"PIP_TRUSTED_HOST": "secret-word;x"},
        {"PIP_TRUSTED_HOST": "a$secret-word"},
    ],
)
def test_settings_that_a_tool_could_read_in_another_way(variables):
    with pytest.raises(InvalidSettings) as caught:
        Indexes.of(Network(index_variables=variables))
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize("password", ["p w", "p$x", "${HOME}", "p#x", "p'\"\\x", "p%41"])
@BOTH
def test_a_password_of_any_characters_is_sent_as_it_is(password, platform):
    with running(credential=("me", password)) as found:
        found.add("lib", "1.0")
        assert locked("lib", indexes=Indexes(default=IndexUrl(found.simple, "me", password)), platform=platform).wheels


# What a wheel's metadata names.

FORMS = [
    "e @ {}/files/e/e-1.0-py3-none-any.whl",
    "e@{}/e.tar.gz",
    "e @ git+{}/e.git",
    "e[x] @ {}/e.zip ; python_version > '3'",
    "{}/e.whl",
    "git+{}/e.git",
]


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_no_address_is_asked_that_the_wheel_of_an_address_requires(index, stranger, platform, form):
    index.add("front", "1.0", requires=[form.format(stranger.url)])
    with pytest.raises(InvalidVersion, match="address"):
        locked(
            at("front", f"{index.url}/files/front/front-1.0-py3-none-any.whl"), indexes=ours(index), platform=platform
        )
    assert stranger.requests == []


@BOTH
@pytest.mark.parametrize("form", FORMS[:4])
@pytest.mark.parametrize("kind", ["index", "find-links", "dependency"])
def test_no_address_is_asked_that_a_wheel_of_an_index_requires(index, stranger, tmp_path, platform, form, kind):
    name, content = make_wheel("front", "1.0", requires=[form.format(stranger.url)])
    indexes = ours(index)
    if kind == "find-links":
        (tmp_path / name).write_bytes(content)
        indexes = ours(index, find_links=(IndexUrl(tmp_path.as_uri()),))
    else:
        index.add("front", "1.0", requires=[form.format(stranger.url)])
        index.add("outer", "1.0", requires=["front"])
    with pytest.raises(InvalidVersion, match="address") as caught:
        locked("outer" if kind == "dependency" else "front", indexes=indexes, platform=platform)
    assert stranger.requests == []
    assert stranger.url not in str(caught.value)


@BOTH
def test_a_resolver_gets_no_address_of_a_model_s(index, stranger, platform):
    """The wheel of an address comes to it as a file, and its marker is read before anything is fetched."""
    written = []

    def reading(argv, **options):
        written.append(Path(argv[-1]).read_text())
        return run(argv, **options)

    url = f"{stranger.url}/files/e/e-1.0-py3-none-any.whl"
    requirements = at("e", url)
    never = replace(
        Requirements.of("x").required[0], url=f"{stranger.url}/files/x/x-1.0-py3-none-any.whl", marker='os_name == "nt"'
    )
    requirements = Requirements(required=(*requirements.required, never))
    found = locked(requirements, indexes=ours(index), platform=platform, runner=reading)
    assert [(wheel.origin, wheel.url, wheel.size) for wheel in found.wheels] == [("address", url, None)]
    assert not any(stranger.url in line for text in written for line in text.splitlines() if " @ " in line)
    assert {path for _, path, _ in stranger.requests} == {"/files/e/e-1.0-py3-none-any.whl"}
    assert not any("Authorization" in headers for _, _, headers in stranger.requests)


# Where credentials go.


def test_a_redirect_of_an_author_s_server_gets_no_credential(index, stranger, tmp_path):
    stranger.faults = lambda handler, path: (
        path.startswith("/files/")
        and (handler.answer(302, Location=f"{index.url}/files/private/private-1.0-py3-none-any.whl") or True)
    )
    with IndexClient(ours(index), policy=QUICK) as client, pytest.raises(PermissionRefused):
        client.fetch("e-1.0-py3-none-any.whl", f"{stranger.url}/files/e/e-1.0-py3-none-any.whl", tmp_path / "wheel")
    assert not any("Authorization" in headers for _, _, headers in [*stranger.requests, *index.requests])


@pytest.mark.parametrize(
    "location", ["//127.0.0.1\\@{}/x", "https://me:pw@{}/x", "\\\\{}\\x", "/files/%2e%2e/x", "ht\ttps://{}/x"]
)
def test_a_redirect_that_can_be_read_in_two_ways_is_not_followed(index, stranger, tmp_path, location):
    stranger.faults = lambda handler, path: (
        path != "/x" and (handler.answer(302, Location=location.format(index.url.partition("//")[2])) or True)
    )
    with IndexClient(ours(index), policy=QUICK) as client, pytest.raises(BuilderError):
        client.fetch("e-1.0-py3-none-any.whl", f"{stranger.url}/e-1.0-py3-none-any.whl", tmp_path / "wheel")
    assert index.requests == []


def page_of(server, project, href):
    entry = {
        "filename": href.rpartition("/")[2],
        "url": href,
        "hashes": {},
        "size": 1,
        "upload-time": "2020-01-01T00:00:00Z",
    }
    body = json.dumps({"meta": {"api-version": "1.1"}, "name": project, "files": [entry], "versions": []}).encode()
    server.faults = lambda handler, path: (
        path.startswith("/simple/") and (handler.answer(200, body, "application/vnd.pypi.simple.v1+json") or True)
    )


@BOTH
def test_a_page_of_an_author_s_index_gets_no_wheel_with_our_credential(index, stranger, platform):
    index.add("hidden", "1.0")
    listed = index.files.pop("hidden")
    index.files["elsewhere"] = listed
    page_of(stranger, "hidden", f"{index.url}/files/elsewhere/hidden-1.0-py3-none-any.whl")
    requirements = Requirements(required=Requirements.of("hidden").required, indexes=(stranger.simple,))
    with pytest.raises(InvalidVersion, match=r"our credential|another index"):
        locked(requirements, indexes=ours(index), platform=platform)
    wanted = LockedWheel(name="hidden", version="1.0", filename="hidden-1.0-py3-none-any.whl", sha256="0" * 64)
    with (
        IndexClient(ours(index).joined((stranger.simple,)), policy=QUICK) as client,
        pytest.raises(WheelNotFound),
    ):
        client.find(wanted)


@BOTH
@pytest.mark.parametrize("form", ["json", "html", "find-links"])
def test_a_page_of_an_index_gets_no_wheel_of_this_machine(stranger, tmp_path, platform, form):
    name, content = make_wheel("hidden", "1.0")
    (tmp_path / name).write_bytes(content)
    href = (tmp_path / name).as_uri()
    if form == "json":
        page_of(stranger, "hidden", href)
    else:
        body = f'<html><body><a href="{href}">{name}</a></body></html>'.encode()
        stranger.faults = lambda handler, _: handler.answer(200, body, "text/html") or True
    requirements = Requirements(required=Requirements.of("hidden").required, indexes=(stranger.simple,))
    indexes = Indexes(allowed=("*",))
    if form == "find-links":
        requirements = replace(requirements, indexes=())
        indexes = Indexes(find_links=(IndexUrl(f"{stranger.url}/links/"),), no_index=True)
    with pytest.raises(InvalidVersion, match=r"publisher's machine|another index"):
        locked(requirements, indexes=indexes, platform=platform)


@BOTH
def test_a_folder_of_the_settings_gives_its_wheels(tmp_path, platform):
    name, content = make_wheel("lib", "1.0")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / name).write_bytes(content)
    (tmp_path / "links").symlink_to("real")
    indexes = Indexes(find_links=(IndexUrl((tmp_path / "links").as_uri()),), no_index=True)
    (wheel,) = locked("lib", indexes=indexes, platform=platform).wheels
    with IndexClient(indexes, policy=QUICK) as client:
        client.download(wheel, tmp_path / "wheel")
    assert (tmp_path / "wheel").read_bytes() == content


@BOTH
def test_an_index_that_a_model_names_gets_no_credential(index, stranger, tmp_path, platform):
    (tmp_path / "netrc").write_text(
        "machine 127.0.0.1 login me password netrc-p4ssword\ndefault login me password default-p4ssword\n"
    )
    requirements = Requirements(required=Requirements.of("e").required, indexes=(stranger.simple,))
    found = locked(requirements, indexes=ours(index, allowed=("*",), netrc=tmp_path / "netrc"), platform=platform)
    assert [wheel.name for wheel in found.wheels] == ["e"]
    assert stranger.requests
    assert not any("Authorization" in headers for _, _, headers in stranger.requests)


@BOTH
def test_netrc_is_for_hosts_of_the_settings(index, stranger, tmp_path, platform):
    """`machine` knows no port: what it is for is the origin that a setting names."""
    entry = f"login {SECRET[0]} password {SECRET[1]}\n"
    for text in (f"machine 127.0.0.1 {entry}", f"default {entry}"):
        (tmp_path / "netrc").write_text(text)
        indexes = Indexes(default=IndexUrl(index.simple), netrc=tmp_path / "netrc")
        assert locked("lib", indexes=indexes, platform=platform).wheels
        assert indexes.credential(f"{index.url}/files/x") == SECRET
        assert indexes.credential(f"{stranger.url}/x") is None
        assert indexes.joined((stranger.simple,)).credential(stranger.simple) is None
        assert SECRET[1] in indexes.secrets
    allowed = Indexes(allowed=(stranger.url,), netrc=tmp_path / "netrc")
    assert allowed.credential(f"{stranger.url}/x") is None, "`default` is for indexes alone"
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 {entry}")
    assert allowed.credential(f"{stranger.url}/x") == SECRET
    assert Indexes(allowed=("*",), netrc=tmp_path / "netrc").credential(f"{stranger.url}/x") is None


@BOTH
def test_no_child_sees_a_netrc(index, tmp_path, monkeypatch, platform):
    seen = []

    def reading(argv, **options):
        seen.append(options["env"])
        assert not (Path(options["env"]["HOME"]) / ".netrc").exists()
        return run(argv, **options)

    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login {SECRET[0]} password {SECRET[1]}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with pytest.raises(BuilderError):
        locked("lib", indexes=Indexes(default=IndexUrl(index.simple)), platform=platform, runner=reading)
    assert seen
    assert not any("NETRC" in env for env in seen)
    assert not any(headers.get("Authorization") == SENT for _, _, headers in index.requests)


def test_any_address_is_none_that_a_credential_is_sent_to():
    """`*` allows what is public; a private place of one's own server has to be named."""
    secret = Indexes(default=IndexUrl("https://nexus.example.com/simple", *SECRET), allowed=("*",))
    assert secret.allows("https://nexus.example.com/simple/x")
    assert secret.allows("https://other.example.com/simple")
    assert not secret.allows("https://nexus.example.com/other-team/simple")
    assert replace(secret, allowed=("*", "https://nexus.example.com/other-team")).allows(
        "https://nexus.example.com/other-team/simple"
    )


@pytest.mark.parametrize(
    "text",
    [
        "https://nexus.example.com/simple/..\\..\\evil/x-1-py3-none-any.whl",
        "x @ https://nexus.example.com/simple/%2e%2e/x-1-py3-none-any.whl",
    ],
)
def test_a_wheel_s_address_is_checked_as_an_index_s(text):
    with pytest.raises(Unusable):
        parse_requirement(text)
