"""From requirements to a recipe for each platform; nothing is run, and nothing pushed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from builder.budget import Budget
from builder.errors import InvalidSettings, InvalidVersion, UsageError
from builder.log import get_logger, stage
from builder.model_folder import needs_java
from builder.models import Artifact
from builder.oci import MOST_JSON_BYTES, Descriptor, Malformed, digest_of, from_bytes, strings
from builder.oci.base_image import MOST_LAYERS, BaseImage, base_image
from builder.oci.files_layer import FileEntry, split
from builder.oci.layer import Layer
from builder.oci.manifest import LOCK_DIGEST, REQUIREMENTS_DIGEST, Published
from builder.oci.registry import Registry
from builder.oci.rootfs import BaseFacts, inspect_base
from builder.oci.store import LayerStore, SmallArtifact
from builder.package_index import Indexes
from builder.package_index.client import IndexClient
from builder.package_index.wheel_file import LockedWheel
from builder.plan import AsDigest, AsPlatform, Base, Layers
from builder.process import side_by_side
from builder.reference import Digest, Platform, Reference
from builder.settings import Settings
from builder.wheels.imports import check_provided
from builder.wheels.inputs import InputSettings, Source
from builder.wheels.layer_cache import Group, WheelLayers, compiler_for, grouped
from builder.wheels.lock import Lock
from builder.wheels.resolve import LOCK_TYPE, Resolver
from builder.wheels.shared_libraries import from_note, lacking
from builder.wheels.uv import MOST_MEMORY, NoWheel

# Where the folders of the model and of its client are in an image.
HOME = "/app"
# Layers that are kept for the model's files at least, so that the environment's do not depend on the model.
_MODEL_LAYERS = 24
_ENVIRONMENT_LAYERS = 1
# Wheels need five layers at least to be grouped in.
MOST_BASE_LAYERS = MOST_LAYERS - _MODEL_LAYERS - _ENVIRONMENT_LAYERS - 5


class PlatformRecipe(BaseModel):
    """One platform's environment.

    Attributes:
        platform: which.
        interpreter: the base's interpreter, an absolute path.
        base_layers: how many layers the base has.
        command: what a container runs, relative to the context's folder.
        lock: the wheels.
        libraries: names of the base's shared libraries; None if they are not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    platform: AsPlatform
    interpreter: str
    base_layers: int
    command: tuple[str, ...]
    lock: Lock
    libraries: tuple[str, ...] | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The wheels, grouped by layer."""
        return grouped(self.lock.wheels, MOST_LAYERS - self.base_layers - _ENVIRONMENT_LAYERS - _MODEL_LAYERS)

    @property
    def model_layers(self) -> int:
        """The most layers of the model and its client: all that are left on this platform, independent of others."""
        return MOST_LAYERS - self.base_layers - _ENVIRONMENT_LAYERS - len(self.groups)


class Recipe(BaseModel):
    """All platforms' environments, and how a container of the image is started.

    Attributes:
        python: the model's Python, `3.11`.
        model_folder: of the context.
        client_folder: of the context; empty if the image has no client.
        indexes: package indexes that the model names beside the configured ones.
        requirements: digest of the requirements that the locks were made from.
        platforms: those that are made of wheel layers.
        context: where the context was, a `file:` URL: wheels that were logged with the model are below it.
        unkept: what the registry refused to store for the credential of fetch, which may only pull; push stores it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    model_folder: str
    client_folder: str = ""
    indexes: tuple[str, ...] = ()
    requirements: AsDigest
    platforms: tuple[PlatformRecipe, ...] = Field(default=())
    context: str
    unkept: tuple[SmallArtifact, ...] = ()

    def within(self, context: Path) -> Recipe:
        """Return the recipe for a context that may have moved: each phase mounts the workspace in its own place."""
        here = context.absolute().as_uri()

        def moved(wheel: LockedWheel) -> LockedWheel:
            if wheel.origin != "model" or not wheel.url or not wheel.url.startswith(f"{self.context}/"):
                return wheel
            return wheel.model_copy(update={"url": here + wheel.url.removeprefix(self.context)})

        parts = (
            part.model_copy(
                update={"lock": part.lock.model_copy(update={"wheels": tuple(map(moved, part.lock.wheels))})}
            )
            for part in self.platforms
        )
        return self.model_copy(update={"platforms": tuple(parts), "context": here})

    def for_platform(self, platform: Platform) -> PlatformRecipe:
        """Return one platform's part.

        Raises:
            UsageError: it is missing, so that the recipe belongs to another plan.
        """
        for part in self.platforms:
            if part.platform == platform:
                return part
        message = f"The workspace has no recipe for {platform}."
        raise UsageError(message, remedy="Run 'builder fetch' again, with the same BUILDER_WORKSPACE.")

    @classmethod
    def from_json(cls, content: bytes) -> Recipe:
        """Return the recipe that a workspace holds.

        Raises:
            UsageError: this program did not write it.
        """
        try:
            return cls.model_validate_json(content)
        except (ValidationError, ValueError) as error:
            message = "The workspace holds a recipe that this program did not write."
            raise UsageError(message, remedy="Run 'builder fetch' again.") from error


