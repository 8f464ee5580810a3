"""MLflow: there and away, with and without what a sweep needs of it."""

import json

import pytest

from tests.servers.forwarding import forwarding
from tests.versions import register

TAG = {"EXTERNAL_TARGET_DOCTOR": "true"}


@pytest.fixture
def tagged(mlflow_server):
    return register(mlflow_server.uri, {"mymodel/MLmodel": "flavors: {}\n"}, TAG)


def refusing(*paths, status=403, code="PERMISSION_DENIED", unless=lambda _: False):
    """Return a rule that refuses requests whose path ends in one of some."""
    body = json.dumps({"error_code": code, "message": "refused here"}).encode()

    def rule(asked):
        if any(asked.path.partition("?")[0].endswith(path) for path in paths) and not unless(asked):
            return status, {"Content-Type": "application/json"}, body
        return None

    return rule


def test_a_server_that_answers_is_named_with_its_release(look, tagged):
    import mlflow

    found = look("MLflow")
    assert found.state == "ok", found
    assert f"MLflow {mlflow.__version__} answers" in found.found
    assert "has versions with EXTERNAL_TARGET_DOCTOR" in found.found


def test_no_tagged_version_is_told(look):
    found = look("MLflow", TARGET_TAG="NOBODY_HAS_THIS")
    assert found.state == "ok"
    assert "has no versions" in found.found
    assert look("tags", TARGET_TAG="NOBODY_HAS_THIS").state == "skipped"


def test_a_server_that_is_away(look, dead_port):
    away = f"http://127.0.0.1:{dead_port}"
    found = look("MLflow", MLFLOW_TRACKING_URI=away)
    assert (found.state, found.exit_code) == ("fail", 69), found
    assert away in found.found
    # One row is enough to say so.
    assert {look(name, MLFLOW_TRACKING_URI=away).state for name in ("tags", "mount")} == {"skipped"}


def test_a_server_that_refuses_the_credential(look, mlflow_server):
    rule = refusing("/version", "/model-versions/search", status=401, code="UNAUTHENTICATED")
    with forwarding(mlflow_server.uri.partition("://")[2], rule) as proxy:
        found = look("MLflow", MLFLOW_TRACKING_URI=f"http://{proxy.host}")
    assert (found.state, found.exit_code) == ("fail", 77), found


def test_a_server_that_names_no_release_and_cannot_search_by_tags(look, mlflow_server, tagged):
    rule = refusing(
        "/version", "/model-versions/search", status=400, code="INVALID_PARAMETER_VALUE",
        unless=lambda asked: asked.path.endswith("search") and "filter" not in asked.path,
    )  # fmt: skip
    with forwarding(mlflow_server.uri.partition("://")[2], rule) as proxy:
        found = look("MLflow", MLFLOW_TRACKING_URI=f"http://{proxy.host}")
    assert found.state == "warn", found
    assert "lists every version" in found.found
    assert "MLflow answers" in found.found


def test_tags_may_be_written_and_none_is(look, tagged):
    before = tagged.tags()
    found = look("tags", MODEL_NAME=tagged.name)
    assert found.state == "ok", found
    assert tagged.name in found.found
    assert tagged.tags() == before


def test_tags_may_not_be_written(look, mlflow_server, tagged):
    with forwarding(mlflow_server.uri.partition("://")[2], refusing("/model-versions/set-tag")) as proxy:
        found = look("tags", MLFLOW_TRACKING_URI=f"http://{proxy.host}")
    assert (found.state, found.exit_code) == ("fail", 77), found
    assert "refused here" in found.found
