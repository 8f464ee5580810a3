"""Publish a model of every flavor, run its image and ask it: `python -m scripts.flavors [WORD …]`, `make flavors`.

A registry, MLflow and the base image are those of the demo. BASE_IMAGE may name another base for further Pythons. Words
name the rows to try, by parts of their titles; without words all are tried. Each row is written into docs/flavors.md.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from scripts import machine
from scripts.demo_tools import BUILDER, find_tools
from scripts.flavors.kinds import FLAVORS, RELEASES, WRITTEN, Saved, Written
from scripts.launch import Processes, Program, clean_environ, free_port, running

_HERE = Path(__file__).parent
_CHECKOUT = _HERE.parent.parent
_PAGE = _CHECKOUT / "docs" / "flavors.md"
_ASK = _CHECKOUT / "examples" / "ask.py"
_UV = str(Path(sys.executable).with_name("uv"))
_SECONDS = 1800
# The Python of the base image that the demo makes where none can be pulled.
_MADE = "3.11"
_TABLES = (("flavors", FLAVORS), ("releases", RELEASES), ("written", WRITTEN))


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a model.

    Attributes:
        title: the model.
        mlflow: the release that saved it, or empty.
        outcome: a word: `answers`, `refused`, `not saved`, or what is wrong.
        detail: more words.
    """

    title: str
    mlflow: str
    outcome: str
    detail: str

    def markdown(self) -> str:
        """Return a line of the table."""
        cells = (self.title, self.mlflow, self.outcome, self.detail)
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


