"""What was meant to select a version and does not: another value, a misspelt tag, a tag of the registered model."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from builder.shown import one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from builder.models.version import ModelVersion

# Whoever gives a tag such a value means what happens.
_NO = frozenset({"", "false", "no", "off", "0", "none"})
_LIKE = 0.85
# Tags are others' text: so many different names are compared, and so many findings told.
_MOST_NAMES = 2000
_MOST_TOLD = 10
_LONGEST = 100


class NearMisses:
    """Collects what is like a target tag.

    Attributes:
        versions: how many versions were seen.

    Args:
        tag: the target tag.
    """

    def __init__(self, tag: str) -> None:
        self.versions = 0
        self._tag = tag
        self._like: dict[str, bool] = {tag: True}
        self._on_versions: dict[tuple[str, str], tuple[int, str]] = {}
        self._on_models: list[str] = []

    def add(self, version: ModelVersion) -> None:
        """Take a version."""
        self.versions += 1
        for shown in self._near(version.tags):
            count, first = self._on_versions.get(shown, (0, str(version)))
            self._on_versions[shown] = (count + 1, first)

    def add_model(self, name: str, tags: Mapping[str, str]) -> None:
        """Take a registered model and its own tags."""
        for tag, value in self._near(tags):
            self._on_models.append(
                f"{tag}={value!r} on the registered model {one_line(name, _LONGEST)!r}, not a version"
            )

    def told(self) -> list[str]:
        """Return a text for each finding, the most frequent first."""
        most = sorted(self._on_versions.items(), key=lambda item: -item[1][0])
        found = [
            f"{tag}={value!r} on {count} version{'s' if count > 1 else ''}, such as {first}"
            for (tag, value), (count, first) in most
        ]
        return [*found, *self._on_models][:_MOST_TOLD]

    def _near(self, tags: Mapping[str, str]) -> list[tuple[str, str]]:
        return [
            (one_line(tag, _LONGEST), one_line(value, _LONGEST))
            for tag, value in tags.items()
            if value.strip().lower() not in _NO and self._is_like(tag)
        ]

    def _is_like(self, tag: str) -> bool:
        if tag not in self._like:
            if len(self._like) > _MOST_NAMES or abs(len(tag) - len(self._tag)) > len(self._tag):
                return False
            match = difflib.SequenceMatcher(None, tag.strip().lower(), self._tag.lower(), autojunk=False)
            self._like[tag] = match.quick_ratio() >= _LIKE and match.ratio() >= _LIKE
        return self._like[tag]
