"""A model folder: its Python environment, its flavor, and what its release of MLflow needs to serve."""

from __future__ import annotations

import codecs
import json
import posixpath
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from builder.errors import InvalidVersion
from builder.log import get_logger
from builder.masking import one_line
from builder.safe_open import (
    MOST_YAML_BYTES,
    SAFE_PATH,
    exists_beneath,
    read_beneath,
    read_mapping,
    read_yaml,
    scalar_places,
)

# `packaging` takes a while to import, and `download` needs none of it: functions import it.
if TYPE_CHECKING:
    from packaging.version import Version

    from builder.safe_open import Yaml


SETUPTOOLS = "setuptools"
WSGI = ("gunicorn", "mlflow.pyfunc.scoring_server.wsgi:app")
ASGI = ("uvicorn", "mlflow.pyfunc.scoring_server.app:app")
# From this release on, MLflow's scoring server is an ASGI application; it was a WSGI one before.
_FIRST_ASGI = "2.21"
# What serving needs of other packages' versions, of releases from the first one and before the second.
# `mlflow` has these bounds itself but for those of _UNKNOWN_TO_MLFLOW; `mlflow-skinny` has none.
_BOUNDS = (
    ("2.0", "2.16", "numpy", "<2"),
    ("2.16", "4", "numpy", "<3"),
    ("2.0", "3.16", "pandas", "<3"),
    ("3.16", "4", "pandas", "<4"),
    ("2.0", "4", "flask", "<4"),
    # Starlette 1 has no `route` decorator any more, and no release of MLflow before 3.12 says that it needs it.
    ("2.21", "3.13", "starlette", "<1"),
    # They import pkg_resources, which setuptools had until 81, and no release requires it.
    ("0", "2.16", SETUPTOOLS, "<81"),
)
_UNKNOWN_TO_MLFLOW = ("starlette", SETUPTOOLS)
# What `mlflow` brings, in any release, and `mlflow-skinny` with pandas does not: distributions by their modules.
# tests/wheels/test_named_modules.py compares it with the newest release.
BROUGHT = {
    **dict.fromkeys(("matplotlib", "mpl_toolkits", "pylab"), "matplotlib"),
    "PIL": "pillow",
    "attr": "attrs",
    "fontTools": "fonttools",
    "graphql": "graphql-core",
    "sklearn": "scikit-learn",
    **{name.replace("-", "_"): name for name in ("flask-cors", "graphql-relay", "querystring-parser")},
    "prometheus_flask_exporter": "prometheus-flask-exporter",
    **{
        name: name
        for name in (
            *("aiohttp", "alembic", "attrs", "blinker", "contourpy", "cryptography", "cycler", "docker", "entrypoints"),
            *("flask", "graphene", "greenlet", "gunicorn", "huey", "itsdangerous", "jinja2", "joblib", "kiwisolver"),
            *("mako", "markdown", "markupsafe", "multidict", "narwhals", "prettytable", "pyarrow"),
            *("pyparsing", "pytz", "scipy", "skops", "sqlalchemy", "sqlparse", "tabulate", "threadpoolctl"),
            *("waitress", "wcwidth", "werkzeug", "yarl"),
        )
    },
}
# What comes with another one of these wherever that is installed.
COMES_WITH = {"joblib": "scikit-learn", "scipy": "scikit-learn", "threadpoolctl": "scikit-learn"}
# Methods of pandas that import one of these, by their names.
IMPLIED = {
    **dict.fromkeys(("read_parquet", "to_parquet", "read_feather", "to_feather", "read_orc", "to_orc"), "pyarrow"),
    **dict.fromkeys(("read_sql", "read_sql_query", "read_sql_table", "to_sql"), "sqlalchemy"),
}
_RELEASE = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9}){1,9}")


def release_of(text: str) -> Version | None:
    """Return the release that a text names; None where it is not a plain number."""
    return _version(text) if _RELEASE.fullmatch(text) else None


def _version(text: str) -> Version:
    from packaging.version import Version

    return Version(text)


