"""The listener in the cluster: a tag becomes a Job within a second, once, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx2
import pytest

from builder.cluster.job import job_name
from builder.models import ModelVersion
from builder.models.catalog import _version
from scripts import certificates
from tests.cluster.gate import Gate
from tests.cluster.listening import DEPLOYMENT, SUBMIT_SECRET, WEBHOOK_SECRET, Listening, insist, listening
from tests.cluster.site import Site, answers, outcome, patch, wait_for
from tests.servers.forwarding import Forwarding, forwarding
from tests.signed import post, signed, tag_set
from tests.versions import Registered
from tests.waiting import HANG, LONG_HANG, until

# A template whose Jobs wait, as with a queue: what is tested is which Jobs are made.
SUSPENDED = patch("builder-publish-wheels", "/spec/jobTemplate/spec/suspend", value=True, op="add")
MANY = 250


@pytest.fixture(scope="module")
def listener(new_site_for_all):
    """One Pod that listens, to which MLflow delivers; a version is tried once."""
    site = new_site_for_all(settings={"SWEEP_ATTEMPTS": "1", "SWEEP_BACKOFF": "3600"})
    with listening(site) as running:
        yield running


@pytest.fixture
def site(listener):
    """The install of the listener; what a test leaves in it is removed."""
    yield listener.site
    listener.site.kubectl("delete", "jobs", "--all", "--grace-period=1")


@pytest.fixture(scope="module")
def idle(new_site_for_all):
    """One Pod that listens, to which nobody delivers, and whose Jobs wait."""
    site = new_site_for_all(patches=[SUSPENDED], settings={"LISTEN_PARALLEL": "5000"})
    with listening(site, webhook=False) as running:
        yield running


def target_of(site: Site) -> str:
    return site.environ["TARGET_TAG"].lower().removeprefix("external_target_")


def name_of(site: Site, version: Registered) -> str:
    return job_name(target_of(site), ModelVersion(name=version.name, version=version.version, created_ms=0))


def job_of(site: Site, version: Registered) -> str:
    """Wait until a version has a Job, and return its name."""
    site.kubectl("wait", "--for=create", f"--timeout={LONG_HANG:.0f}s", f"job/{name_of(site, version)}")
    return name_of(site, version)


def published(site: Site, version: Registered) -> dict[str, str]:
    """Wait for the end of a version's Job, and return what is recorded."""
    name = job_of(site, version)
    assert site.ended(name) == "Complete", site.log_of(name)
    found = outcome(site, version)
    assert found["state"] == "published"
    return found


def bodies(listener: Listening, version: Registered) -> bytes:
    key = listener.site.environ["TARGET_TAG"]
    return json.dumps(tag_set(version.name, version.version, key)).encode()


# ---- the story


def test_a_tag_becomes_an_image_that_answers(site, listener, new_pump):
    version = new_pump()
    version.set_tag(site.environ["TARGET_TAG"], "true")
    found = published(site, version)
    assert answers(site, found["image"])
    # Once, though the publisher's own tags have told the listener of it nine times more.
    assert len(site.get("jobs", "-l", f"builder/model={version.name}")) == 1


def test_a_version_that_is_registered_with_its_tag_is_published(site, listener, new_pump):
    version = new_pump(**{site.environ["TARGET_TAG"]: "True"})
    published(site, version)


def test_what_changes_while_a_job_runs_is_published_as_well(new_site, new_pump, cluster_mlflow, cluster):
    server, registry = cluster_mlflow.uri.removeprefix("http://"), Forwarding("")
    with forwarding(server, address=cluster.address) as mlflow:
        site = new_site(settings={"MLFLOW_TRACKING_URI": f"http://{mlflow.host}"})
        with listening(site), Gate(mlflow, registry).hold(r"GET \S+/mlflow-artifacts/artifacts/") as download:
            version = new_pump()
            version.set_tag(site.environ["TARGET_TAG"], "true")
            name = job_of(site, version)
            # The publisher has read what it is to do.
            download.wait()
            version.set_tag("MODEL_FOLDER", "mymodel")
            download.release()
            # It sees that before it moves the tag, and the Job's next Pod begins anew.
            assert site.ended(name) == "Complete"
            changed = version.client.get_model_version(version.name, version.version)
            assert outcome(site, version)["source"] == _version(changed).source_id()


