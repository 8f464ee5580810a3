"""Registries: credentials, the right to push, mounts, and the base image."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from builder.doctor import Finding, ok, skipped, warn
from builder.errors import BuilderError, InvalidSettings, InvalidVersion
from builder.oci.base_image import find_image
from builder.publish.record import Outcome
from builder.reference import Platform, Reference

if TYPE_CHECKING:
    from builder.doctor.surroundings import Surroundings
    from builder.models import ModelVersion
    from builder.oci.base_image import BaseImage
    from builder.reference import Digest, Repository

IN_A_JOB = "A Job that publishes has one: see docs/operations.md for the command that runs `builder doctor` in a Job."
# Layers of an image that are looked for among the wheel layers.
_MOST_LAYERS = 30


def credential(around: Surroundings) -> Finding:
    """See what names a credential for each registry, and whether a helper that is named answers."""
    hosts = dict.fromkeys([around.settings.registry_url.host, _base(around).repository.host])
    credentials = {host: around.registries.credential_of(host) for host in hosts}
    found = [
        f"{host}: {source if gives else f'{source} has none' if source else 'none, so anonymous'}"
        for host, (source, gives) in credentials.items()
    ]
    text = f"Credentials: {'; '.join(found)}."
    return ok(text) if any(gives for _, gives in credentials.values()) else skipped(text)


def push(around: Surroundings) -> Finding:
    """Open an upload where images and wheel layers go, and cancel it."""
    found = []
    for repository in _repositories(around):
        try:
            around.registries.for_host(repository.host).check_push(repository)
        except BuilderError as error:
            if around.without_credential(repository.host):
                return skipped(f"This Pod has no credential for {repository.host}, as it should be.", IN_A_JOB)
            raise error from error.__cause__
        found.append(str(repository))
    return ok(f"An upload to {' and to '.join(found)} could be opened, and was cancelled.")


def mount(around: Surroundings) -> Finding:
    """Mount a wheel layer where an image has it already: nothing changes, and it shows whether the registry mounts."""
    settings = around.settings
    if settings.build_method == "dockerfile":
        return skipped("BUILD_METHOD is dockerfile, which needs no wheel layers.")
    if around.without_credential(settings.registry_url.host):
        return skipped(f"This Pod has no credential for {settings.registry_url.host}, as it should be.", IN_A_JOB)
    layers = settings.wheel_layer_repository
    try:
        version = around.sample()
    except BuilderError:
        return skipped("MLflow does not answer, so no published version is known.")
    repository, shared = _shared_layer(around, version) if version else (None, None)
    if repository is None or shared is None:
        what = f"No published version has a layer that {layers} has too, so there is nothing to try it with."
        return skipped(what, "Look again when a version is published by its wheels.")
    if around.registries.for_host(layers.host).mount_blob(repository, shared, layers):
        return ok(f"A layer of {layers} can be mounted in {repository}.")
    return warn(
        f"The registry does not mount a layer of {layers} in {repository}: each publish sends its layers again.",
        "Give the credential the right to pull from WHEEL_LAYERS, or see docs/registries.md for this registry.",
    )


def base_image(around: Surroundings) -> Finding:
    """Look for BASE_IMAGE for each of TARGET_PLATFORMS."""
    reference = _base(around)
    try:
        digests = [_resolved(around, reference, platform) for platform in around.settings.target_platforms]
    except InvalidVersion as error:
        raise InvalidSettings(error.what, remedy="Correct BASE_IMAGE, or TARGET_PLATFORMS.") from error
    except BuilderError:
        if around.without_credential(around.settings.registry_url.host):
            return skipped("This Pod reaches no registry: only Jobs that publish read base images.", IN_A_JOB)
        raise
    platforms = ", ".join(map(str, around.settings.target_platforms))
    return ok(f"{reference} is {digests[0]}, and has {platforms}.")


def _base(around: Surroundings) -> Reference:
    """Return BASE_IMAGE for the Python of this program: that of a model is not known here."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Reference.parse(around.settings.base_image.replace("{python_version}", python))


def _resolved(around: Surroundings, reference: Reference, platform: Platform) -> Digest:
    found = find_image(around.registries.for_host(reference.repository.host), reference, platform)
    if found is None:
        message = f"There is no image {reference}."
        raise InvalidSettings(message, remedy="Correct BASE_IMAGE, or copy the image there.")
    if around.settings.build_method != "dockerfile":
        found.to_base()
    return found.digest


def _repositories(around: Surroundings) -> list[Repository]:
    """Return where an upload is tried: the images' of a model, if one is known, and the wheel layers'."""
    settings = around.settings
    name = settings.model_name
    if not name:
        try:
            version = around.sample()
        except BuilderError:
            version = None  # the row of MLflow says why
        name = version.name if version else ""
    found = [settings.repository_of(name)] if name else []
    # Somewhere has to be tried.
    return found if found and settings.build_method == "dockerfile" else [*found, settings.wheel_layer_repository]


def _shared_layer(around: Surroundings, version: ModelVersion) -> tuple[Repository, Digest | None]:
    """Return a version's repository, and a layer of its image that WHEEL_LAYERS has too."""
    settings = around.settings
    repository, layers = settings.repository_of(version.name), settings.wheel_layer_repository
    image = _image(around, version, repository)
    registry = around.registries.for_host(repository.host)
    digests = [layer.digest for layer in image.layers[-_MOST_LAYERS:]] if image else []
    return repository, next((each for each in reversed(digests) if registry.has_blob(layers, each)), None)


def _image(around: Surroundings, version: ModelVersion, repository: Repository) -> BaseImage | None:
    """Return the image of a version; its tags can be edited by everybody, so the repository is not theirs."""
    outcome = Outcome.of(version, around.settings.target)
    if outcome.state != "published" or not outcome.platforms:
        return None
    registry = around.registries.for_host(repository.host)
    try:
        digest, platform = Reference.parse(outcome.image).digest, Platform.parse(outcome.platforms[0])
        found = find_image(registry, repository.digest(digest), platform) if digest else None
        return found.to_base() if found else None
    except InvalidVersion:
        return None