_log = get_logger("wheels")
_MOST_NAMED = 5
FACTS = "application/vnd.modelimage.base.v1+json"


def facts_key(base: BaseImage) -> str:
    """Return the tag that the facts of a base image are kept under, as a text of the kind `FACTS`."""
    return f"base-{base.manifest.hex}"


def _last_name(reference: Reference) -> str:
    """Return the last component of a reference's path."""
    return reference.repository.path.rpartition("/")[2]


def interpreter_of(base: BaseImage, facts: BaseFacts, python: str) -> str:
    """Return the base's interpreter of a minor version.

    Raises:
        InvalidVersion: it has none, or a C library that the wheels are not for.
    """
    found = facts.interpreters.get(python)
    if found is None:
        there = ", ".join(sorted(facts.interpreters)) or "none"
        message = f"The base image {base.reference} has no Python {python} for {base.platform}; it has {there}."
        raise InvalidVersion(message, remedy="Set BASE_IMAGE to an image with the model's Python.")
    if facts.musl:
        message = f"The base image {base.reference} has musl, but the wheels need glibc."
        raise InvalidVersion(message, remedy="Use a base image with glibc (Debian, Ubuntu, Red Hat), not Alpine.")
    if facts.occupied:
        message = f"The base image {base.reference} has something at /opt/model, where the environment goes."
        raise InvalidVersion(message, remedy="Use another base image, or log a Dockerfile.template.")
    return found


def check_libraries(base: str, platform: Platform, there: Collection[str] | None, notes: Iterable[str]) -> list[str]:
    """Refuse wheels that need a missing system library; return warnings about parts of wheels, for people.

    Args:
        base: the base image's reference.
        platform: the image's.
        there: names of the base image's libraries; None if they are not known, so that nothing is refused.
        notes: on the layers of all wheels of the image.

    Raises:
        InvalidVersion: nothing of a wheel can be loaded without a library that is missing.
    """
    read = [from_note(note) for note in notes]
    if there is None or None in read:
        return []
    wheels = [wheel for note in read if note for wheel in note]
    warnings = []
    for lack in lacking(wheels, frozenset(there), platform):
        named = [f"{name} ({needed_by})" for name, needed_by in lack.missing.items()]
        more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
        what = f"needs {', '.join(named[:_MOST_NAMED])}{more}, which neither the base image {base} nor a wheel has for "
        what += f"{platform}."
        if lack.loads:
            warnings.append(f"A part of the wheel {lack.wheel} cannot be loaded: it {what}")
            continue
        packages = f", such as one with Debian's {' '.join(lack.packages)}" if lack.packages else ""
        remedy = f"Set BASE_IMAGE, or the version's tag MODEL_BASE_IMAGE, to an image that has it{packages}"
        headless = lack.wheel.startswith(("opencv_python-", "opencv_contrib_python-"))
        remedy += ", or log the model with the package's variant for servers, -headless." if headless else "."
        message = f"The wheel {lack.wheel} {what}"
        raise InvalidVersion(message, remedy=remedy)
    return warnings


def check_loader(base: BaseImage, facts: BaseFacts, loader: str, *, client: bool) -> None:
    """Refuse a loader that needs a program that the base lacks; only warn if a client may do without it.

    Args:
        base: the base image.
        facts: those of the base image.
        loader: the module that MLflow's scoring server loads the model by.
        client: whether the version has a client, which loads the model itself.

    Raises:
        InvalidVersion: MLflow's scoring server would need Java.
    """
    if facts.java is not False or not needs_java(loader):
        return
    message = (
        f"The model's loader {loader[:100]!r} needs Java, and the base image {base.reference} has no program java "
    )
    message += f"for {base.platform}."
    if client:
        _log.warning("the client has to do without Java", why=message)
        return
    remedy = "Set BASE_IMAGE, or the version's tag MODEL_BASE_IMAGE, to an image with Python and Java, install it in a "
    remedy += "Dockerfile.template, or log the model with a flavor that needs none."
    raise InvalidVersion(message, remedy=remedy)


