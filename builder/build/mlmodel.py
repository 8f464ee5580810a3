"""What MLflow's scoring server will find in MLmodel: a flavor that it can serve, and files that are there."""

from __future__ import annotations

import json
import posixpath
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from builder.build.beneath import read_beneath
from builder.build.environment import MLMODEL, read_description
from builder.errors import InvalidVersion, one_line
from builder.log import get_logger
from builder.yaml_file import MOST_BYTES, read_yaml, scalar_places

if TYPE_CHECKING:
    from builder.yaml_file import Yaml

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
    content = read_beneath(context, name, MOST_BYTES)
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

    The model's own folder is none: `mlflow.pyfunc` puts on `sys.path` what `code` names, and nothing besides.

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
    content = read_beneath(context, name, MOST_BYTES)
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
        message = f"{one_line(name, _SHOWN)} has paths that were written on Windows, in a form that cannot be repaired."
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
