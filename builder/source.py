"""What a version without a Dockerfile asks for: requirements, a base image, a command; and whether it is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Self

from builder.build.environment import MLMODEL, REQUIREMENTS, read_description
from builder.build.indexes import Indexes
from builder.build.locked import LOCK_VERSION, Lock
from builder.build.mlflow_release import server_of
from builder.build.mlmodel import loader_of
from builder.build.named_modules import NamedModules, read_named_modules
from builder.build.overlooked import overlooked
from builder.build.requirements import Requirements
from builder.build.serving import for_serving, locked_release
from builder.build.template import DOCKERFILE_JINJA, DOCKERFILE_TEMPLATE, BaseImages, client_command
from builder.errors import InvalidVersion
from builder.log import get_logger
from builder.models.artifacts import MODEL_FILE, find_model_folder, names_modules
from builder.models.catalog import Artifact
from builder.models.version import TAG_DOCKERFILE, TAG_TEMPLATES_FOLDER, Inputs, ModelVersion, template_variables
from builder.network import network
from builder.plan import Method
from builder.reference import Digest, Reference
from builder.settings import Settings

_log = get_logger("wheels")
PORT = 8080


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a version's artifacts ask for.

    Attributes:
        context: the folder that the artifacts are in; what describes the model, and its wheels, is enough.
        as_of: when the model was logged or, where that is not known or not earlier, when the version was registered.
        requirements: what is to be installed.
        indexes: who is asked for it.
        python: the model's Python, `3.11`.
        base: the base image.
        own_base: whether the version names it itself.
        loader: the module that MLflow's scoring server loads the model by; empty where MLmodel does not name it.
        model_folder: of the context.
        client_folder: of the context; empty where no client is in the image.
        client_command: what a container runs; empty where that is MLflow's scoring server.
        names: the modules that the version's files name, as far as those are there.
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
        return self.client_command or _served(server_of(locked_release(lock.versions)))

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
        client = client_command(context, template_variables(version, inputs, settings.component_of(version.name)))
        client_folder = inputs.client_folder if client else ""
        configured = Indexes.of(network(settings), allowed=settings.allowed_indexes)
        asked = Requirements.read(context, folder, configured, client_folder=client_folder)
        folders = tuple(f"{each}/" for each in (folder, client_folder) if each)
        own = tuple(path for path in paths if path.startswith(folders))
        names = read_named_modules(context, folder, [path for path in own if names_modules(path)])
        requirements = for_serving(asked, full=settings.full_mlflow, own_client=bool(client), uses=names.uses)
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
            as_of=min(version.created, asked.logged or version.created),
            requirements=requirements,
            indexes=configured.joined(asked.indexes),
            python=asked.python_version,
            base=base,
            own_base=bool(inputs.base_image),
            loader=loader_of(read_description(context, folder, MLMODEL)),
            model_folder=folder,
            client_folder=client_folder,
            client_command=tuple(client),
            names=names,
            own_paths=own,
        )


def chosen_method(settings: Settings, version: ModelVersion, paths: Sequence[str]) -> Method:
    """Return how a version's image is made: by its template where it ships one, unless BUILD_METHOD says otherwise.

    Args:
        settings: BUILD_METHOD is used.
        version: the version.
        paths: of its artifacts.

    Raises:
        InvalidVersion: a file may have been meant for the Dockerfile, and has another name or place.
    """
    inputs = Inputs.of(version)
    templates = own_templates(inputs, paths)
    if not templates and not inputs.no_dockerfile:
        _check_overlooked(settings, version, inputs, paths)
    if settings.build_method == "auto":
        return "dockerfile" if templates else "wheels"
    if settings.build_method == "wheels" and templates:
        _log.warning("the version's template is not used, since BUILD_METHOD is wheels", template=min(templates))
    return settings.build_method


def own_templates(inputs: Inputs, paths: Sequence[str]) -> set[str]:
    """Return the paths of the version's Dockerfile; empty where it ships none, or says that none is meant."""
    names = () if inputs.no_dockerfile else (DOCKERFILE_TEMPLATE, DOCKERFILE_JINJA)
    return {f"{inputs.templates_folder}/{name}" for name in names} & set(paths)


def served(version: ModelVersion, artifacts: Sequence[Artifact]) -> tuple[Artifact, ...]:
    """Return the artifacts that are in an image for which the version has no Dockerfile: the model's and the client's.

    Args:
        version: the version.
        artifacts: all that it has.
    """
    inputs = Inputs.of(version)
    model = find_model_folder([artifact.path for artifact in artifacts], inputs)
    folders = (f"{model}/", f"{inputs.client_folder}/")
    return tuple(artifact for artifact in artifacts if artifact.path.startswith(folders))


def _check_overlooked(settings: Settings, version: ModelVersion, inputs: Inputs, paths: Sequence[str]) -> None:
    """Raise InvalidVersion if the version's Dockerfile would be passed over without a word."""
    models = {path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] == MODEL_FILE}
    found = overlooked(paths, inputs.templates_folder, {inputs.client_folder, inputs.model_folder, *models})
    if found and settings.build_method == "wheels":
        _log.warning("a Dockerfile is not used, since BUILD_METHOD is wheels", file=found[0].path)
        return
    if found:
        names = " and ".join(f"{each.path!r}, which would have to be called {each.right!r}" for each in found[:2])
        message = f"No Dockerfile of {version} is used, and it has {names}."
        remedy = f"Log it under that name and register again, or name its folder by the tag {TAG_TEMPLATES_FOLDER}. "
        remedy += f"If it is not meant for the image, set the tag {TAG_DOCKERFILE} to 'none'."
        raise InvalidVersion(message, remedy=remedy)
    if version.tags.get(TAG_TEMPLATES_FOLDER, "").strip() and not any(
        path.startswith(f"{inputs.templates_folder}/") for path in paths
    ):
        message = f"The tag {TAG_TEMPLATES_FOLDER} of {version} is {inputs.templates_folder!r}, and it has no artifact "
        message += "in that folder."
        raise InvalidVersion(message, remedy="Set it to the folder of the Dockerfile.template, or remove it.")


def _served(server: tuple[str, str]) -> tuple[str, ...]:
    everywhere = "0.0.0.0"  # noqa: S104  # a container's own network
    if server[0] == "gunicorn":
        return ("python", "-m", *server, "--bind", f"{everywhere}:{PORT}")
    return ("python", "-m", *server, "--host", everywhere, "--port", str(PORT))
