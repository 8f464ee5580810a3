"""The sweep: every version that carries the target tag, published one after another, each in a child of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from builder.batch.children import Children
from builder.budget import Budget
from builder.clients import connected
from builder.errors import BuilderError, ExitCode, InvalidVersion, OverBudget, VersionCrashed, VersionNotFound
from builder.log import get_logger
from builder.models.catalog import MlflowCatalog
from builder.models.version import Catalog, ModelVersion, natural_order, wanted_platforms
from builder.publish import publish_version, refuse_untrusted, workspace_of
from builder.publish.inspect import reference_of
from builder.publish.record import Outcome, Record
from builder.reference import Reference
from builder.settings import Settings
from builder.workspace import Workspace

log = get_logger("sweep")
# What takes long to import, and every publish needs.
MODULES = ("mlflow", "builder.batch.sweep", "builder.publish.fetch", "builder.publish.push")

# What is wrong with a version says nothing of the publisher, and a sweep that told it did its work.
_OWN = frozenset({ExitCode.DATA, ExitCode.NO_INPUT, ExitCode.CANNOT_CREATE})

# `published` was made now; `current` was there; `gone` was deleted, or its tag withdrawn, under our hands; `waiting`
# failed too often and is left until somebody changes it.
State = Literal["published", "current", "foreign", "failed", "waiting", "gone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a sweep did about one version.

    Attributes:
        version: the model version.
        state: what became of it.
        reference: the digest reference that was published now; None elsewhere.
        detail: the reason, or the error, on one line.
        exit_code: of the error, 0 where there was none.
        trouble: the same where the error hinders the publisher itself; 0 where it is the version's own.
    """

    version: ModelVersion
    state: State
    reference: Reference | None = None
    detail: str = ""
    exit_code: int = 0
    trouble: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a sweep treats what it finds.

    Attributes:
        check: ask the registry about published versions too: is the image there, have artifacts or base changed.
        retry_failed: try versions again that have failed SWEEP_ATTEMPTS times.
        force: as for a publish.
        rebuild: as for a publish.
    """

    check: bool = False
    retry_failed: bool = False
    force: bool = False
    rebuild: bool = False

    @property
    def asks(self) -> bool:
        """Whether what a version's own tags say is not enough."""
        return self.check or self.force or self.rebuild


def sweep(settings: Settings, options: Options | None = None) -> Iterator[Swept]:
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
        _tell_near_misses(catalog, settings.target_tag)
    with Children(Budget.of(settings), modules=MODULES) as children:
        # What has failed, or has taken the whole process with it, comes last: it must not keep the others waiting.
        for version in sorted(versions, key=lambda version: _in_vain(settings, version)):
            yield _sweep_one(settings, catalog, children, version, options)


def _tell_near_misses(catalog: MlflowCatalog, tag: str) -> None:
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


def _sweep_one(
    settings: Settings, catalog: Catalog, children: Children, version: ModelVersion, options: Options
) -> Swept:
    try:
        settled = None if options.asks else _settled(settings, version, retry=options.retry_failed)
        if settled:
            return settled
        # The listing may be hours old by now.
        version = catalog.find(version.name, version.version)
        if not version.selected_by(settings.target_tag):
            return Swept(version=version, state="gone", detail="no longer carries the target tag")
        return _in_child(settings, catalog, children, version, options)
    except VersionNotFound as error:
        log.info("gone", version=str(version), detail=error.what)
        return Swept(version=version, state="gone", detail=error.one_line())
    except BuilderError as error:
        return _failed(version, error)
    except Exception as error:
        # One version's surprise must not keep the others from being published.
        log.exception("defect", version=str(version))
        return _defect(version, error)


