"""The commands of docs/operations.md, run as they stand, in an install whose namespace is `builder`.

Left out are those of a laptop's own environment, and a certificate's; the names of servers are this cluster's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.launch import clean_environ
from tests.cluster.listening import SUBMIT_SECRET, WEBHOOK_SECRET, listening
from tests.cluster.site import Site, outcome, tagged
from tests.servers.registries import PASSWORD, USER
from tests.waiting import LONG_HANG

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def blocks() -> dict[str, str]:
    """Return the shell blocks of the page by their first words, without indentation."""
    found = re.findall(r"^( *)```shell\n(.*?)^\1```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    scripts = [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]
    return {text.split("\n")[0]: text for text in scripts}


def block(words: str) -> str:
    """Return the block whose first line has some words."""
    (found,) = [text for first, text in blocks().items() if words in first]
    return found


@pytest.fixture
def shell(site, tmp_path):
    """Run a script with kubectl and builder, in the install's namespace; return what it prints."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").symlink_to(site.cluster.kubectl_path)

    def run(script: str, *, codes: tuple[int, ...] = (0,), **replaced: str) -> str:
        # Its bound is that of a machine that has nothing else to do.
        ours = {"-n builder": f"-n {site.namespace}", '["doctor"]': '["doctor", "--timeout=300"]'}
        for old, new in {**ours, **replaced}.items():
            script = script.replace(old, new)
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environ = clean_environ(**{**site.environ, "PATH": path, **site.cluster.environ})
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path, check=False, capture_output=True, text=True, env=environ, timeout=LONG_HANG,
        )  # fmt: skip
        assert done.returncode in codes, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run


def test_every_block_is_known():
    """A new command of the page has to be run here, or to be left out on purpose."""
    assert {first.split("  ")[0].strip() for first in blocks()} == {
        "builder doctor",
        "kubectl -n builder exec deploy/builder-listener -- builder doctor",
        "kubectl -n builder create job doctor --from=cronjob/builder-publish-wheels --dry-run=client -o json \\",
        """kubectl -n builder patch cronjob builder-sweep -p '{"spec": {"suspend": true}}'""",
        "kubectl -n builder scale deployment builder-listener --replicas=2",
        next(first for first in blocks() if "generic builder-mlflow" in first),
        next(first for first in blocks() if "builder-registry-push" in first),
        next(first for first in blocks() if "--field-selector=status.phase=Running" in first),
        "mv webhook-secret webhook-secret-old",
    }


def test_doctor_runs_in_a_job_that_publishes_where_the_push_credential_is(site, shell):
    printed = shell(block("create job doctor"))
    assert re.search(r"^ok +push ", printed, re.MULTILINE), printed
    assert re.search(r"^ok +base image ", printed, re.MULTILINE), printed
    assert re.search(r"^skipped +cluster ", printed, re.MULTILINE), printed
    assert site.jobs() == []


def test_stopped_and_started_nothing_is_lost(site, shell, new_pump):
    version = tagged(new_pump, site)
    shell(block('{"suspend": true}'))
    assert site.get("cronjob")
    (sweep,) = [each for each in site.get("cronjob") if each["metadata"]["name"] == "builder-sweep"]
    assert sweep["spec"]["suspend"] is True
    shell(block("--replicas=2"))
    (sweep,) = [each for each in site.get("cronjob") if each["metadata"]["name"] == "builder-sweep"]
    assert sweep["spec"]["suspend"] is False
    site.sweep()
    (job,) = site.jobs()
    assert site.ended(job["metadata"]["name"]) == "Complete"
    assert outcome(site, version)["state"] == "published"
    # The table's other commands.
    shell("kubectl -n builder get jobs -L builder/model,builder/version")
    assert "Submitted" in shell(f"kubectl -n builder describe job {job['metadata']['name']}")


def test_credentials_are_replaced_while_a_publish_runs(site: Site, shell, new_pump, tmp_path):
    for name, text in {"token": "unused", "push-password": PASSWORD, "pull-password": PASSWORD}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "webhook-secret").write_text(WEBHOOK_SECRET)
    (tmp_path / "submit-secret").write_text(SUBMIT_SECRET)
    here = {
        "--docker-server=registry.example.com": f"--docker-server={site.registry}",
        "--docker-username=publisher": f"--docker-username={USER}",
        "--docker-username=reader": f"--docker-username={USER}",
    }
    with listening(site, webhook=False) as listener:
        first = tagged(new_pump, site)
        site.sweep()
        shell(block("generic builder-mlflow"))
        shell(block("builder-registry-push"), **here)
        shell(block("get pods -l app.kubernetes.io/component=publish"))
        (job,) = site.jobs()
        assert site.ended(job["metadata"]["name"]) == "Complete"
        assert outcome(site, first)["state"] == "published"
        # The webhook's steps: MLflow's side is the address of this test's service.
        site.builder("webhook", "create", listener.url, "--name", site.namespace, WEBHOOK_SECRET=WEBHOOK_SECRET)
        service = {
            "http://builder-listener.builder": f"{listener.url} --name {site.namespace}",
            "webhook delete builder": f"webhook delete {site.namespace}",
            "webhook test builder": f"webhook test {site.namespace}",
        }
        try:
            shell(block("mv webhook-secret"), **service)
            new = (tmp_path / "webhook-secret").read_text().strip()
            assert new not in {"", WEBHOOK_SECRET}
            # Both are accepted.
            body = {"entity": "model_version_tag", "action": "deleted", "timestamp": "", "data": {}}
            answers = {listener.ask("/webhook", body, secret=secret)[0] for secret in (new, WEBHOOK_SECRET)}
            assert 401 not in answers, answers
            assert listener.ask("/webhook", body, secret="another-secret-0123456789")[0] == 401
        finally:
            site.builder("webhook", "delete", site.namespace, WEBHOOK_SECRET=WEBHOOK_SECRET)
    second = tagged(new_pump, site)
    site.sweep()
    for job in site.jobs():
        site.ended(job["metadata"]["name"])
    assert outcome(site, second)["state"] == "published"
    assert json.loads(site.builder("status", second.name, "-o", "json", "-n", site.namespace).stdout)
