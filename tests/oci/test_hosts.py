from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.http import api_host, canonical, is_named, proxy_for
from builder.oci.transport import Challenge, challenges
from builder.reference import is_loopback, split


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("LOCALHOST", True),
        ("127.0.0.1:5000", True),
        ("127.8.9.10", True),
        ("[::1]:5000", True),
        ("[::1]", True),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("127.1", False),
        ("0.0.0.0:5000", False),
        ("10.0.0.1", False),
        ("registry", False),
    ],
)
def test_loopback_is_known_by_name_alone(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("host", "names", "expected"),
    [
        ("reg.example:5000", ["reg.example:5000"], True),
        ("reg.example:5000", ["REG.example"], True),
        ("reg.example", ["reg.example:5000"], False),
        ("a.reg.example", ["reg.example"], False),
        ("reg.example", [], False),
    ],
)
def test_hosts_match_the_names_in_a_setting(host: str, names: list[str], expected: bool) -> None:
    assert is_named(host, names) is expected


def test_docker_hub_has_one_name_and_another_for_its_api() -> None:
    assert {canonical(each) for each in ("docker.io", "index.docker.io", "registry-1.docker.io")} == {"docker.io"}
    assert api_host("docker.io") == "registry-1.docker.io"
    assert api_host("quay.io:443") == "quay.io:443"


@pytest.mark.parametrize(
    ("host", "expected"), [("a:1", ("a", "1")), ("a", ("a", "")), ("[::1]:2", ("::1", "2")), ("[::1]", ("::1", ""))]
)
def test_hosts_are_split_into_name_and_port(host: str, expected: tuple[str, str]) -> None:
    assert split(host) == expected


@pytest.mark.parametrize(
    ("no_proxy", "name", "direct"),
    [
        ("", "a.example", False),
        ("*", "a.example", True),
        ("a.example", "a.example", True),
        ("a.example", "b.a.example", True),
        (".a.example", "b.a.example", True),
        ("*.a.example", "b.a.example", True),
        ("a.example", "ba.example", False),
        ("A.Example , x", "a.example", True),
        ("a.example:443", "a.example", True),
        ("a.example:444", "a.example", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "a.example", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("", "127.0.0.1", True),
        ("", "::1", True),
        ("", "localhost", True),
        (",,", "a.example", False),
    ],
)
def test_no_proxy(no_proxy: str, name: str, direct: bool) -> None:
    proxies = {"HTTPS_PROXY": "http://secure.proxy", "HTTP_PROXY": "http://plain.proxy", "NO_PROXY": no_proxy}
    assert proxy_for("https", name, 443, proxies) == ("" if direct else "http://secure.proxy")
    assert proxy_for("http", name, 443, proxies) == ("" if direct else "http://plain.proxy")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (['Basic realm="x"'], [("basic", {"realm": "x"})]),
        (["Basic realm=x"], [("basic", {"realm": "x"})]),
        (["BASIC"], [("basic", {})]),
        (
            ['Bearer realm="https://a/t",service="s", scope="repository:a/b:pull,push"'],
            [("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"})],
        ),
        (['Bearer realm="a\\"b"'], [("bearer", {"realm": 'a"b'})]),
        (['Bearer realm="a", Basic realm="b"'], [("bearer", {"realm": "a"}), ("basic", {"realm": "b"})]),
        (["Negotiate", 'Basic realm="b"'], [("negotiate", {}), ("basic", {"realm": "b"})]),
        (['Negotiate, Basic realm="b"'], [("negotiate", {}), ("basic", {"realm": "b"})]),
        (['Negotiate YWJj==, Basic realm="b"'], [("negotiate", {}), ("basic", {"realm": "b"})]),
        (['Bearer realm = "a" , Service = "s"'], [("bearer", {"realm": "a", "service": "s"})]),
        ([""], []),
        (["=,="], []),
    ],
)
def test_authentication_challenges_are_parsed(values: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    assert challenges(values) == tuple(Challenge(*each) for each in expected)


@given(st.text(st.characters(codec="latin-1"), max_size=200))
def test_any_header_is_read_to_an_end(value: str) -> None:
    assert all(challenge.scheme for challenge in challenges([value]))
