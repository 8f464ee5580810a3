"""Image configs, manifests and indexes, ours and others', and the rules of a target. Nothing here does I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from builder.errors import InvalidVersion
from builder.masking import one_line
from builder.oci import (
    INDEXES,
    MANIFESTS,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    descriptors,
    digest_of,
    from_bytes,
    mapping,
    platform_of,
    refuse,
    sequence,
    strings,
    to_bytes,
)
from builder.reference import Digest, Platform, Reference

# Standard annotations: https://github.com/opencontainers/image-spec/blob/main/annotations.md
CREATED = "org.opencontainers.image.created"
TITLE = "org.opencontainers.image.title"
VERSION = "org.opencontainers.image.version"
BASE_NAME = "org.opencontainers.image.base.name"
BASE_DIGEST = "org.opencontainers.image.base.digest"
# Ours. Labels and annotations of others must not begin so.
PREFIX = "io.modelimage."
SOURCE_ID = f"{PREFIX}source-id"
CONTENT_DIGEST = f"{PREFIX}content-digest"
PLATFORMS = f"{PREFIX}platforms"
ARTIFACTS_DIGEST = f"{PREFIX}artifacts-digest"
LOCK_DIGEST = f"{PREFIX}lock-digest"
REQUIREMENTS_DIGEST = f"{PREFIX}requirements-digest"
METHOD = f"{PREFIX}method"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One platform's image, ready to be pushed.

    Attributes:
        platform: what it runs on.
        manifest: the manifest's bytes.
        config: the config's bytes.
        descriptor: names the manifest, with its platform: an entry of an index.
        config_descriptor: names the config.
        layers: name the layers, first to last.
        annotations: of the manifest.
    """

    platform: Platform
    manifest: bytes = field(repr=False)
    config: bytes = field(repr=False)
    descriptor: Descriptor
    config_descriptor: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of all layers, compressed: what a first pull moves."""
        return sum(layer.size for layer in dict.fromkeys(self.layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a tag names.

    Attributes:
        digest: of the manifest or index.
        media_type: which of the two it is.
        source_id: what it was published from; None for an image that is not ours.
        platforms: the images in it.
        annotations: its annotations.
    """

    digest: Digest
    media_type: str
    source_id: str | None
    platforms: Mapping[Platform, Descriptor]
    annotations: Mapping[str, str]


def image_of(
    platform: Platform, config: Mapping[str, Any], layers: tuple[Descriptor, ...], annotations: Mapping[str, str]
) -> Image:
    """Return the image of a config and its layers.

    Args:
        platform: what it runs on.
        config: the image config.
        layers: name the layers, first to last, by OCI's media types.
        annotations: of the manifest.
    """
    content = to_bytes(config)
    descriptor = Descriptor.of(content, OCI_CONFIG)
    manifest = manifest_of(descriptor, layers, annotations)
    return Image(
        platform=platform,
        manifest=manifest,
        config=content,
        descriptor=Descriptor.of(manifest, OCI_MANIFEST, platform),
        config_descriptor=descriptor,
        layers=layers,
        annotations=dict(annotations),
    )


def manifest_of(
    config: Descriptor,
    layers: Sequence[Descriptor],
    annotations: Mapping[str, str],
    *,
    kind: str = "",
    subject: Descriptor | None = None,
) -> bytes:
    """Return the bytes of a manifest.

    Args:
        config: names the config.
        layers: name the layers, first to last.
        annotations: of the manifest.
        kind: the type of an artifact, a media type; empty for an image.
        subject: the manifest that it refers to; None for none.
    """
    return to_bytes(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            **({"artifactType": kind} if kind else {}),
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in layers],
            "annotations": dict(annotations),
            **({"subject": subject.to_json()} if subject else {}),
        }
    )


def stamped(config: Mapping[str, Any], platform: Platform, created: datetime) -> dict[str, Any]:
    """Return an image config with our time and the planned platform."""
    variant = {"variant": platform.variant} if platform.variant else {}
    time = timestamp(created)
    return {**config, "created": time, "os": platform.os, "architecture": platform.architecture, **variant}


def labelled(labels: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """Return labels together with ours; others that begin with our prefix are left out."""
    return {**{name: text for name, text in labels.items() if not name.startswith(PREFIX)}, **ours}


def index(images: Iterable[Descriptor], *, annotations: Mapping[str, str]) -> bytes:
    """Return the bytes of an index of images, ordered by platform, so that the same images give the same index.

    Args:
        images: descriptors with a platform, each platform once.
        annotations: of the index.

    Raises:
        ValueError: a descriptor has no platform, or two have the same.
    """
    by_platform: dict[Platform, Descriptor] = {}
    for image in images:
        if image.platform is None or image.platform in by_platform:
            message = f"{image.digest} has no platform, or that of another image of the index"
            raise ValueError(message)
        by_platform[image.platform] = image
    return to_bytes(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [by_platform[platform].to_json() for platform in sorted(by_platform)],
            "annotations": dict(annotations),
        }
    )


