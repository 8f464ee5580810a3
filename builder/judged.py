"""What is judged of a version without a Dockerfile from its description alone, before anything large is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from builder.build.environment import MLMODEL, read_description
from builder.build.mlmodel import check_served, loader_of, repaired
from builder.build.template import client_command
from builder.errors import InvalidVersion, one_line
from builder.log import get_logger
from builder.models.artifacts import find_model_folder
from builder.models.version import Inputs, ModelVersion, template_variables
from builder.settings import Settings

_log = get_logger("judged")


def judged(settings: Settings, version: ModelVersion, context: Path, paths: Sequence[str]) -> dict[str, bytes]:
    """Refuse a model that cannot be served; return the files of it that have to be others in the image, by path.

    A version with a client loads its model as it likes: what is wrong is a warning then.

    Args:
        settings: for what commands may name.
        version: the version.
        context: the folder its artifacts are in; what describes the model is enough.
        paths: of its artifacts.

    Raises:
        InvalidVersion: MLflow's scoring server could not load the model, or the entry point is no file of the client.
    """
    folder, client = _served_by(settings, version, context, paths)
    try:
        check_served(context, folder, paths)
        changed = repaired(context, folder, paths)
    except InvalidVersion as error:
        if not client:
            raise
        _log.warning("MLflow could not load the model; its client has to", why=one_line(error.what))
        return {}
    if changed is None:
        return {}
    _log.warning("paths in MLmodel were written on Windows, and are repaired in the image", model=folder)
    return {f"{folder}/{MLMODEL}": changed}


def loaded_by(settings: Settings, version: ModelVersion, context: Path, paths: Sequence[str]) -> tuple[str, bool]:
    """Return the module that MLflow's scoring server loads a model by, and whether a client runs in its place.

    Args:
        settings: for what commands may name.
        version: the version.
        context: the folder its artifacts are in; what describes the model is enough.
        paths: of its artifacts.

    Raises:
        InvalidVersion: MLmodel cannot be read, or the entry point is no file of the client.
    """
    folder, client = _served_by(settings, version, context, paths)
    return loader_of(read_description(context, folder, MLMODEL)), client


def _served_by(settings: Settings, version: ModelVersion, context: Path, paths: Sequence[str]) -> tuple[str, bool]:
    """Return the model's folder, and whether the version has a client."""
    inputs = Inputs.of(version)
    folder = find_model_folder(paths, inputs)
    inputs = inputs.model_copy(update={"model_folder": folder})
    variables = template_variables(version, inputs, settings.component_of(version.name))
    return folder, bool(client_command(context, variables))
