"""The sweep: every version that carries the target tag, published one after another, each in a child of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from builder.batch import Batch, Children, Result
from builder.budget import Budget
from builder.clients import connected
from builder.errors import BuilderError, InvalidVersion, OverBudget, VersionCrashed
from builder.log import get_logger
from builder.models import Catalog, ModelVersion, natural_order, wanted_platforms
from builder.models.catalog import MlflowCatalog
from builder.publish import publish_version, refuse_untrusted, workspace_of
from builder.publish.inspect import reference_of
from builder.publish.record import Outcome, Record
from builder.settings import Settings
from builder.workspace import Workspace

log = get_logger("sweep")
MODULES = ("mlflow", "builder.batch.sweep", "builder.publish.prepare", "builder.publish.assemble")
_SWEEP = Batch(kind=Result, logger="sweep", modules=MODULES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a sweep treats what it finds.

    Attributes:
        check: look at the registry for published versions too: is the image there, have artifacts or base changed.
        retry_failed: try versions again that have failed SWEEP_ATTEMPTS times.
        force: as for a publish.
        rebuild: as for a publish.
    """

    check: bool = False
    retry_failed: bool = False
    force: bool = False
    rebuild: bool = False

    @property
    def queries_registry(self) -> bool:
        """Whether a version's own tags settle nothing."""
        return self.check or self.force or self.rebuild


def sweep(settings: Settings, options: Options | None = None) -> Iterator[Result]:
    """Publish every version that carries the target tag; yield each as it is done.

    What its tags call published from the same source, for the platforms wanted, costs no request beyond the listing.

    Args:
        settings: what the environment says; MODEL_NAME and MODEL_VERSION are not used.
        options: how to treat what is found.

    Raises:
        BuilderError: the listing failed. What fails of one version is yielded, not raised.
    """
    options = options or Options()
    if settings.build_method != "wheels":
        refuse_untrusted(settings)
    catalog = MlflowCatalog.from_settings(settings)
    versions = natural_order(catalog.tagged(settings.target_tag))
    if not versions:
        log_near_misses(catalog, settings.target_tag)
    # What has failed, or has taken the whole process with it, comes last: it must not keep the others waiting.
    versions.sort(key=lambda version: in_vain(settings, version))
    yield from _SWEEP.results(Budget.of(settings), versions, partial(_swept, settings, catalog, options))


def log_near_misses(catalog: MlflowCatalog, tag: str) -> None:
    """Say in the log what may have been meant to select a version."""
    try:
        found = catalog.near_misses(tag)
    except BuilderError as error:
        log.warning("no version carries the target tag", tag=tag, error=error.one_line())
        return
    remedy = f"A version is selected by its own tag {tag} with the value true."
    log.warning(
        "no version carries the target tag", tag=tag, versions=found.versions, seen=found.findings(), remedy=remedy
    )


def _swept(
    settings: Settings, catalog: Catalog, options: Options, children: Children, version: ModelVersion
) -> Result:  # fmt: skip
    """Publish a version in a child, unless its tags settle it."""
    found = None if options.queries_registry else settled(settings, version, retry=options.retry_failed)
    if found:
        return found
    # The listing may be hours old by now.
    version = catalog.find(version.name, version.version)
    if not version.selected_by(settings.target_tag):
        return Result(name=str(version), state="gone", detail="no longer carries the target tag")
    ended = partial(_record_end, settings, catalog, version)
    work = partial(_published, settings, options, version)
    swept = children.run(work, Result, whose=str(version), folders=_folders(settings), ended=ended)
    if swept.reference and swept.reference.repository != reference_of(settings, version).repository:
        message = f"The publisher's process for {version} reports {swept.reference}, in another repository."
        crashed = VersionCrashed(message, remedy="See the log, and report this.")
        ended(crashed)
        raise crashed
    return swept


def _folders(settings: Settings) -> tuple[Path, ...]:
    return (settings.named_workspace,) if settings.named_workspace else ()


def _record_end(settings: Settings, catalog: Catalog, version: ModelVersion, error: BuilderError) -> None:
    """Record what a child could not that crashed or exceeded its budget, and remove what it left."""
    if not isinstance(error, (OverBudget, VersionCrashed)):
        return
    tag = ""
    wanted: tuple[str, ...] = ()
    with suppress(BuilderError):
        tag = str(reference_of(settings, version))
        wanted = tuple(str(platform) for platform in wanted_platforms(version, settings.target_platforms))
    record = Record(catalog, version, settings.target, version.source_id())
    record.ended(error, tag=tag, wanted=wanted)
    for folder in _folders(settings):
        with suppress(BuilderError):
            Workspace(folder).discard()


def _published(settings: Settings, options: Options, version: ModelVersion) -> Result:
    """Publish a version: this is what a child does."""
    name = str(version)
    with _SWEEP.defects(name), connected(settings) as services, workspace_of(settings) as workspace:
        published = publish_version(services, workspace, version, force=options.force, rebuild=options.rebuild)
    if published.reference is None:
        return Result(name=name, state="foreign", detail=f"{published.tag} was not made by this publisher")
    if not published.changed:
        return Result(name=name, state="current", detail=str(published.tag))
    return Result(
        name=name, state="published", reference=published.reference, detail=", ".join(published.platforms)
    )  # fmt: skip


def in_vain(settings: Settings, version: ModelVersion) -> tuple[int, bool]:
    """Return how often a version was tried in vain, and whether it was last ended before anybody could tell."""
    outcome = Outcome.of(version, settings.target)
    tried = outcome.state in {"running", "failed"}
    return (outcome.attempts if tried else 0, tried)


def settled(settings: Settings, version: ModelVersion, *, retry: bool) -> Result | None:
    """Return what the version's own tags settle, without a request; None where something has to be done."""
    outcome = Outcome.of(version, settings.target)
    if outcome.source_id != version.source_id():
        return None
    try:
        platforms = wanted_platforms(version, settings.target_platforms)
    except InvalidVersion:
        # Platforms that cannot be read cannot be compared: the version is tried, and the error is on it.
        wanted = outcome.wanted
    else:
        wanted = tuple(str(platform) for platform in platforms)
        here = outcome.tag == str(reference_of(settings, version))
        if outcome.state == "published" and here and set(wanted) <= set(outcome.platforms) and not outcome.error:
            return Result(name=str(version), state="current", detail=outcome.tag)
    # `running` is what a process leaves that was killed: it has not said why, but it was an attempt.
    tried = outcome.state in {"running", "failed"} and outcome.wanted in {wanted, ()}
    if tried and outcome.attempts >= settings.sweep_attempts and not retry:
        detail = outcome.error or "the publisher ended without saying why"
        log.warning("waits for a change, or for --retry-failed", version=str(version), error=detail)
        return Result(name=str(version), state="waiting", detail=detail)
    return None
