"""What a package index says of a project's files: PEP 691's JSON, PEP 503's HTML, and pages that merely link wheels.

https://packaging.python.org/en/latest/specifications/simple-repository-api/ has both forms.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.utils import canonicalize_name, parse_sdist_filename
from packaging.version import Version

from builder.build.address import linked
from builder.build.wheel_name import parse_wheel_name

ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_JSON = "application/vnd.pypi.simple.v1+json"
# Of a file; a wheel's name of some kB can stand for billions of tags.
_LONGEST_NAME = 255
_SHA256 = re.compile(r"(?:^|&)sha256=([0-9a-fA-F]{64})(?:&|$)")


class NoPage(ValueError):
    """A page is not in a form that an index answers with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFile:
    """One file of a project, as an index lists it.

    Attributes:
        filename: its name.
        url: where it is; no credential.
        sha256: 64 hexadecimal digits; empty where the index does not say.
        size: in bytes; None where the index does not say.
        uploaded: when it was uploaded; None where the index does not say.
    """

    filename: str
    url: str
    sha256: str = ""
    size: int | None = None
    uploaded: datetime | None = None

    @property
    def release(self) -> tuple[str, Version] | None:
        """The project's normal name and the version, as the file's name has them; None where it has neither."""
        if len(self.filename) > _LONGEST_NAME:
            return None
        try:
            if self.filename.endswith(".whl"):
                return parse_wheel_name(self.filename)[:2]
            return parse_sdist_filename(self.filename)
        except ValueError:
            return None


def parse_page(content: bytes, media_type: str, url: str) -> tuple[IndexFile, ...]:
    """Return the files that a page lists, in its order; links that are not http are left out.

    Args:
        content: the page.
        media_type: of the answer, without parameters, lower-case.
        url: the page's own address, after redirects.

    Raises:
        NoPage: it is neither JSON of PEP 691 nor HTML.
    """
    if media_type in {_JSON, "application/json"}:
        return _from_json(content, url)
    if media_type in {"text/html", "application/vnd.pypi.simple.v1+html", "application/xhtml+xml"}:
        return _from_html(content.decode(errors="replace"), url)
    message = f"an answer of the type {media_type!r}"
    raise NoPage(message)


def _from_json(content: bytes, url: str) -> tuple[IndexFile, ...]:
    try:
        files = json.loads(content)["files"]
        found = [_from_entry(entry, url) for entry in files]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = "an answer that is not the JSON of PEP 691"
        raise NoPage(message) from error
    return tuple(file for file in found if file)


def _from_entry(entry: Any, url: str) -> IndexFile | None:  # JSON holds anything
    hashes, size, uploaded = entry.get("hashes") or {}, entry.get("size"), entry.get("upload-time")
    address = linked(url, entry["url"])
    if address is None:
        return None
    digest = str(hashes.get("sha256", "")).lower()
    return IndexFile(
        filename=str(entry["filename"]),
        url=address,
        sha256=digest if re.fullmatch(r"[0-9a-f]{64}", digest) else "",
        size=size if isinstance(size, int) and size >= 0 else None,
        uploaded=_moment(uploaded) if isinstance(uploaded, str) else None,
    )


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class _Links(HTMLParser):
    """Collects the links of a page, and the base that they are relative to."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.base = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if href and tag == "base" and not self.base:
            self.base = href
        elif href and tag == "a":
            self.links.append(href)


def _from_html(text: str, url: str) -> tuple[IndexFile, ...]:
    parser = _Links()
    parser.feed(text)
    base = (linked(url, parser.base) if parser.base else None) or url
    found = []
    for link in parser.links:
        address = linked(base, link)
        if address is None:
            continue
        digest = _SHA256.search(link.partition("#")[2])
        filename = unquote(urlsplit(address).path.rpartition("/")[2])
        found.append(IndexFile(filename=filename, url=address, sha256=digest[1].lower() if digest else ""))
    return tuple(found)


def of_project(files: tuple[IndexFile, ...], project: str) -> tuple[IndexFile, ...]:
    """Return the files whose names are of a project, by its normal name: a page may link those of several."""
    name = canonicalize_name(project)
    return tuple(file for file in files if (release := file.release) and release[0] == name)
