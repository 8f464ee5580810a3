"""Names of artifacts that MLflow's client does not take from a server: it says 'Invalid path', and not which."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from builder.errors import InvalidVersion, one_line

_SHOWN = 200
_ENDPOINT = "/mlflow-artifacts/artifacts"


@contextmanager
def naming_refused(repository: Any, path: str) -> Iterator[None]:
    """Turn MLflow's refusal of a name in a listing into an error that names the artifact; all else passes.

    Args:
        repository: MLflow's artifact repository of a folder that the server hands on.
        path: of the folder that is listed, below it.

    Raises:
        InvalidVersion: an artifact's name has a backslash, leaves its folder, or cannot be used otherwise.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if "Invalid path" not in str(error):
            raise
        name = _refused(repository, path)
        if name is None:
            raise
        why = "a backslash" if "\\" in name else "characters that MLflow's client does not take"
        message = f"The artifact {one_line(posixpath.join(path, name), _SHOWN)!r} cannot be read: its name has {why}."
        raise InvalidVersion(
            message, remedy="Log the file under another name, and register the model again."
        ) from error


def _refused(repository: Any, path: str) -> str | None:
    """Return the first name of a folder that MLflow's client does not take; None where the server lists none."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import augmented_raise_for_status, http_request
    from mlflow.utils.uri import validate_path_is_safe

    url, _, root = repository.artifact_uri.partition(_ENDPOINT)
    parameters = {"path": posixpath.join(root.lstrip("/"), path)}
    answer = http_request(get_default_host_creds(url), _ENDPOINT, "GET", params=parameters)
    augmented_raise_for_status(answer)
    for file in answer.json().get("files", []):
        try:
            validate_path_is_safe(file["path"])
        except MlflowException:
            return str(file["path"])
    return None
