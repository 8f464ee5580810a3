"""Base images, published images, and images assembled on a base: its layers, ours and a config, joined by digest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from builder.errors import InvalidVersion
from builder.oci import INDEXES, LAYERS, MANIFESTS, Descriptor, Malformed, descriptors, from_bytes, refuse, sequence
from builder.oci.layer import Layer
from builder.oci.manifest import (
    Image,
    config_of,
    engine_config,
    image_of,
    images_of,
    labelled,
    read_config,
    stamped,
    timestamp,
)
from builder.oci.registry import FetchedManifest, Registry, config_bytes
from builder.oci.transport import unexpected
from builder.reference import Digest, Platform, Reference

_ARM = re.compile(r"v([0-9]{1,3})")
_OLDEST_ARM = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImage:
    """A base image whose layers can be joined with others.

    Attributes:
        reference: as it was requested.
        digest: of what the reference names, an index or a manifest.
        manifest: of the platform's image manifest.
        platform: as it was requested; the config may name an older variant of it.
        layers: name the layers, first to last, by OCI's media types.
        diff_ids: digests of the layers when not compressed, in the same order.
        config: the whole image config.
    """

    reference: Reference
    digest: Digest
    manifest: Digest
    platform: Platform
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[Digest, ...]
    config: Mapping[str, Any] = field(repr=False, hash=False)

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment that the config sets; of a name that is set twice, the last."""
        entries = (self.config.get("config") or {}).get("Env") or []
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundImage:
    """An image for one platform, as a registry has it: an engine can build on it, whatever its layers are.

    Attributes:
        reference: as it was requested.
        digest: of what the reference names, an index or a manifest.
        platform: as it was requested.
        manifest: the platform's image manifest.
        config: the image config's bytes.
        diff_ids: digests of its layers when not compressed, first to last.
    """

    reference: Reference
    digest: Digest
    platform: Platform
    manifest: FetchedManifest
    config: bytes = field(repr=False)
    diff_ids: tuple[Digest, ...]

    def to_base(self) -> BaseImage:
        """Return it as a base whose layers can be joined with others; no request is sent.

        Raises:
            InvalidVersion: its layers are of an unknown kind, or its config does not fit them.
        """
        try:
            layers, config = _layers(self.manifest.content), _config(self.config)
            if len(layers) != len(self.diff_ids):
                refuse(f"it has {len(layers)} layers, and its config lists {len(self.diff_ids)}")
        except Malformed as error:
            raise _no_image(self.reference, error) from error
        return BaseImage(
            reference=self.reference,
            digest=self.digest,
            manifest=self.manifest.digest,
            platform=self.platform,
            layers=layers,
            diff_ids=self.diff_ids,
            config=config,
        )


def base_image(registry: Registry, reference: Reference, platform: Platform) -> BaseImage | None:
    """Return a base image for a platform, or None where the registry says that there is none.

    Raises:
        InvalidVersion: it is not an image, has none for the platform, or has layers that nothing can be joined with.
        BuilderError: the registry does not answer; see `Registry`.
    """
    found = find_image(registry, reference, platform)
    return found.to_base() if found else None


def find_image(registry: Registry, reference: Reference, platform: Platform) -> FoundImage | None:
    """Return the image for a platform that a reference leads to, or None where the registry says that there is none.

    Raises:
        InvalidVersion: it is not an image, or has none for the platform.
        BuilderError: the registry does not answer; see `Registry`.
    """
    fetched = registry.manifest(reference)
    if fetched is None:
        return None
    manifest = fetched
    try:
        if fetched.media_type in INDEXES:
            entry = _entry(images_of(fetched.content), platform, reference)
            inner = registry.manifest(replace(reference, tag="", digest=entry.digest))
            if inner is None or inner.media_type not in MANIFESTS:
                what = f"Reading {reference}"
                raise unexpected(what, f"without its image for {platform}")
            manifest = inner
        config = config_bytes(registry, reference.repository, manifest)
        own, diff_ids = read_config(config)
    except Malformed as error:
        raise _no_image(reference, error) from error
    _entry({own: config_of(manifest.content)}, platform, reference)
    return FoundImage(
        reference=reference,
        digest=fetched.digest,
        platform=platform,
        manifest=manifest,
        config=config,
        diff_ids=diff_ids,
    )


