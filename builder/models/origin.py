"""Where a version's files are: its run's artifacts, its logged model's, or a folder that belongs to neither.

How MLflow says so (seen with 3.17, whose REST answers never fill `model_id`):

* registered from a logged model, by any API: source `models:/m-…`; the run's id too, where there was a run;
* `create_model_version` with a source `runs:/…/name`: kept as it is, the files are a logged model's or the run's;
* registered from files of a run, the only way of MLflow 2: the URI of a folder, as a rule below the run's artifacts;
* copied: `models:/<name>/<version>` of the first one.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from builder.errors import BuilderError, InvalidVersion, VersionNotFound
from builder.models.answers import answering
from builder.models.artifacts import checked_path
from builder.models.store import Root
from builder.models.version import TAG_MODEL_FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from builder.models.version import Inputs, ModelVersion

LOGGED_MODEL = re.compile(r"models:/+(m-[0-9A-Za-z]+)/?")
_OTHER_VERSION = re.compile(r"models:/+(?P<name>[^/].*)/(?P<version>[0-9]+)/?", re.DOTALL)
_IN_RUN = re.compile(r"runs:/+(?P<run>[^/]+)/(?P<name>[^/]+).*", re.DOTALL)
_MOST_COPIES = 20
# MLflow's client puts it into the path of a request as it is.
_MODEL_ID = re.compile(r"[0-9A-Za-z_-]{1,100}")


class Origin:
    """Finds the artifact folders of versions.

    Args:
        client: MLflow's client.
        find: finds a version by name and number.
        server: the server, as errors name it.
        check: raises for an artifact folder that may not be read; called for each before it is used for anything.
    """

    def __init__(
        self,
        client: Any,
        find: Callable[[str, str], ModelVersion],
        server: str,
        check: Callable[[str], object],
    ) -> None:
        self._client = client
        self._find = find
        self._server = server
        self._check = check

    def roots(self, version: ModelVersion, inputs: Inputs) -> list[Root]:
        """Return the artifact folders a version is made of: the run's first, then the one its model is in.

        Raises:
            InvalidVersion: run or logged model no longer exist, or the model's folder has no name.
            BuilderError: what `check` raises.
        """
        source, run_id = self._source(version)
        run = self._run(run_id, version)
        model = self._logged_model(version, source, run)
        if model and not run:
            run = self._run(model.source_run_id or "", version)
        roots = [Root(self._checked(run.info.artifact_uri), "")] if run else []
        if model:
            location = self._checked(model.artifact_location)
            roots.append(Root(location, inputs.model_folder or checked_path(str(model.name))))
        elif _is_folder(source) and not (run and _within(source, roots[0].uri)):
            roots.append(Root(self._checked(source), self._folder_name(version, source, inputs)))
        if not roots:
            message = f"{version} was registered from {source[:200]!r}, and that run no longer exists."
            raise InvalidVersion(message, remedy="Register it again from a run that exists.")
        return roots

    def _checked(self, uri: object) -> str:
        self._check(str(uri))
        return str(uri)

    def _source(self, version: ModelVersion) -> tuple[str, str]:
        """Return source and run id of a version, or of the one that it was copied from."""
        source, run_id = version.source, version.run_id
        for _ in range(_MOST_COPIES):
            other = None if LOGGED_MODEL.fullmatch(source) else _OTHER_VERSION.fullmatch(source)
            if not other:
                return source, run_id
            try:
                first = self._find(other["name"], other["version"])
            except VersionNotFound:
                # The first one was deleted; MLflow keeps with the copy where its files are.
                with answering(f"find the files of {version}", server=self._server):
                    return self._client.get_model_version_download_uri(version.name, version.version), run_id
            source, run_id = first.source, first.run_id or run_id
        message = f"{version} is a copy of a copy, more than {_MOST_COPIES} times."
        raise InvalidVersion(message, remedy="Register it from its run or its logged model.")

    def _run(self, run_id: str, version: ModelVersion) -> Any:
        """Return MLflow's Run; None where there is none, or no longer."""
        if not run_id:
            return None
        with suppress(VersionNotFound), answering(f"find run {run_id} of {version}", server=self._server):
            return self._client.get_run(run_id)
        return None

    def _logged_model(self, version: ModelVersion, source: str, run: Any) -> Any:
        """Return MLflow's LoggedModel behind a version; None where its files are a run's, or nobody's."""
        named = LOGGED_MODEL.fullmatch(source)
        model_id = named[1] if named else version.model_id
        if model_id:
            return self._logged_model_by_id(model_id, version, gone=InvalidVersion)
        in_run = _IN_RUN.fullmatch(source)
        for model in self._models_of(run, version):
            if model.artifact_location.rstrip("/") == source.rstrip("/") or (in_run and model.name == in_run["name"]):
                return model
        return None

    def _models_of(self, run: Any, version: ModelVersion) -> Iterator[Any]:
        """Yield the models that a run logged, the last one first. MLflow 2 knows none."""
        for output in reversed(getattr(getattr(run, "outputs", None), "model_outputs", None) or []):
            # A logged model can be deleted under its run.
            with suppress(VersionNotFound):
                yield self._logged_model_by_id(output.model_id, version, gone=VersionNotFound)

    def _logged_model_by_id(self, model_id: str, version: ModelVersion, *, gone: type[BuilderError]) -> Any:
        if not _MODEL_ID.fullmatch(model_id):
            message = f"{version} has the logged model {model_id[:200]!r}, which is no id."
            raise InvalidVersion(message, remedy="Register it from its run or its logged model.")
        with answering(f"find the logged model {model_id} of {version}", server=self._server, gone=gone):
            return self._client.get_logged_model(model_id)

    def _folder_name(self, version: ModelVersion, source: str, inputs: Inputs) -> str:
        """Return the folder of the context for files that belong to no run and no logged model."""
        folder = inputs.model_folder or source.rstrip("/").rpartition("/")[2]
        if folder in {"", "artifacts"}:
            message = f"{version} names neither a run nor a logged model, so its model folder has no name."
            raise InvalidVersion(message, remedy=f"Give it one by the tag {TAG_MODEL_FOLDER}.")
        return checked_path(folder)


def _is_folder(source: str) -> bool:
    return bool(source) and not source.startswith(("runs:", "models:"))


def _within(uri: str, folder: str) -> bool:
    """Return whether one artifact URI lies below another; a path and a `file:` URI may name the same folder."""

    def plain(text: str) -> str:
        return re.sub(r"^file:/*", "/", text).rstrip("/") + "/"

    return plain(uri).startswith(plain(folder))
