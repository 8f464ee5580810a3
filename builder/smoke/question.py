"""What an image is asked in its smoke test, and how what it says is judged. All of it is pure.

Who starts the container is no concern of this module: here it is a container runtime of the machine; in a cluster it
can be a container of the same Pod.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from builder.errors import one_line
from builder.log import masked

_SERVER = "mlflow.pyfunc.scoring_server"
_MODEL_PATH = "__pyfunc_model_path__"
_PORT = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/tcp)?")
_LAST_PORT = 65535
_MOST_PORTS = 64
_MOST_VOLUMES = 32
# An absolute folder without what `--tmpfs folder:options` would take for something else.
_VOLUME = re.compile(r"(?:/[A-Za-z0-9_.@+-]+)+")
# proc(5): in /proc/net/tcp the second field is the local address, and state 0A is LISTEN.
_LISTENS = re.compile(r"\s*[0-9]+: [0-9A-F]{8,32}:([0-9A-F]{4}) [0-9A-F]{8,32}:[0-9A-F]{4} 0A ")
_MOST_EVENT_CHARACTERS = 4000
_LONGEST_PROBLEM = 500
_LONGEST_LINE = 300
_LONGEST_SAYING = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a container of an image is asked.

    Attributes:
        ports: TCP ports that the image exposes; one of them has to be open.
        model: folder of the model in the image where MLflow's scoring server is what runs; empty where something else
            does, which is not known to answer anything.
        volumes: folders that the image declares as volumes: it expects to be able to write there.
    """

    ports: tuple[int, ...]
    model: str = ""
    volumes: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Question:
        """Return what an image is asked, from its config as JSON, which may be a stranger's."""
        runtime = config.get("config")
        runtime = runtime if isinstance(runtime, Mapping) else {}
        ports = _ports(runtime.get("ExposedPorts"))
        command = [word for name in ("Entrypoint", "Cmd") for word in _words(runtime.get(name))]
        entries = [entry.partition("=") for entry in _words(runtime.get("Env"))]
        model = next((value for name, _, value in entries if name == _MODEL_PATH), "")
        port = _serving_port(command) if any(word.startswith(_SERVER) for word in command) else 0
        if model and port in ports:
            ports = (port,)
        else:
            model = ""
        volumes = runtime.get("Volumes")
        names = [name.rstrip("/") for name in volumes][:_MOST_VOLUMES] if isinstance(volumes, Mapping) else []
        return cls(
            ports=ports,
            model=model,
            volumes=tuple(name for name in names if _VOLUME.fullmatch(name) and ".." not in name.split("/")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of asking MLflow's server.

    Attributes:
        loaded: whether it answered, so that its model is loaded: every release loads it before.
        finished: whether the questions were asked to their end.
        example: the file of the input example that was sent; empty where there is none.
        problem: what is wrong with the answer to it; empty where nothing is.
    """

    loaded: bool = False
    finished: bool = False
    example: str = ""
    problem: str = ""

    @classmethod
    def read(cls, lines: Iterable[str]) -> Answer:
        """Return what the lines of `builder.smoke.ask` say; they may be a stranger's."""
        found = cls()
        for line in lines:
            event = event_of(line)
            if event.get("event") == "ping":
                found = cls(loaded=True)
            elif event.get("event") == "answer" and found.loaded:
                example, problem = (printable(str(event.get(name, "")), _LONGEST_PROBLEM) for name in _SAID)
                return cls(loaded=True, finished=True, example=example, problem=problem)
        return found


_SAID = ("example", "problem")


def event_of(line: str) -> dict[str, Any]:
    """Return one line of `builder.smoke.ask`; empty where it is none."""
    if len(line) > _MOST_EVENT_CHARACTERS or not line.startswith("{"):
        return {}
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def listening(lines: Iterable[str]) -> frozenset[int]:
    """Return the TCP ports that are open, from the lines of /proc/net/tcp and /proc/net/tcp6."""
    return frozenset(int(match[1], 16) for line in lines if (match := _LISTENS.match(line)))


def printable(text: str, limit: int = _LONGEST_LINE) -> str:
    """Return a line that a stranger's program wrote: no control character, no secret, bounded."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 2 * limit])
    return one_line(masked(shown), limit)


def last_words(lines: Sequence[str]) -> str:
    """Return the end of a container's log as one line for an error: the last lines, as far as they fit."""
    kept: list[str] = []
    for line in reversed(lines):
        text = printable(line)
        if text and sum(map(len, kept)) + len(text) > _LONGEST_SAYING and kept:
            break
        kept += [text] if text else []
    return " | ".join(reversed(kept))


def without_volumes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an image config that declares no volume: a runtime would make each one a folder on the machine's disk."""
    runtime = config.get("config")
    return {**config, "config": {**runtime, "Volumes": {}}} if isinstance(runtime, Mapping) else dict(config)


def _ports(exposed: object) -> tuple[int, ...]:
    found: list[int] = []
    for name in list(exposed)[:_MOST_PORTS] if isinstance(exposed, Mapping) else []:
        if match := _PORT.fullmatch(str(name)):
            found += range(int(match[1]), min(int(match[2] or match[1]), int(match[1]) + _MOST_PORTS) + 1)
    return tuple(sorted({port for port in found if 0 < port <= _LAST_PORT})[:_MOST_PORTS])


def _serving_port(command: Sequence[str]) -> int:
    """Return the port that uvicorn or gunicorn is told to listen on; 0 where it is none."""
    for option, value in pairwise(command):
        if option in {"--port", "--bind"} and re.fullmatch(r"(?:.*:)?[0-9]{1,5}", value):
            return int(value.rpartition(":")[2])
    return 0


def _words(value: object) -> list[str]:
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []
