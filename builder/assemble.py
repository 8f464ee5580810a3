"""From recipes to images in the registry: every layer found, made or taken from the model's files, and joined."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from builder.build.kept_locks import LOCK_FILE, LOCK_TYPE
from builder.build.venv_layer import venv_layer
from builder.build.wheel_files import ENVIRONMENT
from builder.crew import in_background
from builder.errors import InvalidVersion, TryAgain, UsageError
from builder.images.assembly import Addition, Runtime, assembled
from builder.images.base import BaseImage, base_image
from builder.images.blob import Blob, BytesBlob
from builder.images.files_layer import FileEntry, FilesLayer, split
from builder.images.layer import Layer
from builder.images.layer_store import LayerStore
from builder.images.manifest import LOCK_DIGEST, REQUIREMENTS_DIGEST, Image
from builder.images.profile import profile_for
from builder.images.push import Stoppable
from builder.images.referrers import attach
from builder.images.registries import Registries
from builder.images.registry import RemoteBlob
from builder.log import get_logger
from builder.plan import Plan, PlatformPlan
from builder.recipe import HOME, PlatformRecipe, Recipe
from builder.reference import Digest, Reference, Repository
from builder.settings import Settings
from builder.source import PORT
from builder.stages import stage
from builder.wheels import check_wheels, layer_store, wheel_layers

_log = get_logger("assemble")
_THREADS = 4
USER = "10001:0"


def push_images(
    settings: Settings,
    registries: Registries,
    plan: Plan,
    recipe: Recipe,
    context: Path,
    *,
    notes: Callable[[PlatformPlan], dict[str, str]],
    check: Callable[[Image], None],
) -> list[Image]:
    """Push the image of every platform that is made of wheel layers, by its digest; no tag is touched.

    Args:
        settings: what the environment says.
        registries: those of images and of base images.
        plan: what is to be made.
        recipe: from what.
        context: the folder the version's artifacts are in.
        notes: returns the annotations of one platform's image, which are its labels too.
        check: raises where an image must not be pushed.

    Returns:
        The images, in the plan's order.

    Raises:
        BuilderError: a wheel cannot be had or installed, a file has changed, or a registry refuses.
    """
    steps = plan.made_by("wheels")
    recipe = recipe.within(context)
    parts = [recipe.for_platform(step.platform) for step in steps]
    target = _Target(registries, plan.reference.repository, layer_store(settings, registries))
    bases = [_base(registries, step) for step in steps]
    shares = _shares(context, recipe, parts, profile_for(plan.target).most_layer_bytes)
    # Platforms have all or most of them in common.
    each = list(dict.fromkeys(files for share in shares for files in share))
    tasks: list[Callable[[], list[Addition]]] = [
        *(partial(target.files, files, _title(recipe, files)) for files in each),
        *(partial(target.base, base) for base in bases),
    ]
    # After a failure uploads end within a chunk, or with the answer that they wait for.
    with in_background(tasks, threads=_THREADS, stop=target.stop) as results:
        wheels = _wheel_layers(settings, target, recipe, parts)
        for step, part in zip(steps, parts, strict=True):
            for warning in check_wheels(part, step.base.name if step.base else "", wheels):
                _log.warning("a library is not there", platform=str(part.platform), why=warning)
        made = dict(zip(each, results(), strict=False))
    images = []
    with stage("manifests"):
        for step, part, base, share in zip(steps, parts, bases, shares, strict=True):
            venv, content = venv_layer(part.interpreter, recipe.python)
            target.push(content)
            lock = part.lock.to_text().encode()
            labels = notes(step) | {LOCK_DIGEST: str(Digest.of(lock)), REQUIREMENTS_DIGEST: str(recipe.requirements)}
            image = assembled(
                base,
                [
                    Addition(layer=venv, history=f"environment on {part.interpreter}"),
                    *(Addition(layer=wheels[group.source], history=f"wheel {group.title}") for group in part.groups),
                    *(addition for files in share for addition in made[files]),
                ],
                _runtime(recipe, part),
                labels=labels,
                annotations=labels,
                created=plan.version.created,
            )
            check(image)
            target.push(BytesBlob(image.config))
            target.registry.put_manifest(
                target.repository, image.manifest, image.descriptor.media_type, image.descriptor.digest
            )
            attach(target.registry, target.repository, image.descriptor, lock, kind=LOCK_TYPE, title=LOCK_FILE)
            _log.info("assembled", platform=str(step.platform), layers=len(image.layers), size=image.size)
            images.append(image)
        for text in recipe.unkept:
            target.store.keep_text(text.key, text.content.encode(), kind=text.kind, title=text.title)
    return images


class _Target:
    """The repository that images go to."""

    def __init__(self, registries: Registries, repository: Repository, store: LayerStore) -> None:
        self.registries = registries
        self.registry = registries.for_host(repository.host)
        self.repository = repository
        self.store = store
        self.stop = threading.Event()

    def push(self, blob: Blob, mount_from: Sequence[Repository] = ()) -> int:
        """Push a blob unless it is there; return the bytes that were sent."""
        return self.registry.push_blob(self.repository, Stoppable(blob, self.stop), mount_from)

    def base(self, base: BaseImage) -> list[Addition]:
        """Put a base's layers into the repository; those of another registry are kept beside the wheel layers.

        Returns:
            Nothing that would be added to the base.
        """
        home = base.reference.repository
        source = self.registries.for_host(home.host)
        for layer in base.layers:
            blob = RemoteBlob(registry=source, repository=home, descriptor=layer)
            if home.host == self.registry.host:
                self.push(blob, (home,))
            elif not self.registry.has_blob(self.repository, layer.digest):
                _log.info("copying a layer of the base image", base=str(base.reference), size=layer.size)
                self.registry.push_blob(self.store.repository, Stoppable(blob, self.stop))
                kept = RemoteBlob(registry=self.registry, repository=self.store.repository, descriptor=layer)
                self.push(kept, (self.store.repository,))
        return []

    def files(self, entries: Sequence[FileEntry], history: str) -> list[Addition]:
        """Push the layer of some files, and return it."""
        with stage("model layers"):
            layer = FilesLayer.of(entries)
            sent = self.push(layer)
        _log.debug("model layer", files=len(entries), size=layer.size, sent=sent)
        return [Addition(layer=layer.layer, history=history)]


def _shares(
    context: Path, recipe: Recipe, parts: Sequence[PlatformRecipe], limit: int | None
) -> list[list[tuple[FileEntry, ...]]]:
    """Return the files of each layer that holds the version's own, for each platform."""
    model = _files(context, recipe.model_folder)
    if not model:
        message = f"The folder {recipe.model_folder!r} of the model is empty."
        raise InvalidVersion(message, remedy="Log the model again.")
    client = _files(context, recipe.client_folder) if recipe.client_folder else []
    # One folder may be within the other, and a file is in one layer.
    inner, outer = (client, model) if len(client) < len(model) else (model, client)
    own = {entry.path for entry in inner}
    outer[:] = [entry for entry in outer if entry.path not in own]
    return [split(model, client, most=part.model_layers, limit=limit) for part in parts]


