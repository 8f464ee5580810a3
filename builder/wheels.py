"""The wheels method: from a model's requirements to a recipe for each platform; nothing is run, and nothing pushed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builder.bases import base_with_facts, check_libraries, check_loader, interpreter_of
from builder.budget import Budget
from builder.build.index import IndexClient
from builder.build.indexes import Indexes
from builder.build.kept_locks import LOCK_TYPE, Resolver
from builder.build.locked import Lock
from builder.build.provided_modules import check_provided
from builder.build.resolver import MOST_MEMORY
from builder.build.unsatisfied import NoWheel
from builder.build.wheel_layers import WheelLayers, compiler_for
from builder.crew import side_by_side
from builder.errors import InvalidVersion
from builder.images.descriptor import MOST_JSON_BYTES, Descriptor, Malformed, digest_of, from_bytes, strings
from builder.images.files_layer import FileEntry, split
from builder.images.layer import Layer
from builder.images.layer_store import LayerStore
from builder.images.manifest import LOCK_DIGEST, REQUIREMENTS_DIGEST, Published
from builder.images.registries import Registries
from builder.images.registry import Registry
from builder.log import get_logger
from builder.models.catalog import Artifact
from builder.network import network
from builder.plan import Base, Layers
from builder.recipe import HOME, PlatformRecipe, Recipe
from builder.reference import Digest, Platform, Reference
from builder.settings import Settings
from builder.source import Source
from builder.stages import stage

_log = get_logger("wheels")
_SECONDS = 60.0
_RESOLVERS = 4
_LEAST_MEMORY = 512 << 20

# Returns the lock of the image that stands, given a platform and the digest of the requirements; None for none.
Former = Callable[[Platform, Digest], Lock | None]


def no_former(_platform: Platform, _requirements: Digest) -> None:
    """Return None: no image stands whose lock could be taken."""
    return


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What the wheels method can do for a version.

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


def layer_store(settings: Settings, registries: Registries) -> LayerStore:
    """Return where wheel layers are kept."""
    repository = settings.wheel_layer_repository
    return LayerStore(registries.for_host(repository.host), repository)


def planned(
    settings: Settings,
    registries: Registries,
    source: Source,
    platforms: Sequence[Platform],
    *,
    former: Former = no_former,
    keep: bool = True,
) -> Planned:
    """Return the recipe of a version's images.

    Args:
        settings: what the environment says.
        registries: those of the base image and of the kept locks.
        source: what the version asks for.
        platforms: what for.
        former: returns the lock of the image that stands, where that was made from the same files and requirements.
        keep: whether what is found out is kept in the registry.

    Raises:
        InvalidVersion: the requirements cannot be used or fulfilled, or the base image has no such Python.
        BuilderError: a server is away, or refuses.
    """
    store = layer_store(settings, registries)
    with IndexClient(source.indexes) as client:
        resolver = resolver_of(settings, store, source, client, former=former)

        def one(platform: Platform) -> tuple[PlatformRecipe | NoWheel, Base, Platform]:
            with stage("base"):
                base, facts = base_with_facts(registries, store, source, platform, keep=keep)
            found = Base(name=str(base.reference), digest=base.digest, diff_ids=base.diff_ids)
            interpreter = interpreter_of(base, facts, source.python)
            check_loader(base, facts, source.loader, client=bool(source.client_command))
            try:
                with stage("lock"):
                    lock = resolver.lock(platform, facts.glibc, keep=keep)
            except NoWheel as error:
                return error, found, platform
            # A client loads the model as it likes, and a base image may have a place of its own for modules.
            if not source.client_command and "PYTHONPATH" not in base.environ:
                check_provided(source.names.loaded, source.own_paths, lock, client, code=source.names.code)
            part = PlatformRecipe(
                platform=platform,
                interpreter=interpreter,
                base_layers=len(base.layers),
                command=source.command(lock),
                lock=lock,
                libraries=facts.libraries,
            )
            return part, found, platform

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
        unkept=tuple(sorted(store.refused, key=lambda text: text.key)),
    )
    return Planned(
        recipe=recipe,
        bases={platform: base for _, base, platform in results if platform in parts},
        notes={platform: tuple(_notes(source, part.lock)) for platform, part in parts.items()},
        impossible={platform: part for part, _, platform in results if isinstance(part, NoWheel)},
    )


def _notes(source: Source, lock: Lock) -> Iterator[str]:
    for name in lock.added:
        why = source.names.uses.get(name, "the model's files name it")
        yield f"added {name} {lock.versions[name]}, which comes with the whole mlflow: {why}"


def resolver_of(
    settings: Settings, store: LayerStore, source: Source, client: IndexClient, *, former: Former = no_former
) -> Resolver:  # fmt: skip
    """Return what gives the locks of a source.

    Args:
        settings: RESOLVE_AS_OF and VERSION_MEMORY are used.
        store: where locks are kept.
        source: what a version asks for.
        client: asks the source's indexes.
        former: as for `planned`.
    """
    return Resolver(
        store=store,
        requirements=source.requirements,
        indexes=source.indexes,
        client=client,
        model=source.context / source.model_folder,
        python=source.python,
        as_of=source.as_of if settings.resolve_as_of == "registered" else None,
        former=lambda platform: former(platform, source.digest),
        # Several may run at a time, so one has its share, or what an honest one needs.
        memory=min(MOST_MEMORY, max(Budget.of(settings).memory // _RESOLVERS, _LEAST_MEMORY)),
    )


@contextmanager
def wheel_layers(settings: Settings, store: LayerStore, recipe: Recipe) -> Iterator[WheelLayers]:
    """Give what finds and makes the layers of a recipe's wheels."""
    compiler = compiler_for(recipe.python) if settings.wheel_bytecode else None
    indexes = Indexes.of(network(settings), allowed=settings.allowed_indexes).joined(recipe.indexes)
    with (
        IndexClient(indexes) as client,
        WheelLayers(store, client, python=recipe.python, compiler=compiler) as layers,
    ):
        yield layers