def _in_child(
    settings: Settings, catalog: Catalog, children: Children, version: ModelVersion, options: Options
) -> Swept:
    """Publish a version in a child, and record what the child could not."""
    work = partial(_published, settings, options, version)
    try:
        swept = children.run(work, Swept, whose=str(version), folders=_folders(settings))
        if swept.reference and swept.reference.repository != reference_of(settings, version).repository:
            message = f"The publisher's process for {version} says that it published {swept.reference}."
            raise VersionCrashed(message, remedy="See the log, and report this.")  # noqa: TRY301  # is handled alike
    except (OverBudget, VersionCrashed) as error:
        _record_end(settings, catalog, version, error)
        return _failed(version, error)
    return replace(swept, version=version)


def _folders(settings: Settings) -> tuple[Path, ...]:
    return (settings.named_workspace,) if settings.named_workspace else ()


def _record_end(settings: Settings, catalog: Catalog, version: ModelVersion, error: BuilderError) -> None:
    """Record what the child could not, as it was ended, and remove what it left."""
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


def _published(settings: Settings, options: Options, version: ModelVersion) -> Swept:
    """Publish a version: this is what a child does."""
    try:
        with connected(settings) as services, workspace_of(settings) as workspace:
            published = publish_version(
                settings, services, workspace, version, force=options.force, rebuild=options.rebuild
            )
    except VersionNotFound as error:
        log.info("gone", version=str(version), detail=error.what)
        return Swept(version=version, state="gone", detail=error.one_line())
    except BuilderError as error:
        return _failed(version, error)
    except MemoryError:
        raise  # `Children` knows what it means
    except Exception as error:
        log.exception("defect", version=str(version))
        return _defect(version, error)
    if published.reference is None:
        return Swept(version=version, state="foreign", detail=f"{published.tag} was not made by this publisher")
    if not published.changed:
        return Swept(version=version, state="current", detail=str(published.tag))
    return Swept(
        version=version, state="published", reference=published.reference, detail=", ".join(published.platforms)
    )


def _failed(version: ModelVersion, error: BuilderError) -> Swept:
    log.error("failed", version=str(version), error=error.one_line())
    own = error.of_version or error.exit_code in _OWN
    return Swept(
        version=version,
        state="failed",
        detail=error.one_line(),
        exit_code=error.exit_code,
        trouble=0 if own else error.exit_code,
    )


def _defect(version: ModelVersion, error: Exception) -> Swept:
    return Swept(
        version=version,
        state="failed",
        detail=f"Defect: {type(error).__name__}",
        exit_code=ExitCode.SOFTWARE,
        trouble=ExitCode.SOFTWARE,
    )


def _in_vain(settings: Settings, version: ModelVersion) -> tuple[int, bool]:
    """Return how often a version was tried in vain, and whether it was last ended before anybody could tell."""
    outcome = Outcome.of(version, settings.target)
    tried = outcome.state in {"running", "failed"}
    return (outcome.attempts if tried else 0, tried)


def _settled(settings: Settings, version: ModelVersion, *, retry: bool) -> Swept | None:
    """Return what the version's own tags settle, without a request; None where something has to be done."""
    outcome = Outcome.of(version, settings.target)
    if outcome.source_id != version.source_id():
        return None
    try:
        platforms = wanted_platforms(version, settings.target_platforms)
    except InvalidVersion:
        # What nobody can read cannot be compared: it was tried, or is tried, and says so on the version.
        wanted = outcome.wanted
    else:
        wanted = tuple(str(platform) for platform in platforms)
        here = outcome.tag == str(reference_of(settings, version))
        if outcome.state == "published" and here and set(wanted) <= set(outcome.platforms) and not outcome.error:
            return Swept(version=version, state="current", detail=outcome.tag)
    # `running` is what a process leaves that was killed: it has not said why, but it was an attempt.
    tried = outcome.state in {"running", "failed"} and outcome.wanted in {wanted, ()}
    if tried and outcome.attempts >= settings.sweep_attempts and not retry:
        detail = outcome.error or "the publisher ended without saying why"
        log.warning("waits for a change, or for --retry-failed", version=str(version), error=detail)
        return Swept(version=version, state="waiting", detail=detail)
    return None
