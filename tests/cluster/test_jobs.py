"""The story: install, sweep, a Job for each version, an image that predicts; and the commands that steer it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from builder.api import Catalog, Settings
from tests.cluster.site import TEMPLATE_POD, Done, outcome, submit, tagged, wait_for
from tests.waiting import LONG_HANG

ROOT = Path(__file__).parents[2]


def test_a_sweep_makes_a_job_whose_image_is_published(site, new_pump):
    version = tagged(new_pump, site)
    log = site.sweep()
    assert '"submitted": 1' in log, log
    (job,) = site.jobs()
    name = job["metadata"]["name"]
    assert site.ended(name) == "Complete", site.log_of(name)
    found = outcome(site, version)
    assert found["state"] == "published"
    assert found["image"] in site.log_of(name)
    labels = job["metadata"]["labels"]
    assert labels["builder/version"] == "1"
    assert labels["builder/method"] == "wheels"
    # The next one has nothing to do.
    assert '"current": 1' in site.sweep()
    assert [each["metadata"]["uid"] for each in site.jobs()] == [job["metadata"]["uid"]]


def test_submit_waits_and_exits_as_the_publisher_does(site, new_pump):
    version = new_pump(name="Modell für Pumpe 7")
    done = submit(site, version, "--wait")
    assert done.code == 0, done.stderr
    assert done.stdout.strip() == outcome(site, version)["image"]
    assert "container=publish" in done.stderr
    status = site.builder("status", version.name, version.version, "-o", "json", "-n", site.namespace)
    (row,) = json.loads(status.stdout)
    assert row["state"] == "published"
    assert row["digest"] == done.stdout.strip().partition("@")[2]
    assert row["method"] == "wheels"
    logs = site.builder("logs", version.name, version.version, "-n", site.namespace)
    assert "[publish]" in logs.stdout
    assert done.stdout.strip() in logs.stdout
    # Made again: it was finished.
    again = submit(site, version, "--wait")
    assert (again.code, again.stdout) == (0, done.stdout)


def test_a_version_that_cannot_be_published_is_recorded_once_and_tried_again_by_hand(site, new_pump):
    site.patch_settings(SWEEP_BACKOFF="3600")
    version = tagged(new_pump, site, MODEL_FOLDER="not/there")
    done = submit(site, version, "--wait")
    assert done.code == 65, done.stderr
    assert "not/there" in done.stderr
    found = outcome(site, version)
    assert (found["state"], found["attempts"]) == ("failed", "1")
    waits = site.sweep()
    assert '"waiting": 1' in waits
    site.patch_settings(SWEEP_ATTEMPTS="1")
    site.environ["SWEEP_ATTEMPTS"] = "1"
    status = site.builder("status", version.name, "-n", site.namespace)
    assert "builder retry" in status.stdout, status
    version.set_tag("MODEL_FOLDER", "mymodel")
    retried = site.builder("retry", version.name, version.version, "--wait", "-n", site.namespace)
    assert retried.code == 0, retried.stderr
    assert outcome(site, version)["state"] == "published"


def test_many_at_one_instant_make_one_job(site, new_pump):
    version = tagged(new_pump, site)
    # No node takes the Pod until all have asked.
    label = f"test/{site.namespace}"
    site.patch_template("wheels", {"op": "add", "path": f"{TEMPLATE_POD}/nodeSelector", "value": {label: "here"}})
    several = [
        site.start_builder("submit", version.name, version.version, "--wait", "-n", site.namespace) for _ in range(4)
    ]
    for number in range(2):
        site.kubectl("create", "job", f"sweep-{number}", "--from=cronjob/builder-sweep")
    for number in range(2):
        assert site.ended(f"sweep-{number}") == "Complete"
    heard = [wait_for(process.stderr, "no node takes it") for process in several]
    assert all("the Job does not go on" in line for line in heard), heard
    site.cluster.kubectl("label", "node", site.cluster.node, f"{label}=here")
    done = []
    for process in several:
        stdout, stderr = process.communicate(timeout=LONG_HANG)
        done.append(Done(process.returncode, stdout, stderr))
    assert {each.code for each in done} == {0}, done
    assert {each.stdout.strip() for each in done} == {outcome(site, version)["image"]}
    # Of its Pods, one may have been ended from outside.
    made = site.get("events", "--field-selector=reason=SuccessfulCreate,involvedObject.kind=Job")
    made_for = {each["uid"] for each in (event["involvedObject"] for event in made) if each["name"][:8] == "publish-"}
    assert len(made_for) == 1, made


def test_a_package_without_a_wheel_leads_to_the_template_with_an_engine(new_site, new_pump):
    site = new_site("dockerfile")
    version = tagged(new_pump, site)
    target = site.environ["TARGET_TAG"].lower().removeprefix("external_target_")
    settings = Settings.from_environ({**site.environ, "MODEL_NAME": version.name, "MODEL_VERSION": version.version})
    source = Catalog.from_settings(settings).find(version.name, version.version).source_id()
    for name, value in {"state": "failed", "source": source, "error": "NoWheel: none of it"}.items():
        version.set_tag(f"publish.{target}.{name}", value)
    assert '"submitted": 1' in site.sweep()
    (job,) = site.jobs()
    assert job["metadata"]["labels"]["builder/method"] == "dockerfile"


def test_the_example_of_the_page_for_python_publishes(site, new_pump, monkeypatch, capsys):
    version = new_pump()
    environ = {**site.environ, "MODEL_NAME": version.name, "MODEL_VERSION": version.version}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    settings = Settings.from_environ(environ)
    (block,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    block = block.replace("pump_alarm", version.name).replace("Cluster()", f"Cluster({site.namespace!r})")
    names = {"settings": settings, "catalog": Catalog.from_settings(settings)}
    capsys.readouterr()  # what MLflow says of the registration
    exec(compile(block, "docs/api.md", "exec"), names)
    printed = capsys.readouterr().out.split()
    assert printed[1:] == ["0", outcome(site, version)["image"]]


@pytest.mark.parametrize("method", ["wheels", "dockerfile"])
def test_a_job_by_kubectl_names_what_is_missing(site, method):
    """`kubectl create job --from` works, and the publisher says which setting it lacks."""
    if method == "dockerfile":
        with pytest.raises(Exception, match="not found"):
            site.kubectl("create", "job", "by-hand", "--from=cronjob/builder-publish-dockerfile")
        return
    site.kubectl("create", "job", "by-hand", "--from=cronjob/builder-publish-wheels")
    assert site.ended("by-hand") == "Failed"
    assert "MODEL_NAME is missing" in site.log_of("by-hand")
