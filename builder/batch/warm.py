"""Wheel layers and locks ahead of time, verified or made: a publish finds them, and no consumer waits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

from builder.batch import Batch, Children, Result, State
from builder.budget import Budget, check_listing
from builder.clients import Registries, Services, connected
from builder.errors import ExitCode, InvalidVersion, UsageError
from builder.log import get_logger
from builder.models import ModelVersion, natural_order, wanted_platforms
from builder.models.catalog import MlflowCatalog
from builder.models.context import sketch_context
from builder.oci import Malformed
from builder.oci.base_image import BaseImage
from builder.oci.registry import Registry
from builder.oci.rootfs import BaseFacts, inspect_base
from builder.reference import Platform, Reference
from builder.settings import Settings
from builder.wheels import recipe as recipes
from builder.wheels.inputs import Source, chosen_method
from builder.wheels.layer_cache import Verdict
from builder.wheels.lock import Lock
from builder.wheels.recipe import Recipe, WheelsMethod
from builder.wheels.resolve import Resolver
from builder.wheels.uv import NoWheel, Unsatisfiable

_log = get_logger("verify")
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that is kept, or could be.

    Attributes:
        what: what it is.
        of: the base image, the platform or the wheels that it belongs to.
        tag: where it is kept.
        verdict: whether it is what it should be.
    """

    what: Literal["base image", "lock", "layer"]
    of: str
    tag: Reference
    verdict: Verdict

    def __str__(self) -> str:
        """Return what it is, where, and what is wrong with it."""
        return f"the {self.what} at {self.tag} ({self.of}) is {self.verdict.state}: {self.verdict.detail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was checked of one environment.

    Attributes:
        checks: all that a publish of it would take from WHEEL_LAYERS.
        impossible: the platforms for which a package has no wheel.
    """

    checks: tuple[Check, ...]
    impossible: dict[Platform, NoWheel] = field(default_factory=dict)


class Verification:
    """Checks environments; what they share is checked once.

    Args:
        wheels: the wheels method.
        registries: those of the layers and of base images.
        seen: what was checked of other environments, by its tag.
    """

    def __init__(
        self, wheels: WheelsMethod, registries: Registries, seen: Mapping[str, Check] | None = None
    ) -> None:  # fmt: skip
        self._wheels = wheels
        self._registries = registries
        self._store = wheels.store
        self._seen: dict[str, Check] = dict(seen or {})

    def environment(self, source: Source, platforms: Sequence[Platform]) -> Verified:
        """Return what is kept for an environment, checked.

        Where the facts of a base image are wrong, there is nothing else to check: locks are made for a base image.

        Args:
            source: what asks for the environment.
            platforms: what for.

        Raises:
            InvalidVersion: the requirements cannot be used or fulfilled, or the base image has no such Python.
            BuilderError: a server is away, or refuses.
        """
        found = [self._base(source, platform) for platform in platforms]
        if any(check.verdict.state == "different" for check in found):
            return Verified(checks=tuple(found))
        planned = self._wheels.environments(source, platforms, keep=False)
        locks = self._locks(source, planned.recipe)
        layers = self._layers(planned.recipe)
        return Verified(checks=(*found, *locks, *layers), impossible=planned.impossible)

    def _base(self, source: Source, platform: Platform) -> Check:
        registry = self._registries.for_host(source.base.repository.host)
        base = self._wheels.existing_base(source, platform)
        key = recipes.facts_key(base)
        if key not in self._seen:
            kept = self._store.text(key, kind=recipes.FACTS)
            verdict = Verdict(state="missing") if kept is None else _facts_verdict(kept, registry, base)
            self._note(key, "base image", f"{source.base}, {platform}", verdict)
        return self._seen[key]

    def _locks(self, source: Source, recipe: Recipe) -> list[Check]:
        checks = []
        resolver = self._wheels.resolver(source)
        for part in recipe.platforms:
            kept = resolver.kept(part.platform, part.lock.glibc)
            if kept is None or kept.as_of is None:
                continue
            key = resolver.tag(part.platform, part.lock.glibc, kept.as_of)
            if key not in self._seen:
                self._note(key, "lock", str(part.platform), _lock_verdict(resolver, kept))
            checks.append(self._seen[key])
        return checks

    def _layers(self, recipe: Recipe) -> list[Check]:
        groups = {group.source: group for part in recipe.platforms for group in part.groups}
        with self._wheels.layers(recipe) as layers:
            keys = {source: layers.key(group) for source, group in groups.items()}
            new = [group for source, group in groups.items() if keys[source] not in self._seen]
            for group, verdict in layers.verified(new):
                self._note(keys[group.source], "layer", group.title[:200], verdict)
        return [self._seen[key] for key in keys.values()]

    def _note(self, key: str, what: Literal["base image", "lock", "layer"], of: str, verdict: Verdict) -> None:
        check = Check(what=what, of=of, tag=self._store.repository.tag(key), verdict=verdict)
        self._seen[key] = check
        said = {"same": _log.debug, "missing": _log.debug, "different": _log.error, "not derivable": _log.warning}
        said[verdict.state](
            f"a kept {what} is {verdict.state}", tag=str(check.tag), of=check.of, detail=verdict.detail
        )  # fmt: skip


def _facts_verdict(kept: bytes, registry: Registry, base: BaseImage) -> Verdict:
    try:
        said = BaseFacts.from_json(kept)
    except Malformed:
        return Verdict(state="missing")  # a publish does not believe it either
    right = inspect_base(registry, base)
    if said == right:
        return Verdict(state="same")
    return Verdict(state="different", detail=f"it says {kept[:500].decode()}, and the image {right.to_json().decode()}")


def _lock_verdict(resolver: Resolver, kept: Lock) -> Verdict:
    """Return whether a lock can be resolved again.

    One that cannot is no proof of anything: an index may have lost a release, or may give no upload times.
    """
    try:
        now = resolver.again(kept)
    except (Unsatisfiable, NoWheel) as error:
        return Verdict(state="not derivable", detail=f"nothing is found now: {error.what}")
    if now.wheels == kept.wheels:
        return Verdict(state="same")
    gone = [wheel.filename for wheel in kept.wheels if wheel not in now.wheels]
    come = [wheel.filename for wheel in now.wheels if wheel not in kept.wheels]
    return Verdict(
        state="not derivable",
        detail=f"the indexes now give {_names(come)} in place of {_names(gone)}",
    )


def _names(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "") or "nothing"


log = get_logger("warm")

_MOST_BYTES = 1 << 20
_CORRECT = "Correct the file. Lines that name other files (-r, -c, paths) are not supported: write out what they hold."
_EXCHANGED = (
    "find out who can write there; delete these tags and, where a digest names another blob, that blob from the "
    "registry's storage; then publish what was made of them with --rebuild"
)
_UNPROVEN = (
    "configure the index that had these wheels. If no index has them, find out who can write there, and delete the tags"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed(Result):
    """What became of one environment.

    Attributes:
        known: layers that were there.
        made: layers that were made now.
        checks: what was verified, one by one.
    """

    known: int = 0
    made: int = 0
    checks: tuple[Check, ...] = ()


_WARM = Batch(kind=Warmed, logger="warm", modules=("mlflow", "builder.batch.warm"), gone="", key="of")


def warm(settings: Settings, *, name: str = "", version: str = "", verify: bool = False) -> Iterator[Warmed]:
    """Make the wheel layers and locks of versions; yield each as it is done.

    Args:
        settings: what the environment says; MODEL_NAME and MODEL_VERSION are not used.
        name: of a model, one version of which is meant, whatever its tags; empty for all that carry the target tag.
        version: of that model.
        verify: write nothing; rebuild layers, and compare what is stored with them.

    Raises:
        BuilderError: the listing failed. What fails of one version is yielded, not raised.
    """
    catalog = MlflowCatalog.from_settings(settings)
    versions = [catalog.find(name, version)] if name else natural_order(catalog.tagged(settings.target_tag))
    seen: dict[str, Check] = {}

    def in_child(children: Children, version: ModelVersion) -> Warmed:
        work = partial(_version, settings, version, verify=verify, seen=seen)
        warmed = children.run(work, Warmed, whose=str(version))
        seen.update({check.tag.tag: check for check in warmed.checks})
        return warmed

    yield from _WARM.results(Budget.of(settings), versions, in_child)


def warm_requirements(settings: Settings, file: Path, *, python: str, verify: bool = False) -> Warmed:
    """Make the wheel layers and locks of a requirements file, for TARGET_PLATFORMS.

    It counts as a model without a client that is registered now: MLflow's part is replaced as for a publish. Every
    version finds the layers. The lock is found by versions that are registered later on the same day (UTC), if they ask
    for the same: the same lines, MLflow pinned among them as MLflow logs it, the same Python, base image and indexes.

    Args:
        settings: what the environment says.
        file: a requirements file of pip.
        python: the Python they are for, `3.11`.
        verify: as for `warm`.

    Raises:
        UsageError: the file cannot be read.
        InvalidVersion: a line of it cannot be used; each is named. It must not name further files.
        BuilderError: as for a publish.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        message = f"The requirements file {str(file)!r} cannot be read: {error.strerror}."
        raise UsageError(message, remedy="Name a requirements file of pip.") from error
    if len(content) > _MOST_BYTES:
        message = f"The requirements file {str(file)!r} is larger than {_MOST_BYTES >> 20} MiB."
        raise UsageError(message, remedy="Name a requirements file of pip.")
    created = int(datetime.now(tz=UTC).timestamp() * 1000)
    version = ModelVersion(name=file.name, version="1", created_ms=created)
    with connected(settings) as services, tempfile.TemporaryDirectory(prefix="builder-warm-") as name:
        folder = Path(name) / "model"
        folder.mkdir()
        (folder / "MLmodel").touch()
        (folder / "requirements.txt").write_bytes(content)
        (folder / "python_env.yaml").write_text(f"python: {python}\n")
        paths = [f"model/{path.name}" for path in folder.iterdir()]
        try:
            source = Source.of(services.wheels.inputs, version, folder.parent, paths)
        except InvalidVersion as error:
            message = f"The requirements file {str(file)!r} cannot be used. {error.what}"
            raise InvalidVersion(message, remedy=_CORRECT) from error
        return _Warming(settings, services, verify=verify).environment(str(file), source, settings.target_platforms)


