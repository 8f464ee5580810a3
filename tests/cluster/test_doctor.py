"""`builder doctor` in a cluster: with an administrator's kubeconfig, in the listener's Pod, in a Job, without rights."""

from __future__ import annotations

import json

import pytest
import yaml

from builder.cluster.job import TEMPLATES
from tests.cluster.listening import DEPLOYMENT, listening
from tests.cluster.site import Done, Site, outcome, tagged
from tests.waiting import LONG_HANG, until

# What has to be well with an administrator's kubeconfig. Webhook and listener are skipped without one.
ADMINISTRATOR = {"MLflow", "clock", "cluster", "rights", "templates", "policies"}


def rows(text: str) -> dict[str, dict[str, object]]:
    """Return the rows of `builder doctor -o json` by what was checked."""
    return {row["check"]: row for row in json.loads(text)}


def states(found: dict[str, dict[str, object]], *names: str) -> dict[str, object]:
    return {name: found[name]["state"] for name in names}


def doctor(site: Site, *arguments: str, **environ: str) -> Done:
    return site.builder(
        "doctor", "--timeout=300", "-o", "json", "-n", site.namespace, *arguments, SMOKE_TEST="off", **environ
    )


def test_an_administrator_sees_that_all_is_there(site, new_pump):
    version = tagged(new_pump, site)
    found = rows(doctor(site, version.name).stdout)
    assert states(found, *ADMINISTRATOR) == dict.fromkeys(ADMINISTRATOR, "ok"), found
    assert site.namespace in found["cluster"]["found"]
    assert found["tags"]["state"] == "ok"


def test_what_is_not_installed_is_named(site):
    site.kubectl("delete", "cronjob", TEMPLATES["wheels"])
    done = doctor(site)
    found = rows(done.stdout)
    assert (found["templates"]["state"], found["templates"]["exit_code"]) == ("fail", 78), found
    assert TEMPLATES["wheels"] in found["templates"]["found"]
    assert "kubectl apply -k k8s/base" in found["templates"]["remedy"]
    assert done.code == 78


@pytest.fixture
def account_without_rights(site, cluster, tmp_path):
    """The kubeconfig of an account of the namespace that may do nothing."""
    token = site.kubectl("create", "token", "builder-publish").strip()
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    for user in config["users"]:
        user["user"] = {"token": token}
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_an_account_without_rights_is_told_which_it_lacks(site, account_without_rights):
    done = doctor(site, KUBECONFIG=account_without_rights)
    found = rows(done.stdout)
    assert found["cluster"]["state"] == "ok"
    assert f"system:serviceaccount:{site.namespace}:builder-publish" in found["cluster"]["found"]
    rights = found["rights"]
    assert (rights["state"], rights["exit_code"]) == ("fail", 77), found
    for right in ("create jobs", "delete jobs", "get pods/log", "watch events", f"get cronjobs {TEMPLATES['wheels']}"):
        assert right in rights["found"], rights
    assert (found["templates"]["state"], found["templates"]["exit_code"]) == ("fail", 77)
    assert found["policies"]["state"] == "skipped"
    # Whatever else failed.
    assert done.code >= 77


def test_an_account_that_the_policies_do_not_hold_is_told(site, account_without_rights):
    account = f"--serviceaccount={site.namespace}:builder-publish"
    site.kubectl("create", "rolebinding", "more", "--role=builder-sweep", account)

    def rights():
        return rows(doctor(site, KUBECONFIG=account_without_rights).stdout)["rights"]

    # The API server learns of bindings and roles by watching them.
    until(lambda: rights()["state"] == "ok")
    body = json.loads(site.kubectl("get", "role", "builder-sweep", "-o", "json"))
    body["rules"] = [rule for rule in body["rules"] if "template-copies" not in rule["resources"]]
    site.kubectl("replace", "-f", "-", documents=[body])
    found = until(lambda: (row := rights())["state"] != "ok" and row)
    assert (found["state"], "any Job" in found["found"]) == ("warn", True), found


def test_in_the_listener_s_pod_what_it_cannot_see_is_skipped(site, new_pump):
    tagged(new_pump, site)
    with listening(site):
        done = site.kubectl(
            "exec", DEPLOYMENT, "--", "builder", "doctor", "--timeout=300", "-o", "json", timeout=LONG_HANG
        )
    found = rows(done)
    well = ("MLflow", "tags", "clock", "cluster", "rights", "templates", "listener")
    assert states(found, *well) == dict.fromkeys(well, "ok"), found
    # Its own address is not known to it.
    assert states(found, "webhook") == {"webhook": "warn"}, found
    assert f"system:serviceaccount:{site.namespace}:builder-sweep" in found["cluster"]["found"]
    hidden = ("push", "mount", "policies")
    assert states(found, *hidden) == dict.fromkeys(hidden, "skipped"), found
    assert "docs/operations.md" in found["push"]["remedy"]


def test_without_the_right_to_create_events_jobs_are_made_all_the_same(site, new_pump):
    body = json.loads(site.kubectl("get", "role", "builder-sweep", "-o", "json"))
    for rule in body["rules"]:
        if "events" in rule["resources"]:
            rule["verbs"] = ["get", "list", "watch"]
    site.kubectl("replace", "-f", "-", documents=[body])
    version = tagged(new_pump, site)
    assert '"submitted": 1' in site.sweep()
    (job,) = site.jobs()
    assert site.ended(job["metadata"]["name"]) == "Complete"
    assert outcome(site, version)["state"] == "published"
