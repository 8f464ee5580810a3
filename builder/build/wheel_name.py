"""A wheel's file name, taken apart within bounds: its tags are a product, which a short name can make huge."""

from __future__ import annotations

import re

from packaging.tags import Tag
from packaging.utils import BuildTag, InvalidWheelFilename, NormalizedName, parse_wheel_filename
from packaging.version import InvalidVersion, Version

# What a file system takes; what real wheels have is far below the second.
_LONGEST, _MOST_TAGS = 255, 1000
# Resolvers hold numbers in a machine's word, and Python reads none of more than 4,300 digits.
_NUMBER = re.compile(r"[0-9]{19}")


def parse_wheel_name(filename: str) -> tuple[NormalizedName, Version, BuildTag, frozenset[Tag]]:
    """Return name, version, build tag and tags of a wheel, as `packaging.utils.parse_wheel_filename` does.

    Raises:
        InvalidWheelFilename: it is no wheel's name, or one that no installer should have to read.
    """
    *_, python, abi, platform = ("", "", *filename.split("-"))
    tags = (python.count(".") + 1) * (abi.count(".") + 1) * (platform.count(".") + 1)
    if len(filename) > _LONGEST or tags > _MOST_TAGS or _NUMBER.search(filename):
        message = "Invalid wheel filename (too long, too many tags or too large a number)"
        raise InvalidWheelFilename(message)
    try:
        return parse_wheel_filename(filename)
    except InvalidVersion as error:
        message = "Invalid wheel filename (its version is none)"
        raise InvalidWheelFilename(message) from error
