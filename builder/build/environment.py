"""What a model folder says of the Python environment the model was logged in."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

from builder.build.beneath import SAFE_PATH, exists_beneath, read_beneath
from builder.errors import InvalidVersion
from builder.yaml_file import MOST_BYTES, read_mapping

if TYPE_CHECKING:
    from pathlib import Path

    from builder.yaml_file import Yaml

REQUIREMENTS = "requirements.txt"
MLMODEL, PYTHON_ENV, CONDA = "MLmodel", "python_env.yaml", "conda.yaml"
_LIMIT = 1 << 20
# Words of requirements.txt that could be paths, each of which is looked for in the model folder.
_MOST_PATHS = 10_000
_PYTHON = re.compile(r"(3\.[0-9]{1,2})(?![0-9])")
_CONDA_PYTHON = re.compile(r"(?:[^\s:]{1,99}::)?python[ \t]{0,9}={1,2}[ \t]{0,9}(3\.[0-9]{1,2})(?![0-9])")
_MLFLOW = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9}){1,9}")
# `2022-05-01 12:34:56.789`: what MLflow writes, and no more than that is read.
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9:.+Z]{5,32}\Z")
# MLflow's own; a time before it is none.
_FIRST_YEAR = 2018
_PINNED = re.compile(r"==\s*([0-9]{1,9}(?:\.[0-9]{1,9}){1,9})(?![0-9])")
_SPECIFIER = re.compile(r"[<>=!~]=?=?[^;#@\[\]]{1,200}")
_REQUIREMENT_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """An environment, as the files of a model folder describe it.

    Attributes:
        python_version: major and minor, `3.11`; empty where no file tells.
        mlflow_version: the release of MLflow that logged the model; empty where MLmodel does not tell.
        logged: when the model was logged, in UTC; None where MLmodel does not tell.
        has_requirements: whether there is a requirements.txt.
        requirement_inputs: what pip reads beside it, relative to the model folder: constraints, further requirement
            files, local wheels and source folders that it names.
        server_requirements: what MLflow's scoring server needs beside requirements.txt.
        server: the module that serves, and its arguments without address and port.
    """

    python_version: str = ""
    mlflow_version: str = ""
    logged: datetime | None = None
    has_requirements: bool = False
    requirement_inputs: tuple[str, ...] = ()
    server_requirements: tuple[str, ...] = ()
    server: tuple[str, ...] = ("uvicorn", "mlflow.pyfunc.scoring_server.app:app")

    @classmethod
    def read(cls, context: Path, model_folder: str) -> Self:
        """Return the environment of the model in `context / model_folder`; files that are not there tell nothing.

        Raises:
            InvalidVersion: a file is a link, too large or not YAML; requirements.txt is not UTF-8, or has too many
                words that could be paths.
        """
        model = read_description(context, model_folder, MLMODEL)
        logged = model.get("mlflow_version")
        mlflow = logged if isinstance(logged, str) and _MLFLOW.fullmatch(logged) else ""
        raw = read_beneath(context, f"{model_folder}/{REQUIREMENTS}", _LIMIT)
        try:
            lines = [] if raw is None else _requirement_lines(requirements_text(raw))
        except UnicodeDecodeError as error:
            message = f"{model_folder}/{REQUIREMENTS} is not UTF-8."
            raise InvalidVersion(message, remedy="Log the model again with a requirements.txt in UTF-8.") from error
        server, needs = _scoring_server(lines, mlflow)
        return cls(
            python_version=_python(context, model_folder, model),
            mlflow_version=mlflow,
            logged=_logged(model),
            has_requirements=raw is not None,
            requirement_inputs=tuple(_inputs(lines, context, model_folder)),
            server_requirements=needs,
            server=server,
        )


def requirements_text(content: bytes) -> str:
    """Return the text of a requirements file, as pip reads it: UTF-16 where it begins with that one's mark.

    PowerShell's `pip freeze > requirements.txt` writes such files.

    Raises:
        UnicodeDecodeError: it is neither that nor UTF-8.
    """
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8-sig")


def read_description(context: Path, model_folder: str, name: str) -> dict[str, Yaml]:
    """Return the mapping in a YAML file of the model folder; empty where there is no file, or something else in it.

    Args:
        context: folder of the version's artifacts.
        model_folder: the model's folder in it.
        name: MLMODEL, PYTHON_ENV or CONDA.

    Raises:
        InvalidVersion: it is a link, too large, or not YAML that can be read.
    """
    content = read_beneath(context, f"{model_folder}/{name}", MOST_BYTES if name == MLMODEL else _LIMIT)
    return {} if content is None else read_mapping(content, f"{model_folder}/{name}")


def _python(context: Path, model_folder: str, model: dict[str, Yaml]) -> str:
    """Return the model's Python, major and minor: of python_env.yaml, else conda.yaml, else MLmodel, as MLflow."""
    told = read_description(context, model_folder, PYTHON_ENV).get("python")
    if isinstance(told, str) and (found := _PYTHON.match(told)):
        return found[1]
    entries = read_description(context, model_folder, CONDA).get("dependencies")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, str) and (found := _CONDA_PYTHON.match(entry)):
            return found[1]
    flavors = model.get("flavors")
    pyfunc = flavors.get("python_function") if isinstance(flavors, dict) else None
    told = pyfunc.get("python_version") if isinstance(pyfunc, dict) else None
    found = _PYTHON.match(told) if isinstance(told, str) else None
    return found[1] if found else ""


