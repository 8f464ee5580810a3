"""The newest version that one run registered: a Domino run, or a run of MLflow's.

Domino tags every MLflow run that is begun in one of its own with that one's id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from builder.errors import InvalidSettings, VersionNotFound
from builder.masking import one_line
from builder.models.errors import answering

if TYPE_CHECKING:
    from builder.models import ModelVersion
    from builder.models.catalog import MlflowCatalog

DOMINO_RUN_TAG = "mlflow.domino.run_id"
_RUN_ID = re.compile(r"[0-9A-Za-z_-]{1,100}")
_PAGE = 1000
_REMEDY = "Name the version: MODEL_NAME and MODEL_VERSION, or two arguments."


def newest_of_run(catalog: MlflowCatalog, tag: str, *, domino_run: str = "", mlflow_run: str = "") -> ModelVersion:
    """Return the newest version that a run registered and that carries the target tag.

    Args:
        catalog: where the versions are.
        tag: the target tag.
        domino_run: as DOMINO_RUN_ID; all MLflow runs that were begun in it count.
        mlflow_run: as MLFLOW_RUN_ID, which counts alone if it is given.

    Raises:
        VersionNotFound: the run registered no version, or selected none of them.
        InvalidSettings: there is no run, or its id is malformed.
    """
    name, run = ("MLFLOW_RUN_ID", mlflow_run) if mlflow_run else ("DOMINO_RUN_ID", domino_run)
    if not run:
        message = "No version is named, and neither MLFLOW_RUN_ID nor DOMINO_RUN_ID says which run registered it."
        raise InvalidSettings(message, remedy=_REMEDY)
    if not _RUN_ID.fullmatch(run):
        message = f"{name} is malformed: it should be a run's id, of letters, digits, '_' and '-'."
        raise InvalidSettings(message, remedy=_REMEDY)
    found = list(catalog.of_runs([mlflow_run] if mlflow_run else list(_begun_in(catalog, domino_run))))
    selected = [version for version in found if version.selected_by(tag)]
    if selected:
        return max(selected, key=lambda version: (version.created_ms, len(version.version), version.version))
    if not found:
        message = f"This run ({name}) has registered no model version."
        raise VersionNotFound(message, remedy=f"Register the model in it. {_REMEDY}")
    newest = max(found, key=lambda version: version.created_ms)
    message = f"This run ({name}) has registered {one_line(str(newest), 200)}, but no version with the tag {tag}=true."
    raise VersionNotFound(message, remedy=f"Set the tag {tag} to true. {_REMEDY}")


def _begun_in(catalog: MlflowCatalog, domino_run: str) -> Iterator[str]:
    """Yield the ids of the MLflow runs that were begun in a Domino run."""
    client, query = catalog.client, f"tags.`{DOMINO_RUN_TAG}` = '{domino_run}'"
    for experiments in _pages(catalog, "list experiments", client.search_experiments, max_results=_PAGE):
        ids = [experiment.experiment_id for experiment in experiments]
        found = _pages(
            catalog,
            "search the MLflow runs of this Domino run",
            client.search_runs,
            experiment_ids=ids,
            filter_string=query,
            max_results=_PAGE,
        )
        yield from (run.info.run_id for runs in found for run in runs)


def _pages(catalog: MlflowCatalog, what: str, search: Any, **asked: object) -> Iterator[Any]:
    token = None
    while True:
        with answering(what, server=catalog.server):
            page = search(**asked, page_token=token)
        yield page
        token = page.token
        if not token:
            return
