"""The commands of docs/kubernetes.md, run as they stand, from a checkout's k8s/ to a published version.

The names of servers and of the version are this cluster's; what lies between the two networks (plain HTTP, a CA bundle,
a pip.conf) is added as an operator would add it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import yaml

from examples.models import HERE, save_pump_model
from scripts.launch import clean_environ
from scripts.machine import native_platform
from tests.cluster.listening import Service
from tests.servers.registries import PASSWORD, USER
from tests.versions import register
from tests.waiting import LONG_HANG

ROOT = Path(__file__).parents[2]
# A target of its own: the sweep of the page leaves alone what other tests have registered.
TARGET_TAG = "EXTERNAL_TARGET_PAGE"
# Those that build the image.
OTHERS = re.compile(r"^(docker|make) ", re.MULTILINE)


def commands():
    """Return the shell blocks of the page, each as it stands."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    blocks = re.findall(r"^( *)```shell\n(.*?)^\1```$", page, re.DOTALL | re.MULTILINE)
    scripts = [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, text in blocks]
    return [text for text in scripts if not OTHERS.search(text)]


@pytest.fixture
def version(cluster_mlflow, tmp_path):
    """A version whose server needs one small wheel."""
    model = tmp_path / "model"
    save_pump_model(model / "mymodel")
    shutil.copytree(HERE / "pump_alarm" / "client", model / "client")
    files = {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    tags = {"MODEL_ENTRY_POINT": "serve.py", "MODEL_PLATFORMS": native_platform(), TARGET_TAG: "true"}
    return register(cluster_mlflow.uri, files, tags, name=f"page-{tmp_path.name}")


@pytest.fixture
def shell(cluster, tmp_path):
    """Run a script in a folder with k8s/, with kubectl, builder and an administrator's kubeconfig; return what it prints."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").symlink_to(cluster.kubectl_path)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    # An administrator's, as it usually is: its context has no namespace.
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    for each in config["contexts"]:
        each["context"].pop("namespace", None)
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    environ = clean_environ(
        PATH=path, KUBECONFIG=str(tmp_path / "kubeconfig"), TARGET_TAG=TARGET_TAG, **cluster.environ
    )

    def run(script):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            check=False,
            capture_output=True,
            text=True,
            env=environ,
            timeout=LONG_HANG,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    yield run
    cluster.kubectl("delete", "namespace", "builder", "--ignore-not-found", timeout=LONG_HANG)


def site(cluster_registries, variables):
    """Return the patches that this cluster needs besides: its network."""
    registries = f"{cluster_registries.images.host},{cluster_registries.models.host}"
    network = {"INSECURE_REGISTRIES": registries} | variables
    settings = {"BASE_IMAGE": cluster_registries.base_image, "TARGET_TAG": TARGET_TAG}
    mount = {"name": "network", "mountPath": "/kaniko/network", "readOnly": True}
    volume = {"name": "network", "configMap": {"name": "machine-network"}}

    def mounted(kind, pod):
        operations = [
            {"op": "add", "path": f"{pod}/volumes/-", "value": volume},
            {"op": "add", "path": f"{pod}/containers/0/volumeMounts/-", "value": mount},
        ]
        return {"target": {"kind": kind}, "patch": yaml.safe_dump(operations)}

    maps = {"builder-network": network, "builder-settings": settings}
    patches = [
        {
            "target": {"kind": "ConfigMap", "name": name},
            "patch": yaml.safe_dump(
                [{"op": "add", "path": f"/data/{key}", "value": each} for key, each in data.items()]
            ),
        }
        for name, data in maps.items()
    ]
    return [
        *patches,
        mounted("CronJob", "/spec/jobTemplate/spec/template/spec"),
        mounted("Deployment", "/spec/template/spec"),
    ]


# MLflow's, about the example's own annotations.
@pytest.mark.filterwarnings("ignore:.*type hint:UserWarning")
def test_the_page_s_commands_install_and_publish(
    cluster, cluster_registries, cluster_mlflow, machine_network, node_image, version, shell, tmp_path, request
):
    host = cluster_registries.models.host
    service = Service(lambda *arguments: cluster.get("--namespace=builder", *arguments), cluster.address)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    # In the reverse order.
    request.addfinalizer(service.server_close)
    request.addfinalizer(service.shutdown)
    cluster.ctr("images", "tag", "--force", node_image, "registry.example.com/tools/builder:0.1.0-wheels")
    for name, text in {"token": "unused", "push-password": PASSWORD, "pull-password": PASSWORD}.items():
        (tmp_path / name).write_text(text)
    here = {
        "https://mlflow.example.com": cluster_mlflow.uri,
        "http://builder-listener.builder": service.url,
        "registry.example.com/models": f"{host}/models",
        "--docker-server=registry.example.com": f"--docker-server={host}",
        "--docker-username=publisher": f"--docker-username={USER}",
        "--docker-username=reader": f"--docker-username={USER}",
        "pltr_foundry_model 8": f"{version.name} {version.version}",
        "pltr_foundry_model": version.name,
        '"builder/model-version": "8"': f'"builder/model-version": "{version.version}"',
    }
    install, *others = [
        functools.reduce(lambda text, each: text.replace(*each), here.items(), text) for text in commands()
    ]
    # The page's overlay, and this machine's network at its end.
    write, _, apply = install.rpartition("kubectl apply")
    shell(write)
    shell("kubectl create namespace builder")
    with (tmp_path / "install" / "kustomization.yaml").open("a") as file:
        patches = yaml.safe_dump(site(cluster_registries, machine_network("builder")))
        file.write(textwrap.indent(patches, "  "))
    shell(f"kubectl apply{apply}")
    printed = [shell(each) for each in others]
    shell(f"MLFLOW_TRACKING_URI={cluster_mlflow.uri} builder webhook delete builder")
    outcome = version.outcome("page")
    assert outcome["state"] == "published"
    assert any(outcome["image"] in text for text in printed)
