"""The hook: publish one version out of a Domino run, or any other job, and leave word of it.

The version is named, or is the newest selected one that this run registered. It is published in the first way that is
possible: in this process by wheels, through a listener, through the Kubernetes API. What came of it is left for
Domino's dashboard, for programs, and for people.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import (
    BuilderError,
    InvalidSettings,
    PermissionRefused,
    ServiceUnavailable,
    StillRunning,
    Terminated,
    TryAgain,
)
from builder.hook.dashboard import STATS, add_stats, write
from builder.hook.ways import TAKE, WAYS, How, Named, NotPossible, Result, Run
from builder.log import get_logger
from builder.masking import one_line

if TYPE_CHECKING:
    from builder.settings import HookSettings

_log = get_logger("hook")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """What a hook is asked for.

    Attributes:
        settings: the hook's own.
        environ: the environment, for settings that only one way needs.
        how: the only way that may be taken; None for the first that is possible.
        namespace: of the Jobs, where the cluster is asked.
        context: of the kubeconfig.
        timeout: seconds to follow a Job.
        stats: where to write for Domino's dashboard; None for the project's root in a Domino run.
        result: where to write what came of it, as JSON.
    """

    settings: HookSettings
    environ: Mapping[str, str]
    how: How | None = None
    namespace: str = ""
    context: str = ""
    timeout: float = math.inf
    stats: Path | None = None
    result: Path | None = None

    def run(self) -> Result:
        """Publish the version, and leave word of what came of it; also of a failure, which the result holds.

        Raises:
            Terminated: the process is to end; a Job that was made goes on.
        """
        began = time.monotonic()
        result = Result(state="failed", model=self.settings.model_name, version=self.settings.model_version)
        run = None
        try:
            run = Run(
                settings=self.settings,
                environ=self.environ,
                version=named_version(self.settings, self.environ),
                namespace=self.namespace,
                context=self.context,
                timeout=self.timeout,
                began=began,
            )
            result = first_possible(run, [self.how] if self.how else WAYS)
        except StillRunning as error:
            result = self._failed(replace(result, state="running"), run, error, began)
        except BuilderError as error:
            result = self._failed(result, run, error, began)
        except Terminated:
            goes_on = f" The Job {run.job} goes on." if run and run.job else ""
            ended = TryAgain(f"The hook was ended by a signal.{goes_on}", remedy="Run it again.")
            result = replace(result, state="running" if goes_on else "failed")
            self._tell(self._failed(result, run, ended, began))
            raise
        self._tell(result)
        return result

    @staticmethod
    def _failed(result: Result, run: Run | None, error: BuilderError, began: float) -> Result:
        if run:
            named = run.version
            result = replace(result, model=named.model, version=named.version, job=run.job, how=run.how)
        return replace(result, error=error, seconds=round(time.monotonic() - began, 1))

    def _tell(self, result: Result) -> None:
        leave_word(result, self.stats, self.result, folder=self.settings.domino_working_dir)
        if result.error is None:
            _log.info(sentence(result))


def leave_word(result: Result, stats: Path | None, file: Path | None, *, folder: Path | None) -> None:
    """Write what came of a hook for Domino's dashboard and for programs; what cannot be written is logged.

    Args:
        result: what came of it.
        stats: the dashboard's file; None for the one in `folder`.
        file: as JSON; None for nowhere.
        folder: the project's root in a Domino run.
    """
    stats = stats or (folder / STATS if folder else None)
    problems = [add_stats(stats, columns(result)) if stats else "", write(file, as_json(result)) if file else ""]
    for problem in filter(None, problems):
        _log.warning("what came of it is not written", why=problem)


def named_version(settings: HookSettings, environ: Mapping[str, str]) -> Named:
    """Return the version that settings name, or else the newest selected one that this run registered.

    Args:
        settings: the hook's own.
        environ: the environment: MLFLOW_TRACKING_URI and TARGET_TAG are read where no version is named.

    Raises:
        InvalidSettings: a model is named without a version, or no run.
        VersionNotFound: this run has registered no such version.
    """
    model, version = settings.model_name, settings.model_version
    if model and version:
        return Named(model=model, version=version)
    if model or version:
        there, missing = ("MODEL_NAME", "MODEL_VERSION") if model else ("MODEL_VERSION", "MODEL_NAME")
        message = f"{missing} is missing: {there} is set, and needs it."
        raise InvalidSettings(message, remedy="Name both, or neither for the newest version that this run registered.")
    from builder.models.catalog import MlflowCatalog
    from builder.models.runs import newest_of_run
    from builder.settings import CatalogSettings

    catalog_settings = CatalogSettings.from_environ(environ)
    domino_run = settings.domino_run_id.get_secret_value() if settings.domino_run_id else ""
    found = newest_of_run(
        MlflowCatalog.from_settings(catalog_settings),
        catalog_settings.target_tag,
        domino_run=domino_run,
        mlflow_run=settings.mlflow_run_id,
    )
    _log.info("the newest selected version of this run", model=found.name, version=found.version)
    return Named(model=found.name, version=found.version)


def first_possible(run: Run, ways: Sequence[How]) -> Result:
    """Publish in the first way that is possible.

    Args:
        run: what is to be published.
        ways: the ways that may be taken, in this order.

    Raises:
        BuilderError: none is possible, or the one that was taken failed.
    """
    refused: dict[How, BuilderError] = {}
    for how in ways:
        run.how, run.refused = how, {way: error.what for way, error in refused.items()}
        try:
            return TAKE[how](run)
        except NotPossible as reason:
            refused[how] = reason.error
    run.how = ""
    if len(refused) == 1:
        raise next(iter(refused.values()))
    kinds = [
        kind for kind in (ServiceUnavailable, PermissionRefused) if any(isinstance(e, kind) for e in refused.values())
    ]
    problems = [f"{how}: {error.what}" for how, error in refused.items()]
    message = f"The version cannot be published from here: {' '.join(problems)}"
    remedies = " ".join(f"{how}: {error.remedy}" for how, error in refused.items())
    remedy = f"Make one of the ways possible. {remedies} docs/domino.md describes them."
    if kinds:
        raise kinds[0](message, remedy=remedy)
    raise InvalidSettings(message, remedy=remedy)


def columns(result: Result) -> dict[str, object]:
    """Return what Domino's dashboard shows: flat, since each key becomes a column."""
    shown: dict[str, object] = {
        "state": result.state,
        "image": result.image,
        "digest": result.digest,
        "platforms": ",".join(result.platforms),
        "seconds": result.seconds,
    }
    if result.error:
        shown |= {"error": result.error.one_line(), "exit_code": int(result.error.exit_code)}
    return shown


def as_json(result: Result) -> dict[str, object]:
    """Return a result for programs."""
    error = result.error
    return {
        **columns(result),
        "model": result.model,
        "version": result.version,
        "platforms": list(result.platforms),
        "how": result.how,
        "job": result.job,
        "exit_code": int(error.exit_code) if error else 0,
        "error": one_line(error.what, 1000) if error else "",
        "remedy": one_line(error.remedy, 1000) if error else "",
    }


def sentence(result: Result) -> str:
    """Return one line for people on what did not fail."""
    took = f"{result.seconds:g} s, {result.how}"
    if result.state == "foreign":
        return f"{result.model} version {result.version} is left alone: its tag holds an image of others ({took})"
    platforms = ", ".join(result.platforms)
    return f"{result.model} version {result.version} is published for {platforms}: {result.image} ({took})"
