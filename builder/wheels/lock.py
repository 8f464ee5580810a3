"""A lock: the wheels of one environment on one platform, by name, version and hash, without addresses."""

from __future__ import annotations

import hashlib
import json
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import unquote, urlsplit

from packaging.utils import canonicalize_name
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from builder.errors import InvalidVersion
from builder.masking import one_line
from builder.package_index.wheel_file import LockedWheel
from builder.reference import Platform
from builder.wheels.requirements import Requirements

# Raised when the same inputs would give another lock.
LOCK_VERSION = 2
_CREATOR = "model-image-builder"
_MOST_BYTES = 4 << 20
_AsPlatform = Annotated[
    Platform, BeforeValidator(lambda v: Platform.parse(v) if isinstance(v, str) else v), PlainSerializer(str)
]


class Lock(BaseModel):
    """The wheels of an environment on one platform.

    Attributes:
        platform: what it is for.
        python: the interpreter, `3.11` or `3.11.2`.
        glibc: the C library that the wheels may need at most; None where the base's was not known.
        as_of: no wheel was uploaded after this; None for no such bound.
        exempt: names of packages whose index gives no upload times, so that `as_of` was not enforced for them.
        added: names of packages that come with the whole MLflow alone, and are here since the model's files name them.
        wheels: in the order of their names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    platform: _AsPlatform
    python: Annotated[str, Field(pattern=r"^3\.[0-9]{1,2}(?:\.[0-9]{1,3})?$")]
    glibc: tuple[int, int] | None = None
    as_of: datetime | None = None
    exempt: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    wheels: tuple[LockedWheel, ...] = ()

    @model_validator(mode="after")
    def _one_wheel_for_each_package(self) -> Self:
        names = [wheel.name for wheel in self.wheels]
        if names != sorted(set(names)) or not {*self.exempt, *self.added} <= set(names):
            message = "its packages are not one wheel each, in order"
            raise ValueError(message)
        return self

    @property
    def as_of_enforced(self) -> bool:
        """Whether `as_of` was enforced for every package of an index."""
        return self.as_of is not None and not self.exempt

    @property
    def versions(self) -> dict[str, str]:
        """The version of each package, by its name."""
        return {wheel.name: wheel.version for wheel in self.wheels}

    @property
    def note(self) -> str:
        """A sentence for logs and plans on packages that `as_of` was not enforced for; may be empty."""
        if self.as_of is None or not self.exempt:
            return ""
        return f"as of: not enforced for {', '.join(self.exempt)}, whose index gives no upload times"

    def to_text(self) -> str:
        """Return the lock as a pylock.toml (https://packaging.python.org/en/latest/specifications/pylock-toml/).

        It names each wheel by a path, which is its file name alone, so that an installer takes it from a folder that
        holds both. The same lock always gives the same text.
        """
        table = {
            "platform": str(self.platform),
            "python": self.python,
            "glibc": list(self.glibc) if self.glibc else None,
            "as-of": self.as_of,
            "as-of-not-enforced": list(self.exempt) or None,
            "added": list(self.added) or None,
        }
        minor = ".".join(self.python.split(".")[:2])
        lines = [
            'lock-version = "1.0"',
            f'requires-python = "=={minor}.*"',
            f'created-by = "{_CREATOR}"',
        ]
        for wheel in self.wheels:
            lines += ["", "[[packages]]", f'name = "{wheel.name}"', f'version = "{wheel.version}"']
            size = f"size = {wheel.size}, " if wheel.size is not None else ""
            file = f'path = "{wheel.filename}", {size}hashes = {{sha256 = "{wheel.sha256}"}}'
            lines += [f"archive = {{{file}}}" if wheel.origin != "index" else f"wheels = [{{{file}}}]"]
            if wheel.origin != "index":
                lines += [f'tool.{_CREATOR}.origin = "{wheel.origin}"']
        lines += ["", f"[tool.{_CREATOR}]", *(f"{key} = {_toml(value)}" for key, value in table.items() if value)]
        return "\n".join([*lines, ""])

    @classmethod
    def from_text(cls, text: str | bytes) -> Self:
        """Return the lock that `to_text` wrote.

        Raises:
            InvalidVersion: the text is not a valid lock.
        """
        try:
            decoded = text.decode() if isinstance(text, bytes) else text
            if len(decoded) > _MOST_BYTES:
                message = "it is too long"
                raise ValueError(message)  # noqa: TRY301  # one place says what a bad lock is
            document = tomllib.loads(decoded)
            table = document["tool"][_CREATOR]
            if document["lock-version"] != "1.0" or document["created-by"] != _CREATOR:
                message = "another program made it"
                raise ValueError(message)  # noqa: TRY301
            return cls(
                platform=table["platform"],
                python=table["python"],
                glibc=tuple(table["glibc"]) if "glibc" in table else None,
                as_of=table.get("as-of"),
                exempt=tuple(table.get("as-of-not-enforced", ())),
                added=tuple(table.get("added", ())),
                wheels=tuple(_from_table(package) for package in document.get("packages", [])),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidVersion) as error:
            why = one_line(error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error), 200)
            message = f"The cached lock is invalid: {why}."
            raise InvalidVersion(
                message, remedy="Remove it from the registry; the next publish makes a new one."
            ) from error

    def located(self, requirements: Requirements, model: Path) -> Self:
        """Return the lock with the addresses that the model's own requirements name; an index's are looked up later.

        Args:
            requirements: what the lock was made from.
            model: the model's folder.
        """
        places = {one.url.rpartition("/")[2]: one.url for one in requirements.required if one.url}
        places = {unquote(urlsplit(name).path): url for name, url in places.items()}
        local = {wheel.sha256: (model / wheel.path).absolute().as_uri() for wheel in requirements.local}
        found = {
            wheel.name: local.get(wheel.sha256) if wheel.origin == "model" else places.get(wheel.filename)
            for wheel in self.wheels
            if wheel.origin != "index"
        }
        wheels = (
            wheel.model_copy(update={"url": found[wheel.name]}) if wheel.name in found else wheel
            for wheel in self.wheels
        )
        return self.model_copy(update={"wheels": tuple(wheels)})


def _toml(value: Any) -> str:  # what `to_text` has in its table
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ") if isinstance(value, datetime) else json.dumps(value)


def _from_table(package: dict[str, Any]) -> LockedWheel:
    archive = package.get("archive")
    file = archive or package["wheels"][0]
    if not archive and len(package["wheels"]) != 1:
        message = "a package has more than one wheel"
        raise ValueError(message)
    if package["name"] != canonicalize_name(package["name"]):
        message = "a package's name is not in its normal form"
        raise ValueError(message)
    return LockedWheel(
        name=package["name"],
        version=package["version"],
        filename=file["path"],
        size=file.get("size"),
        sha256=file["hashes"]["sha256"],
        origin=package["tool"][_CREATOR]["origin"] if archive else "index",
    )


def rounded(as_of: datetime) -> datetime:
    """Return the beginning of a moment's day in UTC: what a resolution as of that moment is tried with first.

    docs/decisions/0031-as-of.md says why a day, and why its beginning.
    """
    return as_of.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def moments(as_of: datetime | None) -> tuple[datetime | None, ...]:
    """Return the moments as of which a resolution is tried, in order: the day's beginning, then the moment itself."""
    if as_of is None:
        return (None,)
    exact = as_of.astimezone(UTC)
    # The indexes' own times have microseconds; what a version's creation has below the second is noise.
    exact = exact.replace(microsecond=0) + timedelta(seconds=1 if exact.microsecond else 0)
    return tuple(dict.fromkeys((rounded(as_of), exact)))


def lock_keys(
    requirements: Requirements,
    *,
    platform: Platform,
    python: str,
    glibc: tuple[int, int] | None,
    indexes: str,
    as_of: datetime | None,
) -> tuple[str, ...]:
    """Return the names under which a lock for these inputs may be kept, in the order in which they count.

    The first is shared by all versions of one environment that were created on one day; the second, of the exact
    moment, holds the lock where the first could not be resolved. Look for both at once.

    Args:
        requirements: what is to be installed.
        platform: what for.
        python: the interpreter, `3.11` or `3.11.2`.
        glibc: the base's C library.
        indexes: `Indexes.identity`.
        as_of: the version's creation; None for today, whose locks are not shared.

    Returns:
        64 hexadecimal digits each; none where `as_of` is None.
    """
    return tuple(
        lock_key(requirements, platform=platform, python=python, glibc=glibc, indexes=indexes, as_of=moment)
        for moment in moments(as_of)
        if moment is not None
    )


def lock_key(
    requirements: Requirements,
    *,
    platform: Platform,
    python: str,
    glibc: tuple[int, int] | None,
    indexes: str,
    as_of: datetime,
) -> str:
    """Return the name under which a lock is kept: `as_of` is `Lock.as_of`, the moment it was resolved with."""
    what = [
        LOCK_VERSION,
        requirements.to_text(),
        requirements.serves,
        requirements.otherwise.to_text() if requirements.otherwise else None,
        str(platform),
        python,
        glibc,
        indexes,
        as_of.astimezone(UTC).isoformat(),
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
