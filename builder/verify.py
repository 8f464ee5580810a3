"""What is kept in WHEEL_LAYERS, held against what it should be: facts of base images, locks, and wheel layers.

Whoever can write there puts code into every image, and a publish believes what it finds: a layer is not made again, and
a lock not resolved again. Here both are. Nothing is written, so that what was exchanged can still be looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from builder import bases, wheels
from builder.build.index import IndexClient
from builder.build.kept_locks import Resolver
from builder.build.locked import Lock
from builder.build.unsatisfied import NoWheel, Unsatisfiable
from builder.build.wheel_layers import Verdict
from builder.images.base import BaseImage
from builder.images.base_facts import BaseFacts, inspect_base
from builder.images.descriptor import Malformed
from builder.images.registries import Registries
from builder.images.registry import Registry
from builder.log import get_logger
from builder.recipe import Recipe
from builder.reference import Platform, Reference
from builder.settings import Settings
from builder.source import Source

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
        settings: what the environment says.
        registries: those of the layers and of base images.
        seen: what was checked of other environments, by its tag.
    """

    def __init__(self, settings: Settings, registries: Registries, seen: Mapping[str, Check] | None = None) -> None:
        self._settings = settings
        self._registries = registries
        self._store = wheels.layer_store(settings, registries)
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
        planned = wheels.planned(self._settings, self._registries, source, platforms, keep=False)
        locks = self._locks(source, planned.recipe)
        layers = self._layers(planned.recipe)
        return Verified(checks=(*found, *locks, *layers), impossible=planned.impossible)

    def _base(self, source: Source, platform: Platform) -> Check:
        registry = self._registries.for_host(source.base.repository.host)
        base = bases.existing_base(registry, source, platform)
        key = bases.facts_key(base)
        if key not in self._seen:
            kept = self._store.text(key, kind=bases.FACTS)
            verdict = Verdict(state="missing") if kept is None else _held_against(kept, registry, base)
            self._note(key, "base image", f"{source.base}, {platform}", verdict)
        return self._seen[key]

    def _locks(self, source: Source, recipe: Recipe) -> list[Check]:
        checks = []
        with IndexClient(source.indexes) as client:
            resolver = wheels.resolver_of(self._settings, self._store, source, client)
            for part in recipe.platforms:
                kept = resolver.kept(part.platform, part.lock.glibc)
                if kept is None or kept.as_of is None:
                    continue
                key = resolver.tag(part.platform, part.lock.glibc, kept.as_of)
                if key not in self._seen:
                    self._note(key, "lock", str(part.platform), _again(resolver, kept))
                checks.append(self._seen[key])
        return checks

    def _layers(self, recipe: Recipe) -> list[Check]:
        groups = {group.source: group for part in recipe.platforms for group in part.groups}
        with wheels.wheel_layers(self._settings, self._store, recipe) as layers:
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


def _held_against(kept: bytes, registry: Registry, base: BaseImage) -> Verdict:
    try:
        said = BaseFacts.from_json(kept)
    except Malformed:
        return Verdict(state="missing")  # a publish does not believe it either
    right = inspect_base(registry, base)
    if said == right:
        return Verdict(state="same")
    return Verdict(state="different", detail=f"it says {kept[:500].decode()}, and the image {right.to_json().decode()}")


def _again(resolver: Resolver, kept: Lock) -> Verdict:
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
