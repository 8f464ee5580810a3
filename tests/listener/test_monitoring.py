"""The component k8s/monitoring: its rules and its dashboard, on the real output of the listener and a real Prometheus."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from builder.cluster.status import status
from builder.listener.metrics import DELIVERIES, Metrics
from scripts.launch import Processes, Program, clean_environ, free_port, running
from tests.listener.site import moment, pod, terminated
from tests.listener.site import running as runs
from tests.servers.http_server import in_thread
from tests.waiting import HANG, until

FOLDER = Path(__file__).parents[2] / "k8s" / "monitoring"
RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())["spec"]
BOARD = json.loads((FOLDER / "builder.json").read_text())
ALERTS = RULES["groups"][0]["rules"]
METRIC = re.compile(r"\bbuilder_[a-z_]+")
# A metric and its labels as the rules name them, of one replica.
OF = 'namespace="builder", job="builder-listener", service="builder-listener", container="listener", instance="10.0.0.{0}:9090", pod="builder-listener-{0}"'


def program(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name}, of Debian's package prometheus, is not installed")
    return found


def queries() -> dict[str, str]:
    """Return the expressions of the dashboard by panel and legend, as Grafana would send them."""
    found = {}
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", "10m").replace("[1h]", "[10m]")
            text = text.replace('namespace="$namespace", ', "").replace('namespace="$namespace"', "")
            found[f"{panel['title']} {target['legendFormat']}"] = text.replace('target="$target"', 'target=~".+"')
    return found


@pytest.fixture
def busy(listener, opened):
    """Metrics of a listener that has seen one of everything, and its versions' states as `builder status` has them."""
    versions, cluster = listener.versions, listener.cluster
    versions.published("pump")
    versions.published("pump")
    versions.failed("valve")
    versions.register("fan")
    active = versions.register("active")
    metrics = Metrics(versions.settings, listener.overview, listener.watch)
    listener.watch.start()
    opened(listener.overview)
    cluster.sweep("Complete", when=moment(-600))
    cluster.start(active, pod=pod("Running", publish=runs()))
    told = {"state": "published", "changed": True, "seconds": {"fetch": 2.0, "push": 3.0}, "sent": 700, "saved": 4000}

    def publish() -> None:
        """End a Job that published, and one that failed with 69, and take a delivery."""
        cluster.end(
            cluster.start(versions.published("more")), pod=pod("Succeeded", publish=terminated(json.dumps(told)))
        )
        left = json.dumps({"state": "failed", "error": "ServiceUnavailable: no.", "exit_code": 69})
        cluster.end(cluster.start(versions.failed("away")), "Failed", pod=pod("Failed", publish=terminated(left, 69)))
        metrics.delivery("taken", 0.02)

    publish()
    counted = re.compile(rb'builder_publishes_total\{exit_code="69",method="wheels",outcome="failed"[^}]*\} 1\.0')
    until(lambda: counted.search(metrics.render("")[0]))
    return metrics, publish


def names(metrics: Metrics) -> set[str]:
    """Return the names of all series."""
    text, _ = metrics.render("text/plain")
    return {line.partition("{")[0].partition(" ")[0] for line in text.decode().splitlines() if not line.startswith("#")}


def test_every_metric_that_is_used_exists(busy):
    metrics, _ = busy
    used = {name for rule in ALERTS for name in METRIC.findall(rule["expr"])}
    used |= {
        name for panel in BOARD["panels"] for target in panel["targets"] for name in METRIC.findall(target["expr"])
    }
    used |= set(METRIC.findall(json.dumps(BOARD["templating"])))
    assert len(used) > 10
    assert used - names(metrics) == set()


def test_every_alert_says_what_to_do_and_leads_to_its_section():
    page = (FOLDER.parents[1] / "docs" / "operations.md").read_text()
    assert re.findall(r"^### (Builder\w+)$", page, re.MULTILINE) == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert len(rule["annotations"]["description"]) > 80