def _files(context: Path, folder: str) -> list[FileEntry]:
    return [
        FileEntry(path=f"{HOME[1:]}/{path.relative_to(context).as_posix()}", source=path, size=path.lstat().st_size)
        for path in sorted((context / folder).rglob("*"))
        if not path.is_dir() or path.is_symlink()
    ]


def _title(recipe: Recipe, files: Sequence[FileEntry]) -> str:
    """Return a layer's line of history."""
    client = f"{HOME[1:]}/{recipe.client_folder}/"
    what = "client" if recipe.client_folder and files[0].path.startswith(client) else "model"
    return f"{what} {files[0].path}" if len(files) == 1 else f"{what}, {len(files)} files"


def _base(registries: Registries, step: PlatformPlan) -> BaseImage:
    """Return the base image as the plan saw it.

    Raises:
        TryAgain: it is gone.
    """
    if step.base is None:
        message = f"The plan has no base image for {step.platform}."
        raise UsageError(message, remedy="Run 'builder fetch' again.")
    named = Reference.parse(step.base.name)
    reference = named.repository.digest(step.base.digest)
    base = base_image(registries.for_host(named.repository.host), reference, step.platform)
    if base is None:
        message = f"The base image {named} is no longer {step.base.digest}."
        raise TryAgain(message, remedy="Publish again: it starts from the base as it is then.")
    return base


def _wheel_layers(
    settings: Settings, target: _Target, recipe: Recipe, parts: Sequence[PlatformRecipe]
) -> dict[str, Layer]:  # fmt: skip
    """Return the layers of groups of wheels by their sources, placed in the repository."""
    groups = [group for part in parts for group in part.groups]
    with wheel_layers(settings, target.store, recipe) as layers:
        placed = layers.placed(groups, target.repository)
        _log.info("wheel layers are there", **asdict(layers.traffic))
    return placed


def _runtime(recipe: Recipe, part: PlatformRecipe) -> Runtime:
    """Return how a container is started; the built-in Dockerfile.j2 says the same."""
    served = {
        "__pyfunc_model_path__": f"{HOME}/{recipe.model_folder}",
        # MLflow sets up its tracking anew after an error; where it cannot write, that hides the error from the log.
        "MLFLOW_TRACKING_URI": "file:///tmp/mlruns",
    }
    return Runtime(
        environment={
            "HOME": "/tmp",  # noqa: S108  # the one folder that any user may write
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "GIT_PYTHON_REFRESH": "quiet",
            # The user has no name of its own in a base image, and getpass.getuser() wants one.
            "USER": "model",
            "LOGNAME": "model",
            **({} if recipe.client_folder else served),
        },
        path=[f"/{ENVIRONMENT}/bin"],
        user=USER,
        workdir=HOME,
        command=part.command,
        ports=[f"{PORT}/tcp"],
    )
