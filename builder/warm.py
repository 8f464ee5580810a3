"""Wheel layers and locks ahead of time: so that a publish finds them, and does not make a consumer wait."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

from builder import wheels
from builder.build.unsatisfied import NoWheel
from builder.build.wheel_layers import MISSING
from builder.errors import BuilderError, ExitCode, UsageError
from builder.log import get_logger, masked
from builder.models.context import sketch_context
from builder.models.version import ModelVersion, natural_order, wanted_platforms
from builder.recipe import Recipe
from builder.reference import Platform
from builder.services import Services, connected
from builder.settings import Settings

log = get_logger("warm")

# `warm`: all is there now. `verified`: all that is there is what it should be. `different`: something is not.
# `passed over`: it is not made of wheel layers.
State = Literal["warm", "verified", "different", "passed over", "failed"]
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """What became of one environment.

    Attributes:
        name: whose it is: a model version, or a requirements file.
        state: what became of it.
        known: layers that were there.
        made: layers that were made now.
        detail: what is to be said of it, on one line.
        exit_code: of the error, 0 where there was none.
    """

    name: str
    state: State
    known: int = 0
    made: int = 0
    detail: str = ""
    exit_code: int = 0


def warm(settings: Settings, *, verify: bool = False) -> Iterator[Warmed]:
    """Make the wheel layers and locks of every version that carries the target tag; yield each as it is done.

    Args:
        settings: what the environment says; MODEL_NAME and MODEL_VERSION are not used.
        verify: make nothing; make layers again and hold what is kept against them.

    Raises:
        BuilderError: the listing failed. What fails of one version is yielded, not raised.
    """
    with connected(settings) as services:
        for version in natural_order(services.catalog.tagged(settings.target_tag)):
            yield _guarded(str(version), partial(_version, settings, services, version, verify=verify))


def warm_requirements(settings: Settings, file: Path, *, python: str, verify: bool = False) -> Warmed:
    """Make the wheel layers and locks of a requirements file, for TARGET_PLATFORMS.

    It counts as a model that is registered now: versions with the same requirements that are registered later on the
    same day (UTC) find its lock, and all versions its layers.

    Args:
        settings: what the environment says.
        file: requirements in pip's form.
        python: the Python they are for, `3.11`.
        verify: as for `warm`.

    Raises:
        UsageError: the file cannot be read.
        BuilderError: as for a publish.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        message = f"The requirements file {str(file)!r} cannot be read: {error.strerror}."
        raise UsageError(message, remedy="Name a file in pip's form.") from error
    if len(content) > _MOST_BYTES:
        message = f"The requirements file {str(file)!r} is larger than {_MOST_BYTES >> 20} MiB."
        raise UsageError(message, remedy="Name a file in pip's form.")
    created = int(datetime.now(tz=UTC).timestamp() * 1000)
    version = ModelVersion(name=file.name, version="1", created_ms=created)
    with connected(settings) as services, tempfile.TemporaryDirectory(prefix="builder-warm-") as name:
        folder = Path(name) / "model"
        folder.mkdir()
        (folder / "MLmodel").touch()
        (folder / "requirements.txt").write_bytes(content)
        (folder / "python_env.yaml").write_text(f"python: {python}\n")
        paths = [f"model/{path.name}" for path in folder.iterdir()]
        source = wheels.Source.of(settings, version, folder.parent, paths)
        return _environment(settings, services, str(file), source, settings.target_platforms, verify=verify)


def _version(settings: Settings, services: Services, version: ModelVersion, *, verify: bool) -> Warmed:
    artifacts = services.catalog.artifacts(version)
    paths = [artifact.path for artifact in artifacts]
    if wheels.chosen_method(settings, version, paths) != "wheels":
        return Warmed(name=str(version), state="passed over", detail="an engine builds it")
    platforms = wanted_platforms(version, settings.target_platforms)
    with tempfile.TemporaryDirectory(prefix="builder-warm-") as name:
        folder = Path(name)
        sketch_context(services.catalog, version, artifacts, folder)
        source = wheels.Source.of(settings, version, folder, paths)
        return _environment(settings, services, str(version), source, platforms, verify=verify)


def _environment(
    settings: Settings,
    services: Services,
    name: str,
    source: wheels.Source,
    platforms: Sequence[Platform],
    *,
    verify: bool,
) -> Warmed:
    log.info("verifying" if verify else "warming", of=name, platforms=[str(platform) for platform in platforms])
    planned = wheels.planned(settings, services.registries, source, platforms, keep=not verify)
    without = _told(planned.impossible)
    if verify:
        return _verified(settings, services, name, planned.recipe, without)
    store = wheels.layer_store(settings, services.registries)
    with wheels.wheel_layers(settings, store, planned.recipe) as layers:
        layers.placed([group for part in planned.recipe.platforms for group in part.groups], None)
        traffic = layers.traffic
    return Warmed(name=name, state="warm", known=traffic.known, made=traffic.made, detail=without)


def _verified(settings: Settings, services: Services, name: str, recipe: Recipe, without: str) -> Warmed:
    store = wheels.layer_store(settings, services.registries)
    right, missing, different = 0, 0, []
    with wheels.wheel_layers(settings, store, recipe) as layers:
        for group, wrong in layers.verified(group for part in recipe.platforms for group in part.groups):
            right += not wrong
            missing += wrong == MISSING
            if wrong not in {"", MISSING}:
                tag = f"{store.repository}:{layers.key(group)}"
                log.error("a kept layer is not what it should be", tag=tag, wheel=group.title, why=wrong)
                different.append(f"{tag}: {wrong}")
    if different:
        remedy = "see who can write there, delete these tags, and publish with --rebuild what was made of them"
        detail = f"{'; '.join(different)}; {remedy}"
        return Warmed(name=name, state="different", known=right, detail=detail, exit_code=ExitCode.DATA)
    said = "; ".join(filter(None, [f"{missing} layers are not there yet" if missing else "", without]))
    return Warmed(name=name, state="verified", known=right, detail=said)


def _told(impossible: dict[Platform, NoWheel]) -> str:
    return "; ".join(error.what for error in impossible.values())


def _guarded(name: str, work: Callable[[], Warmed]) -> Warmed:
    """Return what became of an environment, its failure included: one must not keep the others from being done."""
    try:
        return work()
    except BuilderError as error:
        log.error("failed", of=name, error=masked(error.one_line()))
        return Warmed(name=name, state="failed", detail=masked(error.one_line()), exit_code=error.exit_code)
    except Exception as error:
        log.exception("defect", of=name)
        return Warmed(name=name, state="failed", detail=f"Defect: {type(error).__name__}", exit_code=ExitCode.SOFTWARE)