def resolved_release(specifier: str, logged: str) -> Version | None:
    """Return the release that a resolver takes, or one that is served as it is; None for the newest.

    Args:
        specifier: of the requirement, `>=2.10,<3`; what cannot be read leaves the release open.
        logged: the release that logged the model, which is preferred where the specifier allows it; may be empty.
    """
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        allowed = SpecifierSet(specifier)
    except InvalidSpecifier:
        allowed = SpecifierSet()
    if logged and allowed.contains(logged, prereleases=True):
        return release_of(logged)
    if allowed.contains("999"):
        return None
    ends = (f"{major}.{minor}.99" for major, most in ((3, 99), (2, 22), (1, 30)) for minor in range(most, -1, -1))
    exact = [one.version for one in allowed if one.operator in {"==", "<=", "~="}]
    return max(
        map(_version, (one for one in (*ends, *exact) if release_of(one) and allowed.contains(one))), default=None
    )


def server_of(release: Version | None) -> tuple[str, str]:
    """Return the module of a release's scoring server and its argument; the newest one's for None."""
    return ASGI if release is None or release >= _version(_FIRST_ASGI) else WSGI


def needs_of(release: Version | None) -> tuple[str, ...]:
    """Return the packages that a release's scoring server imports, and `mlflow-skinny` does not require."""
    return ("pandas", "uvicorn") if server_of(release) == ASGI else ("pandas", "flask", "gunicorn")


def bounds_of(release: Version | None) -> tuple[tuple[str, str], ...]:
    """Return the bounds that a release's server needs: a package and a specifier each; none for None."""
    if release is None:
        return ()
    return tuple((name, bound) for first, end, name, bound in _BOUNDS if _version(first) <= release < _version(end))


REQUIREMENTS = "requirements.txt"
MLMODEL, PYTHON_ENV, CONDA = "MLmodel", "python_env.yaml", "conda.yaml"
_LIMIT = 1 << 20
# Words of requirements.txt that could be paths; each is looked up in the model folder.
_MOST_PATHS = 10_000
_PYTHON = re.compile(r"(3\.[0-9]{1,2})(?![0-9])")
_CONDA_PYTHON = re.compile(r"(?:[^\s:]{1,99}::)?python[ \t]{0,9}={1,2}[ \t]{0,9}(3\.[0-9]{1,2})(?![0-9])")
# `2022-05-01 12:34:56.789`: what MLflow writes, and no more than that is read.
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9:.+Z]{5,32}\Z")
# MLflow's first; an earlier time is invalid.
_FIRST_YEAR = 2018
_PINNED = re.compile(r"==\s*([0-9]{1,9}(?:\.[0-9]{1,9}){1,9})(?![0-9])")
_SPECIFIER = re.compile(r"[<>=!~]=?=?[^;#@\[\]]{1,200}")
_REQUIREMENT_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """An environment, as the files of a model folder describe it.

    Attributes:
        python_version: major and minor, `3.11`; empty where it is not known.
        mlflow_version: the release of MLflow that logged the model; empty where it is not known.
        logged: when the model was logged, in UTC; None where it is not known.
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
        """Return the environment of the model in `context / model_folder`; missing files are skipped.

        Raises:
            InvalidVersion: a file is a link, too large or not YAML; requirements.txt is not UTF-8, or has too many
                words that could be paths.
        """
        model = read_description(context, model_folder, MLMODEL)
        logged = model.get("mlflow_version")
        mlflow = logged if isinstance(logged, str) and _RELEASE.fullmatch(logged) else ""
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
    content = read_beneath(context, f"{model_folder}/{name}", MOST_YAML_BYTES if name == MLMODEL else _LIMIT)
    return {} if content is None else read_mapping(content, f"{model_folder}/{name}")


def _python(context: Path, model_folder: str, model: dict[str, Yaml]) -> str:
    """Return the model's Python, major and minor: of python_env.yaml, else conda.yaml, else MLmodel, as MLflow."""
    python = read_description(context, model_folder, PYTHON_ENV).get("python")
    if isinstance(python, str) and (found := _PYTHON.match(python)):
        return found[1]
    entries = read_description(context, model_folder, CONDA).get("dependencies")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, str) and (found := _CONDA_PYTHON.match(entry)):
            return found[1]
    flavors = model.get("flavors")
    pyfunc = flavors.get("python_function") if isinstance(flavors, dict) else None
    python = pyfunc.get("python_version") if isinstance(pyfunc, dict) else None
    found = _PYTHON.match(python) if isinstance(python, str) else None
    return found[1] if found else ""


