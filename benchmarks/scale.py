"""The publisher in a cluster with a large catalogue: what a sweep costs, and where the seconds of a publish go.

`python -m benchmarks.scale` starts a Kubernetes of its own, with MLflow and a registry on its bridge, and installs
k8s/base there. All is measured in Pods of the builder image: a sweep of 1,000 and of 10,000 versions that are
published, beside `sweep --inline` of the same; 100 versions to publish; one publish from its Job to the tag in the
registry, part by part; the same from the tag on the version, through the listener; and a burst of deliveries.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.containers import Ran, processor_of, watched
from benchmarks.report import machine_words
from builder.cluster.job import job_name
from builder.models import ModelVersion
from builder.settings import Settings
from examples.models import HERE, save_pump_model
from scripts import machine
from scripts.cluster import Cluster, NoCluster, start_cluster
from scripts.cluster.images import builder_archive
from scripts.cluster.install import Site, install
from scripts.demo_tools import BUILDER, Debian
from scripts.launch import Processes, Running, clean_environ, free_port, running
from tests.catalogue import insert, published, versions
from tests.signed import post, signed, tag_set

SIZES = (1_000, 10_000)
# Seconds for a whole sweep with nothing to do, bytes, and seconds for a hundred Jobs.
AIMS = {1_000: 3.0, 10_000: 15.0}
MEMORY_AIM = 200 << 20
NEW, NEW_AIM = 100, 10.0
PUBLISH_AIM = 3.0
TAG_AIM, TAGGED_AIM = 1.0, 5.0
BURST, CONNECTIONS = 1_000, 50
PARTS = ["idle", "publish", "tag", "burst"]
ROUNDS = 5
_PAGE = 500
_ENDED = ("Complete", "Failed")
_CONSOLE = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)
_MLFLOW_REQUEST = re.compile(r'"(GET|POST|PATCH|DELETE|PUT) (/api/[^ ?"]*)[^"]*" \d+')


@dataclasses.dataclass(kw_only=True)
class Lab:
    """An installation, and the servers it works with.

    Attributes:
        cluster: where it is.
        namespace: of its own.
        folder: of MLflow, with its database.
        mlflow: the server.
        uri: its address.
        host: of the registry.
        storage: the registry's files.
    """

    cluster: Cluster
    namespace: str
    folder: Path
    mlflow: Running
    uri: str
    host: str
    storage: Path

    @property
    def account(self) -> str:
        """The sweep's user name at the API server."""
        return f"system:serviceaccount:{self.namespace}:builder-sweep"

    def settings(self, **changes: str) -> dict[str, str]:
        """Return the settings that the ConfigMap has."""
        found = {
            "MLFLOW_TRACKING_URI": self.uri,
            "REGISTRY_URL": f"{self.host}/models",
            "TARGET_PLATFORMS": machine.native_platform(),
            "SMOKE_TEST": "off",
        }
        return {**found, **changes}

    def change(self, **values: str) -> None:
        """Change settings of the installation."""
        self.kubectl("patch", "configmap", "builder-settings", "--type=merge", "-p", json.dumps({"data": values}))

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl in the namespace."""
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments)

    def listener(self) -> str:
        """Return host and port of the listener's Pod."""
        pods = json.loads(self.kubectl("get", "pods", "-l", "app.kubernetes.io/component=listener", "-o", "json"))
        (address,) = [pod["status"]["podIP"] for pod in pods["items"] if not pod["metadata"].get("deletionTimestamp")]
        return f"{address}:8080"

    def builder(self, *arguments: str) -> str:
        """Run `builder` here, and return what it prints."""
        environ = clean_environ(
            **self.settings(),
            KUBECONFIG=str(self.cluster.kubeconfig),
            NO_PROXY=f"{self.cluster.address},127.0.0.1",
            WEBHOOK_SECRET=_SECRET,
        )
        done = subprocess.run([BUILDER, *arguments], check=True, env=environ, capture_output=True, text=True)
        return done.stdout

    def sweep(self, *arguments: str) -> Swept:
        """Run a sweep in a Pod now, and return what it took; `arguments` are further ones of its command line."""
        name = f"sweep-{uuid.uuid4().hex[:8]}"
        cronjob = json.loads(self.kubectl("get", "cronjob", "builder-sweep", "-o", "json"))
        job = {"apiVersion": "batch/v1", "kind": "Job", **cronjob["spec"]["jobTemplate"]}
        job["metadata"] = {**job["metadata"], "name": name}
        job["spec"]["template"]["spec"]["containers"][0]["args"] = ["sweep", *arguments]
        asked, requests = len(self.mlflow.log()), len(self.cluster.requests())
        worked = processor_of(self.uri)
        with watched(self.cluster.node, ["sweep"]) as ran:
            self.cluster.create(job, namespace=self.namespace)
            ended = self.cluster.watch(
                f"job/{name}", "{.status.conditions[-1:].type}", _ENDED, namespace=self.namespace, timeout=1800
            )
            ran.wait()
        worked = processor_of(self.uri) - worked
        log = self.kubectl("logs", f"job/{name}")
        self.kubectl("delete", "job", name)
        if ended != "Complete":
            raise SystemExit(log)
        made = self.cluster.requests()[requests:]
        return Swept(
            ran=ran,
            worked=worked,
            log=log,
            mlflow=_MLFLOW_REQUEST.findall(self.mlflow.log()[asked:]),
            kubernetes=[each for each in made if each["user"]["username"] == self.account],
        )