def _logged(model: dict[str, Yaml]) -> datetime | None:
    """Return when MLmodel says that the model was logged, in UTC; None where it says nothing that is a time."""
    told = model.get("utc_time_created")
    if not isinstance(told, str) or not _TIME.match(told):
        return None
    try:
        found = datetime.fromisoformat(told)
        found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return found if found.year >= _FIRST_YEAR else None


def _requirement_lines(text: str) -> list[str]:
    """Return the lines of a requirements file, continuations joined, comments and hashes cut."""
    joined = re.sub(r"\\\r?\n", " ", text)
    return [line for raw in joined.splitlines() if (line := re.sub(r"(?:^|\s)#.*|\s--hash=\S*", "", raw).strip())]


def _inputs(lines: list[str], context: Path, model_folder: str) -> list[str]:
    """Return the paths that requirement lines name and that stand in the model folder, each once, in order."""
    seen: dict[str, None] = {}
    for line in lines:
        for word in re.split(r"[\s=]+|(?<=^-[rce])|file:(?://)?", line):
            path = (word or "").removeprefix("./").rstrip("/")
            if path not in {"", REQUIREMENTS} and SAFE_PATH.fullmatch(path):
                seen[path] = None
    if len(seen) > _MOST_PATHS:
        message = f"{model_folder}/{REQUIREMENTS} has more than {_MOST_PATHS:,} words that could be files."
        raise InvalidVersion(message, remedy="Log the model again with the packages that it needs.")
    return [path for path in seen if exists_beneath(context, f"{model_folder}/{path}")]


def _scoring_server(lines: list[str], logged: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the scoring server's module and arguments, and the requirements it adds.

    `mlflow` brings all it needs, but for a bound that some releases lack. `mlflow-skinny` lacks pandas and, where
    it is older, the web server. Where neither is listed, the skinny one of the release that logged the model is added,
    and where one is listed that leaves its release open, that release is asked for, if it fits.
    """
    listed: dict[str, str] = {}
    for line in lines:
        if name := _REQUIREMENT_NAME.match(line):
            listed[re.sub(r"[-_.]+", "-", name[1]).lower()] = line
    # `packaging` takes a while to import, and `download` reads templates without it.
    from builder.build.mlflow_release import SETUPTOOLS, bounds_of, needs_of, server_of, taken

    asked = next((name for name in ("mlflow", "mlflow-skinny") if name in listed), "")
    pinned = _PINNED.search(listed.get(asked, ""))
    release = taken("==" + pinned[1] if pinned else _specifier(listed.get(asked, "")), logged)
    server = server_of(release)
    bounds = dict(bounds_of(release))
    names = ["starlette", *((SETUPTOOLS,) if SETUPTOOLS in bounds else ())]
    needs = [f"{name}{bounds[name]}" for name in names if name in bounds]
    if "mlflow" not in listed:
        needs += [f"{name}<4" if name == "flask" else name for name in needs_of(release)]
    if not asked:
        needs.insert(0, f"mlflow-skinny=={logged}" if logged else "mlflow-skinny")
    elif not pinned and str(release) == logged:
        needs.insert(0, f"{asked}=={logged}")
    # No MLflow that imports pkg_resources starts without it, so that its bound counts beside what the model pins.
    own = listed.keys() - {SETUPTOOLS}
    return server, tuple(need for need in needs if need.split("<")[0] not in own)


def _specifier(line: str) -> str:
    """Return what a requirement's line says of releases, `>=2.10,<3`; empty where it says nothing, or another thing."""
    found = _SPECIFIER.search(line)
    return found[0] if found else ""
