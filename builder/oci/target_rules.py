"""What a target asks of an image, checked before anything is pushed to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.errors import InvalidVersion
from builder.masking import one_line
from builder.oci import Descriptor
from builder.reference import Platform, Reference

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
