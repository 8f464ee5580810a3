"""What a target asks of an image, checked before anything is pushed to it.

Foundry's rules are those of its documentation, "Container transforms", section "Image requirements"
(https://www.palantir.com/docs/foundry/transforms-container/container-overview), for container models as well: the user
is a number and not 0, the image is built for linux/amd64, it is pushed by digest or by a tag other than latest, a layer
is smaller than about 10 GB, exposed ports are between 1024 and 65535. Any other target gets the rules without which an
image runs nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.errors import InvalidVersion, one_line
from builder.images.descriptor import Descriptor
from builder.reference import Platform, Reference

# Docker unpacks no image of more layers; seen, see docs/decisions.
_MOST_LAYERS = 125
_PORTS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?(?:/(?:tcp|udp|sctp))?", re.IGNORECASE)
# The range that container runtimes take (moby, `user.GetExecUser`); a larger number might wrap round to 0.
_USERS = range(1, 1 << 31)
# What is looked at, and shown, of what a stranger's config says.
_MOST_PORTS = 1000
_MOST_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The rules of a target.

    Attributes:
        name: how messages call the target.
        source: the address of the document that gives the rules; empty where there is none.
        platform: must be among the image's platforms; None where any will do.
        numeric_user: whether the user must be a number other than 0.
        refuses_latest: whether the tag may not be `latest`.
        most_layer_bytes: what every layer must be smaller than, as it is sent; None where nobody says.
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


# Names may be users, and tags may be latest, where nobody says otherwise: an image of such runs.
GENERAL = Profile(name="any target")
FOUNDRY = Profile(
    name="Foundry",
    source="https://www.palantir.com/docs/foundry/transforms-container/container-overview",
    platform=Platform("linux", "amd64"),
    numeric_user=True,
    refuses_latest=True,
    most_layer_bytes=10 * 10**9,
    ports=range(1024, 1 << 16),
)
_PROFILES = {"pltr_foundry": FOUNDRY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A rule that an image breaks.

    Attributes:
        rule: its name: platform, tag, user, ports, layers or layer size.
        value: what breaks it.
        asked: what the rule asks for.
        remedy: what its author can do about it.
    """

    rule: str
    value: str
    asked: str
    remedy: str


def profile_for(target: str) -> Profile:
    """Return the rules of a target.

    Args:
        target: its name, `pltr_foundry`; one that is not known gets the general rules.
    """
    return _PROFILES.get(target, GENERAL)


def check(
    profile: Profile,
    *,
    reference: Reference,
    platforms: Iterable[Platform],
    images: Iterable[tuple[Platform, Mapping[str, Any], Sequence[Descriptor]]],
) -> None:
    """Refuse an image that breaks a rule of its target.

    Args:
        profile: the rules.
        reference: what it is pushed to.
        platforms: all that will stand under the reference, those that are there already included.
        images: platform, image config as JSON and layers of each image that is to be pushed.

    Raises:
        InvalidVersion: it breaks rules; all of them are named, each with the value and what to do about it.
    """
    found: dict[Violation, list[Platform]] = {violation: [] for violation in _of_all(profile, reference, platforms)}
    for platform, config, layers in images:
        for violation in _of_image(profile, config, layers):
            found.setdefault(violation, []).append(platform)
    if not found:
        return
    sentences = []
    for violation, where in found.items():
        on = f" on {', '.join(map(str, where))}" if where else ""
        sentences.append(
            f"{violation.rule} is {violation.value}{on}, and must be {violation.asked}: {violation.remedy}"
        )
    count = "a rule" if len(sentences) == 1 else f"{len(sentences)} rules"
    message = f"{reference} breaks {count} of {profile.name}: {'; '.join(sentences)}."
    raise InvalidVersion(message, remedy=f"The rules are those of {profile.source}" if profile.source else "")


def _of_all(profile: Profile, reference: Reference, platforms: Iterable[Platform]) -> Iterator[Violation]:
    """Yield what is wrong with an image whatever is in it."""
    names = {str(platform) for platform in platforms}
    if profile.platform and str(profile.platform) not in names:
        yield Violation(
            rule="platform",
            value=", ".join(sorted(names)) or "none",
            asked=f"{profile.platform}, alone or among others",
            remedy="add it to the version's tag MODEL_PLATFORMS, or to TARGET_PLATFORMS",
        )
    if profile.refuses_latest and reference.tag == "latest":
        yield Violation(
            rule="tag", value="latest", asked="one that does not move", remedy="publish a version under its number"
        )


def _of_image(profile: Profile, config: Mapping[str, Any], layers: Sequence[Descriptor]) -> Iterator[Violation]:
    """Yield what is wrong with one platform's image; its config may be a stranger's."""
    runtime = config.get("config") or {}
    if profile.numeric_user:
        yield from _of_user(runtime.get("User") or "")
    yield from _of_ports(profile, runtime.get("ExposedPorts") or {})
    if len(layers) > profile.most_layers:
        yield Violation(
            rule="layers",
            value=f"{len(layers)} of them",
            asked=f"{profile.most_layers} at most",
            remedy="join RUN and COPY instructions, or use a base image that has fewer",
        )
    for layer in layers:
        if profile.most_layer_bytes is not None and layer.size >= profile.most_layer_bytes:
            yield Violation(
                rule="layer size",
                value=f"{layer.size} bytes of {layer.digest}",
                asked=f"below {profile.most_layer_bytes}",
                remedy="divide what is copied into several COPY instructions, and a file that is as large into shards",
            )


def _of_user(user: object) -> Iterator[Violation]:
    """Yield what is wrong with a user that must be a number: `10001`, `10001:0`, `10001:app` are right."""
    number = user.partition(":")[0] if isinstance(user, str) else ""
    if re.fullmatch(r"[0-9]{1,10}", number) and int(number) in _USERS:
        return
    yield Violation(
        rule="user",
        value=_shown(user) if user else "not set, so root",
        asked="a number other than 0",
        remedy="make the line `USER 10001` the last USER of the Dockerfile",
    )


def _of_ports(profile: Profile, exposed: object) -> Iterator[Violation]:
    asked = f"from {profile.ports.start} to {profile.ports.stop - 1}"
    remedy = (
        "EXPOSE one of those and serve there, 8080 for one; a port of the base image stays, "
        "so another base is needed where it is that one's"
    )
    if not isinstance(exposed, Mapping):
        yield Violation(rule="port", value=_shown(exposed), asked=asked, remedy=remedy)
        return
    for name in sorted(exposed)[:_MOST_PORTS]:
        match = _PORTS.fullmatch(name)
        ports = [int(port) for port in match.groups() if port] if match else []
        if not ports or any(port not in profile.ports for port in ports):
            yield Violation(rule="port", value=_shown(name), asked=asked, remedy=remedy)


def _shown(value: object) -> str:
    # Cut before as well: the value may have megabytes.
    return one_line(repr(value)[:_MOST_SHOWN], 80)
