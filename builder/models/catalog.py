"""The catalog on an MLflow server. MLflow is imported at the first request, since that takes a second."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

from builder.domino import export, quiet_client
from builder.errors import BuilderError, InvalidVersion, PermissionRefused, VersionNotFound
from builder.log import get_logger
from builder.masking import one_line
from builder.models import TAG_MODEL_FOLDER, Inputs, ModelVersion, NearMisses, check_version_text
from builder.models.context import union
from builder.models.errors import answering
from builder.models.store import ArtifactRoots, ArtifactStore, Root
from builder.safe_open import checked_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from builder.models import Artifact
    from builder.settings import CatalogSettings
    from builder.urls import ArtifactUri


_IS_PROMPT = "mlflow.prompt.is_prompt"
_PAGE = 500
_RUNS = 100
_MOST_LISTED = 10_000
_MOST_MODELS = 1000
_log = get_logger("models")


class MlflowCatalog:
    """Registered models of one MLflow server; implements `builder.models.Catalog`.

    Args:
        tracking_uri: as MLFLOW_TRACKING_URI; MLflow's own variables, MLFLOW_REGISTRY_URI among them, count as ever.
        registry_uri: as MLFLOW_REGISTRY_URI; empty where it is not set.
        artifact_roots: as ALLOWED_ARTIFACT_ROOTS; empty for the server's own.
        page_size: how many versions a page of a search has.
    """

    def __init__(
        self,
        tracking_uri: str,
        *,
        registry_uri: str = "",
        artifact_roots: Sequence[ArtifactUri] = (),
        page_size: int = _PAGE,
    ) -> None:
        quiet_client()
        self.tracking_uri = tracking_uri
        self._page_size = page_size
        roots = ArtifactRoots(
            tracking_uri, registry_uri, named=artifact_roots, default_experiment=self._default_experiment
        )
        self.store = ArtifactStore(tracking_uri, roots)

    @classmethod
    def from_settings(cls, settings: CatalogSettings) -> Self:
        """Return the catalog of the settings' server. It sets variables in `os.environ`: see `domino.export`."""
        export(settings)
        registry = settings.mlflow_variables.get("MLFLOW_REGISTRY_URI")
        return cls(
            settings.mlflow_tracking_uri,
            registry_uri=registry.get_secret_value() if registry else "",
            artifact_roots=settings.allowed_artifact_roots,
        )

    @property
    def server(self) -> str:
        """The server as errors name it."""
        return f"MLFLOW_TRACKING_URI ({one_line(self.tracking_uri, 200)})"

    @cached_property
    def client(self) -> Any:  # mlflow.MlflowClient, which must not be imported to be named
        """MLflow's own client of this server."""
        from mlflow import MlflowClient

        with answering("open MLflow's client", server=self.server):
            return MlflowClient(tracking_uri=self.tracking_uri)

    def _default_experiment(self) -> str:
        """Return where the experiment that MLflow makes itself keeps its artifacts; the empty string for none."""
        try:
            with answering("find the Default experiment", server=self.server):
                return str(self.client.get_experiment("0").artifact_location or "")
        except (VersionNotFound, PermissionRefused, InvalidVersion) as error:
            _log.info("MLflow does not tell its artifact root", reason=error.what)
            return ""

    def find(self, name: str, version: str) -> ModelVersion:
        """Return one version, by number or by alias as `@alias`; errors as in `Catalog.find`."""
        check_version_text(version)
        client = self.client
        try:
            with answering(f"find model {name!r} version {version}", server=self.server):
                found = _version(
                    client.get_model_version_by_alias(name, version[1:])
                    if version.startswith("@")
                    else client.get_model_version(name, str(int(version)))
                )
        except InvalidVersion as error:
            # MLflow's answer for an alias that is not there, and for a name that no model can have.
            raise VersionNotFound(error.what, remedy="Check MODEL_NAME and MODEL_VERSION.") from error
        if _IS_PROMPT in found.tags:
            message = f"{found} is a prompt, not a model."
            raise VersionNotFound(message, remedy="Check MODEL_NAME.")
        return found

    def tagged(self, tag: str) -> Iterator[ModelVersion]:
        """Yield every version that carries `tag` with the value `true` in any case, page by page, by name and number.

        Prompts, which MLflow keeps beside models, are left out.
        """
        try:
            yield from self._search(f"tags.`{tag}` ILIKE 'true'", tag)
        except InvalidVersion as error:
            _log.info("MLflow cannot search by tag: every version is listed", tag=tag, reason=error.what)
            yield from self._search(None, tag)

    def of_runs(self, run_ids: Sequence[str]) -> Iterator[ModelVersion]:
        """Yield the versions that were registered from some MLflow runs."""
        for start in range(0, len(run_ids), _RUNS):
            some = ", ".join(f"'{run_id}'" for run_id in run_ids[start : start + _RUNS])
            yield from self._listed(f"run_id IN ({some})", "search versions by their runs")

    def _search(self, query: str | None, tag: str) -> Iterator[ModelVersion]:
        seen: set[tuple[str, str]] = set()
        for version in self._listed(query, f"search versions by the tag {tag}"):
            key = (version.name, version.version)
            if version.selected_by(tag) and key not in seen:
                seen.add(key)
                yield version

    def _listed(self, query: str | None, what: str) -> Iterator[ModelVersion]:
        """Yield the versions of a search, prompts left out; some may come twice."""
        token: str | None = None
        while True:
            with answering(what, server=self.server):
                page = self.client.search_model_versions(
                    filter_string=query,
                    max_results=self._page_size,
                    # By default the last changed comes first, and pages would shift while tags are set.
                    order_by=["name ASC", "version_number ASC"],
                    page_token=token,
                )
            for version in filter(None, map(self._readable, page)):
                if _IS_PROMPT not in version.tags:
                    yield version
            token = page.token
            if not token:
                return

    def near_misses(self, tag: str) -> NearMisses:
        """Return what is like a tag that selects nothing, among 10,000 versions and 1,000 registered models."""
        found = NearMisses(tag)
        for version in islice(self._listed(None, "list versions"), _MOST_LISTED):
            found.add(version)
        with answering("list registered models", server=self.server):
            models = self.client.search_registered_models(max_results=_MOST_MODELS)
        for model in models:
            found.add_model(model.name, dict(model.tags))
        return found

    @staticmethod
    def _readable(found: Any) -> ModelVersion | None:
        """Return our version for MLflow's; None, and a line in the log, for one that no publish could be made of."""
        try:
            version = _version(found)
            check_version_text(version.version)
            return version  # noqa: TRY300  # reads in order
        except (TypeError, ValueError, VersionNotFound) as error:
            _log.warning("a version is passed over: MLflow's answer on it cannot be read", error=type(error).__name__)
            return None

    def artifacts(self, version: ModelVersion) -> tuple[Artifact, ...]:
        """Return the files of the version's context; see `Catalog.artifacts`."""
        inputs = Inputs.of(version)
        roots = Origin(self.client, self.find, self.server, check=self.store.folder).roots(version, inputs)
        found = union(
            (file for root in roots for file in self.store.files(root)), same=self.store.same, whose=str(version)
        )
        if not found:
            if missing := [root.uri for root in roots if self.store.is_missing(root)]:
                message = f"{version} has no artifacts here: there is no folder {one_line(missing[-1], 200)!r}."
                remedy = (
                    "It is on the machine that logged the model. Log it to the MLflow server, and register it again."
                )
                raise InvalidVersion(message, remedy=remedy)
            message = f"{version} has no artifacts."
            raise InvalidVersion(message, remedy="Log its files and register it again.")
        return found

    def download(self, artifact: Artifact, destination: Path) -> None:
        """Write one artifact's bytes to the file `destination`; see `ArtifactStore.download`."""
        self.store.download(artifact, destination)

    def set_tags(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags on the version, in their order; others stay as they are.

        Raises:
            VersionNotFound: the version was deleted meanwhile.
        """
        for name, value in tags.items():
            with answering(f"set the tag {name} of {version}", server=self.server):
                self._registry.set_model_version_tag(version.name, version.version, name, value)

    @cached_property
    def _registry(self) -> Any:
        """The part of MLflow's client that sets a tag with one request.

        The client itself first reads the registered model with its latest versions, for each tag, to see that it is not
        a prompt. `find` and `tagged` have seen that.
        """
        part = getattr(self.client, "_get_registry_client", None)
        return part() if part else self.client


def _version(found: Any) -> ModelVersion:
    """Return our version for MLflow's."""
    source = found.source or ""
    logged = LOGGED_MODEL.fullmatch(source)
    return ModelVersion(
        name=found.name,
        version=str(found.version),
        created_ms=int(found.creation_timestamp),
        source=source,
        run_id=found.run_id or "",
        model_id=(logged[1] if logged else "") or getattr(found, "model_id", None) or "",
        tags=dict(found.tags),
    )


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
        """Return MLflow's Run; None where it does not exist, or no longer."""
        if not run_id:
            return None
        with suppress(VersionNotFound), answering(f"find run {run_id} of {version}", server=self._server):
            return self._client.get_run(run_id)
        return None

    def _logged_model(self, version: ModelVersion, source: str, run: Any) -> Any:
        """Return MLflow's LoggedModel behind a version; None where it has none."""
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
            message = f"{version} names the logged model {model_id[:200]!r}, which is not an id."
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