@dataclasses.dataclass(kw_only=True)
class Swept:
    """A sweep that has run: what it and MLflow took, its log, and its requests to MLflow and to the API server."""

    ran: Ran
    worked: float
    log: str
    mlflow: list[tuple[str, str]]
    kubernetes: list[dict[str, Any]]

    @property
    def states(self) -> dict[str, int]:
        """How many versions are in which state."""
        line = next(line for line in self.log.splitlines() if '"event": "swept"' in line)
        found: dict[str, int] = json.loads(line)["states"]
        return found


@contextlib.contextmanager
def lab(cluster: Cluster, image: str, folder: Path, *, listens: bool = False) -> Iterator[Lab]:
    """Run MLflow and a registry, and install the base for them in a namespace of its own.

    Args:
        cluster: where.
        image: the builder image.
        folder: for the servers' files.
        listens: whether the listener runs, one Pod of it, and MLflow delivers to that.
    """
    folder.mkdir()
    address = cluster.address
    mlflow = machine.mlflow(folder, free_port(address), address=address)
    if listens:
        mlflow = dataclasses.replace(mlflow, environ={**mlflow.environ, **_DELIVERS})
    registry = Debian().registry(folder, free_port(address), address)
    namespace = f"scale-{uuid.uuid4().hex[:6]}"
    with running(Processes(), registry), running(Processes(), mlflow) as server:
        host = f"{address}:{registry.port}"
        cluster.trust_registry(host)
        uri, storage = f"http://{address}:{mlflow.port}", folder / "registry"
        made = Lab(
            cluster=cluster, namespace=namespace, folder=folder, mlflow=server, uri=uri, host=host, storage=storage
        )
        base = Debian().base(host, [machine.native_platform()])
        settings = made.settings(BASE_IMAGE=base)
        site = Site(image=image, settings=settings, network={"INSECURE_REGISTRIES": host})
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        suspended = {
            "target": {"kind": "CronJob", "name": "builder-sweep"},
            "patch": '[{"op": "add", "path": "/spec/suspend", "value": true}]',
        }
        small = {
            "target": {"kind": "CronJob", "name": "builder-publish-wheels"},
            "patch": json.dumps(
                [{"op": "replace", "path": f"{_POD}/containers/0/resources/requests/cpu", "value": "50m"}]
            ),
        }
        listener = {
            "target": {"kind": "Deployment", "name": "builder-listener"},
            "patch": json.dumps([{"op": "replace", "path": "/spec/replicas", "value": int(listens)}]),
        }
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "builder-listener"}}
        cluster.create({**secret, "stringData": {"WEBHOOK_SECRET": _SECRET}}, namespace=namespace)
        install(cluster, folder / "overlay", site, namespace=namespace, patches=[suspended, small, listener])
        try:
            if listens:
                made.kubectl("rollout", "status", "deployment/builder-listener", "--timeout=300s")
                made.builder("webhook", "create", f"http://{made.listener()}")
            yield made
        finally:
            now = ("--all", "--grace-period=1", "--wait=false")
            cluster.kubectl(f"--namespace={namespace}", "delete", "cronjobs,jobs,pods", *now)
            cluster.kubectl("delete", "namespace", namespace, "--wait=false")


_POD = "/spec/jobTemplate/spec/template/spec"
_SECRET = uuid.uuid4().hex
# What MLflow's server needs to deliver to a Pod.
_DELIVERS = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
_TAG = "EXTERNAL_TARGET_PLTR_FOUNDRY"


def settings_of(place: Lab) -> Settings:
    """Return the settings as the program reads them."""
    return Settings.from_environ(place.settings())


