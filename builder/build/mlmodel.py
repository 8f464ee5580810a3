"""What MLflow's scoring server will find in MLmodel: a flavor that it can serve, and files that are there."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from builder.build.beneath import read_beneath
from builder.build.environment import MLMODEL, read_description
from builder.errors import InvalidVersion, one_line
from builder.yaml_file import MOST_BYTES, read_yaml, scalar_places

if TYPE_CHECKING:
    from builder.yaml_file import Yaml

PYFUNC = "python_function"
# Where a flavor keeps a path below the model's folder. `env` and `code` are not among them: a model loads without.
_PATHS = frozenset(
    {"data", "model_code_path", "model_path", "model_data", "model_file", "model_binary"}
    | {"pickled_model", "python_model"}
)
# Those that MLflow's own loaders read with pickle or torch.
_LOADED = frozenset({"data", "model_data", "model_path", "pickled_model", "python_model"})
_TORCH = "model.pth"
_SHOWN = 300
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
            not there and that no part of the folder can be meant by.
    """
    name = f"{folder}/{MLMODEL}" if folder else MLMODEL
    content = read_beneath(context, name, MOST_BYTES)
    if content is None:
        message = f"The folder {folder!r} has no file {MLMODEL}, and the version has no client."
        raise InvalidVersion(message, remedy="Log a model into it, or log a client and set MODEL_ENTRY_POINT.")
    model = read_description(context, folder, MLMODEL)
    flavors = model.get("flavors")
    pyfunc = flavors.get(PYFUNC) if isinstance(flavors, dict) else None
    loader = pyfunc.get("loader_module") if isinstance(pyfunc, dict) else None
    if not loader or not isinstance(loader, str):
        has = ", ".join(map(repr, flavors)) if isinstance(flavors, dict) and flavors else "none"
        what = f"no flavor {PYFUNC}" if not isinstance(pyfunc, dict) else f"a flavor {PYFUNC} without loader_module"
        message = (
            f"{name} has {what}, which is what MLflow's scoring server loads; its flavors: {one_line(has, _SHOWN)}."
        )
        remedy = "Log the model by a flavor that has it (mlflow.pyfunc and most others do), or log a client that loads "
        raise InvalidVersion(message, remedy=f"{remedy}the model, and set MODEL_ENTRY_POINT.")
    _repairs(model, folder, paths)


def loader_of(model: dict[str, Yaml]) -> str:
    """Return the module that MLflow's scoring server loads a model with; empty for none.

    Args:
        model: the content of MLmodel.
    """
    loader = _mapping(_mapping(model.get("flavors")).get(PYFUNC)).get("loader_module")
    return loader if isinstance(loader, str) else ""


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
    changes = _repairs(read_description(context, folder, MLMODEL), folder, paths)
    if not changes:
        return None
    text = content.decode("utf-8-sig")
    places = scalar_places(content, name, set(changes))
    for keys in sorted(places, key=lambda keys: places[keys], reverse=True):
        begin, end = places[keys]
        text = text[:begin] + json.dumps(changes[keys], ensure_ascii=False) + text[end:]
    if _repairs(_mapping(read_yaml(text.encode(), name)), folder, paths):
        message = f"{name} has paths that were written on Windows, in a form that cannot be repaired."
        raise InvalidVersion(message, remedy="Log the model again, on Linux or with a later release of MLflow.")
    return text.encode()


def _repairs(model: dict[str, Yaml], folder: str, paths: Collection[str]) -> dict[tuple[str, ...], str]:
    """Return what the paths in MLmodel have to become, by their keys; those that are right are left out."""
    there = _below(folder, paths)
    changes = {}
    for keys, value in _named(model):
        shown = f"{folder}/{MLMODEL} names {one_line(value, _SHOWN)!r} ({'.'.join(keys)})"
        # MLflow itself takes the last part of this one, by the rules of the system it runs on.
        plain = posixpath.basename(value) if keys[-1] == "model_code_path" else posixpath.normpath(value)
        if plain in there or plain == ".":
            continue
        last = value.replace("\\", "/").rstrip("/").rpartition("/")[2]
        slashes = posixpath.normpath(value.replace("\\", "/"))
        found = slashes if slashes in there else last if last in there else None
        if found is None or "\\" not in value:
            message = f"{shown}, and there is no such file in the model's folder."
            windows = " It is a path of the Windows machine that logged the model." if "\\" in value else ""
            remedy = "Log the model again with all of its files, and register it again."
            raise InvalidVersion(message + windows, remedy=remedy)
        changes[keys] = found
    return changes


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
