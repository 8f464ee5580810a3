"""Build Kubernetes' programs from Go modules, once for each version: some six minutes on two processors.

requirements/kubernetes/ pins them by hash. No image registry has a part in it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scripts.cache import cache_folder, locked
from scripts.go_tools import go

_MODULE = Path(__file__).parents[2] / "requirements" / "kubernetes"
# The long ones first: they compile what the others share.
_PROGRAMS = {
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubelet": "k8s.io/kubernetes/cmd/kubelet",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "etcd": "go.etcd.io/etcd/server/v3",
    "pause": "./pause",
}


def version() -> str:
    """Return the version of Kubernetes, as `v1.34.4`."""
    found = re.search(r"^(?:require|\t) *k8s.io/kubernetes (v\S+)", (_MODULE / "go.mod").read_text(), re.MULTILINE)
    assert found  # noqa: S101 - our own file
    return found[1]


def programs() -> Path:
    """Return the folder of the programs, which are built where they are not yet in the cache.

    Raises:
        subprocess.CalledProcessError: one cannot be built; Go's own message is on stderr.
    """
    sources = b"".join((_MODULE / name).read_bytes() for name in ("go.mod", "go.sum", "pause/main.go"))
    cache = cache_folder("kubernetes")
    folder = cache / f"{version()}-{hashlib.sha256(sources).hexdigest()[:12]}"
    if folder.exists():
        return folder
    with locked(folder):
        if not folder.exists():
            _build(cache, folder)
    return folder


def _build(cache: Path, folder: Path) -> None:
    # Of their own, since they take 5 GB and are not needed afterwards; after a failure what was made is found again.
    caches = {"GOCACHE": str(cache / "go-build"), "GOMODCACHE": str(cache / "go-modules")}
    flags = {"GOFLAGS": "-buildvcs=false -modcacherw", "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    major, minor, _ = version().removeprefix("v").split(".")
    numbers = {"gitVersion": version(), "gitMajor": major, "gitMinor": minor}
    link = "-s -w " + " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in numbers.items())
    made = folder.with_name(f"{folder.name}.part")
    made.mkdir(exist_ok=True)
    for name, package in _PROGRAMS.items():
        started = time.monotonic()
        command = [go(), "build", "-trimpath", "-ldflags", link, "-o", str(made / name), package]
        subprocess.run(command, check=True, cwd=_MODULE, env={**os.environ, **flags, **caches})
        print(f"built {name} {version()} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    for cached in caches.values():
        shutil.rmtree(cached)
    made.rename(folder)
