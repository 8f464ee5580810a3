"""The wheels method: from a model's requirements to a recipe for each platform; nothing is run, and nothing pushed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from builder.build.environment import REQUIREMENTS
from builder.build.index import IndexClient
from builder.build.indexes import Indexes
from builder.build.kept_locks import LOCK_TYPE, Resolver
from builder.build.locked import Lock
from builder.build.requirements import Requirements
from builder.build.serving import for_serving
from builder.build.template import DOCKERFILE_JINJA, DOCKERFILE_TEMPLATE, BaseImages, client_command
from builder.build.unsatisfied import NoWheel
from builder.build.wheel_layers import WheelLayers, compiler_for
from builder.crew import side_by_side
from builder.errors import InvalidSettings, InvalidVersion
from builder.images.base import BaseImage, base_image
from builder.images.base_facts import BaseFacts, inspect_base
from builder.images.descriptor import MOST_JSON_BYTES, Descriptor, Malformed, digest_of, from_bytes, strings
from builder.images.layer_store import LayerStore
from builder.images.manifest import LOCK_DIGEST, REQUIREMENTS_DIGEST, Published
from builder.images.registries import Registries
from builder.images.registry import Registry
from builder.log import get_logger
from builder.models.artifacts import find_model_folder
from builder.models.catalog import Artifact
from builder.models.version import Inputs, ModelVersion, template_variables
from builder.network import network
from builder.plan import Base, Layers, Method
from builder.recipe import PlatformRecipe, Recipe
from builder.reference import Digest, Platform, Reference, repository_component
from builder.settings import Settings
from builder.stages import stage

_log = get_logger("wheels")
_FACTS = "application/vnd.modelimage.base.v1+json"
_SECONDS = 60.0
PORT = 8080

# Returns the lock of the image that stands, given a platform and the digest of the requirements; None for none.
Former = Callable[[Platform, Digest], Lock | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a version's artifacts ask for.

    Attributes:
        context: the folder that the artifacts are in; what describes the model, and its wheels, is enough.
        created: when the version was registered.
        requirements: what is to be installed.
        indexes: who is asked for it.
        python: the model's Python, `3.11`.
        base: the base image.
        own_base: whether the version names it itself.
        model_folder: of the context.
        client_folder: of the context; empty where no client is in the image.
        command: what a container runs.
    """

    context: Path
    created: datetime
    requirements: Requirements
    indexes: Indexes
    python: str
    base: Reference
    own_base: bool
    model_folder: str
    client_folder: str
    command: tuple[str, ...]

    @property
    def digest(self) -> Digest:
        """A digest of the requirements."""
        return Digest.of(self.requirements.to_text().encode())

    @classmethod
    def of(cls, settings: Settings, version: ModelVersion, context: Path, paths: Sequence[str]) -> Self:
        """Return what a version asks for.

        Args:
            settings: what the environment says.
            version: the version.
            context: the folder its artifacts are in.
            paths: of its artifacts.

        Raises:
            InvalidVersion: the requirements cannot be used, or there are none; the base image is not allowed.
            InvalidSettings: the indexes cannot be used.
        """
        inputs = Inputs.of(version)
        folder = find_model_folder(paths, inputs)
        inputs = inputs.model_copy(update={"model_folder": folder})
        client = client_command(context, template_variables(version, inputs, repository_component(version.name)))
        client_folder = inputs.client_folder if client else ""
        configured = Indexes.of(network(settings), allowed=settings.allowed_indexes)
        asked = Requirements.read(context, folder, configured, client_folder=client_folder)
        serving = for_serving(asked, full=settings.full_mlflow, own_client=bool(client))
        named = {f"{folder}/{REQUIREMENTS}", f"{client_folder}/{REQUIREMENTS}"} & set(paths)
        if not asked.required and not named:
            message = f"{version} has neither a template ({inputs.templates_folder}/{DOCKERFILE_TEMPLATE}) nor "
            message += f"{folder}/{REQUIREMENTS}, and no other file of the model names its requirements."
            remedy = "Log the model with its requirements (MLflow's log_model does), or log a Dockerfile.template; "
            remedy += "MODEL_TEMPLATES_FOLDER names its folder where that is another one."
            raise InvalidVersion(message, remedy=remedy)
        images = BaseImages(default=settings.base_image, allowed=settings.allowed_base_images, wanted=inputs.base_image)
        base = Reference.parse(images.choose(asked.python_version))
        if not asked.python_version:
            message = "The model does not say which Python version it was logged with."
            remedy = "Log it with MLflow (python_env.yaml or MLmodel tells), or ship a Dockerfile.template."
            raise InvalidVersion(message, remedy=remedy)
        return cls(
            context=context,
            created=version.created,
            requirements=serving.requirements,
            indexes=configured.joined(asked.indexes),
            python=asked.python_version,
            base=base,
            own_base=bool(inputs.base_image),
            model_folder=folder,
            client_folder=client_folder,
            command=tuple(client) or _served(serving.server),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What the wheels method can do for a version.

    Attributes:
        recipe: of the platforms that it can make.
        bases: the base image of each of them.
        impossible: the platforms for which a package has no wheel.
    """

    recipe: Recipe
    bases: dict[Platform, Base]
    impossible: dict[Platform, NoWheel]


def chosen_method(settings: Settings, version: ModelVersion, paths: Sequence[str]) -> Method:
    """Return how a version's image is made: by its template where it ships one, unless BUILD_METHOD says otherwise.

    Args:
        settings: BUILD_METHOD is used.
        version: the version.
        paths: of its artifacts.
    """
    folder = Inputs.of(version).templates_folder
    templates = {f"{folder}/{name}" for name in (DOCKERFILE_TEMPLATE, DOCKERFILE_JINJA)} & set(paths)
    if settings.build_method == "auto":
        return "dockerfile" if templates else "wheels"
    if settings.build_method == "wheels" and templates:
        _log.warning("the version's template is not used, since BUILD_METHOD is wheels", template=min(templates))
    return settings.build_method


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
    former: Former = lambda _platform, _requirements: None,
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

        def one(platform: Platform) -> tuple[PlatformRecipe | NoWheel, Base, Platform]:
            with stage("base"):
                base, facts = base_with_facts(registries, store, source, platform, keep=keep)
            found = Base(name=str(base.reference), digest=base.digest, diff_ids=base.diff_ids)
            resolver = Resolver(
                store=store,
                requirements=source.requirements,
                indexes=source.indexes,
                client=client,
                model=source.context / source.model_folder,
                python=source.python,
                as_of=source.created if settings.resolve_as_of == "registered" else None,
                former=lambda platform: former(platform, source.digest),
            )
            interpreter = _interpreter(base, facts, source.python)
            try:
                with stage("lock"):
                    lock = resolver.lock(platform, facts.glibc, keep=keep)
            except NoWheel as error:
                return error, found, platform
            part = PlatformRecipe(platform=platform, interpreter=interpreter, base_layers=len(base.layers), lock=lock)
            return part, found, platform

        results = [result for result in side_by_side(one, platforms, threads=4, every=_SECONDS) if result is not None]
    parts = {platform: part for part, _, platform in results if isinstance(part, PlatformRecipe)}
    recipe = Recipe(
        python=source.python,
        model_folder=source.model_folder,
        client_folder=source.client_folder,
        command=source.command,
        indexes=source.requirements.indexes,
        requirements=source.digest,
        platforms=tuple(parts[platform] for platform in platforms if platform in parts),
        unkept=tuple(sorted(store.refused, key=lambda text: text.key)),
    )
    return Planned(
        recipe=recipe,
        bases={platform: base for _, base, platform in results if platform in parts},
        impossible={platform: part for part, _, platform in results if isinstance(part, NoWheel)},
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


def known_layers(
    settings: Settings, registries: Registries, recipe: Recipe, artifacts: Sequence[Artifact]
) -> dict[Platform, Layers]:  # fmt: skip
    """Return what the registry knows of each platform's wheel layers, and what would have to move.

    Args:
        settings: what the environment says.
        registries: those of the layers.
        recipe: what the images are made from.
        artifacts: of the version.
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


def base_with_facts(
    registries: Registries, store: LayerStore, source: Source, platform: Platform, *, keep: bool = True
) -> tuple[BaseImage, BaseFacts]:  # fmt: skip
    """Return a base image and what is in it; the latter is found out once for each image and kept.

    Raises:
        InvalidVersion: there is no such image, or none for the platform.
        InvalidSettings: there is no such image, and the version does not name it.
        BuilderError: it cannot be told.
    """
    reference = source.base
    registry = registries.for_host(reference.repository.host)
    base = base_image(registry, reference, platform)
    if base is None:
        message = f"There is no base image {reference}."
        remedy = "Set BASE_IMAGE, or the version's tag MODEL_BASE_IMAGE, to one there is."
        if source.own_base:
            raise InvalidVersion(message, remedy=remedy)
        # Nothing that the version could help, and that must not count as an attempt at it.
        raise InvalidSettings(message, remedy=remedy)
    key = f"base-{base.manifest.hex}"
    kept = store.text(key, kind=_FACTS)
    if kept is not None:
        try:
            return base, BaseFacts.from_json(kept)
        except Malformed as error:
            _log.warning("kept facts of a base image are none, and are found out again", tag=key, why=str(error))
    _log.info("reading the base image", base=str(reference), platform=str(platform))
    facts = inspect_base(registry, base)
    if keep:
        store.keep_text(key, facts.to_json(), kind=_FACTS, title=f"{one_name(reference)}.json")
    return base, facts


def one_name(reference: Reference) -> str:
    """Return a name for the last component of a reference."""
    return reference.repository.path.rpartition("/")[2]


def _interpreter(base: BaseImage, facts: BaseFacts, python: str) -> str:
    """Return the base's interpreter of a minor version.

    Raises:
        InvalidVersion: it has none, or its C library is one that the wheels are not for.
    """
    found = facts.interpreters.get(python)
    if found is None:
        there = ", ".join(sorted(facts.interpreters)) or "none"
        message = f"The base image {base.reference} has no Python {python} for {base.platform}; it has {there}."
        raise InvalidVersion(message, remedy="Set BASE_IMAGE to an image with the model's Python.")
    if facts.musl:
        message = f"The base image {base.reference} is built on musl, and the wheels are for glibc."
        raise InvalidVersion(message, remedy="Take a base image with glibc (Debian, Ubuntu, Red Hat), not Alpine.")
    if facts.occupied:
        message = f"The base image {base.reference} has something at /opt/model, where the environment goes."
        raise InvalidVersion(message, remedy="Take another base image, or ship a Dockerfile.template.")
    return found


def _served(server: tuple[str, str]) -> tuple[str, ...]:
    everywhere = "0.0.0.0"  # noqa: S104  # a container's own network
    if server[0] == "gunicorn":
        return ("python", "-m", *server, "--bind", f"{everywhere}:{PORT}")
    return ("python", "-m", *server, "--host", everywhere, "--port", str(PORT))