class _Other:
    """Every value but one, and but none."""

    def __init__(self, value: str) -> None:
        self._value = value

    def __contains__(self, value: str) -> bool:
        return value not in {"", self._value}

    def __iter__(self):
        return iter([f"another than {self._value}"])


def test_settings_that_are_newer_than_the_listener_s_start_no_second_job(site, listener, new_pump):
    before = site.environ["REGISTRY_URL"]
    site.patch_settings(REGISTRY_URL=f"{before}/moved")
    try:
        version = new_pump()
        version.set_tag(site.environ["TARGET_TAG"], "true")
        found = published(site, version)
    finally:
        site.patch_settings(REGISTRY_URL=before)
    assert "/moved/" in found["image"]
    # It has looked at the version once more, with settings by which that is not published.
    until(lambda: [line for line in listener.log().splitlines() if version.name in line and "has ended" in line])
    (job,) = site.get("jobs", "-l", f"builder/model={version.name}")
    assert job["status"]["succeeded"] == 1


def test_a_tag_that_is_set_again_tries_a_failed_version_again(site, listener, new_pump):
    version = new_pump(MODEL_FOLDER="not/there")
    version.set_tag(site.environ["TARGET_TAG"], "true")
    name = job_of(site, version)
    assert site.ended(name) == "Failed"
    first = site.get(f"job/{name}")["metadata"]["uid"]
    version.set_tag(site.environ["TARGET_TAG"], "true")
    site.cluster.watch(f"job/{name}", "{.metadata.uid}", _Other(first), namespace=site.namespace)


# ---- what is refused


@pytest.fixture
def version(idle, new_pump):
    return new_pump(**{idle.site.environ["TARGET_TAG"]: "true"})


def test_what_is_not_mlflow_s_is_refused_without_work_and_without_a_word(idle, version):
    body = bodies(idle, version)
    forged = idle.ask("/webhook", body, secret="another-secret-of-the-tests")
    stale = insist(lambda: idle.post("/webhook", body, headers=signed(body, WEBHOOK_SECRET, when=time.time() - 3600)))
    unsigned = insist(lambda: post(_address(idle), "/webhook", body, {}))
    swapped = idle.ask("/webhook", body, secret=SUBMIT_SECRET)
    malformed = idle.ask("/webhook", b'{"entity": "model_version_tag", "action": "set", "data": 1}')
    assert [each[0] for each in (forged, stale, unsigned, swapped, malformed)] == [401, 401, 401, 401, 400]
    assert {each[1] for each in (forged, stale, unsigned, swapped, malformed)} == {""}
    assert insist(lambda: post(_address(idle), "/nothing", body, {}))[0] == 404
    # A body that is too large ends at the bound, whether its length is told or not; it is not read to its end, so that
    # the answer may be lost with the connection.
    large = body + b" " * (1 << 20)
    assert _sent(idle, large, signed(large, WEBHOOK_SECRET)) in {413, 408, 0}
    chunked = {**signed(body, WEBHOOK_SECRET), "Transfer-Encoding": "chunked"}
    assert _sent(idle, iter([b"x" * (1 << 18)] * 8), chunked) in {413, 408, 0}
    assert version.name not in str(idle.site.jobs())


def test_a_replay_is_refused(idle, version):
    body = bodies(idle, version)
    headers: dict[str, str] = {}

    def send() -> tuple[int, str]:
        headers.update(signed(body, WEBHOOK_SECRET))
        return post(_address(idle), "/webhook", body, headers)

    assert insist(send)[0] in {202, 204}
    assert insist(lambda: post(_address(idle), "/webhook", body, headers)) == (409, "")
    job_of(idle.site, version)


def test_an_example_is_taken_without_work(idle):
    before = {job["metadata"]["name"] for job in idle.site.jobs()}
    assert idle.ask("/webhook", tag_set("example_model", "1", "example_key", "example_value"))[0] == 204
    assert idle.ask("/webhook", tag_set("example_model", "1", idle.site.environ["TARGET_TAG"]))[0] in {202, 204}
    assert {job["metadata"]["name"] for job in idle.site.jobs()} == before


