"""Images and their names: what an author writes selects no other registry, repository or file, and costs little."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.base_pattern import BasePattern
from builder.build.template import BaseImages
from builder.errors import BuilderError, ExitCode, InvalidSettings, InvalidVersion
from builder.reference import Reference
from builder.settings import Settings

A, B = "a" * 64, "b" * 64
GOOD = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "REGISTRY_URL": "quay.io/domino"}

# ---- ALLOWED_BASE_IMAGES


def chosen(wanted: str, *patterns: str) -> str:
    settings = Settings.from_environ({**GOOD, "ALLOWED_BASE_IMAGES": ",".join(patterns)})
    return BaseImages(default="a", allowed=settings.allowed_base_images, wanted=wanted).choose("3.11")


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ("python:443/evil/img", "python:*"),
        ("python:443/evil/img:1", "python:*"),
        ("python.evil.io/x", "python*"),
        ("quay.io.evil.io/team/x", "quay.io/team/*"),
        ("evilquay.io/team/x", "*.quay.io/team/*"),
        ("quay.io/team/x", "*.quay.io/team/*"),
        ("quay.io:443/team/x", "quay.io/team/*"),
        ("evil.io/quay.io/team/x", "quay.io/team/*"),
        ("evil.io/library/python:3", "docker.io/library/python:*"),
        ("docker.io/evil/python:3", "python:*"),
        ("python/evil:3", "python:*"),
        ("python/evil", "python*"),
        ("quay.io/team-evil/x", "quay.io/team/*"),
        ("quay.io/team", "quay.io/team/*"),
        ("quay.io/team/a/b", "quay.io/team/a"),
        ("quay.io/team/a/b:1", "quay.io/team/?"),
        ("quay.io/team/a/b", "quay.io/team/a*"),
        ("localhost:5000/x", "localhost:*"),
        ("localhost:5001/x", "localhost:5000/*"),
        ("localhost:5001/x", "localhost/*"),
        ("localhost/x", "localhost:5000/*"),
        ("[::1]:5000/x", "[:]:5000/x"),
        ("[::2]:5000/x", "[::1]:5000/x"),
        # A digest beside a tag decides what is pulled: any image of the repository.
        (f"python:3.11@sha256:{A}", "python:3.11"),
        (f"python:3.11@sha256:{A}", "python:3.*"),
        (f"python@sha256:{A}", "python:3.11"),
        (f"python@sha256:{A}", f"python@sha256:{B}"),
        ("python:3.11", "python@*"),
        ("python:3.11", "python:3.11-*"),
        ("python:3.11", "Python3.org/python:3.11"),
    ],
)
def test_a_pattern_takes_no_other_image(wanted, pattern):
    with pytest.raises(InvalidVersion, match="ALLOWED_BASE_IMAGES does not allow") as caught:
        chosen(wanted, pattern)
    assert caught.value.exit_code == ExitCode.DATA


@pytest.mark.parametrize(
    ("wanted", "pattern", "whole"),
    [
        ("python:3.11", "python:*", "docker.io/library/python:3.11"),
        ("library/python:3.11", "python:*", "docker.io/library/python:3.11"),
        ("docker.io/python:3.11", "index.docker.io/library/python:3.*", "docker.io/library/python:3.11"),
        ("Index.Docker.IO/library/python:3.11", "python", "docker.io/library/python:3.11"),
        ("python", "python:latest", "docker.io/library/python:latest"),
        ("python:3.11-slim", "python:3.1[12]-s*m", "docker.io/library/python:3.11-slim"),
        ("bitnami/python:3", "bitnami/*", "docker.io/bitnami/python:3"),
        ("bitnami/python:3", "docker.io/*", "docker.io/bitnami/python:3"),
        ("QUAY.IO/team/x:V1", "quay.io/team/*:V?", "quay.io/team/x:V1"),
        ("quay.io/team/x:1", "Quay.io/team/*", "quay.io/team/x:1"),
        ("quay.io/team/a/b:1", "quay.io/team/*", "quay.io/team/a/b:1"),
        ("quay.io/team/a/b:1", "quay.io/team/**", "quay.io/team/a/b:1"),
        ("quay.io/team/a/b:1", "quay.io/*/a/b", "quay.io/team/a/b:1"),
        ("eu.quay.io/team/x:1", "*.quay.io/team/x", "eu.quay.io/team/x:1"),
        ("localhost:5000/x:1", "localhost:*/*", "localhost:5000/x:1"),
        ("[::1]:5000/x:1", "[::1]:5000/x", "[::1]:5000/x:1"),
        (f"python:3@sha256:{A}", "python:*", f"docker.io/library/python:3@sha256:{A}"),
        (f"python@sha256:{A}", "python:*", f"docker.io/library/python@sha256:{A}"),
        (f"python@sha256:{A}", "python", f"docker.io/library/python@sha256:{A}"),
        (f"python@sha256:{A}", f"python@sha256:{A}", f"docker.io/library/python@sha256:{A}"),
        (f"python:3@sha256:{A}", "python:3@sha256:*", f"docker.io/library/python:3@sha256:{A}"),
        (f"any.io/x@sha256:{A}", "*@sha256:*", f"any.io/x@sha256:{A}"),
        ("any.io/x/y:1", "*", "any.io/x/y:1"),
    ],
)
def test_an_honest_pattern_takes_its_images_and_the_whole_reference_goes_on(wanted, pattern, whole):
    assert chosen(wanted, pattern) == whole


@pytest.mark.parametrize(
    "pattern",
    [
        "*/team/x",
        "quay.io/",
        "quay.io/team/",
        "quay.io//x",
        "quay.io/**/x",
        "quay.io/Team/*",
        "https://quay.io/*",
        "user@quay.io/x",
        "quay.io/x:",
        "quay.io/x@",
        "python@sha256:abc",
        f"python@sha256:{A[:-1]}*",
        "python@md5:*",
        "a?.io/x",
        "quay.io*/team/*",
        "*:5000/x",
        "q*.io/x",
        "quay.io:5000000/x",
        "quay.io:http/x",
        "a b",
        "quay.io/../x",
        "²/x.y",
        ":1",
        "@",
    ],
)
def test_a_pattern_that_cannot_be_read_is_the_settings_fault(pattern):
    with pytest.raises(InvalidSettings, match="ALLOWED_BASE_IMAGES is malformed") as caught:
        Settings.from_environ({**GOOD, "ALLOWED_BASE_IMAGES": f"python:*,{pattern}"})
    assert caught.value.exit_code == ExitCode.CONFIG


@given(st.text(alphabet=st.sampled_from(list("ab.:/@*-0localhost")), max_size=14), st.sampled_from([":*", ":1*", "/*"]))
def test_whatever_is_asked_for_a_pattern_takes_what_it_names_alone(wanted, end):
    pattern = BasePattern.parse(f"localhost:5000/a{end}")
    try:
        reference = Reference.parse(wanted)
    except BuilderError:
        return
    if pattern.matches(reference):
        assert reference.repository.host == "localhost:5000"
        assert reference.repository.path == "a" or (end == "/*" and reference.repository.path.startswith("a/"))


def test_a_pattern_of_many_stars_is_read_in_linear_time():
    pattern = BasePattern.parse("quay.io/" + "*a" * 40 + "b")
    assert not pattern.matches(Reference.parse("quay.io/" + "a" * 200_000))


# ---- the repositories that are no model's


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        ("wheel-layers", {}),
        ("layers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("wheel-layers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("layers", {"WHEEL_LAYERS": "Quay.io/domino/layers/"}),
        ("cache", {"BUILD_CACHE": "quay.io/domino/cache"}),
        ("cache", {"BUILD_CACHE": "QUAY.IO:443/domino/cache"}),
        ("cache", {"BUILD_CACHE": "quay.io:0443/domino/cache", "WHEEL_LAYERS": "quay.io/domino/x"}),
        ("cache", {"REGISTRY_URL": "docker.io/acme", "BUILD_CACHE": "index.docker.io/acme/cache"}),
        ("layers", {"REGISTRY_URL": "docker.io/acme", "WHEEL_LAYERS": "registry-1.docker.io/acme/layers"}),
        ("layers", {"REGISTRY_URL": "127.0.0.1:5000", "WHEEL_LAYERS": "127.0.0.1:5000/layers"}),
        ("_layers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("layers/", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("layers/x", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("Layers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("\uff4cayers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
        ("../domino/layers", {"WHEEL_LAYERS": "quay.io/domino/layers"}),
    ],
)
def test_wheel_layers_and_the_cache_are_no_models_repository(name, environ):
    settings = Settings.from_environ({**GOOD, **environ})
    repository = settings.repository_of(name)
    for ours in (settings.wheel_layer_repository, settings.build_cache):
        assert ours is None or not ours.holds(repository)
    assert repository.path.rpartition("/")[2].count("--x") == 1


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        ("layers", {}),
        ("layers", {"WHEEL_LAYERS": "quay.io/domino/all/layers"}),
        ("all", {"WHEEL_LAYERS": "quay.io/domino/all/layers"}),
        ("cache", {"BUILD_CACHE": "quay.io/other/cache"}),
        ("cache", {"BUILD_CACHE": "quay.io.example.com/domino/cache"}),
        ("cache", {"BUILD_CACHE": "quay.io:5000/domino/cache"}),
    ],
)
def test_a_name_that_nothing_of_ours_has_stays_as_it_is(name, environ):
    assert Settings.from_environ({**GOOD, **environ}).repository_of(name).path == f"domino/{name}"


@pytest.mark.parametrize(
    "environ",
    [
        {"WHEEL_LAYERS": "quay.io/domino"},
        {"REGISTRY_URL": "quay.io/domino/wheel-layers", "WHEEL_LAYERS": "quay.io/domino/wheel-layers"},
        {"REGISTRY_URL": "quay.io/domino/layers/models", "WHEEL_LAYERS": "quay.io/domino/layers"},
        {"REGISTRY_URL": "docker.io/acme/x", "WHEEL_LAYERS": "Index.docker.io/acme"},
        {"BUILD_CACHE": "quay.io/domino"},
        {"BUILD_CACHE": "quay.io:443/domino"},
        {"REGISTRY_URL": "quay.io/cache/models", "BUILD_CACHE": "quay.io/cache"},
    ],
)
def test_models_do_not_lie_below_what_is_ours(environ):
    with pytest.raises(InvalidSettings, match="REGISTRY_URL is the same or lies below it"):
        Settings.from_environ({**GOOD, **environ})