class RegistryClients(Protocol):
    """Gives the client of a registry, always the same for the same host."""

    def for_host(self, host: str) -> Registry:
        """Return the client of the registry at a host, perhaps with a port."""
        ...


_SECONDS = 60.0
_RESOLVERS = 4
_LEAST_MEMORY = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PresentImage:
    """The image under the version's tag, made from the version's current files, so that its locks can be reused.

    Attributes:
        registry: the client of its registry.
        reference: the tag.
        image: what the tag names.
    """

    registry: Registry
    reference: Reference
    image: Published

    def lock(self, platform: Platform, requirements: Digest) -> Lock | None:
        """Return the lock that a platform's image was made from; None if absent or unreadable.

        Args:
            platform: which of the images.
            requirements: digest of the requirements that the lock must be made from.

        Raises:
            BuilderError: the registry is unavailable, or refuses.
        """
        image = self.image.platforms.get(platform)
        repository = self.reference.repository
        found = self.registry.manifest(repository.digest(image.digest)) if image else None
        if found is None:
            return None
        try:
            notes = strings(from_bytes(found.content).get("annotations"), "annotations")
            digest = notes.get(LOCK_DIGEST)
            if digest is None or notes.get(REQUIREMENTS_DIGEST) != str(requirements):
                return None
            if not self.registry.has_blob(repository, digest_of(digest)):
                return None
            text = Descriptor(media_type=LOCK_TYPE, digest=digest_of(digest), size=0)
            return Lock.from_text(self.registry.blob_bytes(repository, text, MOST_JSON_BYTES))
        except (Malformed, InvalidVersion) as error:
            _log.warning("the lock of the present image cannot be read", reference=str(self.reference), why=str(error))
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Environments:
    """What the wheels method can make of a version.

    Attributes:
        recipe: of the platforms that it can make.
        bases: the base image of each of them.
        notes: what was added to the environment of each, and why, for people.
        impossible: the platforms for which a package has no wheel.
    """

    recipe: Recipe
    bases: dict[Platform, Base]
    notes: dict[Platform, tuple[str, ...]]
    impossible: dict[Platform, NoWheel]


