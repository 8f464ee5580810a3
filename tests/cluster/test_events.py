"""Events on a version's Job: what was asked for, and what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid

from scripts.launch import clean_environ
from tests.cluster.site import TEMPLATE_POD, outcome, submit, tagged, wait_for
from tests.waiting import HANG


def events(site, job):
    """Return the builder's own Events of a Job by their reasons."""
    found = site.get("events", "--field-selector", f"involvedObject.uid={job['metadata']['uid']}")
    return {each["reason"]: each for each in found if each["source"].get("component") == "builder"}


def test_a_sweep_tells_what_it_submits_and_a_follower_what_is_published(site, new_pump):
    version = tagged(new_pump, site)
    site.sweep()
    (job,) = site.jobs()
    submitted = events(site, job)["Submitted"]
    assert version.name in submitted["message"]
    assert submitted["type"] == "Normal"
    done = submit(site, version, "--wait")
    assert done.code == 0, done.stderr
    (job,) = site.jobs()
    found = events(site, job)
    assert found["Published"]["message"] == outcome(site, version)["image"]
    assert "Failed" not in found
    assert "Published" in site.kubectl("describe", "job", job["metadata"]["name"])


def test_a_failure_is_a_warning_with_its_error(site, new_pump):
    version = tagged(new_pump, site, MODEL_FOLDER="not/there")
    done = submit(site, version, "--wait")
    assert done.code == 65, done.stderr
    (job,) = site.jobs()
    failed = events(site, job)["Failed"]
    assert failed["type"] == "Warning"
    assert "not/there" in failed["message"]
    assert "\n" not in failed["message"]


def test_a_job_that_hangs_is_ended_and_says_why(site, new_pump):
    absent = f"{site.registry}/absent:1"
    image = {"op": "replace", "path": f"{TEMPLATE_POD}/containers/0/image", "value": absent}
    site.patch_template("wheels", image)
    version = tagged(new_pump, site)
    # Not before the image is what it waits for.
    with site.start_builder("submit", version.name, version.version, "--wait", "-n", site.namespace) as process:
        try:
            wait_for(process.stderr, absent)
        finally:
            process.terminate()
    done = submit(site, version, "--wait", JOB_START_TIMEOUT="1")
    assert done.code == 75, done.stderr
    found = site.get("events")
    (ended,) = [each for each in found if each["reason"] == "Ended" and each["source"].get("component") == "builder"]
    assert ended["type"] == "Warning"
    assert absent in ended["message"]
    assert ended["involvedObject"]["name"].startswith("publish-")


TELL = """\
import json, sys
from builder.cluster.api_server import Cluster
from builder.cluster.events import tell_end
from builder.publish.record import Outcome

job, told = json.load(sys.stdin)
cluster = Cluster(sys.argv[1])
for each in told:
    tell_end(cluster, job, Outcome(target="t", **each))
cluster.close()
"""


def test_however_often_an_end_is_told_there_is_one_event(site):
    # A Job that nobody else watches: the listener tells of those that are there.
    job = {"metadata": {"name": "publish-nothing-v1-0123456789", "uid": str(uuid.uuid4())}}
    published = {"state": "published", "image": f"registry.example.com/m@sha256:{'a' * 64}"}
    later = {**published, "error": "TryAgain: a later attempt. Wait."}
    told = json.dumps([job, [published, published, later, {"state": "running"}]])
    # In a process of its own: Kubernetes' client reads KUBECONFIG when it is imported.
    argv = [sys.executable, "-c", TELL, site.namespace]
    environ = clean_environ(**site.environ)
    subprocess.run(argv, input=told, check=True, capture_output=True, text=True, env=environ, timeout=HANG)
    found = events(site, job)
    assert found.keys() == {"Published", "Failed"}
    assert found["Published"]["message"] == published["image"]
    assert found["Published"]["count"] == 1
    assert "a later attempt" in found["Failed"]["message"]
