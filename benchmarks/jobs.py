"""What is measured: a job, from a tagged version in MLflow to its image in the registry."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.memory import peak_memory
from benchmarks.meter import Meter, bytes_from_outside

_TIMEOUT = 3600
_SHOWN = 600


class JobFailed(Exception):
    """A command of a job failed; its last words are the message."""


class JobSkipped(Exception):
    """A job cannot be done here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a job.

    Attributes:
        argv: the command.
        cwd: the folder it runs in.
        environ: its whole environment.
    """

    argv: tuple[str, ...]
    cwd: Path
    environ: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a job took.

    Attributes:
        seconds: from the first command's start to the last one's end.
        peak: most memory held together, in bytes.
        sent: bytes to the registry.
        received: bytes from the registry.
        outside: bytes from outside this machine: the package index.
        model: bytes from MLflow.
        stages: seconds by stage, where the job tells.
    """

    seconds: float
    peak: int
    sent: int
    received: int
    outside: int
    model: int
    stages: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job in one run.

    Attributes:
        job: its name.
        cost: what it took; None where it was skipped or failed.
        reason: why it was skipped or failed.
        image_bytes: compressed size of the image, its config included; 0 where that is not asked.
        starts: seconds from `docker run` to the first prediction.
    """

    job: str
    cost: Cost | None = None
    reason: str = ""
    image_bytes: int = 0
    starts: tuple[float, ...] = ()


def perform(steps: Sequence[Step], registry: Meter, mlflow: Meter, daemon: str = "") -> Cost:
    """Run the commands of a job one after another, and return what they took.

    Args:
        steps: the commands.
        registry: counts what passes between the job and the registry.
        mlflow: counts what passes between the job and MLflow.
        daemon: see `peak_memory`.

    Raises:
        JobFailed: a command did not end with 0.
    """
    before = (registry.sent, registry.received, bytes_from_outside(), mlflow.received)
    with tempfile.TemporaryDirectory(prefix="bench-log-") as folder, peak_memory(daemon) as peak:
        log = Path(folder) / "log"
        start = time.monotonic()
        for step in steps:
            run(step, log)
        seconds = time.monotonic() - start
        stages = timings(log.read_text(errors="replace"))
    after = (registry.sent, registry.received, bytes_from_outside(), mlflow.received)
    sent, received, outside, model = (then - first for first, then in zip(before, after, strict=True))
    return Cost(
        seconds=seconds, peak=peak.bytes, sent=sent, received=received, outside=outside, model=model, stages=stages
    )


def run(step: Step, log: Path) -> None:
    """Run one command; what it prints goes to `log`.

    Raises:
        JobFailed: it did not end with 0.
    """
    with log.open("wb") as output:
        done = subprocess.run(
            step.argv,
            check=False,
            cwd=step.cwd,
            env=dict(step.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT,
        )
    if done.returncode:
        message = f"'{' '.join(step.argv[:4])} …' ended with {done.returncode}: {last_words(log)}"
        raise JobFailed(message)


def last_words(log: Path) -> str:
    """Return why a command failed: what our own program's last event says, else the end of what was printed."""
    text = log.read_text(errors="replace").strip()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text.splitlines()[-1])["what"]) if text else "it printed nothing"
    return f"… {' '.join(text.split())[-_SHOWN:]}"


def timings(log: str) -> dict[str, float]:
    """Return the seconds by stage of the last event `timings` in a log of JSON lines; nothing where there is none."""
    for line in reversed(log.splitlines()):
        if line.startswith("{") and "timings" in line:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("event") == "timings":
                stages = event.get("seconds", event)
                return {name: float(value) for name, value in stages.items() if isinstance(value, int | float)}
    return {}
