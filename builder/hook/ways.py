"""The three ways in which a hook can publish: here, through a listener, through the Kubernetes API.

A way that is not possible says so before it has changed anything, so that the next one can be taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

from builder.errors import BuilderError, InvalidSettings, PermissionRefused, ServiceUnavailable
from builder.log import get_logger

if TYPE_CHECKING:
    from builder.settings import HookSettings, Settings

How = Literal["here", "listener", "cluster"]
State = Literal["published", "failed", "foreign", "running"]
WAYS: tuple[How, ...] = ("here", "listener", "cluster")
_log = get_logger("hook")


class NotPossible(Exception):
    """A way cannot be taken.

    Args:
        error: why.
    """

    def __init__(self, error: BuilderError) -> None:
        super().__init__(error.what)
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """What is to be published.

    Attributes:
        model: the registered model.
        version: its version: a number, or an alias as `@champion`.
    """

    model: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a hook.

    Attributes:
        state: `published`, `failed`, `foreign`, or `running` if the hook ended before its Job.
        model: the registered model.
        version: its number, or the alias that was asked for where the number is not known.
        how: the way that was taken; empty if none was.
        image: the digest reference.
        platforms: what the image runs on.
        seconds: that it took.
        job: the name of the Job, if it had one.
        error: what failed.
    """

    state: State
    model: str = ""
    version: str = ""
    how: How | Literal[""] = ""
    image: str = ""
    platforms: tuple[str, ...] = ()
    seconds: float = 0.0
    job: str = ""
    error: BuilderError | None = None

    @property
    def digest(self) -> str:
        """The image's digest; empty where there is no image."""
        return self.image.partition("@")[2]


@dataclass(kw_only=True)
class Run:
    """One run of a hook.

    Attributes:
        settings: the hook's own.
        environ: the environment, for settings that only one way needs.
        version: what is to be published; with its number, once that is known.
        namespace: of the Jobs, if the cluster is asked; KUBE_NAMESPACE where it is empty.
        context: of the kubeconfig.
        timeout: seconds to follow a Job.
        began: when the hook began, as of `time.monotonic`.
        how: the way that is tried.
        refused: why earlier ways were not possible.
        job: the name of the Job that was made or found.
    """

    settings: HookSettings
    environ: Mapping[str, str]
    version: Named
    namespace: str = ""
    context: str = ""
    timeout: float = math.inf
    began: float
    how: How | Literal[""] = ""
    refused: Mapping[How, str] = field(default_factory=dict)
    job: str = ""

    def taken(self, **about: object) -> None:
        """Say which way is taken, and why earlier ones are not."""
        others = {f"not_{how}": why for how, why in self.refused.items()}
        _log.info(f"publishing {self.version.model} version {self.version.version}", how=self.how, **about, **others)

    def settings_of(self, **more: str) -> Settings:
        """Return the publisher's settings.

        Raises:
            NotPossible: REGISTRY_URL or another one is missing.
        """
        from builder.settings import Settings

        named = {"MODEL_NAME": self.version.model, "MODEL_VERSION": self.version.version}
        with _or_not_possible(InvalidSettings):
            return Settings.from_environ(self.environ, **named, **more)

    @property
    def seconds(self) -> float:
        """How long the hook has run."""
        return round(time.monotonic() - self.began, 1)


def here(run: Run) -> Result:
    """Publish in this process, by wheels.

    Raises:
        NotPossible: there is no registry to push to, its certificate or credential cannot be used, or the version has
            a Dockerfile.
        BuilderError: it was begun, and failed.
    """
    settings = run.settings_of(BUILD_METHOD="wheels")
    _check_here(settings)
    from builder import publish as story
    from builder.report import progress

    run.taken()
    with progress() as of_artifacts:
        published = story.publish(settings, progress=of_artifacts)
    return Result(
        state="foreign" if published.reference is None else "published",
        model=published.version.name,
        version=published.version.version,
        how="here",
        image=str(published.reference or ""),
        platforms=published.platforms,
        seconds=run.seconds,
    )