def test_the_page_on_operations_lists_every_metric(busy):
    page = (FOLDER.parents[1] / "docs" / "operations.md").read_text()
    told = set(METRIC.findall(page.partition("## Metrics")[2].partition("\n## ")[0]))
    metrics, _ = busy
    exposed = {name for name in names(metrics) if not name.endswith("_created")}
    histograms = {name.removesuffix("_bucket") for name in exposed if name.endswith("_bucket")}
    parts = {f"{name}{part}" for name in histograms for part in ("_bucket", "_count", "_sum")}
    assert told == (exposed - parts) | histograms


def test_the_page_on_operations_lists_every_outcome_of_a_delivery():
    page = (FOLDER.parents[1] / "docs" / "operations.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| `builder_deliveries_total{outcome}`")]
    assert [outcome for outcome in DELIVERIES if not re.search(rf"\b{outcome}\b", row)] == []


def test_rules_are_rules(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(RULES))
    done = subprocess.run(
        [program("promtool"), "check", "rules", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environ(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


# ---- what fires, and what does not


def series(name: str, values: str, labels: str = "", *, replicas: int = 2) -> list[dict[str, str]]:
    """Return the series of a metric, the same of each replica."""
    given = f"{labels}, " if labels else ""
    return [{"series": f"{name}{{{given}{OF.format(each)}}}", "values": values} for each in range(1, replicas + 1)]


def healthy() -> dict[str, list[dict[str, str]]]:
    """Return the series of a publisher that works, for three hours, a sample a minute."""
    target = 'target="t"'
    failed = f'{target}, outcome="failed", method="wheels"'
    return {
        "up": series("up", "1x180"),
        "sweep": series("builder_sweep_last_success_timestamp_seconds", "_x14 0+60x166"),
        "waiting": series("builder_waiting_age_seconds", "0x180", target),
        "running": series("builder_jobs", "1x180", f'{target}, state="running"'),
        "queued": series("builder_jobs", "0x180", f'{target}, state="waiting"'),
        "mlflow": series("builder_source_up", "1x180", 'source="mlflow"'),
        "kubernetes": series("builder_source_up", "1x180", 'source="kubernetes"'),
        "published": series("builder_publishes_total", "0+1x180", f'{target}, outcome="published", method="wheels", exit_code="0"'),
        # Authors' models: one each minute.
        "65": series("builder_publishes_total", "0+1x180", f'{failed}, exit_code="65"'),
        "73": series("builder_publishes_total", "0+1x180", f'{failed}, exit_code="73"'),
        "69": series("builder_publishes_total", "0x180", f'{failed}, exit_code="69"'),
        "77": series("builder_publishes_total", "0x180", f'{failed}, exit_code="77"'),
        "taken": series("builder_deliveries_total", "0+1x180", 'outcome="taken"'),
        "ignored": series("builder_deliveries_total", "0+9x180", 'outcome="ignored"'),
        "refused": series("builder_deliveries_total", "0x180", 'outcome="refused"'),
    }  # fmt: skip


CASES: dict[str, tuple[set[str], dict[str, list[dict[str, str]]]]] = {
    "a publisher that works, and broken models": (set(), {}),
    "no listener": ({"BuilderListenerDown"}, {"up": series("up", "0x180")}),
    "one of two listeners": (set(), {"up": series("up", "1x180", replicas=1)}),
    "listeners that replaced others": (
        set(),
        {"up": series("up", "1x180", replicas=1), "old": series("up", "1x30 stale")[1:]},
    ),
    "a listener that starts anew": (set(), {"up": series("up", "1x60 0x4 1x116")}),
    "a sweep that stopped": (
        {"BuilderSweepStopped"},
        {"sweep": series("builder_sweep_last_success_timestamp_seconds", "0x180")},
    ),
    "versions wait while nothing runs": (
        {"BuilderVersionsWait"},
        {
            "waiting": series("builder_waiting_age_seconds", "0+60x180", 'target="t"'),
            "running": series("builder_jobs", "0x180", 'target="t", state="running"'),
        },
    ),
    "versions wait while others run": (
        set(),
        {"waiting": series("builder_waiting_age_seconds", "0+60x180", 'target="t"')},
    ),
    "a service is away": (
        {"BuilderPublishesFail"},
        {
            "69": series(
                "builder_publishes_total",
                "0+0.1x180",
                'target="t", outcome="failed", method="wheels", exit_code="69"',
            )
        },
    ),
    "a service was away once": (
        set(),
        {
            "69": series(
                "builder_publishes_total",
                "0x150 1x30",
                'target="t", outcome="failed", method="wheels", exit_code="69"',
            )
        },
    ),
    "a credential is refused": (
        {"BuilderPublishesFail"},
        {
            "77": series(
                "builder_publishes_total",
                "0x150 0+1x30",
                'target="t", outcome="failed", method="wheels", exit_code="77"',
            )
        },
    ),
    "a watch that is not current in one replica": (
        {"BuilderSourceAway"},
        {
            "kubernetes": [
                *series("builder_source_up", "1x180", 'source="kubernetes"', replicas=1),
                {"series": f'builder_source_up{{source="kubernetes", {OF.format(2)}}}', "values": "0x180"},
            ]
        },
    ),
    "every delivery is refused": (
        {"BuilderDeliveriesRefused"},
        {
            "refused": series("builder_deliveries_total", "0+1x180", 'outcome="refused"'),
            "taken": series("builder_deliveries_total", "0x180", 'outcome="taken"'),
            "ignored": series("builder_deliveries_total", "5x180", 'outcome="ignored"'),
        },
    ),
    "somebody forges deliveries": (
        set(),
        {"refused": series("builder_deliveries_total", "0+1x180", 'outcome="refused"')},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_alerts_fire_for_a_broken_publisher_alone(tmp_path, case):
    expected, changed = CASES[case]
    found = [each for each in {**healthy(), **changed}.values() for each in each]
    check_alerts(tmp_path, found, "alertname", [f'{{alertname="{name}"}}' for name in sorted(expected)])


def check_alerts(folder: Path, found: list[dict[str, str]], by: str, firing: list[str], at: str = "175m") -> None:
    """Assert which alerts fire for some series at a time, by some of their labels."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
    checks = [{"expr": f'count by ({by}) (ALERTS{{alertstate="firing"}}) > bool 0', "eval_time": at, "exp_samples": [
        {"labels": labels, "value": 1} for labels in firing
    ]}]  # fmt: skip
    test = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [
        {"interval": "1m", "input_series": found, "promql_expr_test": checks}
    ]}  # fmt: skip
    (folder / "test.yaml").write_text(yaml.safe_dump(test, width=1000))
    done = subprocess.run(
        [program("promtool"), "test", "rules", "test.yaml"],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        env=clean_environ(),
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("values", ["1x30 0x150", "1x30 stale"], ids=["does not answer", "has no Pod"])
def test_a_listener_that_is_down_is_not_hidden_by_that_of_another_namespace(tmp_path, values):
    other = series("up", values, replicas=1)
    other[0]["series"] = other[0]["series"].replace('namespace="builder"', 'namespace="builder-second"')
    alert = '{alertname="BuilderListenerDown", namespace="builder-second"}'
    check_alerts(tmp_path, [*series("up", "1x180"), *other], "alertname, namespace", [alert])


@pytest.mark.parametrize(
    ("values", "at", "firing"),
    [
        ("1x30 stale", "2h", '{alertname="BuilderListenerDown", namespace="builder"}'),
        ("1x30 stale", "80h", '{alertname="BuilderListenerDown"}'),
        ("_x180", "2h", '{alertname="BuilderListenerDown"}'),
    ],
    ids=["today", "days ago", "never"],
)
def test_a_listener_that_is_gone_is_told_however_long_ago(tmp_path, values, at, firing):
    check_alerts(tmp_path, series("up", values), "alertname, namespace", [firing], at)


# ---- the dashboard


@pytest.fixture
def prometheus(busy, tmp_path) -> Iterator[str]:
    """A Prometheus that scrapes the metrics every two seconds; gives its address."""
    metrics, _ = busy

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, kind = metrics.render(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    job = {"job_name": "builder-listener", "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}]}
    every = {"scrape_interval": "2s", "scrape_timeout": "2s"}
    config = {"global": every, "scrape_configs": [job]}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    argv = (program("prometheus"), f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data")
    argv = (*argv, f"--web.listen-address=127.0.0.1:{port}")
    ready = f"http://127.0.0.1:{port}/-/ready"
    each = Program(name=f"prometheus-{port}", kind="binary", argv=argv, port=port, ready=ready, folder=tmp_path)
    with in_thread(server), running(Processes(), each):
        yield f"http://127.0.0.1:{port}"


def ask(address: str, query: str) -> dict[tuple[str, ...], float]:
    """Return a query's values by the labels that the dashboard shows."""
    answer: dict[str, Any] = httpx2.get(f"{address}/api/v1/query", params={"query": query}, timeout=HANG).json()
    assert answer["status"] == "success", answer
    shown = ("state", "outcome", "exit_code", "phase", "source")
    return {
        tuple(each["metric"][name] for name in shown if name in each["metric"]): float(each["value"][1])
        for each in answer["data"]["result"]
    }


def test_the_dashboard_shows_what_mlflow_and_the_cluster_have(busy, prometheus, listener):
    _, publish = busy
    asked = queries()
    until(lambda: ask(prometheus, asked["Versions {{state}}"]))
    publish()
    for title, query in asked.items():
        until(lambda query=query: ask(prometheus, query)), title
    until(lambda: ask(prometheus, asked["Publishes {{outcome}}"]).get(("published",), 0) > 0)
    shown = Counter(each.state for each in status(listener.versions.settings, listener.versions.catalog, None))
    # `builder status` without the cluster does not know of the Job that runs.
    expected = {**shown, "new": shown["new"] - 1, "running": 1}
    until(
        lambda: (
            {key: value for (key,), value in ask(prometheus, asked["Versions {{state}}"]).items() if value} == expected
        )
    )
    # A scrape that was too slow makes all series stale until the next one.
    until(lambda: ask(prometheus, asked["Jobs {{state}}"]) == {("running",): 1, ("waiting",): 0})
    until(lambda: ask(prometheus, asked["Answers {{source}}"]) == {("mlflow",): 1, ("kubernetes",): 1})
    (since,) = until(lambda: ask(prometheus, asked["Since the last sweep that succeeded __auto"])).values()
    assert 590 < since < 3600
    phases = until(lambda: ask(prometheus, asked["Seconds by phase {{phase}}"]))
    expected = {("start",): 10, ("fetch",): 2, ("push",): 3} | {key: 10 for key in phases if key == ("publish",)}
    # Prometheus divides rates by each other.
    assert phases == pytest.approx(expected)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("overlay", ["base", "dockerfile", "domino"])
def test_the_component_goes_on_top_of_an_overlay(tmp_path, overlay):
    relative = Path(os.path.relpath(FOLDER.parent, tmp_path))
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "elsewhere",
        "resources": [str(relative / overlay)],
        "components": [str(relative / "monitoring")],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    command = ["kubectl", "kustomize", "--load-restrictor=LoadRestrictionsNone", str(tmp_path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=clean_environ()).stdout
    found = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text) if each}
    board = found["ConfigMap", "builder-dashboard"]
    assert json.loads(board["data"]["builder.json"]) == BOARD
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    for key in (
        ("PrometheusRule", "builder"),
        ("ServiceMonitor", "builder-listener"),
        ("ConfigMap", "builder-dashboard"),
    ):
        assert found[key]["metadata"]["namespace"] == "elsewhere"


def test_the_component_is_complete():
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    (generated,) = listed["configMapGenerator"]
    assert {*listed["resources"], *generated["files"], "kustomization.yaml"} == {each.name for each in FOLDER.iterdir()}
    assert generated["options"]["labels"]["grafana_dashboard"] == "1"
    monitor = yaml.safe_load((FOLDER / "service-monitor.yaml").read_text())["spec"]
    base = list(yaml.safe_load_all((FOLDER.parent / "base" / "listener.yaml").read_text()))
    (service,) = [each for each in base if each["kind"] == "Service"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    # The alert for a listener that is down names the Service, as the operator calls the job of its Pods.
    assert any(f'job="{service["metadata"]["name"]}"' in rule["expr"] for rule in ALERTS)