def timestamp(time: datetime) -> str:
    """Return a time with a time zone as RFC 3339 in UTC."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def media_type_of(content: bytes, declared: str = "") -> str:
    """Return the media type that a manifest or an index has in it, or the declared one where it has none.

    Raises:
        Malformed: it is not JSON, or the two differ.
    """
    inside = from_bytes(content).get("mediaType")
    known = MANIFESTS | INDEXES
    if inside is not None and declared in known and inside != declared:
        # CVE-2021-41190: one document that is two things, depending on the reader.
        refuse("its mediaType is not the declared one")
    return inside if isinstance(inside, str) else declared


def read_config(content: bytes) -> tuple[Platform, tuple[Digest, ...]]:
    """Return an image config's platform and the diff ids of its layers.

    Raises:
        Malformed: it is not an image config.
    """
    value = from_bytes(content)
    rootfs = mapping(value.get("rootfs"), "rootfs")
    return platform_of(value), tuple(digest_of(entry) for entry in sequence(rootfs.get("diff_ids"), "diff_ids"))


def config_of(manifest: bytes) -> Descriptor:
    """Return the descriptor of the config that an image manifest names; raises `Malformed` where it names none."""
    return Descriptor.from_json(from_bytes(manifest).get("config"))


def images_of(content: bytes) -> dict[Platform, Descriptor]:
    """Return an index's images by platform; entries of no platform, and attestations, are left out.

    Raises:
        Malformed: it is not an index.
    """
    entries = descriptors(from_bytes(content).get("manifests"), "manifests")
    images: dict[Platform, Descriptor] = {}
    for entry in entries:
        if entry.platform and entry.media_type in MANIFESTS and not entry.is_attestation:
            images.setdefault(entry.platform, entry)
    return images


def read_published(content: bytes, media_type: str, platforms: Mapping[Platform, Descriptor]) -> Published:
    """Return a manifest or an index with what its annotations say.

    Args:
        content: its bytes.
        media_type: what it is.
        platforms: the images in it: those of `images_of` for an index.

    Raises:
        Malformed: its annotations are not strings.
    """
    annotations = strings(from_bytes(content).get("annotations"), "annotations")
    return Published(
        digest=Digest.of(content),
        media_type=media_type,
        source_id=annotations.get(SOURCE_ID) or None,
        platforms=dict(platforms),
        annotations=annotations,
    )


def engine_config(content: bytes) -> dict[str, Any]:
    """Return an engine's image config, in a form that `finished_image` can work on.

    Raises:
        Malformed: `config` or its labels are malformed.
    """
    value = from_bytes(content)
    runtime = mapping(value.get("config") or {}, "config")
    strings(runtime.get("Labels"), "labels")
    return value


# Docker unpacks no image of more layers; seen, see docs/decisions.
_MOST_LAYERS = 125
_PORTS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?(?:/(?:tcp|udp|sctp))?", re.IGNORECASE)
# The range that container runtimes take (moby, `user.GetExecUser`); a larger number might wrap round to 0.
_USERS = range(1, 1 << 31)
# The most ports of a config that are examined, and the most characters of a value that are shown.
_MOST_PORTS = 1000
_MOST_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRules:
    """The rules of a target.

    Attributes:
        name: of the target in messages.
        source: the address of the document that gives the rules; empty for none.
        platform: must be among the image's platforms; None for any.
        numeric_user: whether the user must be a number other than 0.
        refuses_latest: whether the tag may not be `latest`.
        most_layer_bytes: every layer must be smaller, as it is sent; None for no limit.
        ports: those that an image may expose.
        most_layers: layers of one image.
    """

    name: str
    source: str = ""
    platform: Platform | None = None
    numeric_user: bool = False
    refuses_latest: bool = False
    most_layer_bytes: int | None = None
    ports: range = range(1, 1 << 16)
    most_layers: int = _MOST_LAYERS


# A user may be a name, and a tag may be latest: such an image runs.
GENERAL = TargetRules(name="any target")
FOUNDRY = TargetRules(
    name="Foundry",
    source="https://www.palantir.com/docs/foundry/transforms-container/container-overview",
    platform=Platform("linux", "amd64"),
    numeric_user=True,
    refuses_latest=True,
    most_layer_bytes=10 * 10**9,
    ports=range(1024, 1 << 16),
)
_TARGETS = {"pltr_foundry": FOUNDRY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A rule that an image breaks.

    Attributes:
        rule: its name: platform, tag, user, ports, layers or layer size.
        value: what breaks it.
        required: what the rule requires.
        remedy: what its author can do about it.
    """

    rule: str
    value: str
    required: str
    remedy: str


