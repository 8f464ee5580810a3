"""What is to be registered, checked before anything is sent."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import InvalidVersion
from builder.models.answers import on_disk
from builder.models.artifacts import MODEL_FILE, checked_path
from builder.models.version import DEFAULT_TEMPLATES_FOLDER, Inputs, ModelVersion, wanted_platforms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    # Given a version as it will be and a folder with its artifacts, raises InvalidVersion if the templates are wrong.
    CheckTemplates = Callable[[ModelVersion, Path], object]

# The layout that publishing reads: this folder, `client/` and `templates/`, at the top of the run's artifacts.
MODEL_FOLDER = "mymodel"
_MOST_SKETCHED = 1 << 20


def check_candidate(
    name: str, tags: dict[str, str], folders: Mapping[str, Path], check_templates: CheckTemplates | None
) -> None:
    """Raise InvalidVersion if what is to be registered could not be published.

    Args:
        name: the registered model.
        tags: the version's tags.
        folders: the folders to be registered, by their names in the layout.
        check_templates: called last, with the version as it will be and a folder with the layout.
    """
    if not name.strip():
        message = "A registered model needs a name."
        raise InvalidVersion(message, remedy="Give it one.")
    version = ModelVersion(name=name, version="1", created_ms=0, tags=tags)
    inputs = Inputs.of(version)
    wanted_platforms(version, ())
    for folder, path in folders.items():
        _check_folder(folder, path)
    if not (folders[MODEL_FOLDER] / MODEL_FILE).is_file():
        message = f"{str(folders[MODEL_FOLDER])!r} is not a saved MLflow model: it holds no file {MODEL_FILE}."
        raise InvalidVersion(message, remedy="Save the model with mlflow.<flavor>.save_model, and name that folder.")
    _check_entry_point(inputs, folders)
    if check_templates:
        with tempfile.TemporaryDirectory(prefix="builder-check-") as temporary:
            _sketch(folders, Path(temporary))
            check_templates(version, Path(temporary))


def _check_entry_point(inputs: Inputs, folders: Mapping[str, Path]) -> None:
    """Raise InvalidVersion if the entry point is to be a file of the client folder and is not there."""
    client = folders.get(inputs.client_folder)
    entry_point = inputs.entry_point.removeprefix("/")
    if not entry_point or inputs.entry_point.startswith("/"):
        # Without one, or with a path in the image, there is nothing to compare with.
        return
    inside = entry_point.removeprefix(f"{inputs.client_folder}/")
    if client is None and DEFAULT_TEMPLATES_FOLDER in folders:
        # The author's own Dockerfile knows where it is.
        return
    if client is None or not ((client / inside).is_file() or (client / entry_point).is_file()):
        message = f"The entry point is {inputs.entry_point!r}, and the client folder has no such file."
        raise InvalidVersion(message, remedy="Name a file of the client folder, relative to it.")


def _check_folder(folder: str, path: Path) -> None:
    """Raise InvalidVersion if a folder is none, is empty, or holds what is not a plain file with a plain name."""
    if not path.is_dir():
        message = f"{str(path)!r}, to be registered as {folder}/, is not a folder."
        raise InvalidVersion(message, remedy="Name a folder that exists.")
    files = 0
    with on_disk(f"read {str(path)!r}"):
        for file, mode in _below(path):
            name = file.relative_to(path).as_posix()
            if not stat.S_ISREG(mode):
                message = f"{str(file)!r} is a link or a special file, and only files are registered."
                raise InvalidVersion(message, remedy="Put the file itself there.")
            if checked_path(f"{folder}/{name}") != f"{folder}/{name}":
                message = f"{str(file)!r} has a name that is not in Unicode's normal form C."
                raise InvalidVersion(message, remedy="Rename it.")
            files += 1
    if not files:
        message = f"{str(path)!r}, to be registered as {folder}/, is empty."
        raise InvalidVersion(message, remedy="Put files there, or leave the folder out.")


def _below(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the path and the mode of everything below a folder that is not a folder; links are not followed."""
    for root, folders, files in os.walk(folder):
        for name in [*files, *(name for name in folders if Path(root, name).is_symlink())]:
            yield Path(root, name), Path(root, name).lstat().st_mode


def _sketch(folders: Mapping[str, Path], destination: Path) -> None:
    """Lay out what templates are rendered from: their text, the model's description; all else as empty files."""
    for folder, path in folders.items():
        for file, _ in _below(path):
            target = destination / folder / file.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if folder == DEFAULT_TEMPLATES_FOLDER or file.parent == path:
                _copy_or_touch(file, target)
            else:
                target.touch()


def _copy_or_touch(file: Path, target: Path) -> None:
    if file.stat().st_size <= _MOST_SKETCHED:
        shutil.copyfile(file, target)
    else:
        target.touch()
