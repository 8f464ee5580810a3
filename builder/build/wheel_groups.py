"""Which wheels share a layer: an image has at most so many layers, and some environments have more wheels.

docs/decisions/0025-groups.md says why a wheel has a layer of its own as long as there is one for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from builder.build.locked import LockedWheel

# Few, so that most wheels keep a layer of their own; more than one, so that a change does not make all of it again.
_SHARED = 4


@dataclass(frozen=True, slots=True)
class Group:
    """Wheels that share a layer, in the order of their names.

    Attributes:
        wheels: one or more.
    """

    wheels: tuple[LockedWheel, ...]

    @property
    def source(self) -> str:
        """What the layer is made from: a wheel's SHA-256, or a hash of those of several; 64 hexadecimal digits."""
        if len(self.wheels) == 1:
            return self.wheels[0].sha256
        return hashlib.sha256("\n".join(wheel.sha256 for wheel in self.wheels).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the wheels, as far as they are known."""
        return sum(wheel.size or 0 for wheel in self.wheels)

    @property
    def title(self) -> str:
        """The wheels' file names, for people."""
        return " ".join(wheel.filename for wheel in self.wheels)


def grouped(wheels: Iterable[LockedWheel], most: int) -> tuple[Group, ...]:
    """Return wheels in groups, each of which is a layer; the same wheels always give the same groups.

    Where there are more wheels than layers, the smallest share some: which one is decided by their name, so that a new
    version of one wheel leaves the others together.

    Args:
        wheels: each once.
        most: the most layers, more than 4.
    """
    ordered = sorted(wheels, key=lambda wheel: wheel.name)
    if len(ordered) <= most:
        return tuple(Group((wheel,)) for wheel in ordered)
    by_size = sorted(ordered, key=lambda wheel: (wheel.size or 0, wheel.name))
    sharing = by_size[: len(ordered) - most + _SHARED]
    shared: dict[int, list[LockedWheel]] = {}
    for wheel in sharing:
        shared.setdefault(hashlib.sha256(wheel.name.encode()).digest()[0] % _SHARED, []).append(wheel)
    alone = [(wheel,) for wheel in by_size[len(sharing) :]]
    together = [tuple(sorted(each, key=lambda wheel: wheel.name)) for each in shared.values()]
    return tuple(Group(each) for each in sorted([*alone, *together], key=lambda each: each[0].name))
