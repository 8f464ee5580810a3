"""How soon the program is there: `--help`, and a publish that has nothing to do beside a bare `import mlflow`.

Each is a fresh interpreter, timed from its start to its end, in turn; MLflow and the registry are real, on loopback.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts import machine
from scripts.demo_tools import CHECKOUT, Debian
from scripts.launch import Processes, clean_environ, free_port, running
from tests.versions import register, seed_layout

RUNS = 9
HELP_AIM = 0.25
PUBLISH_AIM = 0.4
EMPTY, HELP, IMPORT, QUICK_END, PUBLISH = (
    "python -c pass",
    "builder --help",
    "import mlflow",
    "import mlflow, quick end",
    "publish, nothing to do",
)
COMMANDS = {
    EMPTY: ("-c", "pass"),
    HELP: ("-m", "builder", "--help"),
    IMPORT: ("-c", "import mlflow"),
    # Ours ends without a search for garbage; this shows what is left of the difference when MLflow may do so too.
    QUICK_END: ("-c", "import gc, mlflow; gc.freeze()"),
    PUBLISH: ("-m", "builder", "publish"),
}
NEEDED = ("docker-registry", "buildah")
# Nothing has to be pulled for it.
DOCKERFILE = "FROM scratch\nCOPY $model_folder /app\nUSER 10001\n"


def main() -> int:
    """Measure, and print a table; say why where it cannot be measured here."""
    missing = [name for name in NEEDED if not shutil.which(name)]
    if missing:
        Console().print(f"Skipped: start-up. It needs {' and '.join(missing)}, of the Debian packages of that name.")
        return 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        registry, mlflow = Debian().registry(folder, free_port()), machine.mlflow(folder, free_port())
        for program in (registry, mlflow):
            stack.enter_context(running(Processes(), program))
        show(measure(published(f"http://127.0.0.1:{mlflow.port}", f"127.0.0.1:{registry.port}")))
    return 0


def published(uri: str, host: str) -> dict[str, str]:
    """Publish a small version, and return the environment in which that need not be done again."""
    version = register(uri, seed_layout("", DOCKERFILE))
    settings = {
        "MLFLOW_TRACKING_URI": uri,
        "REGISTRY_URL": host,
        "MODEL_NAME": version.name,
        "MODEL_VERSION": "1",
        "SMOKE_TEST": "off",
    }
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    environ = clean_environ(**settings, PYTHONPATH=path)
    again = [run(COMMANDS[PUBLISH], environ).stderr for _ in range(2)][1]
    if b"nothing to do" not in again:
        message = f"The second publish had something to do: {again.decode()}"
        raise SystemExit(message)
    return environ


def measure(environ: Mapping[str, str]) -> dict[str, list[float]]:
    """Run every command in turn, and return the seconds that each run took."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(RUNS + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            run(command, environ)
            if number:  # the first compiles, and warms the page cache
                seconds[name].append(time.perf_counter() - start)
    return seconds


def run(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a fresh interpreter, to its end."""
    return subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environ)


def show(seconds: Mapping[str, Sequence[float]]) -> None:
    """Print the table."""
    table = Table("milliseconds", "min", "median", "max", title=f"Start-up: {RUNS} runs in turn, whole processes")
    for name, values in seconds.items():
        table.add_row(name, *figures([1000 * value for value in values], "{:.0f}"))
    for rival in (IMPORT, QUICK_END):
        pairs = list(zip(seconds[PUBLISH], seconds[rival], strict=True))
        table.add_row(f"publish less {rival}", *figures([1000 * (ours - bare) for ours, bare in pairs], "{:.0f}"))
        table.add_row(f"publish over {rival}", *figures([ours / bare for ours, bare in pairs], "{:.2f}"))
    console = Console(width=110, highlight=False)
    console.print(table)
    aim = (
        f"--help within {1000 * HELP_AIM:.0f} ms, a publish within {1000 * PUBLISH_AIM:.0f} ms more than import mlflow"
    )
    console.print(f"Aim: {aim}.")


def figures(values: Sequence[float], form: str) -> tuple[str, ...]:
    """Return the least, the median and the most of some values, as text."""
    return tuple(form.format(figure(values)) for figure in (min, statistics.median, max))


if __name__ == "__main__":
    sys.exit(main())