def _logged(model: dict[str, Yaml]) -> datetime | None:
    """Return when MLmodel says that the model was logged, in UTC; None where it has no valid time."""
    text = model.get("utc_time_created")
    if not isinstance(text, str) or not _TIME.match(text):
        return None
    try:
        found = datetime.fromisoformat(text)
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

    Where neither `mlflow` nor `mlflow-skinny` is listed, the latter is added in the release that logged the model.
    Where one is listed that leaves its release open, that release is added, if it fits.
    """
    listed: dict[str, str] = {}
    for line in lines:
        if name := _REQUIREMENT_NAME.match(line):
            listed[re.sub(r"[-_.]+", "-", name[1]).lower()] = line
    asked = next((name for name in ("mlflow", "mlflow-skinny") if name in listed), "")
    pinned = _PINNED.search(listed.get(asked, ""))
    release = resolved_release("==" + pinned[1] if pinned else _specifier(listed.get(asked, "")), logged)
    server = server_of(release)
    bounds = dict(bounds_of(release))
    names = [name for name in _UNKNOWN_TO_MLFLOW if name in bounds]
    if "mlflow" not in listed:
        # A bound on what only others require, numpy, has no place on pip's command line.
        names += needs_of(release)
    needs = [f"{name}{bounds.get(name, '')}" for name in names]
    if not asked:
        needs.insert(0, f"mlflow-skinny=={logged}" if logged else "mlflow-skinny")
    elif not pinned and str(release) == logged:
        needs.insert(0, f"{asked}=={logged}")
    # No MLflow that imports pkg_resources starts without it, so that its bound counts beside what the model pins.
    own = listed.keys() - {SETUPTOOLS}
    return server, tuple(need for need in needs if need.split("<")[0] not in own)


def _specifier(line: str) -> str:
    """Return what a requirement's line says of releases, `>=2.10,<3`; empty where it has none."""
    found = _SPECIFIER.search(line)
    return found[0] if found else ""


_log = get_logger("mlmodel")
PYFUNC = "python_function"
# Where a flavor keeps a path below the model's folder. `env` and `code` are not among them: a model loads without.
_PATHS = frozenset(
    {"data", "model_code_path", "model_path", "model_data", "model_file", "model_binary"}
    | {"pickled_model", "python_model"}
)
# Those that MLflow's own loaders read with pickle or torch.
_LOADED = frozenset({"data", "model_data", "model_path", "pickled_model", "python_model"})
_TORCH = "model.pth"
_SHOWN, _MOST_SHOWN = 300, 10
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_JAVA = re.compile(r"(?:mlflow\.(?:spark|h2o|mleap|johnsnowlabs)|pyspark|sparknlp|h2o|pysparkling)(?![^.])")


def needs_java(loader: str) -> bool:
    """Return whether a loader starts a Java program: Spark's and H2O's do."""
    return bool(_JAVA.match(loader))