class WheelsMethod:
    """From requirements to recipes and wheel layers, through clients that are opened once. Thread-safe.

    Args:
        registries: those of base images and of WHEEL_LAYERS.
        store: where wheel layers, locks and facts about base images are kept.
        inputs: gives the settings for requirements, indexes and base images, when they are first used.
        as_registered: whether packages uploaded after the model was logged are ignored.
        bytecode: whether layers have bytecode.
        compilers: folder of interpreters that only compile; None for none.
        memory: bytes that all runs of the resolver may take together.
    """

    def __init__(
        self,
        registries: RegistryClients,
        store: LayerStore,
        inputs: Callable[[], InputSettings],
        *,
        as_registered: bool = True,
        bytecode: bool = True,
        compilers: Path | None = None,
        memory: int = MOST_MEMORY,
    ) -> None:
        self.store = store
        self._inputs = inputs
        self._registries = registries
        self._as_registered = as_registered
        self._bytecode = bytecode
        self._compilers = compilers
        self._memory = memory
        self._lock = threading.Lock()
        self._clients: dict[str, IndexClient] = {}
        self._bases: dict[tuple[Reference, Platform], BaseImage] = {}

    @classmethod
    def from_settings(cls, settings: Settings, registries: RegistryClients) -> Self:
        """Return the method as the settings describe it."""
        repository = settings.wheel_layer_repository
        return cls(
            registries,
            LayerStore(registries.for_host(repository.host), repository),
            partial(InputSettings.of, settings),
            as_registered=settings.resolve_as_of == "registered",
            bytecode=settings.wheel_bytecode,
            compilers=settings.wheel_compilers,
            memory=Budget.of(settings).memory,
        )

    @cached_property
    def inputs(self) -> InputSettings:
        """The settings for requirements, indexes and base images.

        Raises:
            InvalidSettings: the package indexes cannot be used.
        """
        return self._inputs()

    def close(self) -> None:
        """Close all connections to package indexes."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def client(self, indexes: Indexes) -> IndexClient:
        """Return the client of some package indexes, the same one each time."""
        with self._lock:
            if indexes.identity not in self._clients:
                self._clients[indexes.identity] = IndexClient(indexes)
            return self._clients[indexes.identity]

    # ---- base images

    def base(self, reference: Reference, platform: Platform) -> BaseImage | None:
        """Return a base image as it is first found, under its tag and its digest alike; None if there is none.

        Raises:
            InvalidVersion: it exists, but not for the platform.
            BuilderError: the registry is unavailable, or refuses.
        """
        known = self._bases.get((reference, platform))
        if known is not None:
            return known
        found = base_image(self._registries.for_host(reference.repository.host), reference, platform)
        if found is not None:
            self._bases[reference, platform] = found
            self._bases[reference.repository.digest(found.digest), platform] = found
        return found

    def existing_base(self, source: Source, platform: Platform) -> BaseImage:
        """Return a version's base image.

        Raises:
            InvalidVersion: there is no such image, or none for the platform.
            InvalidSettings: there is no such image, and the version does not name it.
            BuilderError: the registry is unavailable, or refuses.
        """
        base = self.base(source.base, platform)
        if base is None:
            message = f"The base image {source.base} does not exist."
            remedy = "Set BASE_IMAGE, or the version's tag MODEL_BASE_IMAGE, to one that exists."
            if source.own_base:
                raise InvalidVersion(message, remedy=remedy)
            # Not the version's fault, so that it must not count as an attempt.
            raise InvalidSettings(message, remedy=remedy)
        return base

    def facts(self, base: BaseImage, *, keep: bool = True, registry: Registry | None = None) -> BaseFacts:
        """Return the facts about a base image, which is read once.

        Args:
            base: the image.
            keep: whether new facts are kept in the registry.
            registry: the client to read it with; None for the usual one.

        Raises:
            InvalidVersion: a layer cannot be read.
            BuilderError: a registry is unavailable, or refuses.
        """
        key = facts_key(base)
        kept = self.store.text(key, kind=FACTS)
        if kept is not None:
            try:
                return BaseFacts.from_json(kept)
            except Malformed as error:
                _log.warning("the facts kept of a base image are invalid; reading it again", tag=key, why=str(error))
        _log.info("reading the base image", base=str(base.reference), platform=str(base.platform))
        facts = inspect_base(registry or self._registries.for_host(base.reference.repository.host), base)
        if keep:
            self.store.keep_text(key, facts.to_json(), kind=FACTS, title=f"{_last_name(base.reference)}.json")
        return facts

    # ---- environments

    def resolver(self, source: Source, present: PresentImage | None = None) -> Resolver:
        """Return the resolver of a source's requirements.

        Args:
            source: a version's inputs.
            present: the image under the tag, whose locks are reused if they fit; None if there is none.
        """
        return Resolver(
            store=self.store,
            requirements=source.requirements,
            indexes=source.indexes,
            client=self.client(source.indexes),
            model=source.context / source.model_folder,
            python=source.python,
            as_of=source.as_of if self._as_registered else None,
            previous=partial(present.lock, requirements=source.digest) if present else None,
            # Several may run at a time, so each has its share, but at least what an honest one needs.
            memory=min(MOST_MEMORY, max(self._memory // _RESOLVERS, _LEAST_MEMORY)),
        )

    def environments(
        self,
        source: Source,
        platforms: Sequence[Platform],
        *,
        present: PresentImage | None = None,
        keep: bool = True,
    ) -> Environments:
        """Return the recipe of a version's images.

        Args:
            source: the version's inputs.
            platforms: those of the images.
            present: as for `resolver`.
            keep: whether locks and facts are kept in the registry.

        Raises:
            InvalidVersion: the requirements cannot be used or fulfilled, or the base image has no such Python.
            BuilderError: a server is unavailable, or refuses.
        """
        resolver = self.resolver(source, present)
        # What an earlier plan could not keep is no part of this one.
        self.store.refused.clear()

        def one(platform: Platform) -> tuple[PlatformRecipe | NoWheel, Base, Platform]:
            return *self._environment(source, platform, resolver, keep=keep), platform

        results = [
            result for result in side_by_side(one, platforms, threads=_RESOLVERS, every=_SECONDS) if result is not None
        ]
        parts = {platform: part for part, _, platform in results if isinstance(part, PlatformRecipe)}
        recipe = Recipe(
            python=source.python,
            model_folder=source.model_folder,
            client_folder=source.client_folder,
            indexes=source.requirements.indexes,
            requirements=source.digest,
            platforms=tuple(parts[platform] for platform in platforms if platform in parts),
            context=source.context.absolute().as_uri(),
            unkept=tuple(sorted(self.store.refused, key=lambda text: text.key)),
        )
        return Environments(
            recipe=recipe,
            bases={platform: base for _, base, platform in results if platform in parts},
            notes={platform: tuple(_notes(source, part.lock)) for platform, part in parts.items()},
            impossible={platform: part for part, _, platform in results if isinstance(part, NoWheel)},
        )

    def _environment(
        self, source: Source, platform: Platform, resolver: Resolver, *, keep: bool
    ) -> tuple[PlatformRecipe | NoWheel, Base]:
        """Return one platform's environment, or the package that has no wheel for it; and its base image."""
        with stage("base"):
            base = self.existing_base(source, platform)
            _check_depth(base)
            facts = self.facts(base, keep=keep)
        found = Base(name=str(source.base), digest=base.digest, diff_ids=base.diff_ids)
        interpreter = interpreter_of(base, facts, source.python)
        check_loader(base, facts, source.loader, client=bool(source.client_command))
        try:
            with stage("lock"):
                lock = resolver.lock(platform, facts.glibc, keep=keep)
        except NoWheel as error:
            return error, found
        # A client loads the model itself, and a base image may have a place of its own for modules.
        if not source.client_command and "PYTHONPATH" not in base.environ:
            check_provided(source.names.loaded, source.own_paths, lock, resolver.client, code=source.names.code)
        part = PlatformRecipe(
            platform=platform,
            interpreter=interpreter,
            base_layers=len(base.layers),
            command=source.command(lock),
            lock=lock,
            libraries=facts.libraries,
        )
        return part, found

    # ---- wheel layers

    @contextmanager
    def layers(self, recipe: Recipe) -> Iterator[WheelLayers]:
        """Yield the cache that finds and makes the layers of a recipe's wheels."""
        compiler = compiler_for(recipe.python, self._compilers) if self._bytecode else None
        client = self.client(self.inputs.indexes.joined(recipe.indexes))
        with WheelLayers(self.store, client, python=recipe.python, compiler=compiler) as layers:
            yield layers

    def known_layers(
        self, recipe: Recipe, artifacts: Sequence[Artifact], bases: Mapping[Platform, Base]
    ) -> dict[Platform, Layers]:
        """Return the state of each platform's wheel layers in the registry, and the bytes to be transferred.

        Args:
            recipe: what the images are made from.
            artifacts: of the version.
            bases: the base image of each platform.

        Raises:
            InvalidVersion: all layers of a platform are present, and nothing of a wheel can be loaded without a
                library that is missing.
        """
        folders = tuple(f"{folder}/" for folder in (recipe.model_folder, recipe.client_folder) if folder)
        own = sum(artifact.size or 0 for artifact in artifacts if artifact.path.startswith(folders))
        with self.layers(recipe) as layers:
            known = layers.known(group for part in recipe.platforms for group in part.groups)
        found = {}
        for part in recipe.platforms:
            missing = [group for group in part.groups if group.source not in known]
            found[part.platform] = Layers(
                known=len(part.groups) - len(missing),
                missing=tuple(wheel.filename for group in missing for wheel in group.wheels),
                download=sum(group.size for group in missing),
                model=own,
                lacks=() if missing else check_wheels(part, bases[part.platform].name, known),
            )
        return found


