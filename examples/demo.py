"""`make demo`: three versions registered, published and run, with real servers and nothing prepared.

Where the registry, the base image and the engine come from differs between machines (scripts/demo_tools.py);
everything after that is the same everywhere.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from examples.models import save_flower_model, save_pump_model
from scripts import machine
from scripts.demo_tools import BUILDER, Tools, find_tools
from scripts.launch import Processes, clean_environ, free_port, running

HERE = Path(__file__).parent
CHECKOUT = HERE.parent
CONSOLE = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)

# In the builder's log, a line of the engine's own output.
STEP_OUTPUT = " engine="

AMD64, ARM = "linux/amd64", "linux/arm/v7"
FLOWERS = {"rows": [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]}
READINGS = {"inputs": [{"bearing_celsius": 96, "vibration_mm_s": 2.8, "pressure_bar": 17}]}


class Demo:
    """Runs commands and shows them; keeps how long each step took.

    Args:
        folder: a temporary folder for all that the demo makes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.times: list[tuple[str, float]] = []
        self.environ = clean_environ(LOG_FORMAT="text", SMOKE_TEST="auto", TERM="dumb", **machine.pip_configuration())
        self.tools: Tools = find_tools()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Show a step's title, and keep the time it takes."""
        CONSOLE.print()
        CONSOLE.rule(f"[bold]{title}", align="left")
        start = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - start))

    def show_times(self) -> None:
        """Show how long each step took."""
        table = Table(box=None, show_header=False)
        for title, seconds in [*self.times, ("together", sum(seconds for _, seconds in self.times))]:
            table.add_row(title, f"{seconds:6.1f} s")
        CONSOLE.print()
        CONSOLE.rule("[bold]What each step took", align="left")
        CONSOLE.print(table)

    def run(self, *argv: str, shown: Mapping[str, str] | None = None, stdin: IO[str] | None = None) -> str:
        """Show a command, run it, show what it prints, and return that.

        Args:
            argv: the command.
            shown: variables that it gets beside the demo's own, and that are shown with it.
            stdin: what it reads.
        """
        words = [*(f"{name}={value}" for name, value in (shown or {}).items()), Path(argv[0]).name, *argv[1:]]
        CONSOLE.print(f"$ {shlex.join(words)}".replace(f"{CHECKOUT}/", ""), style="cyan", markup=False)
        environ = {**self.environ, **(shown or {})}
        kept: list[str] = []
        with subprocess.Popen(
            argv, env=environ, cwd=CHECKOUT, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            reader = threading.Thread(target=self._show_log, args=(process.stderr, kept))
            reader.start()
            output = process.stdout.read().strip()
            reader.join()
        if output:
            CONSOLE.print(output, markup=False)
        if process.returncode:
            sys.exit("\n".join([*kept, f"{Path(argv[0]).name} ended with {process.returncode}"]))
        return output

    @staticmethod
    def _show_log(lines: IO[str], kept: list[str]) -> None:
        """Show a command's log as it comes; what a build step says is kept, for the case that it fails."""
        for line in lines:
            text = line.rstrip()
            if STEP_OUTPUT in text and " STEP " not in text:
                kept.append(text)
            elif text:
                CONSOLE.print(text, style="dim", markup=False)

    def predict(self, image: str, platform: str, body: Mapping[str, Any]) -> None:
        """Run a published image, and show what it predicts."""
        start = time.monotonic()
        try:
            with machine.started_container(image, platform) as (name, command):
                CONSOLE.print(f"$ {shlex.join(command)}", style="cyan", markup=False)
                CONSOLE.print(f"pulled and started in {time.monotonic() - start:.1f} s", style="dim")
                start = time.monotonic()
                # There is no network, since what the image needs is in it. The question is asked from inside.
                with (HERE / "ask.py").open() as program:
                    words = ("exec", "--interactive", name, "python", "-", json.dumps(body))
                    self.run(command[0], *words, stdin=program)
                CONSOLE.print(f"answered {time.monotonic() - start:.1f} s after that", style="dim")
        except machine.CannotRun as error:
            sys.exit(f"no container can be run here: {error}")


@contextlib.contextmanager
def servers(demo: Demo) -> Iterator[str]:
    """Run a registry and MLflow; give the registry's host."""
    launcher = Processes()
    port = free_port()
    registry = demo.tools.registry(demo.folder, port)
    mlflow = machine.mlflow(demo.folder, free_port())
    with running(launcher, registry), running(launcher, mlflow):
        host, uri = f"127.0.0.1:{registry.port}", f"http://127.0.0.1:{mlflow.port}"
        demo.environ.update(MLFLOW_TRACKING_URI=uri, REGISTRY_URL=host)
        CONSOLE.print(f"MLFLOW_TRACKING_URI={uri}\nREGISTRY_URL={host}")
        yield host


def prepare_base(demo: Demo, host: str, platforms: list[str]) -> None:
    """Set BASE_IMAGE: to the one that everybody pulls, or to one that is made here and pushed to the registry."""
    base = demo.environ["BASE_IMAGE"] = demo.tools.base(host, platforms)
    if base.startswith(host):
        CONSOLE.print("No image registry can be reached, so the base image is made from Debian packages.")
    CONSOLE.print(f"BASE_IMAGE={base}")


def copy_templates(source: Path, target: Path, base: str) -> None:
    """Copy an author's templates; where the base image was made here, the Dockerfile's FROM names that one."""
    shutil.copytree(source, target)
    dockerfile = target / "Dockerfile.template"
    if "{python_version}" not in base:
        dockerfile.write_text(re.sub(r"(?m)^FROM \S+", f"FROM {base}", dockerfile.read_text()))


def show_index(text: bytes) -> None:
    """Show what an independent tool says the registry holds."""
    document = json.loads(text)
    table = Table(box=None)
    for title in ("platform", "digest", "bytes"):
        table.add_column(title)
    for manifest in document.get("manifests", []):
        table.add_row(
            "/".join(filter(None, map(manifest["platform"].get, ("os", "architecture", "variant")))),
            manifest["digest"],
            str(manifest["size"]),
        )
    CONSOLE.print(document["mediaType"])
    CONSOLE.print(table)


def show_tags(demo: Demo, name: str, version: str) -> None:
    """Show the tags of a model version, as MLflow has them."""
    from mlflow import MlflowClient

    tags = MlflowClient(demo.environ["MLFLOW_TRACKING_URI"]).get_model_version(name, version).tags
    table = Table(box=None, show_header=False)
    for tag in sorted(tags):
        table.add_row(tag, tags[tag])
    CONSOLE.print(f"{name} version {version}")
    CONSOLE.print(table)


def tell(demo: Demo) -> None:
    """The story."""
    native, emulated = machine.native_platform(), demo.tools.emulated()
    other = machine.other_platform()
    target = AMD64 if AMD64 in {native, emulated} else native
    if target != AMD64:
        # Foundry takes linux/amd64, and nothing here could build or run that.
        demo.environ["TARGET_TAG"] = "EXTERNAL_TARGET_DEMO"
    flower, pump = demo.folder / "flower", demo.folder / "pump"
    with contextlib.ExitStack() as stack:
        with demo.step("Start MLflow and a registry"):
            host = stack.enter_context(servers(demo))
        with demo.step("Get a base image"):
            prepare_base(demo, host, [native, other, ARM])
        with demo.step("Get a builder"):
            builder = demo.tools.builder()
        with demo.step("Train and save two models"):
            save_flower_model(flower)
            save_pump_model(pump)
            CONSOLE.print(f"{flower}: scikit-learn\n{pump}: rules in plain Python")
        with demo.step("Register them: scikit-learn with its own Dockerfile.template, and again without; the rules"):
            example, templates = HERE / "foundry_model", demo.folder / "templates"
            copy_templates(example / "templates", templates, demo.environ["BASE_IMAGE"])
            first = demo.run(
                *(BUILDER, "register", "--name", "pltr_foundry_model", "--model", str(flower)),
                *("--client", str(example / "client"), "--templates", str(templates)),
                *("--entry-point", "app.py", "--platforms", target),
            )
            second = demo.run(
                *(BUILDER, "register", "--name", "flowers", "--model", str(flower)),
                *("--platforms", f"{native},{other}"),
            )
            third = demo.run(
                *(BUILDER, "register", "--name", "pump_alarm", "--model", str(pump)),
                *("--client", str(HERE / "pump_alarm" / "client"), "--entry-point", "serve.py"),
                *("--platforms", f"{native},{other},{ARM}"),
            )
        with demo.step("Plan: see what would happen, and touch nothing"):
            demo.run(*builder, "plan", "flowers", second)
        with demo.step("Publish what has a Dockerfile.template: an engine runs it"):
            which = {"MODEL_NAME": "pltr_foundry_model", "MODEL_VERSION": first}
            template_image = demo.run(*builder, "publish", shown=which)
        with demo.step(f"Publish scikit-learn without one, for {native} and {other}: nothing is run or emulated"):
            flower_image = demo.run(*builder, "publish", "flowers", second)
        with demo.step(f"Publish the rules, for {ARM} too"):
            pump_image = demo.run(*builder, "publish", "pump_alarm", third)
        with demo.step("Read it back with another tool"):
            command = demo.tools.read(pump_image)
            CONSOLE.print(f"$ {shlex.join(command)}", style="cyan", markup=False)
            show_index(subprocess.run(command, check=True, capture_output=True).stdout)
        with demo.step("Run the images, and ask for predictions"):
            demo.predict(template_image, target, FLOWERS)
            demo.predict(flower_image, native, {"inputs": FLOWERS["rows"]})
            for platform in [native, emulated] if emulated else [native]:
                demo.predict(pump_image, platform, READINGS)
        with demo.step("Publish again: nothing to do"):
            again = demo.run(*builder, "publish", "pump_alarm", third)
            if again != pump_image:
                sys.exit(f"the second publish gave {again}")
        with demo.step("What the data scientist sees in MLflow"):
            show_tags(demo, "pltr_foundry_model", first)
            show_tags(demo, "flowers", second)


def main() -> None:
    """Run the demo in a temporary folder, and leave nothing behind."""
    # So that servers and containers are stopped when somebody ends the demo.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("the demo was ended"))
    with tempfile.TemporaryDirectory(prefix="builder-demo-") as folder:
        demo = Demo(Path(folder))
        tell(demo)
    demo.show_times()


if __name__ == "__main__":
    main()