def idle(place: Lab, count: int, rounds: int, table: Table) -> list[ModelVersion]:
    """Sweep a catalogue in which all is published, with Jobs and inline in turn; add what that took to a table."""
    settings = settings_of(place)
    made = list(versions(count, target_tag=settings.target_tag, prefix="model"))
    began = time.monotonic()
    insert(place.folder / "mlflow.db", [published(version, settings) for version in made])
    _say(f"{count:,} versions written in {time.monotonic() - began:.1f} s")
    found: dict[str, list[Swept]] = {"sweep": [], "sweep --inline": []}
    for number in range(rounds + 1):
        for name, arguments in (("sweep", ()), ("sweep --inline", ("--inline",))):
            swept = place.sweep(*arguments)
            if swept.states != {"current": count}:
                raise SystemExit(swept.log)
            _say(f"  {count:,}, {name}: {swept.ran.seconds:.2f} s, of the processor {swept.ran.processor:.2f} s")
            if number:  # the first one warms MLflow and the page cache
                found[name].append(swept)
    for name, each in found.items():
        last = each[-1]
        pages = sum(path.endswith("model-versions/search") for _, path in last.mlflow)
        table.add_row(
            f"{count:,}, nothing to do: {name}",
            _figures([one.ran.seconds for one in each]),
            f"{AIMS[count]:g}" if name == "sweep" else "",
            f"{statistics.median(one.ran.processor for one in each):.2f}",
            f"{statistics.median(one.worked for one in each):.2f}",
            f"{max(one.ran.peak for one in each) / (1 << 20):.0f}",
            f"{len(last.mlflow)} ({pages} pages)",
            str(len(last.kubernetes)),
        )
    return made


def to_publish(place: Lab, table: Table) -> None:
    """Sweep where a hundred of a catalogue's versions are new; their Pods find no node."""
    settings = settings_of(place)
    place.kubectl(
        "patch",
        "cronjob",
        "builder-publish-wheels",
        "--type=json",
        "-p",
        json.dumps([{"op": "add", "path": f"{_POD}/nodeSelector", "value": {"nowhere": "here"}}]),
    )
    place.change(SWEEP_PARALLEL=str(NEW))
    new = list(versions(NEW, target_tag=settings.target_tag, prefix="new"))
    insert(place.folder / "mlflow.db", new)
    swept = place.sweep()
    created = [
        each for each in swept.kubernetes if each["verb"] == "create" and each["objectRef"]["resource"] == "jobs"
    ]
    names = [each["objectRef"]["name"] for each in created]
    if names != [job_name(settings.target, version) for version in new]:
        message = f"{len(names)} Jobs, not those of the {NEW} new versions, or not the oldest first: {names}"
        raise SystemExit(message)
    last = datetime.fromisoformat(created[-1]["stageTimestamp"]).timestamp()
    first = datetime.fromisoformat(created[0]["requestReceivedTimestamp"]).timestamp()
    table.add_row(
        f"{NEW} of {sum(swept.states.values()):,} to publish: sweep",
        f"{last - swept.ran.started:.2f} (Jobs in {last - first:.2f})",
        f"{NEW_AIM:g}",
        f"{swept.ran.processor:.2f}",
        f"{swept.worked:.2f}",
        f"{swept.ran.peak / (1 << 20):.0f}",
        str(len(swept.mlflow)),
        str(len(swept.kubernetes)),
    )
    place.kubectl("delete", "jobs", "-l", "app.kubernetes.io/component=publish", "--wait=true")


