"""Locks kept in a registry beside the wheel layers, so that versions of one environment are resolved once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from builder.build.index import IndexClient
from builder.build.indexes import Indexes
from builder.build.lock import lock
from builder.build.locked import Lock, lock_key, lock_keys, moments
from builder.build.requirements import Requirements
from builder.build.resolver import MOST_MEMORY
from builder.crew import side_by_side
from builder.errors import InvalidVersion
from builder.images.layer_store import LayerStore
from builder.log import get_logger
from builder.reference import Platform

_log = get_logger("lock")

LOCK_TYPE = "application/vnd.modelimage.lock.v1+toml"
LOCK_FILE = "pylock.toml"
_SECONDS = 60.0

Name = TypeVar("Name", str, tuple[str, ...])


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolver:
    """Gives the lock of requirements on a platform: one that is kept, or one that is resolved now and kept.

    Attributes:
        store: where locks are kept.
        requirements: what is to be installed.
        indexes: who is asked: those that the model names are among them.
        client: asks them.
        model: folder of the model, for the wheels in it.
        python: the interpreter, `3.11`.
        as_of: packages uploaded later do not exist; None for all that there are, and then no lock is kept.
        former: returns the lock of the image that stands, where that was made from the same files; None for none.
        memory: bytes that each run of a resolver may take.
    """

    store: LayerStore
    requirements: Requirements
    indexes: Indexes
    client: IndexClient
    model: Path
    python: str
    as_of: datetime | None
    former: Callable[[Platform], Lock | None] = lambda _: None
    memory: int = MOST_MEMORY

    def lock(self, platform: Platform, glibc: tuple[int, int] | None, *, keep: bool = True) -> Lock:
        """Return the lock for a platform.

        Args:
            platform: what for.
            glibc: the base image's C library; None where it is not known.
            keep: whether one that is resolved now is kept.

        Raises:
            BuilderError: as `builder.build.lock.lock`, and what a registry's client raises.
        """
        kept = self.kept(platform, glibc) or self._former(platform, glibc)
        if kept is not None:
            return kept.located(self.requirements, self.model)
        made = self._resolved(platform, glibc, self.as_of)
        if keep and made.as_of is not None:
            tag = self.tag(platform, glibc, made.as_of)
            self.store.keep_text(tag, made.to_text().encode(), kind=LOCK_TYPE, title=LOCK_FILE)
        return made

    def _resolved(self, platform: Platform, glibc: tuple[int, int] | None, as_of: datetime | None) -> Lock:
        _log.info("resolving", platform=str(platform), requirements=len(self.requirements.required))
        return lock(
            self.requirements,
            platform=platform,
            indexes=self.indexes,
            model=self.model,
            python=self.python,
            as_of=as_of,
            glibc=glibc,
            client=self.client,
            memory=self.memory,
        )

    def again(self, kept: Lock) -> Lock:
        """Return what is resolved now in place of a kept lock: the same, as long as the indexes lose nothing.

        Raises:
            BuilderError: as `builder.build.lock.lock`.
        """
        return self._resolved(kept.platform, kept.glibc, kept.as_of)

    def tag(self, platform: Platform, glibc: tuple[int, int] | None, as_of: datetime) -> str:
        """Return the tag that a lock of that moment is kept under."""
        return _tag(self._named(lock_key, platform, glibc, as_of))

    def _named(
        self, names: Callable[..., Name], platform: Platform, glibc: tuple[int, int] | None, as_of: datetime | None
    ) -> Name:  # fmt: skip
        return names(
            self.requirements,
            platform=platform,
            python=self.python,
            glibc=glibc,
            indexes=self.indexes.identity,
            as_of=as_of,
        )

    def kept(self, platform: Platform, glibc: tuple[int, int] | None) -> Lock | None:
        """Return the lock that is kept for the day or, where there is none, for the moment; asked for at once."""
        keys = self._named(lock_keys, platform, glibc, self.as_of)
        texts = {}
        for found in side_by_side(self._text, keys, threads=len(keys), every=_SECONDS):
            if found and found[1] is not None:
                texts[found[0]] = found[1]
        for key, moment in zip(keys, moments(self.as_of), strict=False):
            if key in texts:
                try:
                    read = Lock.from_text(texts[key])
                except InvalidVersion as error:
                    _log.warning("a kept lock is none, and is made again", why=error.what)
                    continue
                if (read.platform, read.python, read.glibc, read.as_of) == (platform, self.python, glibc, moment):
                    return read
                _log.warning("a kept lock is another one's, and is made again", tag=_tag(key))
        return None

    def _former(self, platform: Platform, glibc: tuple[int, int] | None) -> Lock | None:
        """Return the lock that the standing image was made of, if it is one for this base image and time."""
        if self.as_of is None:
            return None
        found = self.former(platform)
        if found is None or (found.platform, found.python) != (platform, self.python) or found.as_of is None:
            return None
        fits = found.glibc == glibc or (found.glibc is not None and glibc is not None and found.glibc <= glibc)
        return found if fits else None

    def _text(self, key: str) -> tuple[str, bytes | None]:
        return key, self.store.text(_tag(key), kind=LOCK_TYPE)


def _tag(key: str) -> str:
    return f"lock-{key}"