def _address(listener: Listening) -> str:
    return listener.url.removeprefix("http://")


def _sent(listener: Listening, body: bytes | Iterator[bytes], headers: dict[str, str]) -> int:
    """Send a body, and return the status; 0 where the connection was cut."""
    connection = http.client.HTTPConnection(_address(listener), timeout=HANG)
    try:
        connection.request("POST", "/webhook", body, headers, encode_chunked="Transfer-Encoding" in headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


# ---- bursts, several listeners, services that are away


def test_a_burst_makes_each_job_once(idle, new_pump):
    """1,000 deliveries for 250 versions, from 50 connections; how quickly is measured by benchmarks/."""
    first = new_pump()
    run = first.client.get_run(first.run_id).info
    key = idle.site.environ["TARGET_TAG"]
    tags = {key: "true", "MODEL_ENTRY_POINT": "serve.py"}

    def make(_number: int) -> str:
        made = first.client.create_model_version(first.name, f"{run.artifact_uri}/mymodel", run.run_id, tags=tags)
        return str(made.version)

    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(make, range(MANY)))
    sent = [json.dumps(tag_set(first.name, version, key)).encode() for version in versions * 4]
    before = _memory(idle)

    def answer(body: bytes) -> int:
        """Return the status of a delivery; 0 where the connection was lost."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return idle.post("/webhook", body)[0]
        return 0

    with ThreadPoolExecutor(50) as pool:
        statuses = list(pool.map(answer, sent))
    # 408: it came too slowly, on a machine that has much else to do.
    assert set(statuses) <= {0, 202, 204, 408, 503}, Counter(statuses)
    taken = {body for body, status in zip(sent, statuses, strict=True) if status in {202, 204}}
    assert taken
    for body in set(sent) - taken:
        assert idle.ask("/webhook", body)[0] in {202, 204}
    # What makes them has the processor meanwhile.
    for version in versions[::10]:
        job_of(idle.site, Registered(first.client, first.name, version, first.run_id))

    def by_version() -> Counter[str]:
        found = idle.site.get("jobs", "-l", f"builder/model={first.name}")
        return Counter(job["metadata"]["labels"]["builder/version"] for job in found)

    until(lambda: set(by_version()) >= set(versions))
    assert by_version() == dict.fromkeys(versions, 1)
    assert _memory(idle) - before < 64 << 20, "the burst is held in memory"


def _memory(listener: Listening) -> int:
    """Return the resident memory of the only Pod's process, in bytes."""
    (pod,) = listener.pods()
    text = listener.site.kubectl("exec", pod["metadata"]["name"], "--", *_PYTHON, "-c", _RSS)
    return int(text)


_PYTHON = ("/kaniko/venv/bin/python3", "-I")
_RSS = "print(int(next(l for l in open('/proc/1/status') if l.startswith('VmRSS')).split()[1]) * 1024)"


def test_two_listeners_and_a_sweep_make_one_job(new_site, new_pump):
    site = new_site(patches=[SUSPENDED])
    with listening(site, replicas=2, webhook=False) as listener:
        version = new_pump(**{site.environ["TARGET_TAG"]: "true"})
        body = bodies(listener, version)
        found = until(lambda: len(each := listener.service.addresses()) == 2 and each)
        addresses = [f"{address}:8080" for address in found]
        site.kubectl("create", "job", "sweep", "--from=cronjob/builder-sweep")

        def deliver(address: str) -> int:
            return insist(lambda: post(address, "/webhook", body, signed(body, WEBHOOK_SECRET)))[0]

        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(deliver, addresses * 4))
        assert set(statuses) <= {202, 204}
        assert site.ended("sweep") == "Complete", site.log_of("sweep")
        (job,) = site.jobs()
        assert job["metadata"]["name"] == name_of(site, version)
        created = [line for line in listener.log().splitlines() if '"submitted"' in line and '"job"' in line]
        assert len(created) <= 1


def test_a_service_that_is_away_has_deliveries_sent_again(new_site, new_pump, cluster_mlflow, cluster):
    with forwarding(cluster_mlflow.uri.removeprefix("http://"), address=cluster.address) as mlflow:
        site = new_site(settings={"MLFLOW_TRACKING_URI": f"http://{mlflow.host}"}, patches=[SUSPENDED])
        with listening(site, webhook=False) as listener:
            version = new_pump(**{site.environ["TARGET_TAG"]: "true"})
            body = bodies(listener, version)
            mlflow.rule = lambda _asked: (503, {}, b"")
            statuses = set()

            def refused() -> bool:
                # The first may be promised: it takes some seconds until MLflow is known to be away.
                with contextlib.suppress(OSError, http.client.HTTPException):
                    statuses.add(listener.post("/webhook", body)[0])
                return 503 in statuses

            until(refused)
            assert statuses <= {202, 408, 503}
            assert site.jobs() == []
            mlflow.rule = lambda _asked: None
            assert listener.ask("/webhook", body)[0] in {202, 204}
            job_of(site, version)
            assert len(site.jobs()) == 1


# ---- the listener's own end


def test_a_listener_that_is_killed_loses_nothing(site, listener, new_pump):
    (pod,) = listener.pods()
    version = new_pump()
    # Its deliveries come to nothing; MLflow's retries may reach its successor.
    site.kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force", "--wait=false")
    version.set_tag(site.environ["TARGET_TAG"], "true")
    site.sweep()
    published(site, version)
    assert len(site.get("jobs", "-l", f"builder/model={version.name}")) == 1
    listener.scale(1)


def test_a_listener_that_is_asked_to_end_finishes_what_it_promised(new_site, new_pump, cluster_mlflow, cluster):
    with forwarding(cluster_mlflow.uri.removeprefix("http://"), address=cluster.address) as mlflow:
        site = new_site(settings={"MLFLOW_TRACKING_URI": f"http://{mlflow.host}"}, patches=[SUSPENDED])
        gate = Gate(mlflow, Forwarding(""))
        with listening(site, webhook=False) as listener:
            for _ in range(5):
                version = new_pump(**{site.environ["TARGET_TAG"]: "true"})
                log = log_of_an_end(listener, gate, version)
                made = name_of(site, version) in {job["metadata"]["name"] for job in site.jobs()}
                # This machine may take longer than the 20 seconds that a listener has for what it promised.
                if made or "ends while versions wait" not in log:
                    break
                listener.scale(1)
        assert made, log


def log_of_an_end(listener: Listening, gate: Gate, version: Registered) -> str:
    """Ask the only listener to end while it works for a version, and return what it logs until its end."""
    site = listener.site
    name = listener.pods()[0]["metadata"]["name"]
    follow = (f"--namespace={site.namespace}", "logs", "--follow", name)
    with gate.hold(rf"GET \S+/model-versions/get\S*{version.name}") as held:
        assert listener.ask("/webhook", bodies(listener, version))[0] == 202
        held.wait()
        with site.cluster.start_kubectl(*follow) as log:
            site.kubectl("scale", DEPLOYMENT, "--replicas=0")
            wait_for(log.stdout, '"ending"')
            held.release()
            said = "".join(log.stdout or ())
    site.kubectl("wait", "--for=delete", f"--timeout={LONG_HANG:.0f}s", f"pod/{name}")
    return said


def test_what_waits_for_room_is_made_when_others_end(new_site, new_pump):
    site = new_site(settings={"LISTEN_PARALLEL": "1"})
    with listening(site) as listener:
        versions = [new_pump() for _ in range(3)]
        for version in versions:
            version.set_tag(site.environ["TARGET_TAG"], "true")
        for version in versions:
            published(site, version)
        spans = sorted((job["status"]["startTime"], job["status"]["completionTime"]) for job in site.jobs())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), listener.log()


# A fifth of a processor for two Pods that need a whole one.
STARVED = {
    "target": {"kind": "Deployment", "name": "builder-listener"},
    "patch": '[{"op": "add", "path": "/spec/template/spec/containers/0/resources/limits/cpu", "value": "200m"}]',
}


