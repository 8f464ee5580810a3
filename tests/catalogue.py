"""A synthetic catalogue: any number of tagged versions, written straight into the database of an MLflow server.

Registering them one by one, as people do, would take an hour for 10,000.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from builder.models import ModelVersion
from builder.publish.inspect import reference_of
from builder.publish.record import Outcome
from builder.settings import Settings

# Versions of one registered model.
_VERSIONS = 10
_MODEL = "INSERT INTO registered_models (name, creation_time, last_updated_time, description, workspace) VALUES "
_VERSION = (
    "INSERT INTO model_versions (name, version, creation_time, last_updated_time, description, user_id, current_stage, "
    "source, storage_location, run_id, status, workspace) VALUES "
)
_TAG = "INSERT INTO model_version_tags (name, version, key, value, workspace) VALUES "
_WORKSPACE = "default"
# Beside ours: what people and MLflow itself put on a version, so that a page is as large as a real one.
_OTHERS: Mapping[str, str] = {
    "MODEL_ENTRY_POINT": "serve.py",
    "MODEL_EXECUTE_PATH": "--workers 2",
    "owner": "data-science@example.com",
    "ticket": "MODEL-1234",
    "validated": "true",
}


def versions(count: int, *, target_tag: str, prefix: str) -> Iterator[ModelVersion]:
    """Yield made-up versions, ten of each model, each registered a second after the one before.

    Their names run against their ages: the oldest comes last by name.

    Args:
        count: how many.
        target_tag: the tag that selects them.
        prefix: of the models' names.
    """
    start = int(time.time() * 1000) - count * 1000
    for number in range(count):
        name = f"{prefix}-{count - number // _VERSIONS:06}"
        run = uuid.uuid4().hex
        yield ModelVersion(
            name=name,
            version=str(number % _VERSIONS + 1),
            created_ms=start + number * 1000,
            source=f"mlflow-artifacts:/0/{run}/artifacts/model",
            run_id=run,
            tags={target_tag: "true", **_OTHERS},
        )


def published(version: ModelVersion, settings: Settings) -> ModelVersion:
    """Return a version with the tags that a publish leaves."""
    reference = reference_of(settings, version)
    outcome = Outcome(
        target=settings.target,
        state="published",
        image=f"{reference.repository}@sha256:{uuid.uuid4().hex * 2}",
        tag=str(reference),
        source_id=version.source_id(),
        platforms=tuple(str(platform) for platform in settings.target_platforms),
        wanted=tuple(str(platform) for platform in settings.target_platforms),
        finished="2026-01-02T03:04:05Z",
        smoke_test="off",
    )
    return version.model_copy(update={"tags": {**version.tags, **outcome.tags()}})


def insert(database: Path, found: Sequence[ModelVersion]) -> None:
    """Write versions and their models into the SQLite database of an MLflow server, in one transaction."""
    created = {version.name: version.created_ms for version in reversed(found)}
    models = [(name, when, when, "", _WORKSPACE) for name, when in created.items()]
    rows = [
        (
            version.name,
            int(version.version),
            version.created_ms,
            version.created_ms,
            "",
            None,
            "None",
            version.source,
            version.source,
            version.run_id,
            "READY",
            _WORKSPACE,
        )
        for version in found
    ]
    tags = [
        (version.name, int(version.version), key, value, _WORKSPACE)
        for version in found
        for key, value in version.tags.items()
    ]
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for statement, values in ((_MODEL, models), (_VERSION, rows), (_TAG, tags)):
            connection.executemany(f"{statement} ({', '.join('?' * len(values[0]))})", values)