def _check_depth(base: BaseImage) -> None:
    # Before any layer is read: a manifest may name thousands.
    if len(base.layers) > MOST_BASE_LAYERS:
        message = f"The base image {base.reference} has {len(base.layers)} layers; the limit is {MOST_BASE_LAYERS}."
        raise InvalidVersion(message, remedy="Use a base image with fewer layers, or log a Dockerfile.template.")


def _notes(source: Source, lock: Lock) -> Iterator[str]:
    for name in lock.added:
        why = source.names.uses.get(name, "the model's files name it")
        yield f"added {name} {lock.versions[name]}, which comes with the whole mlflow: {why}"


def check_files(recipe: Recipe, artifacts: Sequence[Artifact], limit: int | None) -> None:
    """Refuse files that an image has no layers for, before they are downloaded.

    Args:
        recipe: what the images are made from.
        artifacts: those of the model and of its client; one of unknown size counts as empty.
        limit: bytes that every layer has to be smaller than; None for no limit.

    Raises:
        InvalidVersion: a file is too large, all of them are, or one cannot be in an image.
    """
    files = [FileEntry(path=f"{HOME[1:]}/{each.path}", source=Path(), size=each.size or 0) for each in artifacts]
    for part in recipe.platforms:
        split(files, most=part.model_layers, limit=limit)


def check_wheels(part: PlatformRecipe, base: str, layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """Refuse an environment whose wheels need missing libraries; return warnings about parts of wheels.

    Args:
        part: the environment.
        base: the base image's reference.
        layers: those of all its wheels, by the sources of their groups.

    Raises:
        InvalidVersion: nothing of a wheel can be loaded without a library that is missing.
    """
    notes = (layers[group.source].note for group in part.groups)
    return tuple(check_libraries(base, part.platform, part.libraries, notes))