class Trial:
    """Saves, publishes and asks one model after another.

    Args:
        folder: a temporary folder.
        environ: what the publisher is set to.
    """

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self._folder, self._environ = folder, environ
        self._client = MlflowClient(environ["MLFLOW_TRACKING_URI"])

    def row(self, number: int, kind: Saved | Written) -> Row:
        """Try a model, and return what became of it."""
        folder = self._folder / f"model-{number}"
        folder.mkdir()
        release = ""
        expected: Any = None
        if isinstance(kind, Saved):
            failure = self._save(kind, folder)
            if failure:
                return Row(title=kind.title, mlflow="", outcome="not saved", detail=failure)
            release = _as_of(folder / "model" / "MLmodel", kind.as_of)
            _whole(folder / "model", kind.mlflow)
            question = (folder / "question.json").read_text()
            expected = json.loads((folder / "expected.json").read_text())
        else:
            for path, content in kind.contents().items():
                (folder / "model" / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / "model" / path).write_text(content)
            question = kind.question
        name = f"flavor-{number}"
        version = self._register(name, folder / "model")
        done = subprocess.run(
            [BUILDER, "publish", name, version], env=self._environ, check=False, capture_output=True, text=True
        )
        (folder / "publish.log").write_text(done.stderr)
        if done.returncode:
            return Row(title=kind.title, mlflow=release, outcome="refused", detail=_failure(done))
        answer = self._asked(done.stdout.strip(), question)
        if isinstance(answer, str):
            return Row(title=kind.title, mlflow=release, outcome="**no answer**", detail=answer)
        if expected is not None and not _alike(answer[0], expected):
            words = f"{json.dumps(answer[0])[:80]}, not {json.dumps(expected)[:80]}"
            return Row(title=kind.title, mlflow=release, outcome="**another answer**", detail=words)
        return Row(title=kind.title, mlflow=release, outcome="answers", detail=_made(done.stderr))

    def _save(self, kind: Saved, folder: Path) -> str:
        """Save a model in an environment of its own; return why not, or nothing."""
        venv = folder.with_name(f"{folder.name}-venv")
        python = f"{venv}/bin/python"
        until = [f"--exclude-newer={kind.as_of}"] if kind.as_of else []
        environ = clean_environ(MLFLOW_DISABLE_TELEMETRY="true", PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1")
        for command in (
            [_UV, "venv", "--quiet", f"--python={kind.python}", str(venv)],
            [_UV, "pip", "install", "--quiet", f"--python={python}", *until, kind.mlflow, *kind.packages],
            [python, str(_HERE / "saved.py"), kind.name, str(folder)],
        ):
            done = subprocess.run(
                command, env=environ, cwd=folder, check=False, capture_output=True, text=True, timeout=_SECONDS
            )
            if done.returncode:
                (folder / "save.log").write_text(done.stdout + done.stderr)
                return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        shutil.rmtree(venv)
        return ""

    def _register(self, name: str, model: Path) -> str:
        run = self._client.create_run("0")
        self._client.log_artifacts(run.info.run_id, str(model), "model")
        self._client.create_registered_model(name)
        source = f"{run.info.artifact_uri}/model"
        return str(self._client.create_model_version(name, source, run.info.run_id).version)

    def _asked(self, image: str, question: str) -> list[Any] | str:
        """Run an image and return its answer in a list, or why there is none; without a network, as its own user."""
        try:
            with machine.started_container(image, machine.native_platform()) as (name, command), _ASK.open() as program:
                asked = subprocess.run(
                    [command[0], "exec", "--interactive", name, "python", "-", question],
                    stdin=program, check=False, capture_output=True, text=True,
                )  # fmt: skip
        except machine.CannotRun as error:
            return f"no container can be run here: {error}"
        if asked.returncode:
            return asked.stderr.strip()[-200:]
        answer = json.loads(asked.stdout)
        return [answer.get("predictions", answer) if isinstance(answer, dict) else answer]


def _as_of(mlmodel: Path, day: str) -> str:
    """Return the release that an MLmodel names; it gets the day that its model was saved on, as far as packages go."""
    text = mlmodel.read_text()
    if day:
        mlmodel.write_text(re.sub(r"(?m)^utc_time_created: .*$", f"utc_time_created: '{day} 12:00:00.000000'", text))
    found = re.search(r"^mlflow_version: '?([0-9.]+)", text, re.MULTILINE)
    return found[1] if found else ""


def _whole(model: Path, saved_with: str) -> None:
    """Let the model ask for `mlflow`, as it would if it had been saved with the whole package."""
    package, _, release = saved_with.partition("==")
    if package == "mlflow-skinny":
        major, minor, _ = release.split(".")
        for name in ("requirements.txt", "conda.yaml"):
            path = model / name
            path.write_text(
                re.sub(r"\bmlflow$", f"mlflow<{int(major) + 1},>={major}.{minor}", path.read_text(), flags=re.MULTILINE)
            )


def _shortened(what: str) -> str:
    """Return what failed, without this run's addresses; of a container's last lines the one that names the error."""
    first, lines, rest = re.sub(r"127\.0\.0\.1:\d+/", "", what).partition("its last lines: ")
    if not lines:
        return first[:400]
    errors = [line for line in rest.split(" | ") if re.match(r"\w*(?:Error|Exception)\b", line)]
    return f"{first}{lines}… {(errors or [rest[-200:]])[-1]}"


def _events(log: str) -> Iterator[dict[str, Any]]:
    for line in reversed(log.splitlines()):
        with suppress(json.JSONDecodeError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


def _made(log: str) -> str:
    """Return how an image was made, and how large it is, compressed."""
    events = list(_events(log))
    method = next((event["method"] for event in events if event.get("event") == "published"), "")
    size = next((event["bytes"] for event in events if event.get("event") == "smoke test"), 0)
    return f"{method}, {size / 1e6:,.0f} MB"


def _failure(done: subprocess.CompletedProcess[str]) -> str:
    for event in _events(done.stderr):
        if "what" in event:
            return f"{done.returncode}: {_shortened(event['what'])}"
    return f"{done.returncode}: {done.stderr.strip()[-200:]}"


def _alike(one: Any, other: Any) -> bool:
    """Return whether two answers are the same, but for a single row that is no list, and for the last digits."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, dict) and len(one) == 1:
        return _alike(next(iter(one.values())), other)
    if isinstance(one, list) and len(one) == 1:
        return _alike(one[0], other)
    if isinstance(other, list) and len(other) == 1:
        return _alike(one, other[0])
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
    return bool(one == other)


def _write(table: str, titles: Sequence[str], row: Row) -> None:
    """Put a row in the place of the one of its title, in the order of the titles."""
    begin, end = f"<!-- {table}: written by make flavors -->\n", f"\n<!-- end of {table} -->"
    before, _, rest = _PAGE.read_text().partition(begin)
    former, _, after = rest.partition(end)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in former.splitlines()[2:]}
    lines[row.title] = row.markdown()
    rows = (lines[title] for title in titles if title in lines)
    made = "\n".join(["| Model | MLflow | Outcome | |", "|---|---|---|---|", *rows])
    _PAGE.write_text(f"{before}{begin}{made}{end}{after}")


def main(wanted: list[str]) -> None:
    """Try what the words name."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    tools, launcher = find_tools(), Processes()
    with ExitStack() as stack:
        kept = os.environ.get("FLAVORS_FOLDER")
        folder = Path(kept or stack.enter_context(tempfile.TemporaryDirectory(prefix="builder-flavors-")))
        registry = stack.enter_context(_started(launcher, tools.registry(folder, free_port())))
        server = stack.enter_context(_started(launcher, machine.mlflow(folder, free_port())))
        base = os.environ.get("BASE_IMAGE") or tools.base(f"127.0.0.1:{registry}", [machine.native_platform()])
        environ = clean_environ(
            MLFLOW_TRACKING_URI=f"http://127.0.0.1:{server}", REGISTRY_URL=f"127.0.0.1:{registry}", BASE_IMAGE=base,
            LOG_FORMAT="json", SMOKE_TEST="required", TARGET_PLATFORMS=machine.native_platform(),
            **machine.pip_configuration(),
        )  # fmt: skip
        trial = Trial(folder, environ)
        rows: list[Row] = []
        number = 0
        for name, kinds in _TABLES:
            for kind in kinds:
                number += 1
                if wanted and not any(word.lower() in f"{name} {kind.title}".lower() for word in wanted):
                    continue
                if kind.python == _MADE or "{python_version}" in base:
                    row = trial.row(number, kind)
                else:
                    words = f"no base image with Python {kind.python} on this machine"
                    row = Row(title=kind.title, mlflow="", outcome="not tried", detail=words)
                sys.stdout.write(f"{row.markdown()}\n")
                sys.stdout.flush()
                _write(name, [each.title for each in kinds], row)
                rows.append(row)
    if any("**" in row.outcome for row in rows):
        sys.exit("what is called published has to answer")


@contextmanager
def _started(launcher: Processes, program: Program) -> Iterator[int]:
    """Run a program, and give its port."""
    with running(launcher, program):
        yield program.port


if __name__ == "__main__":
    main(sys.argv[1:])
