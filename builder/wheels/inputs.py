"""Inputs of the wheels method: requirements, a base image, a command, and the part of MLflow that serves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from builder.dockerfile.template import DOCKERFILE_JINJA, DOCKERFILE_TEMPLATE, BaseImages, client_command, overlooked
from builder.errors import InvalidVersion
from builder.log import get_logger
from builder.model_folder import (
    COMES_WITH,
    MLMODEL,
    REQUIREMENTS,
    SETUPTOOLS,
    bounds_of,
    loader_of,
    needs_of,
    read_description,
    release_of,
    server_of,
)
from builder.models import TAG_DOCKERFILE, TAG_TEMPLATES_FOLDER, Artifact, Inputs, ModelVersion, template_variables
from builder.models.context import MODEL_FILE, find_model_folder, names_modules
from builder.package_index import Indexes
from builder.plan import Method
from builder.reference import BasePattern, Digest, Reference, repository_component
from builder.settings import Settings, network
from builder.wheels.imports import NamedModules, read_named_modules
from builder.wheels.lock import LOCK_VERSION, Lock
from builder.wheels.pip_syntax import Required
from builder.wheels.requirements import Requirements

BuildMethod = Literal["auto", "dockerfile", "wheels"]
MLFLOW = "mlflow"
SKINNY = "mlflow-skinny"


def for_serving(
    requirements: Requirements, *, full: bool = False, own_client: bool = False, uses: Collection[str] = ()
) -> Requirements:  # fmt: skip
    """Return the requirements for serving a model.

    If the model requires `mlflow`, that becomes `mlflow-skinny` of the same version, with the other packages that the
    scoring server imports; those that the model's flavor imports are among the requirements that MLflow logged. The
    model's own pins stay as they are. `otherwise` of the result keeps the whole package, for a release that has no
    `mlflow-skinny`.

    Args:
        requirements: the model's own.
        full: keep the whole package.
        own_client: the version has its own server, so that MLflow is not added unless the model requires it.
        uses: distributions that the whole package brings, and of which the model's files name modules.
    """
    named_mlflow = requirements.named(MLFLOW)
    if own_client and not named_mlflow:
        return requirements
    requirements = replace(requirements, serves=True)
    if named_mlflow:
        whole = _with_server(requirements)
        # The hashes that a model names are those of the whole package and of what that requires.
        if full or requirements.require_hashes or any(one.hashes for one in named_mlflow):
            return whole
        others = tuple(one for one in requirements.required if one.name != MLFLOW)
        skinny = tuple(_skinny(one, requirements.mlflow_version) for one in named_mlflow)
        lean = _with_server(requirements.with_changes(required=(*others, *skinny)))
        named = {one.name for one in requirements.required if not one.marker}
        left = {name for name in uses if not {name, COMES_WITH.get(name)} & named}
        return replace(lean, otherwise=whole, uses=frozenset(left))
    # A model without either was logged by hand; the server is that of the release that wrote its MLmodel.
    logged = f"=={requirements.mlflow_version}" if requirements.mlflow_version else ""
    added = () if requirements.named(SKINNY) else (Required(name=SKINNY, specifier=logged),)
    return _with_server(requirements.with_changes(required=(*requirements.required, *added)))


def for_release(requirements: Requirements, locked: Mapping[str, str]) -> Requirements | None:
    """Return the requirements to resolve instead, if a lock lacks packages that its release of MLflow needs.

    MLflow is pinned to the release of the lock, so that the additions fit the result.

    Args:
        requirements: those that the lock was resolved from.
        locked: the versions in the lock, by package.

    Returns:
        None if the lock has all of them.
    """
    release = locked_release(locked)
    if release is None:
        return None
    changed = _with_needs(requirements, release)
    missing = [one for one in changed.required if one not in requirements.required and one.name not in locked]
    broken = [
        one
        for one in changed.constraints
        if one not in requirements.constraints
        and one.name in locked
        and not SpecifierSet(one.specifier).contains(locked[one.name], prereleases=True)
    ]
    if not missing and not broken:
        return None
    pins = tuple(Required(name=name, specifier=f"=={locked[name]}") for name in (MLFLOW, SKINNY) if name in locked)
    return changed.with_changes(required=changed.required, constraints=pins)


def with_used(
    requirements: Requirements, locked: Mapping[str, str], whole: Mapping[str, str] | None
) -> Requirements:  # fmt: skip
    """Return the requirements to resolve instead, if a lock lacks packages that the model's files name.

    Args:
        requirements: those that the lock was resolved from.
        locked: the versions in the lock, by package.
        whole: those in the lock of the whole package, which are added; None if there is no such lock.
    """
    names = sorted(name for name in requirements.uses if name not in locked and (whole is None or name in whole))
    pins = tuple(Required(name=name, specifier=f"=={whole[name]}" if whole else "") for name in names)
    release = (Required(name=SKINNY, specifier=f"=={locked[SKINNY]}"),)
    changed = requirements.with_changes(required=(*requirements.required, *pins), constraints=release)
    return replace(changed, added=requirements.added | set(names))


def whole_of(requirements: Requirements, locked: Mapping[str, str]) -> Requirements | None:
    """Return the requirements on the whole package, of the release in a lock of its part; None if not needed.

    Args:
        requirements: those that the lock was resolved from.
        locked: the versions in the lock, by package.
    """
    if requirements.otherwise is None or SKINNY not in locked or requirements.uses <= locked.keys():
        return None
    release = (Required(name=MLFLOW, specifier=f"=={locked[SKINNY]}"),)
    return requirements.otherwise.with_changes(required=requirements.otherwise.required, constraints=release)


def locked_release(locked: Mapping[str, str]) -> Version | None:
    """Return the release of MLflow in a lock; None if there is none.

    Args:
        locked: the versions in the lock, by package.
    """
    found = locked.get(MLFLOW) or locked.get(SKINNY)
    return Version(found) if found else None


def _pinned(requirements: Requirements) -> Version | None:
    """Return the release of MLflow that a requirement pins."""
    named = (*requirements.named(MLFLOW), *requirements.named(SKINNY))
    return next((found for one in named if one.pinned and (found := release_of(one.pinned))), None)


def _with_server(requirements: Requirements) -> Requirements:
    """Add the needs of the release that requirements pin, if they pin one; the lock is checked in any case."""
    return _with_needs(requirements, _pinned(requirements))


def _with_needs(requirements: Requirements, release: Version | None) -> Requirements:
    """Add the needs of a release to requirements, in place of the additions for another one."""
    own = tuple(one for one in requirements.required if one.name not in requirements.added)
    everywhere = {one.name for one in own if not one.marker}
    names = needs_of(release) if requirements.serves and MLFLOW not in everywhere else ()
    bounds_of_release = dict(bounds_of(release))
    names = (*names, *({SETUPTOOLS} & bounds_of_release.keys()))
    added = tuple(Required(name=name) for name in names if name not in everywhere)
    bounds = tuple(
        Required(name=name, specifier=specifier)
        for name, specifier in bounds_of_release.items()
        # What a model pins is not bounded; but an MLflow without pkg_resources does not start.
        if name == SETUPTOOLS or (requirements.serves and not requirements.named(name))
    )
    changed = requirements.with_changes(required=(*own, *added), constraints=bounds)
    return replace(changed, added=frozenset(one.name for one in added))


def _skinny(required: Required, logged: str) -> Required:
    """Return the requirement on `mlflow-skinny` that replaces one on `mlflow`.

    If several releases would do, it is the one that logged the model, since that is known to read it.
    """
    specifier = required.specifier
    if logged and not required.pinned and SpecifierSet(specifier).contains(logged, prereleases=True):
        specifier = f"=={logged}"
    return replace(required, name=SKINNY, specifier=specifier, hashes=(), url="", path="")


_log = get_logger("wheels")
PORT = 8080


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSettings:
    """The settings for a version's requirements, indexes and base image.

    Attributes:
        indexes: package indexes that the settings name.
        full_mlflow: keep the whole MLflow if the model requires it.
        base_image: BASE_IMAGE.
        allowed_base_images: which other base images a version may name.
        component_of: gives the last component of a model's repository, which templates may name.
    """

    indexes: Indexes
    full_mlflow: bool = False
    base_image: str
    allowed_base_images: tuple[BasePattern, ...] = ()
    component_of: Callable[[str], str] = repository_component

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the part of the settings.

        Raises:
            InvalidSettings: the indexes cannot be used.
        """
        return cls(
            indexes=Indexes.of(network(settings), allowed=settings.allowed_indexes),
            full_mlflow=settings.full_mlflow,
            base_image=settings.base_image,
            allowed_base_images=settings.allowed_base_images,
            component_of=settings.component_of,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A version's inputs, according to its artifacts.

    Attributes:
        context: the folder that the artifacts are in; what describes the model, and its wheels, is enough.
        as_of: when the model was logged or, if that is not known or not earlier, when the version was registered.
        requirements: what is to be installed.
        indexes: where it is searched.
        python: the model's Python, `3.11`.
        base: the base image.
        own_base: whether the version names it itself.
        loader: the module that MLflow's scoring server loads the model by; empty if MLmodel does not name it.
        model_folder: of the context.
        client_folder: of the context; empty if the image has no client.
        client_command: what a container runs; empty for MLflow's scoring server.
        names: the modules that the version's files name, as far as those are downloaded.
        own_paths: paths of the model's and the client's files.
    """

    context: Path
    as_of: datetime
    requirements: Requirements
    indexes: Indexes
    python: str
    base: Reference
    own_base: bool
    loader: str
    model_folder: str
    client_folder: str
    client_command: tuple[str, ...]
    names: NamedModules = field(default_factory=NamedModules)
    own_paths: tuple[str, ...] = ()

    @property
    def digest(self) -> Digest:
        """A digest of the requirements, and of the rules by which they become a lock."""
        return Digest.of(f"{LOCK_VERSION} {self.requirements.serves}\n{self.requirements.to_text()}".encode())

    def command(self, lock: Lock) -> tuple[str, ...]:
        """Return what a container runs, given the lock of its environment."""
        return self.client_command or _server_command(server_of(locked_release(lock.versions)))

    @classmethod
    def of(cls, settings: InputSettings, version: ModelVersion, context: Path, paths: Sequence[str]) -> Self:
        """Return a version's inputs.

        Args:
            settings: the part of the settings.
            version: the version.
            context: the folder its artifacts are in.
            paths: of its artifacts.

        Raises:
            InvalidVersion: the requirements cannot be used, or there are none; the base image is not allowed.
        """
        inputs = Inputs.of(version)
        folder = find_model_folder(paths, inputs)
        inputs = inputs.model_copy(update={"model_folder": folder})
        client = client_command(context, template_variables(version, inputs, settings.component_of(version.name)))
        client_folder = inputs.client_folder if client else ""
        configured = settings.indexes
        logged = Requirements.read(context, folder, configured, client_folder=client_folder)
        folders = tuple(f"{each}/" for each in (folder, client_folder) if each)
        own = tuple(path for path in paths if path.startswith(folders))
        names = read_named_modules(context, folder, [path for path in own if names_modules(path)])
        requirements = for_serving(logged, full=settings.full_mlflow, own_client=bool(client), uses=names.uses)
        named = {f"{folder}/{REQUIREMENTS}", f"{client_folder}/{REQUIREMENTS}"} & set(paths)
        if not logged.required and not named:
            message = f"{version} has neither a template ({inputs.templates_folder}/{DOCKERFILE_TEMPLATE}) nor "
            message += f"{folder}/{REQUIREMENTS}, and no other file of the model names its requirements."
            remedy = "Log the model with its requirements (MLflow's log_model does), or log a Dockerfile.template. "
            remedy += "If that is in another folder, name the folder in MODEL_TEMPLATES_FOLDER."
            raise InvalidVersion(message, remedy=remedy)
        images = BaseImages(default=settings.base_image, allowed=settings.allowed_base_images, wanted=inputs.base_image)
        base = Reference.parse(images.choose(logged.python_version))
        if not logged.python_version:
            message = "The model does not say which Python version it was logged with."
            remedy = "Log it with MLflow, which writes python_env.yaml and MLmodel, or log a Dockerfile.template."
            raise InvalidVersion(message, remedy=remedy)
        return cls(
            context=context,
            as_of=min(version.created, logged.logged or version.created),
            requirements=requirements,
            indexes=configured.joined(logged.indexes),
            python=logged.python_version,
            base=base,
            own_base=bool(inputs.base_image),
            loader=loader_of(read_description(context, folder, MLMODEL)),
            model_folder=folder,
            client_folder=client_folder,
            client_command=tuple(client),
            names=names,
            own_paths=own,
        )


def chosen_method(wanted: BuildMethod, version: ModelVersion, paths: Sequence[str]) -> Method:
    """Return how a version's image is made: by its template if it has one, unless BUILD_METHOD says otherwise.

    Args:
        wanted: BUILD_METHOD.
        version: the version.
        paths: of its artifacts.

    Raises:
        InvalidVersion: a file may have been meant as the Dockerfile, but has another name or place.
    """
    inputs = Inputs.of(version)
    templates = own_templates(inputs, paths)
    if not templates and not inputs.no_dockerfile:
        _check_overlooked(wanted, version, inputs, paths)
    if wanted == "auto":
        return "dockerfile" if templates else "wheels"
    if wanted == "wheels" and templates:
        _log.warning("the version's template is not used, since BUILD_METHOD is wheels", template=min(templates))
    return wanted


def own_templates(inputs: Inputs, paths: Sequence[str]) -> set[str]:
    """Return the paths of the version's Dockerfile; empty if it has none, or declares that it has none."""
    names = () if inputs.no_dockerfile else (DOCKERFILE_TEMPLATE, DOCKERFILE_JINJA)
    return {f"{inputs.templates_folder}/{name}" for name in names} & set(paths)


def served(version: ModelVersion, artifacts: Sequence[Artifact]) -> tuple[Artifact, ...]:
    """Return the artifacts in an image made without the version's Dockerfile: the model's and the client's.

    Args:
        version: the version.
        artifacts: all that it has.
    """
    inputs = Inputs.of(version)
    model = find_model_folder([artifact.path for artifact in artifacts], inputs)
    folders = (f"{model}/", f"{inputs.client_folder}/")
    return tuple(artifact for artifact in artifacts if artifact.path.startswith(folders))


def _check_overlooked(wanted: BuildMethod, version: ModelVersion, inputs: Inputs, paths: Sequence[str]) -> None:
    """Raise InvalidVersion if the version's Dockerfile would be ignored silently."""
    models = {path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] == MODEL_FILE}
    found = overlooked(paths, inputs.templates_folder, {inputs.client_folder, inputs.model_folder, *models})
    if found and wanted == "wheels":
        _log.warning("a Dockerfile is not used, since BUILD_METHOD is wheels", file=found[0].path)
        return
    if found:
        names = " and ".join(f"{each.path!r}, which would have to be called {each.right!r}" for each in found[:2])
        message = f"No Dockerfile of {version} is used, but it has {names}."
        remedy = f"Log it under that name and register again, or name its folder in the tag {TAG_TEMPLATES_FOLDER}. "
        remedy += f"If it is not meant for the image, set the tag {TAG_DOCKERFILE} to 'none'."
        raise InvalidVersion(message, remedy=remedy)
    if version.tags.get(TAG_TEMPLATES_FOLDER, "").strip() and not any(
        path.startswith(f"{inputs.templates_folder}/") for path in paths
    ):
        message = f"The tag {TAG_TEMPLATES_FOLDER} of {version} is {inputs.templates_folder!r}, but the version has no "
        message += "artifact in that folder."
        raise InvalidVersion(message, remedy="Set it to the folder of the Dockerfile.template, or remove the tag.")


def _server_command(server: tuple[str, str]) -> tuple[str, ...]:
    everywhere = "0.0.0.0"  # noqa: S104  # a container's own network
    if server[0] == "gunicorn":
        return ("python", "-m", *server, "--bind", f"{everywhere}:{PORT}")
    return ("python", "-m", *server, "--host", everywhere, "--port", str(PORT))