def target_rules(target: str) -> TargetRules:
    """Return the rules of a target.

    Args:
        target: its name, `pltr_foundry`; the general rules apply to an unknown one.
    """
    return _TARGETS.get(target, GENERAL)


def check_target(
    rules: TargetRules,
    *,
    reference: Reference,
    platforms: Iterable[Platform],
    images: Iterable[tuple[Platform, Mapping[str, Any], Sequence[Descriptor]]],
) -> None:
    """Refuse an image that breaks a rule of its target.

    Args:
        rules: the rules.
        reference: what it is pushed to.
        platforms: all that the reference will name, those that are there already included.
        images: platform, image config as JSON and layers of each image that is to be pushed.

    Raises:
        InvalidVersion: it breaks rules; the message has each with the value and a remedy.
    """
    found: dict[Violation, list[Platform]] = {violation: [] for violation in _of_all(rules, reference, platforms)}
    for platform, config, layers in images:
        for violation in _of_image(rules, config, layers):
            found.setdefault(violation, []).append(platform)
    if not found:
        return
    sentences = []
    for violation, where in found.items():
        on = f" on {', '.join(map(str, where))}" if where else ""
        sentences.append(
            f"{violation.rule} is {violation.value}{on}, and must be {violation.required}: {violation.remedy}"
        )
    count = "a rule" if len(sentences) == 1 else f"{len(sentences)} rules"
    message = f"{reference} breaks {count} of {rules.name}: {'; '.join(sentences)}."
    raise InvalidVersion(message, remedy=f"The rules are those of {rules.source}" if rules.source else "")


def _of_all(rules: TargetRules, reference: Reference, platforms: Iterable[Platform]) -> Iterator[Violation]:
    """Yield the rules that an image breaks by its platforms and its tag."""
    names = {str(platform) for platform in platforms}
    if rules.platform and str(rules.platform) not in names:
        yield Violation(
            rule="platform",
            value=", ".join(sorted(names)) or "none",
            required=f"{rules.platform}, alone or among others",
            remedy="add it to the version's tag MODEL_PLATFORMS, or to TARGET_PLATFORMS",
        )
    if rules.refuses_latest and reference.tag == "latest":
        yield Violation(
            rule="tag", value="latest", required="one that does not move", remedy="publish a version under its number"
        )


def _of_image(rules: TargetRules, config: Mapping[str, Any], layers: Sequence[Descriptor]) -> Iterator[Violation]:
    """Yield the rules that one platform's image breaks; its config may be a stranger's."""
    runtime = config.get("config") or {}
    if rules.numeric_user:
        yield from _of_user(runtime.get("User") or "")
    yield from _of_ports(rules, runtime.get("ExposedPorts") or {})
    if len(layers) > rules.most_layers:
        yield Violation(
            rule="layers",
            value=f"{len(layers)} of them",
            required=f"{rules.most_layers} at most",
            remedy="join RUN and COPY instructions, or use a base image that has fewer",
        )
    for layer in layers:
        if rules.most_layer_bytes is not None and layer.size >= rules.most_layer_bytes:
            yield Violation(
                rule="layer size",
                value=f"{layer.size} bytes of {layer.digest}",
                required=f"below {rules.most_layer_bytes}",
                remedy="divide COPY into several instructions, and save a file of that size in shards",
            )


def _of_user(user: object) -> Iterator[Violation]:
    """Yield the rule that a user breaks: it must be a number, as `10001`, `10001:0` and `10001:app` are."""
    number = user.partition(":")[0] if isinstance(user, str) else ""
    if re.fullmatch(r"[0-9]{1,10}", number) and int(number) in _USERS:
        return
    yield Violation(
        rule="user",
        value=_shown(user) if user else "not set, so root",
        required="a number other than 0",
        remedy="make the line `USER 10001` the last USER of the Dockerfile",
    )


def _of_ports(rules: TargetRules, exposed: object) -> Iterator[Violation]:
    required = f"from {rules.ports.start} to {rules.ports.stop - 1}"
    remedy = (
        "EXPOSE one of those and serve there, 8080 for one; a port of the base image stays, "
        "so another base is needed where it is that one's"
    )
    if not isinstance(exposed, Mapping):
        yield Violation(rule="port", value=_shown(exposed), required=required, remedy=remedy)
        return
    for name in sorted(exposed)[:_MOST_PORTS]:
        match = _PORTS.fullmatch(name)
        ports = [int(port) for port in match.groups() if port] if match else []
        if not ports or any(port not in rules.ports for port in ports):
            yield Violation(rule="port", value=_shown(name), required=required, remedy=remedy)


def _shown(value: object) -> str:
    # Cut before as well: the value may have megabytes.
    return one_line(repr(value)[:_MOST_SHOWN], 80)
