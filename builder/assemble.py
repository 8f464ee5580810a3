"""From recipes to images in the registry: every layer found, made or taken from the model's files, and joined."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from builder.build.index import IndexClient
from builder.build.indexes import Indexes
from builder.build.kept_locks import LOCK_FILE, LOCK_TYPE
from builder.build.venv_layer import venv_layer
from builder.build.wheel_files import ENVIRONMENT
from builder.build.wheel_groups import Group
from builder.build.wheel_layers import WheelLayers, compiler_for
from builder.crew import side_by_side
from builder.errors import InvalidVersion, TryAgain
from builder.images import manifest as manifests
from builder.images.assembly import Addition, Runtime, assembled
from builder.images.base import BaseImage, base_image
from builder.images.blob import Blob, BytesBlob
from builder.images.files_layer import FileEntry, FilesLayer, split
from builder.images.layer import Layer
from builder.images.layer_store import LayerStore
from builder.images.referrers import attach
from builder.images.registries import Registries
from builder.images.registry import Registry, RemoteBlob
from builder.log import get_logger
from builder.network import network
from builder.plan import Plan, PlatformPlan
from builder.recipe import MODEL_LAYERS, PlatformRecipe, Recipe
from builder.reference import Digest, Platform, Reference, Repository
from builder.settings import Settings
from builder.wheels import PORT, layer_store

_log = get_logger("assemble")
_THREADS = 4
_SECONDS = 60.0
_HOME = "/app"
USER = "10001:0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """Makes and pushes the images of one plan.

    Attributes:
        settings: what the environment says.
        registries: those of images and of base images.
        plan: what is to be made.
        recipe: from what.
        context: the folder the version's artifacts are in.
        notes: the annotations of one platform's image, which are its labels too.
    """

    settings: Settings
    registries: Registries
    plan: Plan
    recipe: Recipe
    context: Path
    notes: Callable[[PlatformPlan], dict[str, str]]
    seconds: dict[str, float] = field(default_factory=dict)

    def push(self) -> list[manifests.Image]:
        """Push the image of every platform that is made so, by its digest; no tag is touched.

        Raises:
            BuilderError: a wheel cannot be had or installed, a file has changed, or a registry refuses.
        """
        steps = self.plan.made_by("wheels")
        repository = self.plan.reference.repository
        registry = self.registries.for_host(repository.host)
        store = layer_store(self.settings, self.registries)
        parts = {step.platform: self.recipe.for_platform(step.platform) for step in steps}
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="model"))
            files = [pool.submit(self._files, registry, repository, *each) for each in self._entries()]
            bases = {step.platform: self._base(step) for step in steps}
            placing = [
                pool.submit(_place_base, registry, repository, store, base, self.registries) for base in bases.values()
            ]
            began = time.monotonic()
            layers = self._wheels(stack, store, repository, list(parts.values()))
            self.seconds["wheel layers"] = time.monotonic() - began
            for future in placing:
                future.result()
            own = [addition for future in files for addition in future.result()]
            self.seconds["all layers"] = time.monotonic() - began
        return [
            self._image(registry, repository, step, bases[step.platform], parts[step.platform], layers, own)
            for step in steps
        ]
