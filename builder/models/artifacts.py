"""What a context may be made of: paths that are safe, and files that do not collide.

An artifact's path is any string an artifact store could hold, so it is data of a stranger. What passes here is a
relative path of ordinary components, in Unicode's normal form C, below which nothing else stands twice.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING
from urllib.parse import unquote

from builder.errors import InvalidVersion
from builder.models.version import TAG_MODEL_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from builder.models.catalog import Artifact
    from builder.models.version import Inputs

MODEL_FILE = "MLmodel"
MOST_FILES = 100_000
MOST_FOLDERS_DEEP = 64
# What may name modules: Python files, and what people call pickles and the archives that hold some.
_CODE = (".py",)
_PICKLES = (
    *(".cloudpickle", ".dill", ".fastai", ".jl", ".joblib", ".model", ".p", ".pck", ".pickle", ".pkl", ".pmd", ".pt"),
    *(".pth", ".sav", ".shap", ".skops", ".statsmodels"),
)
_PACKED = re.compile(r"\.(?:bz2|gz|lzma|xz|z)$")
# Linux's own limits, in bytes.
_LONGEST_PATH = 3000
_LONGEST_COMPONENT = 255
# Control characters, surrogates that no file name can hold, and Unicode's line and paragraph separators.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_SHOWN = 200


def checked_path(path: str) -> str:
    """Return an artifact's path in Unicode's normal form C, if a file may have it in the context.

    Args:
        path: the path as an artifact store gave it.

    Raises:
        InvalidVersion: the path is absolute, has an empty, `.` or `..` component, a backslash, a control character or
            a line break, or is longer than a file system takes.
    """
    problem = _problem(path)
    if problem:
        message = f"The artifact {path[:_SHOWN]!r} cannot be taken into the context: {problem}."
        raise InvalidVersion(message, remedy="Log the file under another name and register the model again.")
    return unicodedata.normalize("NFC", path)


def _problem(path: str) -> str:
    """Return what is wrong with an artifact's path; the empty string for nothing."""
    parts = path.split("/")
    problems = {
        "its path has a control character or a line break": any(
            unicodedata.category(character) in _REFUSED_CATEGORIES for character in path
        ),
        "its path has a backslash": "\\" in path,
        "its path is absolute": path.startswith("/"),
        "its path has a '..' and may leave the context": ".." in parts,
        "its path has a component that is empty or '.'": "." in parts or "" in parts,
        f"its path is more than {MOST_FOLDERS_DEEP} folders deep": len(parts) > MOST_FOLDERS_DEEP,
        "its path is longer than a file system takes": _too_long(path),
    }
    return next((problem for problem, there in problems.items() if there), "")


def _too_long(path: str) -> bool:
    encoded = unicodedata.normalize("NFC", path).encode("utf-8", "surrogatepass")
    return len(encoded) > _LONGEST_PATH or any(len(part) > _LONGEST_COMPONENT for part in encoded.split(b"/"))


def names_modules(path: str) -> bool:
    """Return whether a file may name the modules that the model needs: Python's source, or a pickle."""
    return path.endswith(_CODE) or _PACKED.sub("", path).endswith(_PICKLES)


def union(
    artifacts: Iterable[Artifact], *, same: Callable[[Artifact, Artifact], bool], whose: str
) -> tuple[Artifact, ...]:
    """Return artifacts ordered by path, each path once.

    The same file may stand twice, in the run and in the logged model; then the later one of `artifacts` is taken.

    Args:
        artifacts: files with checked paths.
        same: tells whether two artifacts have the same content; asked only where they have the same path.
        whose: the version they belong to, for errors.

    Raises:
        InvalidVersion: two files of different content have the same path, a file's path is another one's folder, or
            there are too many files.
    """
    found: dict[str, Artifact] = {}
    for artifact in artifacts:
        other = found.get(artifact.path)
        # Within one folder two paths are two files, however alike they are once normalised.
        if other and (other.root == artifact.root or not same(other, artifact)):
            message = f"{whose} has two different files at {artifact.path!r}: {_origin(other)} and {_origin(artifact)}."
            raise InvalidVersion(message, remedy="Remove one, or log it under another name, and register again.")
        found[artifact.path] = artifact
        if len(found) > MOST_FILES:
            message = f"{whose} has more than {MOST_FILES} files."
            raise InvalidVersion(message, remedy="Pack them into an archive before they are logged.")
    for path in found:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if (folder := "/".join(parts[:depth])) in found:
                message = f"{whose} has a file {folder!r} and a folder of the same name."
                raise InvalidVersion(message, remedy="Log one of them under another name, and register again.")
    return tuple(found[path] for path in sorted(found))


def _origin(artifact: Artifact) -> str:
    return f"{artifact.remote!r} ({'?' if artifact.size is None else artifact.size} bytes)"


def find_model_folder(paths: Iterable[str], inputs: Inputs) -> str:
    """Return the model folder: the one that MODEL_FOLDER names, else the one that holds MLmodel.

    Of several, the version's source names the one that was registered. A model may hold other models below its own
    folder; they do not count unless the source names them.

    Args:
        paths: the paths of the context's files.
        inputs: what the version's tags ask for.

    Raises:
        InvalidVersion: MODEL_FOLDER names a folder that is not there; there is no MLmodel, or several; or it is in no
            folder.
    """
    paths = list(paths)
    if inputs.model_folder:
        if not any(path.startswith(f"{inputs.model_folder}/") for path in paths):
            message = f"The tag {TAG_MODEL_FOLDER} is {inputs.model_folder!r}, but there is no artifact in that folder."
            raise InvalidVersion(message, remedy=f"Set {TAG_MODEL_FOLDER} to the folder that holds {MODEL_FILE}.")
        return inputs.model_folder
    holders = {path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] == MODEL_FILE}
    outer = sorted(folder for folder in holders if holders.isdisjoint(_above(folder)))
    if not outer:
        message = f"No artifact is called {MODEL_FILE}, so there is no model folder."
        raise InvalidVersion(message, remedy=f"Log a model, or name its folder by the tag {TAG_MODEL_FOLDER}.")
    if folder := _named_by(inputs.source, holders):
        return folder
    if len(outer) > 1:
        names = ", ".join(repr(folder) for folder in outer[:10])
        message = f"Several folders hold a file {MODEL_FILE}: {names}."
        raise InvalidVersion(message, remedy=f"Name the one to publish by the tag {TAG_MODEL_FOLDER}.")
    if not outer[0]:
        message = f"The file {MODEL_FILE} is at the top of the version's artifacts, in no folder of its own."
        raise InvalidVersion(
            message,
            remedy=f"Log the model in a folder; a logged model's can be named by the tag {TAG_MODEL_FOLDER}.",
        )
    return outer[0]


def _named_by(source: str, folders: Collection[str]) -> str:
    """Return the folder that a version's source ends with, the longest if there are several; empty for none."""
    source = "/" + source.strip("/")
    ways = {unicodedata.normalize("NFC", each) for each in (source, unquote(source))}
    return max(
        (folder for folder in folders if folder and any(way.endswith(f"/{folder}") for way in ways)),
        key=len,
        default="",
    )


def _above(folder: str) -> Iterator[str]:
    """Yield the folders that a folder lies in, itself and the root apart."""
    end = folder.find("/")
    while end >= 0:
        yield folder[:end]
        end = folder.find("/", end + 1)