def check_files(recipe: Recipe, artifacts: Sequence[Artifact], limit: int | None) -> None:
    """Refuse files that an image has no layers for, before they are downloaded.

    Args:
        recipe: what the images are made from.
        artifacts: those of the model and of its client; one whose size nobody tells counts as empty.
        limit: bytes that every layer has to be smaller than; None where any size will do.

    Raises:
        InvalidVersion: a file is too large, all of them are, or one cannot be in an image.
    """
    files = [FileEntry(path=f"{HOME[1:]}/{each.path}", source=Path(), size=each.size or 0) for each in artifacts]
    for part in recipe.platforms:
        split(files, most=part.model_layers, limit=limit)


def check_wheels(part: PlatformRecipe, base: str, layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """Refuse an environment whose wheels need libraries that nobody has; return what is worth a warning.

    Args:
        part: the environment.
        base: the base image's reference.
        layers: those of all its wheels, by the sources of their groups.

    Raises:
        InvalidVersion: nothing of a wheel can be loaded for want of a library.
    """
    notes = (layers[group.source].note for group in part.groups)
    return tuple(check_libraries(base, part.platform, part.libraries, notes))


def known_layers(
    settings: Settings,
    registries: Registries,
    recipe: Recipe,
    artifacts: Sequence[Artifact],
    bases: Mapping[Platform, Base],
) -> dict[Platform, Layers]:
    """Return what the registry knows of each platform's wheel layers, and what would have to move.

    Args:
        settings: what the environment says.
        registries: those of the layers.
        recipe: what the images are made from.
        artifacts: of the version.
        bases: the base image of each platform.

    Raises:
        InvalidVersion: all layers of a platform are known, and nothing of a wheel can be loaded for want of a library.
    """
    folders = tuple(f"{folder}/" for folder in (recipe.model_folder, recipe.client_folder) if folder)
    own = sum(artifact.size or 0 for artifact in artifacts if artifact.path.startswith(folders))
    with wheel_layers(settings, layer_store(settings, registries), recipe) as layers:
        known = layers.known(group for part in recipe.platforms for group in part.groups)
    missing = {
        part.platform: [group for group in part.groups if group.source not in known] for part in recipe.platforms
    }
    return {
        part.platform: Layers(
            known=len(part.groups) - len(missing[part.platform]),
            missing=tuple(wheel.filename for group in missing[part.platform] for wheel in group.wheels),
            download=sum(group.size for group in missing[part.platform]),
            model=own,
            lacks=() if missing[part.platform] else check_wheels(part, bases[part.platform].name, known),
        )
        for part in recipe.platforms
    }


def former_lock(
    registry: Registry, existing: Published, reference: Reference, platform: Platform, requirements: Digest
) -> Lock | None:
    """Return the lock that an image was made of, which is kept beside it; None where there is none that can be read.

    Args:
        registry: where the image is.
        existing: what stands under the reference.
        reference: the tag.
        platform: which of its images.
        requirements: what it has to be a lock of.

    Raises:
        BuilderError: it cannot be told; see `Registry`.
    """
    image = existing.platforms.get(platform)
    found = registry.manifest(reference.repository.digest(image.digest)) if image else None
    if found is None:
        return None
    try:
        notes = strings(from_bytes(found.content).get("annotations"), "annotations")
        digest = notes.get(LOCK_DIGEST)
        if digest is None or notes.get(REQUIREMENTS_DIGEST) != str(requirements):
            return None
        if not registry.has_blob(reference.repository, digest_of(digest)):
            return None
        text = Descriptor(media_type=LOCK_TYPE, digest=digest_of(digest), size=0)
        return Lock.from_text(registry.blob_bytes(reference.repository, text, MOST_JSON_BYTES))
    except (Malformed, InvalidVersion) as error:
        _log.warning("the lock of the standing image cannot be read", reference=str(reference), why=str(error))
        return None
