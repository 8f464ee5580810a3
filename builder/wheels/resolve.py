"""Lock an environment: from the registry's store of locks, or by uv, whose answer is checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from builder.errors import BuildFailed, InvalidVersion
from builder.log import get_logger
from builder.oci.store import LayerStore
from builder.package_index import Indexes
from builder.package_index.client import IndexClient
from builder.package_index.wheel_file import LockedWheel, minor_version, parse_wheel_name, rank_of, wheel_tags
from builder.process import run, side_by_side
from builder.reference import Platform
from builder.wheels.inputs import for_release, locked_release, whole_of, with_used
from builder.wheels.lock import Lock, lock_keys, moments
from builder.wheels.pip_syntax import Required
from builder.wheels.requirements import Requirements, conda_refused
from builder.wheels.uv import (
    MOST_MEMORY,
    MissingTimes,
    NoWheel,
    Question,
    Unfit,
    Unsatisfiable,
    Uv,
    names_an_address,
    private_folder,
)
from builder.wheels.wheel import open_wheel

if TYPE_CHECKING:
    from builder.process import Runner


_log = get_logger("lock")

LOCK_TYPE = "application/vnd.modelimage.lock.v1+toml"
LOCK_FILE = "pylock.toml"
_SECONDS = 60.0
# Each is for an index without times, or for one package more that has too few wheels.
_MOST_ROUNDS = 20
_OTHER_SYSTEMS = ("win", "macosx_")
_NO_SOURCE = (".exe", ".msi", ".egg")


def lock(
    requirements: Requirements,
    *,
    platform: Platform,
    indexes: Indexes,
    model: Path,
    python: str = "",
    as_of: datetime | None = None,
    glibc: tuple[int, int] | None = None,
    client: IndexClient | None = None,
    cache: Path | None = None,
    timeout: float = 300,
    memory: int = MOST_MEMORY,
    runner: Runner = run,
) -> Lock:
    """Return the wheels that fulfil a model's requirements on a platform, each with its hash.

    The wheels carry their addresses, so that downloads can start at once. The resolution is made as of the beginning
    of `as_of`'s day and, where that fails, as of `as_of` itself; `Lock.as_of` says which. Where the requirements cannot
    be fulfilled, those that they name as `otherwise` are taken. What MLflow's release needs is decided by the lock.

    Args:
        requirements: what is to be installed.
        platform: what for.
        indexes: the package indexes; those that the model names are added.
        model: folder of the model, for the wheels in it.
        python: the interpreter, `3.11` or, where it is known, `3.11.2`; empty for the model's own.
        as_of: packages uploaded later do not exist; None for all that there are.
        glibc: the base image's C library, major and minor; None for one that every base has.
        client: reads the same indexes; None for one of this call's own.
        cache: folder in which uv keeps metadata; None for none.
        timeout: seconds for each run of uv.
        memory: bytes for each run of uv.
        runner: runs programs.

    Raises:
        NoWheel: a package has no wheel for this platform; an engine may build it.
        Unsatisfiable: the requirements contradict each other, or what the indexes have.
        InvalidVersion: the platform has no wheels, the model's Python is not known, or hashes do not fit; or one of the
            model's wheels asks for what is at an address.
        ServiceUnavailable, PermissionRefused, InvalidSettings, TryAgain, BuildFailed: it could not be resolved.
    """
    python = python or requirements.python_version
    if not python:
        message = "The model does not say which Python version it was logged with."
        raise InvalidVersion(message, remedy="Log it with a python_env.yaml, as MLflow does.")
    for wheel in requirements.local:
        _check_required(model / wheel.path)
    joined = indexes.joined(requirements.indexes)
    question = Question(
        requirements=requirements, model=model, platform=platform, python=python, glibc=glibc, as_of=as_of
    )
    uv = Uv(indexes=joined, runner=runner, cache=cache, timeout=timeout, memory=memory)
    with private_folder() as folder:
        if client is not None and joined is indexes:
            return _Locking(question, uv, client, folder).lock()
        with IndexClient(joined) as own:
            return _Locking(question, uv, own, folder).lock()


class _Locking:
    """The resolution of one lock: what is tried, and in which order."""

    def __init__(self, question: Question, uv: Uv, client: IndexClient, folder: Path) -> None:
        self._question, self._uv, self._client = question, uv, client
        self._folder = folder
        self._places: dict[str, Path] = {}
        self._timeless: frozenset[str] = frozenset()
        self._unfit: dict[str, frozenset[Version]] = {}

    def lock(self) -> Lock:
        """Return the lock of the requirements, or of what they name as `otherwise`."""
        try:
            return self._whole()
        except NoWheel as error:
            if systems := self._only_for(error.package):
                raise NoWheel(error.package, error.platform, systems=systems) from error
            raise

    def _only_for(self, package: str) -> list[str]:
        """Return the platform tags of the files that would fulfil the requirements on a package.

        Empty where one of them may be built or installed on Linux.
        """
        wanted = [SpecifierSet(one.specifier) for one in self._question.requirements.named(package)]
        platforms: set[str] = set()
        for file in self._client.files(package):
            release = file.release
            unwanted = release and not all(one.contains(release[1], prereleases=True) for one in wanted)
            if unwanted or file.filename.endswith(_NO_SOURCE):
                continue
            if release is None or not file.filename.endswith(".whl"):
                return []  # source, or what may be
            platforms |= {tag.platform for tag in parse_wheel_name(file.filename)[3]}
        return sorted(platforms) if all(platform.startswith(_OTHER_SYSTEMS) for platform in platforms) else []

    def _whole(self) -> Lock:
        try:
            return self._built_with(self._question)
        except Unsatisfiable as error:
            otherwise = self._question.requirements.otherwise
            if otherwise is None:
                raise
            _log.info("the whole package is installed instead", why=error.what)
        return self._built_with(replace(self._question, requirements=otherwise))

    def _built_with(self, question: Question) -> Lock:
        """Return the lock with the packages that the environment was built with, unless they conflict with another."""
        try:
            return self._complete(question)
        except Unsatisfiable as error:
            build = question.requirements.build
            if not build & set(re.findall(r"[a-z0-9-]+", error.explanation)):
                raise
            _log.info("build dependencies give way", packages=sorted(build), why=error.what)
        return self._complete(replace(question, requirements=question.requirements.without_build()))

    def _complete(self, question: Question) -> Lock:
        """Return the lock with what its MLflow needs and what conda would install, resolved again where needed."""
        found = self._as_of(question)
        lacking = self._lacking(found, question)
        served = for_release(question.requirements, found.versions)
        if served is None and not lacking:
            return self._with_used(found, question)
        more = served or question.requirements
        more = more.with_changes(required=(*more.required, *lacking))
        conda = [one.text() for one in lacking]
        _log.info("resolving once more", mlflow=str(locked_release(found.versions)), conda=conda)
        question = replace(question, requirements=more)
        return self._with_used(self._as_of(question), question)

    def _with_used(self, found: Lock, question: Question) -> Lock:
        """Return the lock with what the model's files name of the whole MLflow, in the versions that come with that.

        A name may not be a module's after all, so that nothing is refused for it. Where the part conflicts with what is
        added, the whole is taken; where the whole cannot be resolved, any version is.
        """
        requirements = question.requirements
        whole = whole_of(requirements, found.versions)
        if whole is None:
            return found
        everything = None
        with suppress(Unsatisfiable, NoWheel):
            everything = self._as_of(replace(question, requirements=whole))
        more = with_used(requirements, found.versions, everything.versions if everything else None)
        names = tuple(sorted(more.added - requirements.added))
        if not names:
            return found
        _log.info("resolving once more", added=list(names))
        try:
            made = self._as_of(replace(question, requirements=more))
        except (Unsatisfiable, NoWheel) as error:
            if everything is None:
                _log.warning(
                    "packages of mlflow that the model's files name cannot be added", names=names, why=error.what
                )
                return found
            _log.info("the whole package is installed instead", why=error.what)
            made = everything
        return made.model_copy(update={"added": names})

    def _lacking(self, found: Lock, question: Question) -> list[Required]:
        """Return the packages that conda would install and a lock lacks.

        Raises:
            InvalidVersion: packages have no wheel; each is named.
        """
        lacking = [one for one in question.requirements.conda if one.name not in found.versions]
        if missing := [one.text() for one in lacking if not self._has_wheel(one, question)]:
            raise conda_refused(missing)
        return lacking

    def _has_wheel(self, one: Required, question: Question) -> bool:
        wanted = SpecifierSet(one.specifier)
        return any(
            wanted.contains(version, prereleases=True) for version, fits in self._versions(one.name, question) if fits
        )

    def _as_of(self, question: Question) -> Lock:
        """Return the lock as of the first moment that has a solution."""
        tried = moments(question.as_of)
        for moment in tried[:-1]:
            try:
                return self._resolved(replace(question, as_of=moment))
            except (Unsatisfiable, NoWheel) as error:
                _log.debug("no solution as of the beginning of the day", why=error.what)
        return self._resolved(replace(question, as_of=tried[-1]))

    def _resolved(self, question: Question) -> Lock:
        question = replace(question, places={one.url: self._place(one.url) for one in question.required if one.url})
        wheels = self._by_uv(question) if question.required else ()
        _check_origins(wheels, question.requirements, self._client)
        _check_tags(wheels, question)
        _check_hashes(wheels, question.requirements)
        timeless = {wheel.name for wheel in wheels if wheel.origin == "index" and not wheel.uploaded}
        exempt = tuple(sorted(timeless)) if question.as_of else ()
        lock = Lock(
            platform=question.platform,
            python=question.python,
            glibc=question.glibc,
            as_of=question.as_of,
            exempt=exempt,
            wheels=tuple(sorted(wheels, key=lambda wheel: wheel.name)),
        )
        if lock.note:
            _log.warning(lock.note, platform=str(question.platform))
        return lock

    def _place(self, url: str) -> Path:
        """Return the wheel of an address, fetched with our own client and checked; uv gets its path.

        uv would go on to whatever the wheel requires by an address before that is checked.
        """
        if url not in self._places:
            filename = unquote(urlsplit(url).path.rpartition("/")[2])
            # A folder for each: two addresses may end with one name.
            place = self._folder / str(len(self._places)) / filename
            place.parent.mkdir()
            self._client.fetch(filename, url, place)
            _check_required(place)
            self._places[url] = place
        return self._places[url]

    def _by_uv(self, question: Question) -> tuple[LockedWheel, ...]:
        """Return uv's wheels; it is run once more without what turns out to be in the way.

        That is `as_of`, for an index that gives no upload times, and versions whose wheels are all for another C
        library or interpreter, of which a universal resolution knows nothing.
        """
        for _ in range(_MOST_ROUNDS):
            try:
                return self._uv.resolve(replace(question, timeless=self._timeless, unfit=self._unfit))
            except MissingTimes as missing:
                found = self._without_times(missing.projects)
                if found <= self._timeless:
                    break
                self._timeless |= found
            except Unfit as chosen:
                for name, version in chosen.versions.items():
                    self._unfit[name] = self._without_wheel(name, question) | {version}
        else:
            if self._unfit:
                raise NoWheel(
                    min(self._unfit), question.platform, f"after {_MOST_ROUNDS} resolutions there is still another"
                )
        message = "A package index gives upload times for some of the files that are needed, but not for all."
        raise BuildFailed(message, remedy="Set RESOLVE_AS_OF=now, or repair the index.")

    def _without_wheel(self, name: str, question: Question) -> frozenset[Version]:
        """Return the versions of a package that no wheel for the platform exists of."""
        versions = list(self._versions(name, question))
        fitting = {version for version, fits in versions if fits}
        # `!=1.0` excludes 1.0+cpu, too.
        public = {Version(version.public) for version in fitting}
        return frozenset(version for version, _ in versions if version not in fitting | public)

    def _versions(self, name: str, question: Question) -> Iterator[tuple[Version, bool]]:
        """Yield the version of each file of a package, and whether the file is a wheel for the platform."""
        ranks = wheel_tags(question.platform, question.python, question.glibc)
        for file in self._client.files(name):
            if file.release:
                wheel = file.filename.endswith(".whl")
                yield file.release[1], wheel and rank_of(parse_wheel_name(file.filename)[3], ranks) is not None

    def _without_times(self, projects: Iterable[str]) -> frozenset[str]:
        """Return the addresses of the indexes that list files of these projects without times."""
        return frozenset(
            index.url
            for index in self._client.search_order
            for project in sorted(projects)
            if any(file.uploaded is None for file in self._client.page(index, project) or ())
        )


def _check_required(wheel: Path) -> None:
    """Raise InvalidVersion where a wheel of the model, or of an address, requires what is at an address.

    uv would go to any address, a file of this machine and a repository among them. A line that is no requirement of
    PEP 508 is refused where it looks like an address: uv reads some lines that nobody else does.
    """
    for line in open_wheel(wheel).metadata.requires:
        try:
            address = Requirement(line).url is not None
        except (InvalidRequirement, ValueError, RecursionError):
            address = any(mark in line for mark in ("@", ":", "/", "\\"))
        if address:
            raise names_an_address(line, wheel.name)


def _check_origins(wheels: Iterable[LockedWheel], requirements: Requirements, client: IndexClient) -> None:
    """Raise InvalidVersion for a wheel of a place that the model's requirements and the settings do not name.

    Another wheel's metadata may have named an address or a file; a page of an index may link to a file of this machine
    or, where the model names the index, to a place that our credential would be sent to.
    """
    addresses = {one.url for one in requirements.required if one.url}
    local = {one.sha256 for one in requirements.local}
    for wheel in wheels:
        if (wheel.origin == "address" and wheel.url not in addresses) or (
            wheel.origin == "model" and wheel.sha256 not in local
        ):
            raise names_an_address(wheel.filename)
        if wheel.origin == "index" and client.is_of_this_machine(wheel):
            message = f"A page of a package index links {wheel.filename} to a file of the publisher's machine."
            raise InvalidVersion(message, remedy="Name an index that has the wheel itself.")
        if wheel.origin == "index" and not client.is_listed(wheel):
            message = f"An index that the model names links {wheel.filename} to a place that needs our credential."
            raise InvalidVersion(message, remedy="Name an index that has the wheel itself.")


def _check_tags(wheels: Iterable[LockedWheel], question: Question) -> None:
    """Raise NoWheel for a wheel that does not fit: uv takes an address's or a path's as it is."""
    tags = wheel_tags(question.platform, question.python, question.glibc)
    for wheel in wheels:
        if rank_of(parse_wheel_name(wheel.filename)[3], tags) is None:
            major, minor = minor_version(question.python)
            said = f"{wheel.filename} is not for it and CPython {major}.{minor}"
            raise NoWheel(wheel.name, question.platform, said)


def _check_hashes(wheels: Iterable[LockedWheel], requirements: Requirements) -> None:
    """Raise InvalidVersion for a wheel of another hash than its requirement names: uv does not compare them."""
    for wheel in wheels:
        hashes = {digest for one in requirements.named(wheel.name) for digest in one.hashes}
        local = {one.sha256 for one in requirements.local if one.filename == wheel.filename}
        named = hashes or (local if wheel.origin == "model" else set())
        # Packages that MLflow installs without naming them in requirements.txt have no hash there.
        ours = wheel.origin == "index" and wheel.name in requirements.added | requirements.build
        if wheel.sha256 not in named and (named or (requirements.require_hashes and not ours)):
            message = f"{wheel.filename} has the SHA-256 {wheel.sha256}, which the model's requirements do not name."
            remedy = "Add the hashes of the wheels for every platform of the image."
            raise InvalidVersion(message, remedy=remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolver:
    """The locks of requirements by platform: one that is kept, or one that is resolved now and kept.

    Attributes:
        store: where locks are kept.
        requirements: what is to be installed.
        indexes: the package indexes, those that the model names among them.
        client: reads them.
        model: folder of the model, for the wheels in it.
        python: the interpreter, `3.11`.
        as_of: packages uploaded later do not exist; None for all that there are, and then no lock is kept.
        previous: returns the lock of the tag's image, made from the same files; None for no image.
        memory: bytes that each run of uv may take.
    """

    store: LayerStore
    requirements: Requirements
    indexes: Indexes
    client: IndexClient
    model: Path
    python: str
    as_of: datetime | None
    previous: Callable[[Platform], Lock | None] | None = None
    memory: int = MOST_MEMORY

    def lock(self, platform: Platform, glibc: tuple[int, int] | None, *, keep: bool = True) -> Lock:
        """Return the lock for a platform.

        Args:
            platform: what for.
            glibc: the base image's C library; None where it is not known.
            keep: whether one that is resolved now is kept.

        Raises:
            BuilderError: as `builder.wheels.resolve.lock`, and what a registry's client raises.
        """
        if found := self.kept(platform, glibc) or self._of_previous_image(platform, glibc):
            return found.located(self.requirements, self.model)
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
            BuilderError: as `builder.wheels.resolve.lock`.
        """
        return self._resolved(kept.platform, kept.glibc, kept.as_of)

    def tag(self, platform: Platform, glibc: tuple[int, int] | None, as_of: datetime) -> str:
        """Return the tag that a lock is kept under; `as_of` is the lock's own."""
        return self._tags(platform, glibc)[as_of]

    def _tags(self, platform: Platform, glibc: tuple[int, int] | None) -> dict[datetime, str]:
        """Return the tags that a lock may be kept under, each by its moment, in the order in which they count."""
        keys = lock_keys(
            self.requirements,
            platform=platform,
            python=self.python,
            glibc=glibc,
            indexes=self.indexes.identity,
            as_of=self.as_of,
        )
        return {moment: f"lock-{key}" for moment, key in zip(moments(self.as_of), keys, strict=False) if moment}

    def kept(self, platform: Platform, glibc: tuple[int, int] | None) -> Lock | None:
        """Return the lock that is kept for the day or else the one for the moment; both are fetched at once."""
        tags = self._tags(platform, glibc)
        texts = dict(filter(None, side_by_side(self._text, list(tags.values()), threads=len(tags), every=_SECONDS)))
        for moment, tag in tags.items():
            if (text := texts[tag]) is None:
                continue
            try:
                found = Lock.from_text(text)
            except InvalidVersion as error:
                _log.warning("the cached lock is invalid; resolving again", tag=tag, why=error.what)
                continue
            if (found.platform, found.python, found.glibc, found.as_of) == (platform, self.python, glibc, moment):
                return found
            _log.warning("the cached lock is for another environment; resolving again", tag=tag)
        return None

    def _of_previous_image(self, platform: Platform, glibc: tuple[int, int] | None) -> Lock | None:
        """Return the lock that the tag's image was made of, if it is one for this base image and time."""
        found = self.previous(platform) if self.previous and self.as_of is not None else None
        if found is None or (found.platform, found.python) != (platform, self.python) or found.as_of is None:
            return None
        fits = found.glibc == glibc or (found.glibc is not None and glibc is not None and found.glibc <= glibc)
        return found if fits else None

    def _text(self, tag: str) -> tuple[str, bytes | None]:
        return tag, self.store.text(tag, kind=LOCK_TYPE)
