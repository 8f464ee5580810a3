"""The link to a publish's log in the version's tags."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from builder.cluster.status import status
from builder.errors import BuilderError, InvalidSettings
from builder.models import ModelVersion
from builder.models.catalog import MlflowCatalog
from builder.publish import publish
from builder.publish.log_link import log_link
from builder.settings import Settings

REQUIRED = {"MLFLOW_TRACKING_URI": "https://mlflow.example.com", "REGISTRY_URL": "quay.io/domino"}
POD = "publish-pump-v8-0123456789-x7k2p"
ALL = "m={model}&v={version}&p={pod}&j={job}&a={attempt}&t={target}&s={started}"
PATTERN = f"https://logs.example.com/find?{ALL}"
VERSION = ModelVersion(name="Pumpe & Öl/1", version="8", created_ms=1, source="runs:/x/m")


def settings(**changes):
    return Settings.from_environ({**REQUIRED, **changes})


def test_all_fields_are_filled_in_and_quoted_in_a_pod():
    environ = {"LOG_URL": PATTERN, "KUBERNETES_SERVICE_HOST": "192.0.2.1", "ATTEMPT_ID": "a1b2-c3"}
    link = log_link(settings(**environ), VERSION, host=POD)
    split = urlsplit(link)
    assert (split.netloc, split.path) == ("logs.example.com", "/find")
    found = {name: value for name, (value,) in parse_qs(split.query, strict_parsing=True).items()}
    started = found.pop("s")
    assert found == {
        "m": "Pumpe & Öl/1",
        "v": "8",
        "p": POD,
        "j": "publish-pump-v8-0123456789",
        "a": "a1b2-c3",
        "t": "pltr_foundry",
    }
    assert started.endswith("Z")
    assert "{" not in link


def test_outside_a_pod_there_is_no_pod_to_link_to():
    for field in ("pod", "job"):
        assert log_link(settings(LOG_URL=f"https://logs.example.com/{{{field}}}"), VERSION, host=POD) == ""
    assert log_link(settings(LOG_URL="https://logs.example.com/{model}"), VERSION).endswith(
        "/Pumpe%20%26%20%C3%96l%2F1"
    )
    # Something else than a Job's Pod has no Job.
    in_pod = {"KUBERNETES_SERVICE_HOST": "192.0.2.1"}
    assert log_link(settings(LOG_URL="https://logs.example.com/{job}", **in_pod), VERSION, host="notebook") == ""
    assert log_link(settings(), VERSION, host=POD) == ""


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("https://logs.example.com/{podd}", "unknown field {podd}"),
        ("https://logs.example.com/{model.__class__}", "unknown field"),
        ("https://logs.example.com/{model!r}", "unknown field"),
        ("https://logs.example.com/{version:>10}", "unknown field"),
        ("https://logs.example.com/{}", "unknown field"),
        ("https://logs.example.com/{model", "braces"),
        ("javascript:alert({model})", "not the address"),
        ("https://{model}.example.com/", "not the address"),
        ("https://someone:a-password@logs.example.com/{model}", "credential"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(pattern, says):
    with pytest.raises(InvalidSettings) as caught:
        settings(LOG_URL=pattern)
    assert "LOG_URL" in str(caught.value)
    assert says in str(caught.value)
    # What is known is listed.
    assert "{started}" in str(caught.value)
    assert "a-password" not in str(caught.value)


def test_the_link_is_written_when_the_publish_begins_and_replaced_by_the_next_attempt(small, small_settings):
    model = small()
    plain = {"SMOKE_TEST": "off"}
    publish(small_settings(model, LOG_URL="https://logs.example.com/?m={model}&s={started}", **plain))
    first = model.outcome()["log"]
    assert first.startswith(f"https://logs.example.com/?m={model.name}&s=")
    found = small_settings(model, **plain)
    (row,) = status(found, MlflowCatalog.from_settings(found), None, model.name, model.version)
    assert row.log == first
    # Nothing to do is no attempt.
    publish(small_settings(model, LOG_URL="https://logs.example.com/?again={model}", **plain))
    assert model.outcome()["log"] == first
    publish(small_settings(model, LOG_URL="https://logs.example.com/?again={model}", **plain), rebuild=True)
    assert model.outcome()["log"] == f"https://logs.example.com/?again={model.name}"
    publish(small_settings(model, **plain), rebuild=True)
    assert model.outcome()["log"] == ""


def test_an_attempt_that_fails_before_it_begins_has_its_link_too(small, small_settings):
    model = small(tags={"MODEL_FOLDER": "not/there"})
    with pytest.raises(BuilderError):
        publish(small_settings(model, LOG_URL="https://logs.example.com/{model}", SMOKE_TEST="off"))
    outcome = model.outcome()
    assert outcome["state"] == "failed"
    assert outcome["log"] == f"https://logs.example.com/{model.name}"