def test_killed_doubled_starved_and_lied_to_each_version_is_published_once(
    new_site, new_pump, cluster, cluster_registries
):
    with forwarding(cluster_registries.models.host, address=cluster.address) as registry:
        hosts = f"{registry.host},{cluster_registries.images.host}"
        settings = {"REGISTRY_URL": f"{registry.host}/storm", "LISTEN_PARALLEL": "3"}
        site = new_site(settings=settings, network={"INSECURE_REGISTRIES": hosts}, patches=[STARVED])
        with listening(site, replicas=2) as listener:
            versions, left = [new_pump() for _ in range(5)], new_pump()
            ended = threading.Event()
            lying = threading.Thread(target=_lie, args=(listener, left, ended))
            lying.start()
            for number, version in enumerate(versions):
                version.set_tag(site.environ["TARGET_TAG"], "true")
                if number == 2:
                    victim = listener.pods()[0]["metadata"]["name"]
                    site.kubectl("delete", "pod", victim, "--grace-period=0", "--force", "--wait=false")
            # Whatever was lost.
            site.sweep()
            for version in versions:
                published(site, version)
            ended.set()
            lying.join(LONG_HANG)
            site.sweep("once-more")
        assert len(site.jobs()) == len(versions)
        for version in versions:
            path = f"/v2/storm/{version.name}/manifests/v{version.version}"
            moved = [each for each in registry.seen if (each.method, each.path) == ("PUT", path) and each.status < 300]
            assert len(moved) == 1, version
        assert outcome(site, left) == {}


def _lie(listener: Listening, left: Registered, ended: threading.Event) -> None:
    """Send what is forged, malformed, and signed but not true, until somebody has enough of it."""
    body = bodies(listener, left)
    while not ended.is_set():
        for lie, secret in ((body, SUBMIT_SECRET), (b"{", WEBHOOK_SECRET), (body, WEBHOOK_SECRET)):
            # Between two listeners there may be nobody.
            with contextlib.suppress(OSError, http.client.HTTPException):
                listener.post("/webhook", lie, secret=secret)
        ended.wait(0.2)


# ---- callers


def test_a_caller_hears_the_outcome(site, listener, new_pump):
    version = new_pump()
    tries = []

    def publish() -> tuple[int, str]:
        asked = {"model": version.name, "version": version.version}
        tries.append(asked)
        return listener.post("/publish", asked, secret=SUBMIT_SECRET)

    status, text = insist(publish)
    assert status == 200, text
    job = json.loads(text)
    assert job["job"] == name_of(site, version)
    # One whose answer was lost may have made it.
    assert job["created"] or len(tries) > 1
    watched = {"model": version.name, "version": version.version, "job": job["job"], "uid": job["uid"], "wait": 25}

    def told_end(of: dict[str, Any]) -> dict[str, Any] | None:
        status, text = listener.ask("/outcome", of, secret=SUBMIT_SECRET)
        assert status == 200, text
        told: dict[str, Any] = json.loads(text)
        return told if told["state"] in {"published", "failed"} else None

    told = until(lambda: told_end(watched), LONG_HANG)
    assert told["state"] == "published"
    assert told["image"] == outcome(site, version)["image"]
    # Another Job takes its name, and the first caller still hears of the first.
    version.set_tag("MODEL_PLATFORMS", "linux/amd64,linux/arm64")
    version.set_tag(site.environ["TARGET_TAG"], "true")
    until(lambda: [each for each in site.jobs() if each["metadata"]["uid"] != job["uid"]])
    assert told_end(watched)["image"] == told["image"]
    assert site.ended(job["job"]) == "Complete"
    broken = new_pump(MODEL_FOLDER="not/there")
    _, text = listener.ask("/publish", {"model": broken.name, "version": "1"}, secret=SUBMIT_SECRET)
    job = json.loads(text)
    watched = {"model": broken.name, "version": "1", "job": job["job"], "uid": job["uid"], "wait": 25}
    told = until(lambda: told_end(watched), LONG_HANG)
    assert (told["state"], told["exit_code"]) == ("failed", 65)
    assert "not/there" in told["error"]
    status, text = listener.ask("/publish", {"model": "no-such-model", "version": "1"}, secret=SUBMIT_SECRET)
    assert (status, json.loads(text)["exit_code"]) == (404, 66)
    status, text = listener.ask("/publish", {"model": version.name, "version": "x"}, secret=SUBMIT_SECRET)
    assert (status, json.loads(text)["exit_code"]) == (400, 64)
    assert listener.ask("/publish", {"model": version.name, "version": "1"}, secret=WEBHOOK_SECRET) == (401, "")


