"""What a registry's answers mean: the one place where they become errors of ours.

Error codes are the distribution specification's: https://github.com/opencontainers/distribution-spec, "Error Codes".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus

import httpx2

from builder.errors import BuilderError, InvalidSettings, PermissionRefused, ServiceUnavailable
from builder.masking import masked, one_line
from builder.oci.descriptor import Malformed, from_bytes

_ABSENT = frozenset({"MANIFEST_UNKNOWN", "NAME_UNKNOWN", "NOT_FOUND"})
# The registry of the distribution project tells errno alone: ENOSPC.
_DISK = ("'err': 28", "no space left", "disk quota", "insufficient storage", "disk full", "storage quota")
_MOST_TOLD = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer to a request.

    Attributes:
        status: HTTP's status.
        headers: its headers.
        content: its body.
        url: what was asked, after redirects; never shown, since a query may be signed.
        method: of the request.
    """

    status: int
    headers: httpx2.Headers = field(repr=False)
    content: bytes = field(repr=False)
    url: httpx2.URL = field(repr=False)
    method: str

    @property
    def host(self) -> str:
        """The host, with its port, that answered."""
        return self.url.netloc.decode("ascii", "replace").rpartition("@")[2]

    @property
    def media_type(self) -> str:
        """The media type of the body, without parameters, lower-case."""
        return str(self.headers.get("Content-Type", "")).partition(";")[0].strip().lower()

    @property
    def is_page(self) -> bool:
        """Whether it is a web page, which no registry answers with."""
        return self.media_type in {"text/html", "application/xhtml+xml"}

    def errors(self) -> tuple[tuple[str, str], ...]:
        """Return the errors in the body, each as code and message; none where it is not the specification's form."""
        try:
            entries = from_bytes(self.content).get("errors")
        except Malformed:
            return ()
        if not isinstance(entries, list):
            return ()
        return tuple(
            (str(entry.get("code", "")).upper(), " ".join(str(entry[k]) for k in ("message", "detail") if entry.get(k)))
            for entry in entries
            if isinstance(entry, dict)
        )

    @property
    def codes(self) -> frozenset[str]:
        """The error codes in the body."""
        return frozenset(code for code, _ in self.errors())

    @property
    def reason(self) -> str:
        """The status, and what the registry says about it, on one line that people may see."""
        return told(self)

    def error(self, what: str) -> BuilderError:
        """Return the error that the answer to a request for reading stands for; see `refusal`."""
        return refusal(what, self)

    @property
    def says_absent(self) -> bool:
        """Whether a registry says, and not something in front of it, that what was asked for is not there."""
        api = self.headers.get("Docker-Distribution-Api-Version", "").startswith("registry/2")
        return self.status == HTTPStatus.NOT_FOUND and not self.is_page and (bool(self.codes & _ABSENT) or api)


def told(answer: Answer) -> str:
    """Return the status of an answer, and the beginning of what the registry says about it, on one line."""
    line = one_line(masked(_said(answer)), _MOST_TOLD)
    return f"{answer.status} ({line})" if line else str(answer.status)


def _said(answer: Answer) -> str:
    """Return all that the registry says about an answer: the reason may stand behind a long path of its own."""
    said = "; ".join(f"{code} {message}".strip() for code, message in answer.errors())
    if not said and answer.is_page:
        return "a web page"
    if not said and answer.media_type.startswith(("text/", "application/json")):
        return answer.content[:_MOST_TOLD].decode("utf-8", "replace")
    return said


def refusal(what: str, answer: Answer, *, repository: str = "", credential: bool = False) -> BuilderError:
    """Return the error that an answer stands for.

    Args:
        what: what failed and on what, the beginning of a sentence: "Pushing to quay.io/domino/x".
        answer: an answer that is not what was hoped for.
        repository: where something was to be written; empty where something was read.
        credential: whether a credential was used.
    """
    # After a redirect, or from a token server, it is not the host that `what` names.
    by = "" if answer.host in what else f" by {answer.host}"
    message = f"{what} was answered {told(answer)}{by}."
    error, remedy = _denial(answer, credential=credential) or _obstacle(answer, repository)
    return error(message, remedy=remedy)


def _denial(answer: Answer, *, credential: bool) -> tuple[type[BuilderError], str] | None:
    """Return what to raise and to do where the registry understood and will not; None where that is not so."""
    if answer.status == HTTPStatus.UNAUTHORIZED or "UNAUTHORIZED" in answer.codes:
        if credential:
            return PermissionRefused, "The credential is not accepted for this: see that it is right, and what it may."
        return PermissionRefused, "Set REGISTRY_USER and REGISTRY_TOKEN, or DOCKER_CONFIG with an entry for the host."
    if answer.status == HTTPStatus.FORBIDDEN or "DENIED" in answer.codes:
        return PermissionRefused, "Give the credential the right to do this, or use another one."
    if answer.status == HTTPStatus.METHOD_NOT_ALLOWED or "UNSUPPORTED" in answer.codes:
        remedy = "The registry is read-only, a mirror perhaps: name one in REGISTRY_URL that can be pushed to."
        return PermissionRefused, remedy
    return None


def _obstacle(answer: Answer, repository: str) -> tuple[type[BuilderError], str]:
    """Return what to raise and to do where the registry would if it could, or is none."""
    codes, status = answer.codes, answer.status
    if answer.is_page and status < HTTPStatus.INTERNAL_SERVER_ERROR:
        remedy = "That is no registry's answer: see that REGISTRY_URL names one, and no website or login page."
    elif repository and (status == HTTPStatus.NOT_FOUND or "NAME_UNKNOWN" in codes):
        remedy = (
            f"This registry (ECR, for one) does not create a repository by itself: create {repository}, "
            f"or name another REGISTRY_URL."
        )
        return InvalidSettings, remedy
    elif "NAME_INVALID" in codes:
        return InvalidSettings, "The registry does not take this repository's name: see REGISTRY_URL."
    elif status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return InvalidSettings, "Raise the limit of the registry or of the proxy before it."
    elif status == HTTPStatus.INSUFFICIENT_STORAGE or any(sign in _said(answer).lower() for sign in _DISK):
        remedy = "The registry's disk is full: make room there."
    elif status == HTTPStatus.TOO_MANY_REQUESTS:
        remedy = "The registry limits the rate of requests: try again later, or with a credential."
    elif status == HTTPStatus.NOT_FOUND:
        remedy = "It is not the registry itself that says so: see that this is a registry's host."
    elif HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        remedy = "That is a redirect that is not followed: see that REGISTRY_URL names the registry itself."
    else:
        remedy = "Try again later; the registry's log says more."
    return ServiceUnavailable, remedy


def unexpected(what: str, detail: str) -> ServiceUnavailable:
    """Return the error for an answer that is not what the specification says.

    Args:
        what: what failed and on what, the beginning of a sentence.
        detail: what is wrong with the answer.
    """
    return ServiceUnavailable(f"{what} was answered {detail}.", remedy="That is no registry's answer: ask who runs it.")
