"""What an engine's last words mean: the same words for every engine, so that a user learns them once."""

from __future__ import annotations

import os
import re

from builder.errors import BuilderError, BuildFailed, ServiceUnavailable, TryAgain, one_line
from builder.reference import Platform

_LONGEST_SAYING = 700
_FOREIGN = re.compile(r"exec format error", re.IGNORECASE)
_AWAY = re.compile(
    r"connection refused|connection reset|i/o timeout|TLS handshake timeout|deadline exceeded|no route to host|"
    r"network is unreachable|server misbehaving|temporary failure in name resolution|TOOMANYREQUESTS|"
    r"too many requests|(?:status(?: code)?:? |\()5\d\d|Service Unavailable|Bad Gateway|Gateway Time-?out",
    re.IGNORECASE,
)
_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_REMEDIES = (
    (
        re.compile(
            r"x509|certificate signed by unknown|certificate verify failed|tls: failed to verify", re.IGNORECASE
        ),
        "Name a bundle that holds the registry's CA in SSL_CERT_FILE.",
    ),
    (
        re.compile(r"UNAUTHORIZED|authentication required|access to the resource is denied|\bDENIED\b|\b40[13]\b"),
        "Give the build phase a credential that may pull it: BUILD_DOCKER_CONFIG.",
    ),
    (
        re.compile(
            r"MANIFEST_UNKNOWN|manifest unknown|NAME_UNKNOWN|no child with platform|no image found", re.IGNORECASE
        ),
        "Check the name and the tag behind FROM, and that the image exists for this platform.",
    ),
    (re.compile(r"no such host"), "Check the registry's name behind FROM, and the proxy variables."),
)


def machine_platform() -> Platform:
    """Return the platform of the kernel that runs us; its variant is not known and not named."""
    system = os.uname()
    architecture = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm"}.get(
        system.machine, system.machine
    )
    return Platform(system.sysname.lower(), architecture)


def is_foreign(platform: Platform) -> bool:
    """Return whether programs of a platform need emulation on this machine."""
    here = machine_platform()
    return (platform.os, platform.architecture) != (here.os, here.architecture)


def cannot_be_run(platform: Platform) -> BuildFailed:
    """Return the error for a platform whose programs this machine can neither run nor emulate."""
    message = (
        f"A RUN step of {platform} cannot run on this machine, which is {machine_platform()} and has no emulation."
    )
    remedy = (
        "Register qemu-user-static with binfmt_misc on the node (flag F), build on a node of that architecture, or "
        "leave the platform out: the version's tag MODEL_PLATFORMS, or TARGET_PLATFORMS."
    )
    return BuildFailed(message, remedy=remedy)


def failure(engine: str, platform: Platform, said: str, *, step: str = "", output: str = "") -> BuilderError:
    """Return the error that an engine's last words stand for.

    Args:
        engine: the engine's name, as messages show it.
        platform: what was being built.
        said: the engine's own last words on why it failed.
        step: the Dockerfile's instruction that failed; empty where none had begun, or the engine itself failed.
        output: the last line that the instruction's own program wrote.

    Returns:
        `ServiceUnavailable` where a registry is away, `TryAgain` where a disk is full, else `BuildFailed`.
    """
    said, step, output = (one_line(text, _LONGEST_SAYING) for text in (said, step, output))
    if _FOREIGN.search(f"{said} {output}") and is_foreign(platform):
        return cannot_be_run(platform)
    if step:
        message = f"{platform}: the step '{one_line(step, 200)}' failed: {f'{output} ({said})' if output else said}."
        if _FULL.search(message):
            return TryAgain(message, remedy="Give the workspace and the container's own disk more room.")
        return BuildFailed(message, remedy="The log has the step's whole output; correct the Dockerfile.")
    message = f"{engine} could not build {platform}: {said or 'it did not say why'}."
    if _FULL.search(said):
        return TryAgain(message, remedy="Give the workspace and the container's own disk more room.")
    if _AWAY.search(said):
        return ServiceUnavailable(message, remedy="Try again when the registry answers.")
    remedy = next((remedy for pattern, remedy in _REMEDIES if pattern.search(said)), "Correct the Dockerfile.")
    return BuildFailed(message, remedy=remedy)