def _layers(manifest: bytes) -> tuple[Descriptor, ...]:
    layers = descriptors(from_bytes(manifest).get("layers"), "layers")
    for layer in layers:
        if layer.media_type not in LAYERS:
            refuse(f"it has a layer of the unknown media type {layer.media_type}")
    return tuple(replace(layer, media_type=LAYERS[layer.media_type]) for layer in layers)


def _config(content: bytes) -> dict[str, Any]:
    config = engine_config(content)
    environ = sequence((config.get("config") or {}).get("Env") or [], "Env")
    if not all(isinstance(entry, str) for entry in environ):
        refuse("Env is not a list of strings")
    return config


def _no_image(reference: Reference, error: Malformed) -> InvalidVersion:
    return InvalidVersion(f"The base image {reference} is not an image: {error}.", remedy="Name an image in FROM.")


def _entry(images: Mapping[Platform, Descriptor], platform: Platform, reference: Reference) -> Descriptor:
    """Return the image for a platform; an older variant of arm runs on a newer one, as engines take it too."""
    exact = images.get(platform)
    if exact is not None:
        return exact
    wanted = _arm(platform)
    # Of the variants there are, not of all below the wanted one: an author may write any number.
    older = {_arm(each): each for each in images if each.os == platform.os and _OLDEST_ARM <= _arm(each) < wanted}
    if older:
        return images[older[max(older)]]
    there = ", ".join(str(each) for each in sorted(images)) or "none that names a platform"
    message = f"The base image {reference} has no image for {platform}; it has {there}."
    raise InvalidVersion(message, remedy="Use another base image, or remove the platform from MODEL_PLATFORMS.")


def _arm(platform: Platform) -> int:
    """Return the number of arm's variant; 0 for another platform, or one without a variant."""
    found = _ARM.fullmatch(platform.variant) if platform.architecture == "arm" else None
    return int(found[1]) if found else 0


# Docker refuses more than 125 layers (seen); below that, others can still build upon the image.
MOST_LAYERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """A layer on top of the base.

    Attributes:
        layer: the layer.
        history: what it holds, one line, for `docker history`.
    """

    layer: Layer
    history: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """How a container of the image is started, in the terms of a Dockerfile.

    Attributes:
        environment: variables beside the base's; they win.
        path: folders to put before those of the base's PATH.
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
    """Return the image of a base and the layers on top of it.

    Args:
        base: the base; its config's environment, entry point and labels stay, as under a Dockerfile's FROM.
        additions: the layers on top, first to last.
        runtime: how a container is started.
        labels: to set in the config.
        annotations: of the manifest.
        created: when the image was made, with a time zone.

    Raises:
        InvalidVersion: there are more layers than an image may have.
    """
    layers = (*base.layers, *(addition.layer.descriptor for addition in additions))
    if len(layers) > MOST_LAYERS:
        message = f"The image on {base.reference} would have {len(layers)} layers. The limit is {MOST_LAYERS}."
        raise InvalidVersion(message, remedy="Use a base image with fewer layers, or ship a Dockerfile.template.")
    time = timestamp(created)
    config = {
        **stamped(base.config, base.platform, created),
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
    for name in ("author", "container"):
        config.pop(name, None)
    return image_of(base.platform, config, layers, annotations)


def _runtime(base: Mapping[str, Any], runtime: Runtime, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the config's `config`; malformed values of a base are left out."""
    env = base.get("Env")
    entries = [entry for entry in env if isinstance(entry, str)] if isinstance(env, list) else []
    environment = dict(entry.partition("=")[::2] for entry in entries)
    inherited = environment.get("PATH") or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment |= {**runtime.environment, "PATH": ":".join([*runtime.path, inherited])}
    kept = base.get("Labels")
    kept = {name: text for name, text in (kept if isinstance(kept, dict) else {}).items() if isinstance(text, str)}
    return {
        **{name: value for name, value in base.items() if name not in {"OnBuild", "Image"}},
        "Env": [f"{name}={value}" for name, value in environment.items()],
        "User": runtime.user,
        "WorkingDir": runtime.workdir,
        "Cmd": list(runtime.command),
        "ExposedPorts": {port: {} for port in runtime.ports},
        "Labels": labelled(kept, labels),
    }


def _history(base: BaseImage) -> list[Any]:
    """Return the base's history, if it is of as many layers as the base has; one line for each layer otherwise."""
    history = base.config.get("history")
    entries = history if isinstance(history, list) else []
    if sum(isinstance(entry, dict) and not entry.get("empty_layer") for entry in entries) == len(base.layers):
        return entries
    return [{"created_by": "layer of the base image"} for _ in base.layers]
