"""Runs inside the builder image: builds what the test asks for with the engine, and says what became of it.

argv[1] is a JSON list of jobs; stdout is a JSON list of outcomes. It is the program's own interpreter that runs this,
isolated, so that nothing but the image's packages can be imported.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

from builder.dockerfile.engine import BuildJob
from builder.dockerfile.kaniko import Kaniko
from builder.errors import BuilderError
from builder.reference import Platform, Repository
from builder.settings import Network

WORKSPACE = Path("/kaniko/workspace")
# Seconds: of a build, and until what was killed is gone. Only a hang takes as long.
LONGEST, GONE = 1500, 300


def path(value: str | None) -> Path | None:
    return Path(value) if value else None


def build(number: int, wanted: dict) -> dict:
    dockerfile = WORKSPACE / "context" / "Dockerfile"
    if "dockerfile" in wanted:
        dockerfile.parent.mkdir(exist_ok=True)
        dockerfile.write_text(wanted["dockerfile"])
    lines: list[str] = []
    job = BuildJob(
        context=Path(wanted.get("context", dockerfile.parent)),
        dockerfile=Path(wanted.get("context", dockerfile.parent)) / "Dockerfile",
        platform=Platform.parse(wanted.get("platform", "linux/amd64")),
        layout=WORKSPACE / "layouts" / str(number),
        timeout=wanted.get("timeout", LONGEST),
        network=Network(
            ca_bundle=path(wanted.get("ca_bundle")),
            pip_config=path(wanted.get("pip_config")),
            proxies=wanted.get("proxies", {}),
            index_variables=wanted.get("index_variables", {}),
            insecure_registries=frozenset(wanted.get("insecure_registries", [])),
        ),
        docker_config=path(wanted.get("docker_config")),
        cache=Repository.parse_prefix(wanted["cache"]) if wanted.get("cache") else None,
    )
    outcome: dict = {"error": "", "type": "", "exit_code": 0}
    try:
        Kaniko().build(job, lines.append)
    except BuilderError as error:
        outcome = {"error": str(error), "type": type(error).__name__, "exit_code": int(error.exit_code)}
    return {
        **outcome,
        "lines": lines,
        "processes": left(),
        "kaniko": sorted(entry.name for entry in Path("/kaniko").iterdir()),
    }


def left() -> list[str]:
    """Return the command lines of the processes that stay, whatever time they get to be gone."""
    until = time.monotonic() + GONE
    while (found := processes()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def processes() -> list[str]:
    """Return the command lines of every process but this one."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
            except OSError:
                continue
    return [line for line in found if line]


def main() -> None:
    outcomes = [build(number, wanted) for number, wanted in enumerate(json.loads(sys.argv[1]))]
    # What nobody has imported so far must still be there, and so must the C library that it is linked with.
    for module in ("sqlite3", "xml.sax.expatreader", "_lzma", "mlflow.tracking", "cryptography.x509"):
        importlib.import_module(module)
    json.dump(outcomes, sys.stdout)


main()
