"""What is written back to the model version, at which moment of its publishing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from builder.errors import BuilderError
from builder.log import masked
from builder.models.catalog import Catalog
from builder.models.outcome import Outcome
from builder.models.outcome import record as write
from builder.models.version import ModelVersion
from builder.plan import Plan
from builder.reference import Reference
from builder.settings import Settings


def started(catalog: Catalog, plan: Plan) -> None:
    """Record that work on the version has begun: one more attempt at this source."""
    before = Outcome.of(plan.version, plan.target)
    attempts = before.attempts + 1 if before.source_id == plan.source_id else 1
    now = _changed(
        before, state="running", source_id=plan.source_id, tag=str(plan.reference), attempts=attempts, error=""
    )
    write(catalog, plan.version, now)


def succeeded(catalog: Catalog, plan: Plan, version: ModelVersion, pinned: Reference) -> None:
    """Record what stands in the registry; a version whose tags say so already is left untouched.

    Args:
        catalog: where to write.
        plan: what was done.
        version: the version as MLflow has it now.
        pinned: the digest reference.
    """
    before = Outcome.of(version, plan.target)
    now = _changed(
        before,
        state="published",
        image=str(pinned),
        tag=str(plan.reference),
        source_id=plan.source_id,
        platforms=tuple(sorted(str(step.platform) for step in plan.platforms)),
        error="",
    )
    if plan.action != "nothing" or now != before:
        write(catalog, version, _changed(now, finished=_now()))


def left_alone(catalog: Catalog, plan: Plan, version: ModelVersion) -> None:
    """Record that the tag holds an image that is not ours."""
    before = Outcome.of(version, plan.target)
    now = _changed(
        before,
        state="foreign",
        image="",
        tag=str(plan.reference),
        source_id=plan.source_id,
        platforms=(),
        error=plan.reason,
    )
    if now != before:
        write(catalog, version, _changed(now, finished=_now()))


@contextmanager
def failures(settings: Settings, catalog: Catalog, version: ModelVersion) -> Iterator[None]:
    """Record what fails inside on the version, and let it through.

    An image that stands is not called a failure because a service was away for a moment.
    """
    try:
        yield
    except BuilderError as error:
        source = version.source_id(settings.build_method)
        before = Outcome.of(version, settings.target)
        same = before.source_id == source
        if not (before.state == "published" and same and error.retryable):
            # An attempt that `started` counted is not counted again.
            attempts = before.attempts if same else 0
            attempts += before.state != "running" or not same
            text = masked(error.one_line())
            now = _changed(before, state="failed", source_id=source, error=text, attempts=attempts, finished=_now())
            write(catalog, version, now)
        raise


def _changed(outcome: Outcome, **facts: object) -> Outcome:
    return outcome.model_copy(update=facts)


def _now() -> str:
    return datetime.now(tz=UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
