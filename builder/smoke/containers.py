"""What a container runtime is, as far as a smoke test needs one, and what its container may do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from builder.build.engine import Output
from builder.smoke.content import Content


class CannotRun(Exception):
    """A container cannot be run here: no fault of the image; the message says why, on one line."""


class NoContainers(CannotRun):
    """The runtime runs nothing on this machine, whatever the image."""


class CannotStart(Exception):
    """This image's container does not start where others do; the message is the runtime's, on one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a container may use.

    Attributes:
        memory: bytes, its /tmp included.
        seconds: how long it may live, whatever becomes of us.
        volumes: folders beside /tmp that it may write to, in memory too.
    """

    memory: int
    seconds: int
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a container ended.

    Attributes:
        code: its exit code.
        of_memory: whether it was killed for the memory it used.
    """

    code: int
    of_memory: bool


class ContainerRuntime(Protocol):
    """Runs containers on this machine: without network, read-only, without a capability, bounded."""

    name: str

    def available(self) -> bool:
        """Return whether its program is on this machine; it may still be unable to run anything."""
        ...

    def check(self) -> bool:
        """Run the smallest image, once, so that a container which does not start is known to be at fault itself.

        Returns:
            Whether that could be tried.

        Raises:
            NoContainers: it does not run.
        """
        ...

    def load(self, content: Content, name: str, folder: Path) -> None:
        """Take an image.

        Args:
            content: the image.
            name: what it is called from now on: letters, digits and dashes.
            folder: an empty folder, for what has to be written for that.

        Raises:
            CannotRun: it cannot be taken.
            BuilderError: what reading a layer raises.
        """
        ...

    def start(self, name: str, limits: Limits) -> None:
        """Start a container of the image of that name in the background; it is called so, too.

        Raises:
            CannotRun: perhaps no container can be run here: none was seen to.
            CannotStart: others can, and this one cannot.
        """
        ...

    def execute(self, name: str, argv: Sequence[str], output: Output, *, timeout: float) -> int | None:
        """Run a program within a container, as its user; return its exit code, None where it took too long."""
        ...

    def ended(self, name: str, *, within: float = 0) -> Ended | None:
        """Return how a container ended, None while it runs; wait for its end so many seconds."""
        ...

    def log(self, name: str) -> list[str]:
        """Return the last lines of what a container printed."""
        ...

    def remove(self, name: str) -> None:
        """Kill and remove a container, and remove its image, whether they are there or not."""
        ...

    def sweep(self, now: float) -> None:
        """Remove what publishers that were killed have left here: containers and images whose time is over."""
        ...


# Names that nobody else gives; the number is the time after which what is called so belongs to nobody.
PREFIX = "model-image-smoke-test"


def new_name(until: float, unique: str) -> str:
    """Return a name for an image and for its container.

    Args:
        until: seconds since the epoch, after which another publisher may remove them.
        unique: lower-case letters and digits.
    """
    return f"{PREFIX}-{until:.0f}-{unique}"
