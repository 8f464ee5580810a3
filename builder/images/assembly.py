"""An image put together: a base's layers, layers of ours, and a config, joined by digest. All of it is pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from builder.errors import InvalidVersion
from builder.images.base import BaseImage
from builder.images.layer import Layer
from builder.images.manifest import PREFIX, Image, image_of, timestamp

# Docker refuses more than 125 layers (seen); below that, others can still build upon the image.
MOST_LAYERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """A layer that is put on the base.

    Attributes:
        layer: the layer.
        history: what it holds, one line, for `docker history`.
    """

    layer: Layer
    history: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How a container of the image is started, as a Dockerfile would say it.

    Attributes:
        environment: variables beside the base's; they win.
        path: folders that stand before those of the base's PATH.
        user: numeric user and group: `10001:0`.
        workdir: the working directory, absolute.
        command: CMD.
        ports: EXPOSE, such as `8080/tcp`.
    """

    environment: Mapping[str, str]
    path: Sequence[str]
    user: str
    workdir: str
    command: Sequence[str]
    ports: Sequence[str]


def assembled(
    base: BaseImage,
    additions: Sequence[Addition],
    runtime: Runtime,
    *,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    created: datetime,
) -> Image:
    """Return the image of a base and what is put on it.

    Args:
        base: the base; its config's environment, entry point and labels stay, as under a Dockerfile's FROM.
        additions: the layers put on it, first to last.
        runtime: how it is started.
        labels: to set in the config.
        annotations: of the manifest.
        created: when the image was made, with a time zone.

    Raises:
        InvalidVersion: there are more layers than an image may have.
    """
    layers = (*base.layers, *(addition.layer.descriptor for addition in additions))
    if len(layers) > MOST_LAYERS:
        message = f"The image on {base.reference} would have {len(layers)} layers; {MOST_LAYERS} are the most."
        raise InvalidVersion(message, remedy="Take a base image of fewer layers, or ship a Dockerfile.template.")
    time = timestamp(created)
    config = {
        **{name: value for name, value in base.config.items() if name not in {"author", "container"}},
        "created": time,
        "os": base.platform.os,
        "architecture": base.platform.architecture,
        **({"variant": base.platform.variant} if base.platform.variant else {}),
        "config": _runtime(base.config.get("config") or {}, runtime, labels),
        "rootfs": {
            "type": "layers",
            "diff_ids": [str(each) for each in (*base.diff_ids, *(addition.layer.diff_id for addition in additions))],
        },
        "history": [
            *_history(base),
            *({"created": time, "created_by": addition.history} for addition in additions),
            {"created": time, "created_by": "config of the model image builder", "empty_layer": True},
        ],
    }
    return image_of(base.platform, config, layers, annotations)


def _runtime(base: Mapping[str, Any], runtime: Runtime, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the config's `config`; what a base says that is not of the form it should have is left out."""
    env = base.get("Env")
    entries = [entry for entry in env if isinstance(entry, str)] if isinstance(env, list) else []
    environment = dict(entry.partition("=")[::2] for entry in entries)
    inherited = environment.get("PATH") or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment |= {**runtime.environment, "PATH": ":".join([*runtime.path, inherited])}
    kept = base.get("Labels")
    own = {
        name: text
        for name, text in (kept if isinstance(kept, dict) else {}).items()
        if isinstance(text, str) and not name.startswith(PREFIX)
    }
    return {
        **{name: value for name, value in base.items() if name not in {"OnBuild", "Image"}},
        "Env": [f"{name}={value}" for name, value in environment.items()],
        "User": runtime.user,
        "WorkingDir": runtime.workdir,
        "Cmd": list(runtime.command),
        "ExposedPorts": {port: {} for port in runtime.ports},
        "Labels": {**own, **labels},
    }


def _history(base: BaseImage) -> list[Any]:
    """Return the base's history, if it is of as many layers as the base has; one line for each layer otherwise."""
    history = base.config.get("history")
    entries = history if isinstance(history, list) else []
    if sum(isinstance(entry, dict) and not entry.get("empty_layer") for entry in entries) == len(base.layers):
        return entries
    return [{"created_by": "layer of the base image"} for _ in base.layers]
