"""The dockerfile method with Kaniko, beside bare Kaniko on the same context.

Bare Kaniko builds and pushes; ours fetches from MLflow, builds, pushes and records. Both in a fresh container for each
run, on the same registry, in turn.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
import uuid
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.base import load_base, load_kaniko, push_base
from scripts import machine
from scripts.demo_tools import Debian
from scripts.docker_daemon import docker_daemon
from scripts.launch import Processes, free_port, running
from tests.builder_image import build, build_context, docker, use_daemon
from tests.versions import register, seed_layout

RUNS = 3
AIM = 1.1
BARE, REPRODUCIBLE, OURS = "bare Kaniko", "bare Kaniko --reproducible", "ours"
DOCKERFILE = """\
FROM {base}
RUN mkdir /app && dd if=/dev/urandom of=/app/random bs=1M count=64 status=none
RUN python3 -m venv --without-pip /opt/venv
COPY $model_folder /app/$model_folder
COPY $model_client_folder /app/$model_client_folder
USER 10001
ENTRYPOINT ["python", "/app/$model_client_folder/$entry_point"]
"""


def main() -> int:
    """Measure, and print a table; say why where it cannot be measured here."""
    kaniko = os.environ.get("KANIKO_IMAGE", "")
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(docker_daemon())
        if daemon is None or not kaniko:
            Console().print("Skipped: Kaniko. It needs a Docker daemon, and an image or its archive in KANIKO_IMAGE.")
            return 0
        use_daemon(daemon)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        measure(stack, folder, kaniko)
    return 0


def measure(stack: contextlib.ExitStack, folder: Path, kaniko: str) -> None:
    """Run both in turn."""
    kaniko = load_kaniko(kaniko)
    registry, mlflow = Debian().registry(folder, free_port()), machine.mlflow(folder, free_port())
    for program in (registry, mlflow):
        stack.enter_context(running(Processes(), program))
    host, uri = f"127.0.0.1:{registry.port}", f"http://127.0.0.1:{mlflow.port}"
    base = push_base(host)
    python = load_base(folder)
    context = folder / "image"
    context.mkdir()
    # Without interpreters that only compile.
    images = {"PYTHON_IMAGE": python, **{f"PYTHON_3_{minor}_IMAGE": python for minor in range(9, 15)}}
    builder = build(build_context(context), "localhost/builder-bench", KANIKO_IMAGE=kaniko, **images)

    files = seed_layout(base, DOCKERFILE)
    files["mymodel/weights.bin"] = os.urandom(16 << 20)
    bare_context = folder / "bare"
    for path, content in files.items():
        target = bare_context / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = files["templates/Dockerfile.template"]
    for name, value in {"model_folder": "mymodel", "model_client_folder": "client", "entry_point": "app.py"}.items():
        text = text.replace(f"${name}", value)
    (bare_context / "Dockerfile").write_text(text)

    seconds: dict[str, list[float]] = {name: [] for name in (BARE, REPRODUCIBLE, OURS)}
    for run in range(RUNS + 1):
        version = register(uri, files)
        took = {
            BARE: bare(kaniko, bare_context, f"{host}/bare:{run}"),
            REPRODUCIBLE: bare(kaniko, bare_context, f"{host}/reproducible:{run}", "--reproducible"),
            OURS: ours(builder, uri, host, version.name),
        }
        for name, value in took.items() if run else ():  # the first warms the page cache
            seconds[name].append(value)
    show(seconds)


def bare(image: str, context: Path, destination: str, *options: str) -> float:
    """Build and push with Kaniko's own image; return the seconds it took."""
    command = ["--context=dir:///workspace", f"--destination={destination}", "--custom-platform=linux/amd64", *options]
    # What ours sets too: without it the base's layers are made again.
    setting = "--env=FF_KANIKO_REPRODUCIBLE_PRESERVE_BASE_LAYERS=true"
    mount = f"--volume={context}:/workspace:ro"
    return timed("--entrypoint=/kaniko/executor", setting, mount, image, *command, "--cleanup")


def ours(image: str, uri: str, host: str, name: str) -> float:
    """Publish with the builder image; return the seconds it took."""
    environ = {"MLFLOW_TRACKING_URI": uri, "REGISTRY_URL": host, "MODEL_NAME": name, "MODEL_VERSION": "1"}
    return timed(*(f"--env={key}={value}" for key, value in environ.items()), image)


def timed(*arguments: str) -> float:
    """Run a container to its end, and return the seconds that took."""
    name = f"bench-{uuid.uuid4().hex[:12]}"
    start = time.monotonic()
    docker("run", "--rm", "--network=host", f"--name={name}", *arguments)
    return time.monotonic() - start


def show(seconds: dict[str, list[float]]) -> None:
    """Print the table."""
    table = Table("job", "min", "median", "max", title=f"One version, linux/amd64: {RUNS} runs in turn")
    for name, values in seconds.items():
        table.add_row(f"{name}, seconds", *figures(values))
    for rival in (BARE, REPRODUCIBLE):
        ratios = [mine / theirs for theirs, mine in zip(seconds[rival], seconds[OURS], strict=True)]
        table.add_row(f"{OURS} / {rival}, pair by pair", *figures(ratios))
    console = Console(width=110, highlight=False)
    console.print(table)
    console.print(f"Aim: {AIM} or less. Ours fetches from MLflow, checks every layer that Kaniko leaves, and records.")


def figures(values: list[float]) -> tuple[str, ...]:
    """Return the least, the median and the most of some values, as text."""
    return tuple(f"{figure(values):.2f}" for figure in (min, statistics.median, max))