def _check_here(settings: Settings) -> None:
    """Raise NotPossible where a publish in this process is known to end without an image."""
    from builder.clients import connected
    from builder.publish.inspect import find
    from builder.wheels.inputs import chosen_method

    with _or_not_possible(PermissionRefused, ServiceUnavailable, InvalidSettings), connected(settings) as services:
        version = find(services)
        paths = [artifact.path for artifact in services.catalog.artifacts(version)]
        if chosen_method("auto", version, paths) == "dockerfile":
            message = f"{version} has a Dockerfile, which is not run in this process."
            remedy = "Publish it through the listener or the cluster; or set its tag MODEL_DOCKERFILE to none."
            raise NotPossible(InvalidSettings(message, remedy=remedy))
        repository = settings.registry_url.child(settings.component_of(version.name))
        services.registries.for_host(repository.host).check_push(repository)


def listener(run: Run) -> Result:
    """Ask a listener, and follow the Job that it makes.

    Raises:
        NotPossible: LISTENER_URL or SUBMIT_SECRET is missing, or the listener cannot be reached or does not accept us.
        BuilderError: it took the request, and the outcome is not known.
    """
    from builder.remote import Listener

    with _or_not_possible(InvalidSettings):
        client = Listener.from_settings(run.settings)
    with client:
        with _or_not_possible(ServiceUnavailable, PermissionRefused, InvalidSettings):
            accepted = client.publish(run.version.model, run.version.version)
        run.version, run.job = Named(model=accepted.model, version=accepted.version), accepted.job
        run.taken(job=accepted.job, created=accepted.created)
        outcome = client.follow(accepted, seconds=run.timeout)
    return Result(
        state=cast("State", outcome.state),
        model=accepted.model,
        version=accepted.version,
        how="listener",
        image=outcome.image if outcome.state == "published" else "",
        platforms=outcome.platforms,
        seconds=run.seconds,
        job=accepted.job,
        error=outcome.failure(),
    )


def cluster(run: Run) -> Result:
    """Make a Job by the Kubernetes API, and follow it.

    Raises:
        NotPossible: no cluster can be reached, or the account may not make Jobs in the namespace.
        BuilderError: it was begun, and the outcome is not known.
    """
    from builder.cluster import Jobs
    from builder.cluster.api_server import Cluster
    from builder.cluster.follow import follow
    from builder.models.catalog import MlflowCatalog
    from builder.publish.record import Outcome

    settings = run.settings_of()
    with _or_not_possible(InvalidSettings):
        opened = Cluster(run.namespace or run.settings.kube_namespace, context=run.context)
    with closing(opened) as there:
        catalog = MlflowCatalog.from_settings(settings)
        version = catalog.find(settings.model_name, settings.model_version)
        jobs = Jobs(settings=settings, cluster=there, catalog=catalog)
        with _or_not_possible(PermissionRefused, ServiceUnavailable, InvalidSettings):
            there.job(jobs.name_of(version))
        made = jobs.submit(version)
        run.version, run.job = Named(model=version.name, version=version.version), made.name
        run.taken(job=made.name, created=made.created)
        ended = follow(jobs, version, made.job, seconds=run.timeout)
        outcome = Outcome.of(catalog.find(version.name, version.version), settings.target)
    # Of a Pod that is gone, the version's tags tell what it published.
    image = "" if ended.error else ended.image or outcome.image
    return Result(
        state="failed" if ended.error else "published" if image else "foreign",
        model=version.name,
        version=version.version,
        how="cluster",
        image=image,
        platforms=outcome.platforms,
        seconds=run.seconds,
        job=made.name,
        error=ended.error,
    )


@contextmanager
def _or_not_possible(*kinds: type[BuilderError]) -> Iterator[None]:
    """Raise NotPossible for some kinds of errors."""
    try:
        yield
    except kinds as error:
        raise NotPossible(error) from error


TAKE = {"here": here, "listener": listener, "cluster": cluster}