def check_served(context: Path, folder: str, paths: Collection[str]) -> None:
    """Refuse a model that MLflow's scoring server would not load.

    Args:
        context: folder of the version's artifacts; MLmodel is enough.
        folder: the model's folder in it.
        paths: of all artifacts.

    Raises:
        InvalidVersion: MLmodel is missing or has no flavor `python_function` with a loader, or it names a file that is
            not there and that no part of the folder can be meant by. Where the loader may do without, it is a warning.
    """
    name = f"{folder}/{MLMODEL}" if folder else MLMODEL
    content = read_beneath(context, name, MOST_YAML_BYTES)
    if content is None:
        message = f"The folder {one_line(folder, _SHOWN)!r} has no file {MLMODEL}, and the version has no client."
        raise InvalidVersion(message, remedy="Log a model into it, or log a client and set MODEL_ENTRY_POINT.")
    model = read_description(context, folder, MLMODEL)
    flavors = model.get("flavors")
    pyfunc = flavors.get(PYFUNC) if isinstance(flavors, dict) else None
    loader = pyfunc.get("loader_module") if isinstance(pyfunc, dict) else None
    if not loader or not isinstance(loader, str):
        has = ", ".join(map(repr, flavors)) if isinstance(flavors, dict) and flavors else "none"
        what = f"no flavor {PYFUNC}" if not isinstance(pyfunc, dict) else f"a flavor {PYFUNC} without loader_module"
        message = f"{one_line(name, _SHOWN)} has {what}, which is what MLflow's scoring server loads; "
        message += f"its flavors: {one_line(has, _SHOWN)}."
        remedy = "Log the model by a flavor that has it (mlflow.pyfunc and most others do), or log a client that loads "
        raise InvalidVersion(message, remedy=f"{remedy}the model, and set MODEL_ENTRY_POINT.")
    _, missing = _repairs(model, folder, paths)
    if missing:
        _log.warning("files that MLmodel names are not in the model's folder", model=folder, names=missing)


def loader_of(model: dict[str, Yaml]) -> str:
    """Return the module that MLflow's scoring server loads a model with; empty for none.

    Args:
        model: the content of MLmodel.
    """
    loader = _mapping(_mapping(model.get("flavors")).get(PYFUNC)).get("loader_module")
    return loader if isinstance(loader, str) else ""


def code_of(model: dict[str, Yaml], folder: str) -> str | None:
    """Return the folder that MLflow makes modules of a model importable from; empty for none, None for another place.

    That is never the model's own folder: `mlflow.pyfunc` puts on `sys.path` what `code` names, and nothing else.

    Args:
        model: the content of MLmodel.
        folder: the model's folder.
    """
    code = _mapping(_mapping(model.get("flavors")).get(PYFUNC)).get("code")
    if not code:
        return ""
    path = posixpath.normpath(posixpath.join(folder, code)) if isinstance(code, str) else ""
    return path if path == folder or path.startswith(f"{folder}/") else None


def loaded_files(model: dict[str, Yaml], folder: str) -> set[str]:
    """Return the files that a loader of MLflow's own reads as it loads a model; none for another loader.

    Args:
        model: the content of MLmodel.
        folder: the model's folder.
    """
    if not loader_of(model).startswith("mlflow."):
        return set()
    named = {posixpath.normpath(f"{folder}/{value}") for keys, value in _named(model) if keys[-1] in _LOADED}
    return named | {f"{name}/{_TORCH}" for name in named}


def repaired(context: Path, folder: str, paths: Collection[str]) -> bytes | None:
    """Return MLmodel with the paths that were written on Windows as they are in the folder; None for no change.

    Everything else in the file stays as it is, to the byte.

    Args:
        context: folder of the version's artifacts; MLmodel is enough.
        folder: the model's folder in it.
        paths: of all artifacts.

    Raises:
        InvalidVersion: as `check_served`, of a path.
    """
    name = f"{folder}/{MLMODEL}" if folder else MLMODEL
    content = read_beneath(context, name, MOST_YAML_BYTES)
    if content is None:
        return None
    changes, _ = _repairs(read_description(context, folder, MLMODEL), folder, paths)
    if not changes:
        return None
    old, position = content.decode("utf-8-sig"), 0
    pieces: list[str] = []
    for keys, (begin, end) in sorted(scalar_places(content, name, set(changes)).items(), key=lambda place: place[1]):
        pieces += old[position:begin], json.dumps(changes[keys], ensure_ascii=False)
        position = end
    text = "".join([*pieces, old[position:]])
    if _repairs(_mapping(read_yaml(text.encode(), name)), folder, paths)[0]:
        message = f"{one_line(name, _SHOWN)} has paths that were written on Windows, in a form that is not repaired."
        raise InvalidVersion(message, remedy="Log the model again, on Linux or with a later release of MLflow.")
    return text.encode()


