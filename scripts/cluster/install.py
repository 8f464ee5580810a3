"""Install the manifests of k8s/ as an operator does: an overlay with the site's image and servers, and Secrets."""

from __future__ import annotations

import json
import os
import shutil
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from scripts.cluster.cluster import Cluster
from scripts.machine import ca_bundle, pip_config

_K8S = Path(__file__).parents[2] / "k8s"


@dataclass(frozen=True, kw_only=True)
class Site:
    """What an installation has to know.

    Attributes:
        image: the builder image, as `name:tag`.
        settings: for the ConfigMap `builder-settings`, such as MLFLOW_TRACKING_URI and REGISTRY_URL.
        network: for the ConfigMap `builder-network`, such as INSECURE_REGISTRIES.
        user: of the registry that REGISTRY_URL names; empty where it is anonymous.
        password: of `user`.
        mlflow: variables with MLflow's credential.
    """

    image: str
    settings: Mapping[str, str]
    network: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    password: str = field(default="", repr=False)
    mlflow: Mapping[str, str] = field(default_factory=dict, repr=False)

    def docker_config(self) -> str:
        """Return Docker's configuration with the registry's credential, as JSON."""
        host = self.settings["REGISTRY_URL"].partition("/")[0]
        auth = {"auth": b64encode(f"{self.user}:{self.password}".encode()).decode()}
        return json.dumps({"auths": {host: auth} if self.user else {}})


def install(cluster: Cluster, folder: Path, site: Site, *, namespace: str, overlay: str = "base", **more: Any) -> None:
    """Apply an overlay of k8s/ in a namespace, which it makes, with the Secrets that it needs.

    Args:
        cluster: where.
        folder: for the kustomization, which is written; not below k8s/.
        site: what is written into it. This machine's CA bundle and pip.conf go with it.
        namespace: a new one; `kubectl delete namespace` removes all but the policies, which all installations share.
        overlay: a folder of k8s/.
        more: `components`, folders of k8s/, and further fields of the kustomization; its `patches` come after those of
            the site.
    """
    cluster.kubectl("apply", "--server-side", "-k", str(write_overlay(folder, site, namespace, overlay, **more)))
    docker: dict[str, Any] = {
        "type": "kubernetes.io/dockerconfigjson",
        "stringData": {".dockerconfigjson": site.docker_config()},
    }
    secrets: dict[str, dict[str, Any]] = {
        "builder-mlflow": {"stringData": dict(site.mlflow)},
        # As a rule another credential, that may only pull; this registry knows one user.
        **{f"builder-registry-{purpose}": docker for purpose in ("push", "pull")},
    }
    for name, content in secrets.items():
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, **content}
        cluster.create(secret, namespace=namespace)


def write_overlay(
    folder: Path, site: Site, namespace: str, overlay: str, components: Sequence[str] = (), **more: Any
) -> Path:
    """Write the kustomization of a site into `folder`, and return that."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, tag = site.image.rpartition(":")
    document: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": [os.path.relpath(_K8S / overlay, folder.resolve())],
        "components": [os.path.relpath(_K8S / each, folder.resolve()) for each in components],
        "images": [{"name": "registry.example.com/builder", "newName": name, "newTag": tag}],
        **more,
    }
    files = {"ca-bundle.pem": ca_bundle(), "pip.conf": pip_config()}
    paths: dict[str, str] = {}
    if any(files.values()):
        component = folder / "files"
        shutil.copytree(_K8S / "air-gapped", component, dirs_exist_ok=True)
        for file, source in files.items():
            (component / file).write_text(source.read_text() if source else "")
        paths["SSL_CERT_FILE"] = "/kaniko/network/ca-bundle.pem" if files["ca-bundle.pem"] else ""
        if files["ca-bundle.pem"]:
            text = (component / "pip.conf").read_text()
            (component / "pip.conf").write_text(text.replace(str(files["ca-bundle.pem"]), paths["SSL_CERT_FILE"]))
        document["components"].append("files")
    data = {"builder-settings": site.settings, "builder-network": {**paths, **site.network}}
    document["patches"] = [
        {
            "target": {"kind": "ConfigMap", "name": each},
            "patch": yaml.safe_dump(
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": each}, "data": dict(values)}
            ),
        }
        for each, values in data.items()
    ] + more.get("patches", [])
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return folder
