# ruff: noqa: INP001, T201  # a program of the build stage, not a part of the package
"""Leave out of the image what the builder has no use for: files of packages, and bytecode of modules it never imports.

    python lean.py prune ROOT                    deletes files below ROOT/venv
    ROOT/venv/bin/python3 -I lean.py imported    prints the path of every module that the builder imports, one a line

Used by the Dockerfile, in its build stage. docs/decisions/0058-image-size.md has the sizes and the reasons.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import sys
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

# The services of AWS that the builder calls: artifacts in S3, a credential for ECR, and what botocore calls by itself
# to get credentials for these (AssumeRole, web identity, IAM Identity Center, `aws login`).
AWS_SERVICES = frozenset({"s3", "sts", "ecr", "sso", "sso-oidc", "signin"})
# The asynchronous half of the Kubernetes client, and the packages that only this half needs.
ASYNCHRONOUS = (
    "aiohappyeyeballs",
    "aiohttp",
    "aiohttp-retry",
    "aiosignal",
    "attrs",
    "frozenlist",
    "multidict",
    "propcache",
    "yarl",
)
# Folders and files of packages that only a developer has a use for.
FOLDERS = frozenset({"tests", "test", "__pycache__"})
FILES = frozenset({".pyi", ".pyx", ".pxd", ".c", ".h", ".a"})
PROGRAMS = re.compile(r"python[0-9.]*|uv")
# What is imported where it is used, so that importing the builder alone does not show it.
LAZILY = (
    "boto3",
    "kubernetes.config",
    "mlflow",
    "mlflow.store.artifact.artifact_repository_registry",
    "mlflow.store.artifact.http_artifact_repo",
    "mlflow.store.artifact.mlflow_artifacts_repo",
    "mlflow.store.artifact.models_artifact_repo",
    "mlflow.store.artifact.runs_artifact_repo",
    "mlflow.store.artifact.s3_artifact_repo",
    "mlflow.store.model_registry.rest_store",
    "mlflow.store.tracking.rest_store",
    "prometheus_client",
    "prometheus_client.exposition",
    "standardwebhooks.webhooks",
    "uvicorn.lifespan.off",
    "uvicorn.loops.asyncio",
)


def prune(root: Path) -> None:
    """Delete what nothing uses below ROOT/venv."""
    (packages,) = (root / "venv" / "lib").glob("python3*/site-packages")
    for name in ASYNCHRONOUS:
        uninstall(packages, name)
    shutil.rmtree(packages / "kubernetes" / "aio")
    for service in (packages / "botocore" / "data").iterdir():
        if service.is_dir() and service.name not in AWS_SERVICES:
            shutil.rmtree(service)
    for path in sorted(packages.rglob("*")):
        if path.is_dir() and path.name in FOLDERS:
            shutil.rmtree(path)
        elif path.suffix in FILES and path.is_file():
            path.unlink()
    for program in (root / "venv" / "bin").iterdir():
        if not PROGRAMS.fullmatch(program.name):
            program.unlink()


def uninstall(packages: Path, name: str) -> None:
    """Delete an installed distribution: the files that its RECORD names, and the folders that are empty then."""
    distribution: Distribution = next(iter(PathDistribution.discover(name=name, path=[str(packages)])))
    files = [packages / file for file in distribution.files or () if ".." not in file.parts]
    for file in files:
        file.unlink(missing_ok=True)
    for folder in sorted({above for file in files for above in file.parents}, reverse=True):
        if folder.is_relative_to(packages) and folder != packages and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def imported() -> list[str]:
    """Return the files of the modules that the builder imports, sorted."""
    builder = importlib.import_module("builder")
    names = [module.name for module in pkgutil.walk_packages(builder.__path__, "builder.")]
    for name in (*names, *LAZILY):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    boto3 = importlib.import_module("boto3")
    for service in ("s3", "sts", "ecr"):
        boto3.client(service, region_name="eu-central-1")
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    # The entry point is a part of the package that walk_packages finds and nothing imports.
    files.add(str(Path(str(builder.__file__)).with_name("__main__.py")))
    ours = (sys.prefix, sys.base_prefix)
    return sorted(file for file in files if file and file.endswith(".py") and any(map(Path(file).is_relative_to, ours)))


def main() -> None:
    """Do what the first argument says."""
    if sys.argv[1:2] == ["prune"]:
        prune(Path(sys.argv[2]))
    elif sys.argv[1:] == ["imported"]:
        print("\n".join(imported()))
    else:
        sys.exit("usage: lean.py prune ROOT | lean.py imported")


if __name__ == "__main__":
    main()
