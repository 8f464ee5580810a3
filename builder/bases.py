"""Base images of the wheels method: what is in them is found out once, and kept beside the wheel layers."""

from __future__ import annotations

from builder.build.locked import Lock
from builder.errors import InvalidSettings, InvalidVersion
from builder.images.base import BaseImage, base_image
from builder.images.base_facts import BaseFacts, inspect_base
from builder.images.descriptor import Malformed
from builder.images.layer_store import LayerStore
from builder.images.registries import Registries
from builder.images.registry import Registry
from builder.log import get_logger
from builder.recipe import MOST_BASE_LAYERS
from builder.reference import Platform, Reference
from builder.source import Source

_log = get_logger("wheels")
FACTS = "application/vnd.modelimage.base.v1+json"


def base_with_facts(
    registries: Registries, store: LayerStore, source: Source, platform: Platform, *, keep: bool = True
) -> tuple[BaseImage, BaseFacts]:
    """Return a base image and what is in it; the latter is found out once for each image and kept.

    Raises:
        InvalidVersion, InvalidSettings: as `existing_base`; or the base has too many layers.
        BuilderError: it cannot be told.
    """
    reference = source.base
    registry = registries.for_host(reference.repository.host)
    base = existing_base(registry, source, platform)
    # Before any layer is read: a manifest may name thousands.
    if len(base.layers) > MOST_BASE_LAYERS:
        message = f"The base image {base.reference} has {len(base.layers)} layers; {MOST_BASE_LAYERS} are the most."
        raise InvalidVersion(message, remedy="Take a base image of fewer layers, or ship a Dockerfile.template.")
    key = facts_key(base)
    kept = store.text(key, kind=FACTS)
    if kept is not None:
        try:
            return base, BaseFacts.from_json(kept)
        except Malformed as error:
            _log.warning("kept facts of a base image are none, and are found out again", tag=key, why=str(error))
    _log.info("reading the base image", base=str(reference), platform=str(platform))
    facts = inspect_base(registry, base)
    if keep:
        store.keep_text(key, facts.to_json(), kind=FACTS, title=f"{one_name(reference)}.json")
    return base, facts


def existing_base(registry: Registry, source: Source, platform: Platform) -> BaseImage:
    """Return a version's base image.

    Raises:
        InvalidVersion: there is no such image, or none for the platform.
        InvalidSettings: there is no such image, and the version does not name it.
        BuilderError: it cannot be told.
    """
    base = base_image(registry, source.base, platform)
    if base is None:
        message = f"There is no base image {source.base}."
        remedy = "Set BASE_IMAGE, or the version's tag MODEL_BASE_IMAGE, to one there is."
        if source.own_base:
            raise InvalidVersion(message, remedy=remedy)
        # Nothing that the version could help, and that must not count as an attempt at it.
        raise InvalidSettings(message, remedy=remedy)
    return base


def facts_key(base: BaseImage) -> str:
    """Return the tag that the facts of a base image are kept under, as a text of the kind `FACTS`."""
    return f"base-{base.manifest.hex}"


def one_name(reference: Reference) -> str:
    """Return a name for the last component of a reference."""
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
        message = f"The base image {base.reference} is built on musl, and the wheels are for glibc."
        raise InvalidVersion(message, remedy="Take a base image with glibc (Debian, Ubuntu, Red Hat), not Alpine.")
    if facts.occupied:
        message = f"The base image {base.reference} has something at /opt/model, where the environment goes."
        raise InvalidVersion(message, remedy="Take another base image, or ship a Dockerfile.template.")
    return found


def check_libraries(base: BaseImage, facts: BaseFacts, lock: Lock) -> None:
    """Refuse wheels that need a library of the system which the base does not have: nothing else would say so.

    LightGBM's wheels for Linux do not bring GNU's OpenMP, and are the only ones of MLflow's flavors that do not
    (https://github.com/microsoft/LightGBM/blob/master/python-package/README.rst).

    Raises:
        InvalidVersion: the base has no libgomp.so.1, and LightGBM is among the wheels.
    """
    if facts.openmp is False and any(wheel.name == "lightgbm" for wheel in lock.wheels):
        message = f"lightgbm needs the library libgomp.so.1, which the base image {base.reference} does not have for "
        message += f"{base.platform}."
        remedy = "Set BASE_IMAGE, or the version's tag MODEL_BASE_IMAGE, to an image that has it: python:3.11 rather "
        remedy += "than python:3.11-slim, or one with Debian's package libgomp1."
        raise InvalidVersion(message, remedy=remedy)