def jobs_made(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of some requests to the API server that made a Job."""
    return [each for each in requests if each["verb"] == "create" and each["objectRef"]["resource"] == "jobs"]


def one_publish(place: Lab, rounds: int) -> None:
    """Submit, publish: where the seconds go, with no layer in the registry, and then with all of them."""
    _publishes(place, rounds, by_tag=False)
    _CONSOLE.print(f"Aim: from the Job to the tag at most {PUBLISH_AIM:g} s, warm.")


def one_tag(place: Lab, rounds: int) -> None:
    """Tag a version, and have MLflow deliver that to the listener: where the seconds go, until it is published."""
    _publishes(place, rounds, by_tag=True)
    _CONSOLE.print(
        f"Aims, warm: {TAG_AIM:g} s from the tag on the version to the Job, {TAGGED_AIM:g} s to that in the registry. "
        "With a schedule of 15 minutes alone a tag waits for its Job 7.5 minutes on average."
    )


def _publishes(place: Lab, rounds: int, *, by_tag: bool) -> None:
    register_pump(place)
    title = f"One publish by wheels, {'tagged' if by_tag else 'submitted'}: where the time goes"
    table = Table("seconds", "cold", "warm: min", "median", "max", title=title)
    timed: list[dict[str, float]] = []
    for number in range(rounds + 1):
        found = publish_once(place, f"pump-{'tag' if by_tag else 'job'}-{number}", by_tag=by_tag)
        timed.append(found)
        _say(f"  {'cold' if not number else 'warm'}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
    for part in timed[0]:
        warm = [each[part] for each in timed[1:] if part in each]
        table.add_row(part, f"{timed[0][part]:.2f}", *_three(warm))
    _CONSOLE.print(table)


def burst(place: Lab) -> None:
    """Send 1,000 deliveries for 250 versions to the listener; say how quickly they are answered, and the Jobs made."""
    from mlflow import MlflowClient

    register_pump(place)
    client, run = MlflowClient(place.uri), (place.folder / "run").read_text()
    client.create_registered_model("burst")
    source = f"{client.get_run(run).info.artifact_uri}/mymodel"
    place.kubectl(
        "patch",
        "cronjob",
        "builder-publish-wheels",
        "--type=json",
        '-p=[{"op": "add", "path": "/spec/jobTemplate/spec/suspend", "value": true}]',
    )
    place.change(LISTEN_PARALLEL="5000", TARGET_TAG="EXTERNAL_TARGET_BURST")
    place.kubectl("rollout", "restart", "deployment/builder-listener")
    place.kubectl("rollout", "status", "deployment/builder-listener", "--timeout=300s")
    tags = {"MODEL_ENTRY_POINT": "serve.py", "EXTERNAL_TARGET_BURST": "true"}
    numbers = [client.create_model_version("burst", source, run, tags=tags).version for _ in range(BURST // 4)]
    bodies = [json.dumps(tag_set("burst", str(number), "EXTERNAL_TARGET_BURST")).encode() for number in numbers * 4]
    address = place.listener()
    before = len(place.cluster.requests())

    def send(body: bytes) -> tuple[float, int]:
        began = time.monotonic()
        status, _ = post(address, "/webhook", body, signed(body, _SECRET))
        return time.monotonic() - began, status

    began = time.monotonic()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        answers = list(pool.map(send, bodies))
    answered = time.monotonic() - began
    while len(jobs_made(place.cluster.requests()[before:])) < len(numbers):
        time.sleep(0.5)
    made = time.monotonic() - began
    name = place.kubectl("get", "pods", "-l", "app.kubernetes.io/component=listener", "-o", "name").split()[-1]
    peak = place.kubectl("exec", name, "--", "/kaniko/venv/bin/python3", "-I", "-c", _PEAK)
    table = Table(
        "what", "figure", "aim", title=f"{BURST:,} deliveries for {len(numbers)} versions, {CONNECTIONS} at once"
    )
    table.add_row("seconds until an answer: min / median / max", _figures([each for each, _ in answers]), "1 at most")
    table.add_row("answers", ", ".join(f"{count} {code}" for code, count in Counter(c for _, c in answers).items()), "")
    table.add_row("seconds until all are answered", f"{answered:.1f}", "")
    table.add_row("seconds until all Jobs are made", f"{made:.1f}", "")
    table.add_row("Jobs made", str(len(jobs_made(place.cluster.requests()[before:]))), str(len(numbers)))
    table.add_row("peak MiB of the listener", f"{int(peak) / 1024:.0f}", "512, its limit")
    _CONSOLE.print(table)


_PEAK = "print(next(l for l in open('/proc/1/status') if l.startswith('VmHWM')).split()[1])"


def register_pump(place: Lab) -> None:
    """Log the pump alarm's files once; versions are registered from that run."""
    from mlflow import MlflowClient

    client = MlflowClient(place.uri)
    run = client.create_run("0")
    with tempfile.TemporaryDirectory() as local:
        save_pump_model(Path(local) / "mymodel")
        shutil.copytree(HERE / "pump_alarm" / "client", Path(local) / "client")
        client.log_artifacts(run.info.run_id, local)
    client.set_terminated(run.info.run_id)
    (place.folder / "run").write_text(run.info.run_id)


def publish_once(place: Lab, name: str, *, by_tag: bool) -> dict[str, float]:
    """Register a version, tag or submit it, and return the seconds of each part until its tag is in the registry."""
    from mlflow import MlflowClient

    client, run = MlflowClient(place.uri), (place.folder / "run").read_text()
    client.create_registered_model(name)
    source = f"{client.get_run(run).info.artifact_uri}/mymodel"
    tags = {"MODEL_ENTRY_POINT": "serve.py", _TAG: "false" if by_tag else "true"}
    client.create_model_version(name, source=source, run_id=run, tags=tags)
    requests, asked = len(place.cluster.requests()), len(place.mlflow.log())
    with watched(place.cluster.node, ["publish"]) as ran, _pods(place) as seen:
        submitted = time.time()
        if by_tag:
            client.set_model_version_tag(name, "1", _TAG, "true")
        else:
            place.builder("submit", name, "1", "-n", place.namespace)
        ran.wait()
    (create,) = jobs_made(place.cluster.requests()[requests:])
    job = create["objectRef"]["name"]
    created = datetime.fromisoformat(create["requestReceivedTimestamp"]).timestamp()
    ended = place.cluster.watch(
        f"job/{job}", "{.status.conditions[-1:].type}", _ENDED, namespace=place.namespace
    )  # fmt: skip
    complete = time.time()
    log = place.kubectl("logs", f"job/{job}")
    if ended != "Complete":
        raise SystemExit(log)
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    end = next(line for line in lines if line["event"] == "published")
    done = datetime.fromisoformat(end["timestamp"]).timestamp()
    link = place.storage / f"docker/registry/v2/repositories/models/{name}/_manifests/tags/v1/current/link"
    tagged = link.stat().st_mtime
    began = done - end["seconds"]
    found = {
        "tag on the version to Job" if by_tag else "submit: command to Job": created - submitted,
        "Job to Pod": seen["created"] - created,
        "Pod to its node": seen["scheduled"] - seen["created"],
        "node to process": ran.started - seen["scheduled"],
        "process to work: interpreter, imports, MLflow": began - ran.started,
        "work, to the tag": tagged - began,
        "Job to tag": tagged - created,
        "all, to the tag": tagged - submitted,
        "tag to the process's end": ran.ended - tagged,
        "process's end to Job complete": complete - ran.ended,
        "processor seconds": ran.processor,
        "MLflow requests": len(_MLFLOW_REQUEST.findall(place.mlflow.log()[asked:])),
    }
    stages = next((line for line in lines if line["event"] == "timings"), {})
    named = {f"  of it: {key}": value for key, value in stages.items() if isinstance(value, float)}
    return {**found, **named}


@contextlib.contextmanager
def _pods(place: Lab) -> Iterator[dict[str, float]]:
    """Note when the next Pod of a publish is created, and when it is given to a node."""
    seen: dict[str, float] = {}
    columns = 'jsonpath={.metadata.name} {.spec.nodeName}{"\\n"}'
    what = ("pods", "--watch-only", "-o", columns, "-l", "app.kubernetes.io/component=publish")
    with place.cluster.start_kubectl(f"--namespace={place.namespace}", "get", *what) as process:

        def note() -> None:
            for line in process.stdout or ():
                now = time.time()
                seen.setdefault("created", now)
                if len(line.split()) > 1:
                    seen.setdefault("scheduled", now)

        thread = threading.Thread(target=note, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            process.kill()
            thread.join()


def _figures(values: Sequence[float]) -> str:
    return " / ".join(_three(values))


def _three(values: Sequence[float]) -> tuple[str, str, str]:
    if not values:
        return "", "", ""
    return f"{min(values):.2f}", f"{statistics.median(values):.2f}", f"{max(values):.2f}"


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables; say why where it cannot be measured here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each (default: {ROUNDS})")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    table = Table(
        "sweep in a Pod",
        "seconds: min / median / max",
        "aim",
        "processor s",
        "MLflow's",
        "peak MiB",
        "MLflow requests",
        "API requests",
        title="A sweep of a large catalogue",
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-scale-")))
        try:
            archive, image = builder_archive()
            cluster = stack.enter_context(start_cluster())
        except NoCluster as error:
            _CONSOLE.print(f"Skipped: scale. {error}")
            return 0
        cluster.load_image(archive)
        if "idle" in options.only:
            for count in SIZES:
                with lab(cluster, image, folder / str(count)) as place:
                    idle(place, count, options.rounds, table)
                    to_publish(place, table)
            _CONSOLE.print(table)
            _CONSOLE.print(f"Aims: {MEMORY_AIM >> 20} MiB, and as many requests to MLflow as there are pages.")
        if "publish" in options.only:
            with lab(cluster, image, folder / "publish") as place:
                one_publish(place, options.rounds)
        if "tag" in options.only or "burst" in options.only:
            with lab(cluster, image, folder / "tag", listens=True) as place:
                if "tag" in options.only:
                    one_tag(place, options.rounds)
                if "burst" in options.only:
                    burst(place)
    _CONSOLE.print(f"{machine_words()} Load before: {load:.1f}.", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