def _version(settings: Settings, version: ModelVersion, *, verify: bool, seen: Mapping[str, Check]) -> Warmed:
    """Make, or verify, what a version's images are made of: this is what a child does."""
    with _WARM.defects(str(version)), connected(settings) as services:
        return _Warming(settings, services, verify=verify, seen=seen).version(version)


class _Warming:
    """One run over some environments."""

    def __init__(
        self, settings: Settings, services: Services, *, verify: bool, seen: Mapping[str, Check] | None = None
    ) -> None:
        self._settings = settings
        self._services = services
        self._verification = Verification(services.wheels, services.registries, seen) if verify else None

    def version(self, version: ModelVersion) -> Warmed:
        """Make, or verify, what a version's images are made of."""
        artifacts = self._services.catalog.artifacts(version)
        check_listing(self._settings, version, artifacts)
        paths = [artifact.path for artifact in artifacts]
        if chosen_method(self._settings.build_method, version, paths) != "wheels":
            return Warmed(name=str(version), state="passed over", detail="an engine builds it")
        platforms = wanted_platforms(version, self._settings.target_platforms)
        with tempfile.TemporaryDirectory(prefix="builder-warm-") as name:
            sketch_context(self._services.catalog, version, artifacts, Path(name))
            source = Source.of(self._services.wheels.inputs, version, Path(name), paths)
            return self.environment(str(version), source, platforms)

    def environment(self, name: str, source: Source, platforms: Sequence[Platform]) -> Warmed:
        """Make, or verify, an environment."""
        doing = "verifying" if self._verification else "warming"
        log.info(doing, of=name, platforms=[str(platform) for platform in platforms])
        if self._verification:
            return _warmed(name, self._verification.environment(source, platforms))
        planned = self._services.wheels.environments(source, platforms)
        with self._services.wheels.layers(planned.recipe) as layers:
            placed = layers.placed([group for part in planned.recipe.platforms for group in part.groups], None)
            transfers = layers.transfers
        for part in planned.recipe.platforms:
            for warning in recipes.check_wheels(part, planned.bases[part.platform].name, placed):
                log.warning("a library is missing", of=name, platform=str(part.platform), why=warning)
        without = _without(planned.impossible)
        return Warmed(name=name, state="warm", known=transfers.known, made=transfers.made, detail=without)


def _warmed(name: str, verified: Verified) -> Warmed:
    """Return what the checks of an environment come to."""
    checks = verified.checks
    wrong = [check for check in checks if check.verdict.state == "different"]
    underivable = [check for check in checks if check.verdict.state == "not derivable"]
    layers = [check for check in checks if check.what == "layer"]
    missing = sum(check.verdict.state == "missing" for check in layers)
    state: State = "verified"
    code = ExitCode.OK
    said = [str(check) for check in (*wrong, *underivable)]
    if wrong:
        state, code = "different", ExitCode.DATA
        said.append(_EXCHANGED)
    elif any(check in layers for check in underivable):
        state, code = "unproven", ExitCode.CANNOT_CREATE
        said.append(_UNPROVEN)
    said += [f"{missing} layers are not there yet"] if missing else []
    return Warmed(
        name=name,
        state=state,
        known=sum(check.verdict.state == "same" for check in layers),
        checks=checks,
        detail="; ".join(filter(None, [*said, _without(verified.impossible)])),
        exit_code=code,
    )


def _without(impossible: dict[Platform, NoWheel]) -> str:
    return "; ".join(error.what for error in impossible.values())