def _repairs(
    model: dict[str, Yaml], folder: str, paths: Collection[str]
) -> tuple[dict[tuple[str, ...], str], list[str]]:
    """Return what the paths in MLmodel have to become, by their keys, and some that are missing, for people.

    Those that are right are in neither.
    """
    there = _below(folder, paths)
    ordered = sorted(there)
    changes: dict[tuple[str, ...], str] = {}
    missing: list[str] = []
    for keys, value in _named(model):
        # MLflow itself takes the last part of this one, by the rules of the system it runs on.
        plain = posixpath.basename(value) if keys[-1] == "model_code_path" else posixpath.normpath(value)
        if plain in there or plain == "." or _begins_one(plain, ordered):
            continue
        windows = "\\" in value and not _URL.match(value)
        last = value.replace("\\", "/").rstrip("/").rpartition("/")[2]
        slashes = posixpath.normpath(value.replace("\\", "/"))
        found = slashes if slashes in there else last if last in there else None
        if windows and found is not None:
            changes[keys] = found
        elif not windows and _dispensable(model, keys, value):
            if len(missing) < _MOST_SHOWN:
                missing.append(one_line(value, _SHOWN))
        else:
            message = f"{one_line(f'{folder}/{MLMODEL}', _SHOWN)} names {one_line(value, _SHOWN)!r} "
            message += f"({one_line('.'.join(keys), _SHOWN)}), and there is no such file in the model's folder."
            message += " It is a path of the Windows machine that logged the model." if windows else ""
            raise InvalidVersion(message, remedy="Log the model again with all of its files, and register it again.")
    return changes, missing


def _begins_one(path: str, ordered: Sequence[str]) -> bool:
    """Return whether a name among some begins with a path and a dot: Paddle and sktime put endings behind theirs."""
    place = bisect_left(ordered, f"{path}.")
    return place < len(ordered) and ordered[place].startswith(f"{path}.")


def _dispensable(model: dict[str, Yaml], keys: tuple[str, ...], value: str) -> bool:
    """Return whether a model may load without a file: its loader is not MLflow's, or has a URL or an empty folder.

    Object stores have no empty folders, and MLflow hands an artifact's path to the model without a look at it.
    """
    folder = keys[-1] == "path" and "." not in posixpath.basename(value)
    return folder or bool(_URL.match(value)) or not loader_of(model).startswith("mlflow.")


def _named(model: dict[str, Yaml]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the paths that the loaded flavors name, each with the keys that lead to it."""
    flavors = _mapping(model.get("flavors"))
    pyfunc = _mapping(flavors.get(PYFUNC))
    loader = pyfunc.get("loader_module")
    own = loader.rpartition(".")[2] if isinstance(loader, str) and loader.startswith("mlflow.") else ""
    for flavor in dict.fromkeys((PYFUNC, own)):
        for key, value in _mapping(flavors.get(flavor)).items():
            if key in _PATHS and isinstance(value, str) and value:
                yield ("flavors", flavor, key), value
    for name, artifact in _mapping(pyfunc.get("artifacts")).items():
        path = _mapping(artifact).get("path")
        if isinstance(path, str) and path:
            yield ("flavors", PYFUNC, "artifacts", name, "path"), path


def _below(folder: str, paths: Collection[str]) -> set[str]:
    """Return the files and folders of a folder, relative to it."""
    prefix = f"{folder}/" if folder else ""
    found: set[str] = set()
    for path in paths:
        if path.startswith(prefix):
            inner = path.removeprefix(prefix)
            while inner and inner not in found:
                found.add(inner)
                inner = inner.rpartition("/")[0]
    return found


def _mapping(value: Yaml) -> dict[str, Yaml]:
    return value if isinstance(value, dict) else {}
