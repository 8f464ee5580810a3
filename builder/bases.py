"""Base images of the wheels method: what is in them is found out once, and kept beside the wheel layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from builder.build.libraries import from_note, lacking
from builder.build.mlmodel import needs_java
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
_MOST_NAMED = 5
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
    return base, facts_of(registry, store, base, keep=keep)


def facts_of(registry: Registry, store: LayerStore, base: BaseImage, *, keep: bool = True) -> BaseFacts:
    """Return what is in a base image, which is found out once and kept.

    Raises:
        InvalidVersion: a layer cannot be read.
        BuilderError: it cannot be told.
    """
    key = facts_key(base)
    kept = store.text(key, kind=FACTS)
    if kept is not None:
        try:
            return BaseFacts.from_json(kept)
        except Malformed as error:
            _log.warning("kept facts of a base image are none, and are found out again", tag=key, why=str(error))
    _log.info("reading the base image", base=str(base.reference), platform=str(base.platform))
    facts = inspect_base(registry, base)
    if keep:
        store.keep_text(key, facts.to_json(), kind=FACTS, title=f"{one_name(base.reference)}.json")
    return facts


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


def check_libraries(base: str, platform: Platform, there: Collection[str] | None, notes: Iterable[str]) -> list[str]:
    """Refuse wheels that need a library of the system which nobody has; return what is worth a warning, for people.

    Args:
        base: the base image's reference.
        platform: the image's.
        there: names of the base image's libraries; None where they are not known, and nothing is judged.
        notes: on the layers of all wheels of the image.

    Raises:
        InvalidVersion: nothing of a wheel can be loaded for want of a library.
    """
    read = [from_note(note) for note in notes]
    if there is None or None in read:
        return []
    wheels = [wheel for note in read if note for wheel in note]
    warnings = []
    for lack in lacking(wheels, frozenset(there), platform):
        named = [f"{name} ({needed_by})" for name, needed_by in lack.missing.items()]
        more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
        what = f"needs {', '.join(named[:_MOST_NAMED])}{more}, which neither the base image {base} nor a wheel has for "
        what += f"{platform}."
        if lack.loads:
            warnings.append(f"A part of the wheel {lack.wheel} cannot be loaded: it {what}")
            continue
        packages = f", such as one with Debian's {' '.join(lack.packages)}" if lack.packages else ""
        remedy = f"Set BASE_IMAGE, or the version's tag MODEL_BASE_IMAGE, to an image that has it{packages}"
        headless = lack.wheel.startswith(("opencv_python-", "opencv_contrib_python-"))
        remedy += ", or log the model with the package's variant for servers, -headless." if headless else "."
        message = f"The wheel {lack.wheel} {what}"
        raise InvalidVersion(message, remedy=remedy)
    return warnings


def check_loader(base: BaseImage, facts: BaseFacts, loader: str, *, client: bool) -> None:
    """Refuse a loader that needs a program which the base does not have; warn where a client may do without.

    Args:
        base: the base image.
        facts: what is in it.
        loader: the module that MLflow's scoring server loads the model by.
        client: whether the version has a client, which loads the model as it likes.

    Raises:
        InvalidVersion: MLflow's scoring server would need a Java.
    """
    if facts.java is not False or not needs_java(loader):
        return
    message = (
        f"The model's loader {loader[:100]!r} needs Java, and the base image {base.reference} has no program java "
    )
    message += f"for {base.platform}."
    if client:
        _log.warning("the client has to do without Java", why=message)
        return
    remedy = "Set BASE_IMAGE, or the version's tag MODEL_BASE_IMAGE, to an image with Python and Java, install it in a "
    remedy += "Dockerfile.template, or log the model with a flavor that needs none."
    raise InvalidVersion(message, remedy=remedy)
