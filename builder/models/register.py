"""Register a saved model in the layout, and with the tags, that publishing needs."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.errors import BuilderError, InvalidSettings, InvalidVersion, UsageError
from builder.log import get_logger
from builder.models import (
    DEFAULT_CLIENT_FOLDER,
    DEFAULT_TEMPLATES_FOLDER,
    TAG_BASE_IMAGE,
    TAG_CLIENT_FOLDER,
    TAG_ENTRY_POINT,
    TAG_EXECUTE_PATH,
    TAG_MODEL_FOLDER,
    TAG_PLATFORMS,
    TAG_TEMPLATES_FOLDER,
    Inputs,
    ModelVersion,
    wanted_platforms,
)
from builder.models.catalog import MlflowCatalog
from builder.models.context import MODEL_FILE
from builder.models.errors import answering, on_disk
from builder.models.store import Root
from builder.safe_open import checked_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from builder.settings import CatalogSettings

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
    """Raise InvalidVersion if a path is not a folder, is empty, or holds anything but plain files with plain names."""
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


DEFAULT_TARGET_TAG = "EXTERNAL_TARGET_PLTR_FOUNDRY"
_DEFAULT_EXPERIMENT = "Default"
_FLAVOR = re.compile(r"[a-z][a-z0-9_]*")
_log = get_logger("register")


def register(
    where: CatalogSettings | MlflowCatalog,
    model: Path,
    *,
    name: str,
    client: Path | None = None,
    templates: Path | None = None,
    entry_point: str = "",
    command_line: str = "",
    platforms: str = "",
    base_image: str = "",
    experiment: str = "",
    target_tag: str = "",
    select: bool = True,
    check_templates: CheckTemplates | None = None,
) -> ModelVersion:
    """Log a saved model with its client and templates in a run, and register it.

    Args:
        where: the MLflow server.
        model: folder of a saved MLflow model: it holds a file MLmodel.
        name: the registered model; made where it does not exist.
        client: folder of client programs; None for none.
        templates: folder with Dockerfile.template or Dockerfile.j2; None for the built-in template.
        entry_point: file of the client folder that the image runs (MODEL_ENTRY_POINT).
        command_line: command of the image where it has no entry point (MODEL_EXECUTE_PATH).
        platforms: platforms of this version, separated by commas (MODEL_PLATFORMS).
        base_image: base image of this version (MODEL_BASE_IMAGE).
        experiment: experiment of the run; made where it does not exist; empty for MLflow's default.
        target_tag: the target's tag; empty for the settings'.
        select: whether the version gets that tag, and so is published.
        check_templates: called before anything is sent, with the version as it will be and a folder with the layout.

    Returns:
        The version, with its tags.

    Raises:
        InvalidVersion: a folder is not what it should be or holds a link, a tag's value is not allowed in a Dockerfile,
            or MLflow does not take the name.
        ServiceUnavailable, PermissionRefused: as for every call to MLflow.
    """
    catalog = where if isinstance(where, MlflowCatalog) else MlflowCatalog.from_settings(where)
    target_tag = target_tag or getattr(where, "target_tag", DEFAULT_TARGET_TAG)
    folders = {
        folder: path
        for folder, path in (
            (MODEL_FOLDER, model),
            (DEFAULT_CLIENT_FOLDER, client),
            (DEFAULT_TEMPLATES_FOLDER, templates),
        )
        if path is not None
    }
    tags = {
        TAG_MODEL_FOLDER: MODEL_FOLDER,
        TAG_CLIENT_FOLDER: DEFAULT_CLIENT_FOLDER if client else "",
        TAG_TEMPLATES_FOLDER: DEFAULT_TEMPLATES_FOLDER if templates else "",
        TAG_ENTRY_POINT: entry_point,
        TAG_EXECUTE_PATH: command_line,
        TAG_PLATFORMS: platforms,
        TAG_BASE_IMAGE: base_image,
        target_tag: "true" if select else "",
    }
    tags = {tag: value for tag, value in tags.items() if value}
    check_candidate(name, tags, folders, check_templates)
    return _send(catalog, name, tags, folders, experiment or _DEFAULT_EXPERIMENT)


def register_model_object(
    where: CatalogSettings | MlflowCatalog,
    model: object,
    *,
    flavor: str,
    name: str,
    save: Mapping[str, Any] | None = None,
    **options: Any,  # what `register` takes
) -> ModelVersion:
    """Save a live model by its flavor into a temporary folder, and `register` that.

    Args:
        where: the MLflow server.
        model: an object that `mlflow.<flavor>.save_model` saves; for `pyfunc` a PythonModel.
        flavor: a module of MLflow: `sklearn`, `pyfunc`, `pytorch` and so on.
        name: the registered model.
        save: further arguments of `save_model`, such as `pip_requirements` or `input_example`.
        options: what else `register` takes.

    Raises:
        InvalidSettings: this flavor, or the library it needs, is not installed (mlflow-skinny has few).
        InvalidVersion: the flavor could not save the model, or as in `register`.
    """
    if not _FLAVOR.fullmatch(flavor):
        message = f"{flavor!r} is not a flavor of MLflow."
        raise UsageError(message, remedy="Name a module of MLflow, such as sklearn.")
    try:
        save_model = importlib.import_module(f"mlflow.{flavor}").save_model
    except (ImportError, AttributeError) as error:
        message = f"The flavor {flavor!r} of MLflow cannot be used here: {error}."
        raise InvalidSettings(message, remedy="Install mlflow and the model's own library.") from error
    argument = "python_model" if flavor == "pyfunc" else None
    with tempfile.TemporaryDirectory(prefix="builder-model-") as temporary:
        folder = Path(temporary, MODEL_FOLDER)
        try:
            if argument:
                save_model(path=str(folder), **{argument: model}, **(save or {}))
            else:
                save_model(model, str(folder), **(save or {}))
        except Exception as error:
            message = f"mlflow.{flavor} could not save the model: {type(error).__name__}: {error}."
            raise InvalidVersion(message, remedy="Save it with MLflow yourself, and register the folder.") from error
        return register(where, folder, name=name, **options)


def _send(
    catalog: MlflowCatalog, name: str, tags: Mapping[str, str], folders: Mapping[str, Path], experiment: str
) -> ModelVersion:
    """Log the folders in a run of the experiment, and register the model folder of it."""
    client, server = catalog.client, catalog.server
    with answering(f"start a run in the experiment {experiment!r}", server=server):
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else client.create_experiment(experiment)
        run = client.create_run(experiment_id, run_name=name[:250])
    run_id = run.info.run_id
    try:
        # The experiment's author chose where its artifacts go, and this user's credential is sent there.
        catalog.store.folder(run.info.artifact_uri)
        for folder, path in folders.items():
            with answering(f"log {str(path)!r} in run {run_id}", server=server, gone=InvalidVersion):
                client.log_artifacts(run_id, str(path), folder)
        _check_arrived(catalog, run.info.artifact_uri, folders)
        with answering(f"register model {name!r}", server=server):
            _ensure_model(client, name)
            version = client.create_model_version(
                name, source=f"{run.info.artifact_uri}/{MODEL_FOLDER}", run_id=run_id, tags=dict(tags)
            )
            client.set_terminated(run_id)
    except BuilderError:
        _end_in_vain(client, run_id)
        raise
    return catalog.find(name, str(version.version))


def _check_arrived(catalog: MlflowCatalog, uri: str, folders: Mapping[str, Path]) -> None:
    """Raise InvalidVersion unless the run holds what was logged: a '#' or '?' in a name gets lost on the way."""
    sent = {
        f"{folder}/{file.relative_to(path).as_posix()}": file.stat().st_size
        for folder, path in folders.items()
        for file in path.rglob("*")
        if file.is_file()
    }
    there = {artifact.path: artifact.size for artifact in catalog.store.files(Root(uri, ""))}
    lost = [path for path, size in sent.items() if path not in there or there[path] not in {None, size}]
    if lost:
        message = f"MLflow did not take {len(lost)} of {len(sent)} files as they are, {lost[0]!r} among them."
        raise InvalidVersion(message, remedy="Rename what has a '#', '?' or '%' in its name, and register again.")


def _ensure_model(client: Any, name: str) -> None:
    """Make the registered model unless it exists; MLflow's client is called as in `answering`."""
    try:
        client.create_registered_model(name)
    except Exception as error:
        # MLflow's own exception, which cannot be named without importing it first.
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise


def _end_in_vain(client: Any, run_id: str) -> None:
    """Mark the run as failed; what went wrong before matters more than whether that works."""
    try:
        with answering(f"end run {run_id}", server="MLflow"):
            client.set_terminated(run_id, "FAILED")
    except BuilderError as error:
        _log.warning("the run could not be ended", run=run_id, error=error.one_line())
