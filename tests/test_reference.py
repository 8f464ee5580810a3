"""Names of images: what is valid, what it becomes, and that two names never meet."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from builder.errors import BuilderError, InvalidSettings, InvalidVersion
from builder.reference import Digest, Platform, Reference, Repository, parse_platforms, repository_component

# The grammar of the distribution specification, written down again from its text.
NAME = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*")

model_names = st.text(min_size=1, max_size=300) | st.from_regex(r"[a-zA-Z0-9._-]{1,40}", fullmatch=True)


@given(model_names)
def test_every_model_name_becomes_a_valid_repository(name):
    component = repository_component(name)
    assert NAME.fullmatch(component)
    assert len(component) <= 128
    assert component != "wheel-layers"
    assert repository_component(name) == component


@given(model_names, model_names)
def test_two_names_never_share_a_repository(one, other):
    assume(one != other)
    assert repository_component(one) != repository_component(other)


@given(model_names)
def test_a_name_that_looks_made_by_us_is_made_again(name):
    # Whoever registers a model under the name that another's repository has must not get that repository.
    made = repository_component(name)
    if made != name:
        assert repository_component(made) != made


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("pltr_foundry_model", "pltr_foundry_model"),
        ("main.default.fraud", "main.default.fraud"),
        ("Fraud Model (EU)", "fraud-model-eu--x"),
        ("naïve bayes", "naive-bayes--x"),
        ("模型", "model--x"),
        ("a\nRUN rm -rf /", "a-run-rm-rf--x"),
        ("$(reboot)", "reboot--x"),
        ("../../etc", "etc--x"),
        ("wheel-layers", "wheel-layers--x"),
        ("_private", "private--x"),
        ("x" * 300, "x" * 80 + "--x"),
    ],
)
def test_names_stay_readable(name, component):
    made = repository_component(name)
    assert made == component or (
        component.endswith("--x") and re.fullmatch(re.escape(component) + r"[0-9a-f]{20}", made)
    )


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.11-slim", "docker.io/library/python:3.11-slim"),
        ("bitnami/python:3", "docker.io/bitnami/python:3"),
        ("quay.io/domino/model:v8", "quay.io/domino/model:v8"),
        ("localhost/model", "localhost/model:latest"),
        ("localhost:5000/a/b:v1", "localhost:5000/a/b:v1"),
        ("[::1]:5000/a:v1", "[::1]:5000/a:v1"),
        (f"quay.io/a@sha256:{'a' * 64}", f"quay.io/a@sha256:{'a' * 64}"),
        (f"quay.io/a:v1@sha256:{'a' * 64}", f"quay.io/a:v1@sha256:{'a' * 64}"),
    ],
)
def test_references(text, whole):
    assert str(Reference.parse(text)) == whole
    assert Reference.parse(whole) == Reference.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Python",
        "quay.io/Domino/a:v1",
        "quay.io/a:",
        "quay.io/a@",
        "quay.io/a@sha256:abc",
        "quay.io/a:v1@md5:" + "a" * 32,
        "quay.io/../a:v1",
        "quay.io//a",
        "user:secret@quay.io/a",
        "https://quay.io/a",
        "quay.io/a:" + "t" * 129,
        "quay.io/a:-tag",
        "a b",
        "a\nb",
        "$(id)",
    ],
)
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(InvalidVersion, match="is not a"):
        Reference.parse(text)


@given(st.text(max_size=60))
def test_a_reference_is_refused_or_valid_and_never_anything_else(text):
    try:
        reference = Reference.parse(text)
    except BuilderError:
        return
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("linux/x86_64", Platform("linux", "amd64")),
        ("linux/arm64/v8", Platform("linux", "arm64")),
        ("linux/aarch64", Platform("linux", "arm64")),
        ("linux/arm", Platform("linux", "arm", "v7")),
        ("Linux/ARM/v6", Platform("linux", "arm", "v6")),
        (" linux/s390x ", Platform("linux", "s390x")),
    ],
)
def test_platforms(text, platform):
    assert Platform.parse(text) == platform
    assert Platform.parse(str(platform)) == platform


@pytest.mark.parametrize(
    "text", ["", "linux", "linux/", "/amd64", "linux/amd64/v1/x", "linux/am d64", "../amd64", "linux/a\nb"]
)
def test_what_is_no_platform_is_refused(text):
    with pytest.raises(InvalidVersion, match="os/architecture"):
        Platform.parse(text)


def test_platform_lists_hold_each_platform_once():
    assert parse_platforms("linux/arm64, linux/amd64,linux/aarch64,") == (
        Platform("linux", "arm64"),
        Platform("linux", "amd64"),
    )
    with pytest.raises(InvalidVersion, match="names no platform"):
        parse_platforms(" , ")


def test_a_platforms_folder_is_one_path_component():
    assert Platform.parse("linux/arm/v7").folder == "linux-arm-v7"


@pytest.mark.parametrize(
    ("text", "host", "path"),
    [
        ("quay.io", "quay.io", ""),
        ("quay.io/domino", "quay.io", "domino"),
        ("quay.io/domino/", "quay.io", "domino"),
        ("localhost:5000/a/b", "localhost:5000", "a/b"),
    ],
)
def test_registry_prefixes(text, host, path):
    prefix = Repository.parse_prefix(text)
    assert (prefix.host, prefix.path) == (host, path)
    assert str(prefix.child("m").tag("v1")).endswith("m:v1")


@pytest.mark.parametrize(
    "text", ["https://quay.io", "quay.io/Domino", "user:secret@quay.io/a", "quay.io/a:v1", "", "/a"]
)
def test_what_is_no_registry_is_refused_without_showing_it(text):
    with pytest.raises(InvalidSettings) as caught:
        Repository.parse_prefix(text)
    assert "secret" not in str(caught.value)


def test_digests_are_of_content():
    assert str(Digest.of(b"")) == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(InvalidVersion, match="64 hexadecimal"):
        Digest("sha256:E3B0")
