"""What pip and uv read of ours: one writer for each format, which refuses a value that it cannot write in one way only.

What a model's author or a setting wrote was parsed and checked before. The writers check once more, by the grammar of
the file that is written, so that a hole before them is an error and no option, variable or line of an author's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from builder.build.requirement import NAME, Required
from builder.errors import Defect

# pip and uv split a line at blanks, take quotes and backslashes from it, cut it at ` #`, and put in `${VARIABLE}`. `%`
# is part of an encoded character and of nothing else.
_WORD = re.compile(r"(?:[A-Za-z0-9._~+,=:@!*()/?&\[\]-]|%[0-9A-Fa-f]{2})+")
_OPTION = re.compile(r"--[a-z]+(?:-[a-z]+)*")
_SPECIFIER = re.compile(r"(?:(?:===?|[~!<>]=|[<>])[A-Za-z0-9.!+*_-]+(?:,(?!$)|$))*")
_LOCATION = re.compile(r"file:///(?:[A-Za-z0-9._~/-]|%[0-9A-F]{2})+\.whl")
_REQUIREMENTS = "a requirements file"
_KEY = re.compile(r"[a-z]+(?:-[a-z]+)*")
_STRING = re.compile(r"[ -~]*")


def option_line(option: str, value: str = "") -> str:
    """Return a line of a requirements file that holds one option.

    Args:
        option: its long name.
        value: one word; empty for none.

    Raises:
        Defect: pip could read it as something else.
    """
    plain = not value or (not value.startswith("-") and _WORD.fullmatch(value))
    _require(_OPTION.fullmatch(option) and plain, _REQUIREMENTS)
    return f"{option} {value}".strip()


def requirement_line(required: Required, location: str = "") -> str:
    """Return a line of a requirements file that asks for a package: by its versions, or by a wheel on this machine.

    It has no marker and no address: markers are evaluated before, and what is at an address is fetched before.

    Args:
        required: the requirement.
        location: the `file:` URL of its wheel; empty where an index has it.

    Raises:
        Defect: a resolver could read it as something else, or would have to go to an address.
    """
    _require(all(NAME.fullmatch(name) for name in (required.name, *required.extras)), _REQUIREMENTS)
    if location:
        _require(_LOCATION.fullmatch(location), _REQUIREMENTS)
    else:
        _require(not required.url and not required.path and _SPECIFIER.fullmatch(required.specifier), _REQUIREMENTS)
    extras = f"[{','.join(required.extras)}]" if required.extras else ""
    return f"{required.name}{extras}{f' @ {location}' if location else required.specifier}"


def lines_of(lines: Iterable[str]) -> str:
    """Return the text of a requirements file with these lines."""
    return "".join(f"{line}\n" for line in lines)


def toml_of(
    values: Mapping[str, bool | str | Sequence[str]], tables: Iterable[tuple[str, Mapping[str, bool | str]]]
) -> str:
    """Return the text of a TOML file.

    Args:
        values: what stands at the top.
        tables: name and values of each element of an array of tables, in order.

    Raises:
        Defect: a value is not printable ASCII.
    """
    lines = [f"{_key(key)} = {_toml(value)}" for key, value in values.items()]
    for name, table in tables:
        lines += [f"[[{_key(name)}]]", *(f"{_key(key)} = {_toml(value)}" for key, value in table.items())]
    return lines_of(lines)


def _key(text: str) -> str:
    _require(_KEY.fullmatch(text), "a TOML file")
    return text


def _toml(value: bool | str | Sequence[str]) -> str:
    strings = [] if isinstance(value, bool) else [value] if isinstance(value, str) else value
    _require(all(_STRING.fullmatch(text) for text in strings), "a TOML file")
    # Of printable ASCII, JSON's booleans, strings and lists are TOML's (https://toml.io/en/v1.0.0#string).
    return json.dumps(value if isinstance(value, (bool, str)) else list(value))


def _require(holds: object, where: str) -> None:
    """Raise Defect unless a value is plain. It is not shown: it may hold a credential, or what an author wants read."""
    if not holds:
        message = f"A value cannot be written into {where} in such a way that it is read in one way only."
        raise Defect(message, remedy="Please report it with the model's requirements.")