def test_a_caller_hears_what_a_job_waits_for(site, listener, new_pump):
    pods = len(listener.pods())
    site.kubectl("create", "quota", "full", f"--hard=pods={pods}")
    site.cluster.watch("resourcequota/full", "{.status.hard.pods}", (str(pods),), namespace=site.namespace)
    version = new_pump()
    asked = {"model": version.name, "version": version.version}
    try:
        job = json.loads(listener.ask("/publish", asked, secret=SUBMIT_SECRET)[1])
        watched = {**asked, "job": job["job"], "uid": job["uid"], "wait": 0}

        def told_why():
            told = json.loads(listener.ask("/outcome", watched, secret=SUBMIT_SECRET)[1])
            return told if "exceeded quota" in told["error"] else None

        told = until(told_why)
        assert told["state"] == "pending"
        assert "quota" in told["remedy"]
    finally:
        site.kubectl("delete", "quota", "full")


def test_with_the_component_tls_it_speaks_tls(new_site, new_pump, cluster, tmp_path):
    site = new_site(components=["tls"])
    authority = certificates.self_signed(tmp_path, "authority")
    name = f"builder-listener.{site.namespace}.svc"
    pair = certificates.signed(tmp_path, "tls", authority, dns_names=[name], addresses=[cluster.address])
    site.kubectl("create", "secret", "tls", "builder-listener-tls", f"--cert={pair.path}", f"--key={pair.key_path}")
    with listening(site, webhook=False) as listener:
        version = new_pump()
        url, ours = listener.url.replace("http://", "https://"), {"SUBMIT_SECRET": SUBMIT_SECRET}
        asked = ("submit", version.name, version.version, "--wait", "--via")
        done = site.builder(*asked, url, **ours, SSL_CERT_FILE=str(authority.path))
        assert done.code == 0, done.stderr
        assert done.stdout.strip() == outcome(site, version)["image"]
        body = json.dumps(tag_set(version.name, version.version, site.environ["TARGET_TAG"])).encode()
        trusting = ssl.create_default_context(cafile=authority.path)

        def send() -> tuple[int, str]:
            headers = signed(body, WEBHOOK_SECRET)
            found = httpx2.post(f"{url}/webhook", content=body, headers=headers, verify=trusting, timeout=HANG)
            return found.status_code, found.text

        assert insist(send)[0] in {202, 204}
        other = certificates.self_signed(tmp_path, "another-authority")
        distrusted = site.builder(*asked, url, **ours, SSL_CERT_FILE=str(other.path))
        assert (distrusted.code, "certificate" in distrusted.stderr) == (78, True), distrusted.stderr
        assert site.builder(*asked, listener.url, **ours).code == 69


# ---- layers ahead of time


def test_layers_are_made_before_the_tag_comes(new_site, new_pump):
    site = new_site(components=["warm"])
    with listening(site) as listener:
        version = new_pump()
        name = name_of(site, version).replace("publish-", "warm-", 1)
        site.kubectl("wait", "--for=create", f"--timeout={LONG_HANG:.0f}s", f"job/{name}")
        assert site.ended(name) == "Complete", site.log_of(name)
        assert site.jobs() == []
        pod = site.pod_of(name)
        assert pod["spec"]["priority"] == -10
        assert outcome(site, version) == {}
        version.set_tag(site.environ["TARGET_TAG"], "true")
        published(site, version)
        log = site.log_of(name_of(site, version))
        timings = next(json.loads(line) for line in log.splitlines() if '"timings"' in line)
        assert listener.pods()
        assert "install" not in timings, timings
