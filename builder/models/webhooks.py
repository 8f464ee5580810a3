"""Webhooks that MLflow's server keeps: registered, listed, tried and deleted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from builder.errors import (
    BuilderError,
    InvalidSettings,
    PermissionRefused,
    ServiceUnavailable,
    UsageError,
    VersionNotFound,
)
from builder.masking import one_line
from builder.models.errors import answering

if TYPE_CHECKING:
    from collections.abc import Sequence

    from builder.models.catalog import MlflowCatalog

# A tag that is set on a version, and a version that is registered with it.
EVENTS = ("model_version_tag.set", "model_version.created")
_PAGE = 100
_MOST_NAMED = 5
# What MLflow's server says, and the setting of it that allows it.
_SCHEMES = (
    "MLflow delivers to https addresses only. Give the listener a certificate that the MLflow server trusts "
    "(LISTEN_CERTIFICATE), or set MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https on the MLflow server."
)
_PRIVATE = (
    "MLflow delivers to public addresses only. Set MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true on the MLflow server; then "
    "everybody who may register a webhook there can have it call any address that the server reaches."
)
_UNKNOWN = "The MLflow server does not know this host name. Use one that its DNS resolves."
_REFUSALS = {"Invalid webhook URL scheme": _SCHEMES, "non-public IP": _PRIVATE, "Cannot resolve": _UNKNOWN}
# MLflow's session for deliveries reads no environment (trust_env), so that certifi's file alone counts.
_DISTRUSTED = (
    "The MLflow server does not trust the listener's certificate. Add the authority that signed it to certifi's file "
    'where the MLflow server runs (cat ca.pem >> "$(python -m certifi)"), and restart the server. '
    "REQUESTS_CA_BUNDLE and SSL_CERT_FILE are ignored for webhooks."
)
_MISNAMED = (
    "The listener's certificate is for another name than this address. Create the webhook with the name in the "
    "certificate, or give the listener a certificate for this one."
)
_EXPIRED = "The listener's certificate has expired. Replace it, and restart the listener."
# What OpenSSL says of a certificate; the last one is in all of them.
_CERTIFICATES = {"mismatch, certificate": _MISNAMED, "has expired": _EXPIRED, "CERTIFICATE_VERIFY_FAILED": _DISTRUSTED}
_NOT_REACHED = "Check that the MLflow server reaches this address, and that the listener runs there."
_REMEDIES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: (
        "The listener has another WEBHOOK_SECRET, the webhook has none, or the clocks differ by five minutes. Give "
        "both the same, or delete the webhook and create it again."
    ),
    HTTPStatus.NOT_FOUND: "The listener has no WEBHOOK_SECRET, or this is not the address of a listener.",
}
_KEY = (
    "A server that was restarted, or has several workers, can read its secrets only with a key that stays the same: "
    "set MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY on it (a Fernet key), then delete the webhook and create it again. A "
    "server that keeps its models in files, without a database, has no webhooks."
)
# Words of urllib3 where there is no server.
_NO_SERVER = ("NewConnectionError", "NameResolutionError")
_ADMINISTRATOR = "Where MLflow's own sign-in is on, only an administrator of MLflow may see, make and delete webhooks."


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """A webhook as MLflow's server keeps it.

    Attributes:
        id: MLflow's.
        name: for people.
        url: where it delivers to.
        events: what it delivers, such as `model_version_tag.set`.
        active: whether it delivers.
    """

    id: str
    name: str
    url: str
    events: tuple[str, ...]
    active: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What became of a test delivery.

    Attributes:
        delivered: whether the receiver took it.
        status: the receiver's HTTP status; 0 if there was no answer.
        detail: what it answered, or why it could not be reached.
        remedy: what to do if it was not taken.
    """

    delivered: bool
    status: int
    detail: str
    remedy: str


def address_of(url: str) -> str:
    """Return where MLflow delivers to, for the address of a listener; one with a path is taken as it is.

    Raises:
        UsageError: it is no address of a web server.
    """
    try:
        split = urlsplit(url)
        there = bool(split.hostname) and split.scheme in {"http", "https"} and not (split.query or split.fragment)
    except ValueError:
        there = False
    if not there:
        message = f"{one_line(url, 200)!r} is not the address of a listener."
        raise UsageError(message, remedy="Give one such as https://builder.example.com.")
    return url if split.path.strip("/") else f"{url.rstrip('/')}/webhook"


class Webhooks:
    """The webhooks of a catalog's server.

    Args:
        catalog: the model registry.
    """

    def __init__(self, catalog: MlflowCatalog) -> None:
        self._catalog = catalog

    def create(self, name: str, url: str, secret: str, *, events: Sequence[str] = EVENTS) -> Webhook:
        """Register a webhook.

        Args:
            name: for people.
            url: where MLflow delivers to.
            secret: signs each delivery.
            events: what is delivered.

        Raises:
            InvalidSettings: MLflow's server refuses the address, or knows no webhooks.
            BuilderError: the server is away, or does not allow it.
        """
        if there := [each for each in self.all() if each.url == url]:
            message = f"There is a webhook to {url} already: {there[0].id}."
            raise InvalidSettings(message, remedy=f"Delete it first: builder webhook delete {there[0].id}.")
        try:
            with self._answering(f"register the webhook {name!r}"):
                made = self._client.create_webhook(name=name, url=url, events=list(events), secret=secret)
        except BuilderError as error:
            remedy = next((remedy for words, remedy in _REFUSALS.items() if words in error.what), "")
            if remedy:
                raise InvalidSettings(error.what, remedy=remedy) from error
            raise
        return _webhook(made)

    def all(self) -> Iterator[Webhook]:
        """Yield every webhook of the server."""
        token: str | None = None
        while True:
            with self._answering("list webhooks"):
                page = self._client.list_webhooks(max_results=_PAGE, page_token=token)
            yield from map(_webhook, page)
            token = page.token
            if not token:
                return

    def find(self, id: str) -> Webhook:  # noqa: A002 - MLflow's word
        """Return a webhook.

        Args:
            id: MLflow's, or the name of a single one.

        Raises:
            VersionNotFound: there is no such webhook, or several have that name.
        """
        there = list(self.all())
        found = [each for each in there if each.id == id] or [each for each in there if each.name == id]
        if len(found) == 1:
            return found[0]
        known = ", ".join(f"{one_line(each.name, 60)} ({each.id})" for each in there[:_MOST_NAMED]) or "no webhook"
        message = f"{len(found) or 'No'} webhooks are called {one_line(id, 100)!r}; the server has {known}."
        raise VersionNotFound(message, remedy="Give the id: builder webhook list.")

    def test(self, id: str, event: str = EVENTS[0]) -> Delivery:  # noqa: A002 - MLflow's word
        """Have the server deliver an example, and return what became of it.

        Args:
            id: MLflow's.
            event: of which an example is delivered.
        """
        with self._answering(f"test the webhook {id}"):
            found = self._client.test_webhook(id, event)
        detail = str(found.error_message or found.response_body or "")
        status = int(found.response_status or 0)
        remedies = (remedy for words, remedy in (_REFUSALS | _CERTIFICATES).items() if words in detail)
        remedy = _REMEDIES.get(status) or next(remedies, _NOT_REACHED)
        return Delivery(delivered=bool(found.success), status=status, detail=detail, remedy=remedy)

    def delete(self, id: str) -> None:  # noqa: A002 - MLflow's word
        """Delete a webhook.

        Args:
            id: MLflow's.
        """
        with self._answering(f"delete the webhook {id}"):
            self._client.delete_webhook(id)

    @property
    def _client(self) -> Any:  # mlflow.MlflowClient
        client = self._catalog.client
        if not hasattr(client, "create_webhook"):
            message = "This MLflow client knows no webhooks."
            raise InvalidSettings(message, remedy="Install MLflow 3.3 or newer, here and on the server.")
        return client

    def _answering(self, what: str) -> AbstractContextManager[None]:
        return _answering(what, self._catalog.server)


@contextmanager
def _answering(what: str, server: str) -> Iterator[None]:
    """Turn the errors of MLflow's client into ours, with what they mean for webhooks."""
    try:
        with answering(what, server=server):
            yield
    except PermissionRefused as error:
        if "error code 403" in error.what:
            raise PermissionRefused(error.what, remedy=f"{error.remedy} {_ADMINISTRATOR}") from error
        raise
    except ServiceUnavailable as error:
        if any(words in error.what for words in _NO_SERVER):
            raise
        if "error code 404" in error.what:
            message = f"{error.what} The server may be older than MLflow 3.3, or keep its models in files."
            raise InvalidSettings(message, remedy="Use MLflow 3.3 or newer, with a database.") from error
        raise ServiceUnavailable(error.what, remedy=f"{error.remedy} {_KEY}") from error


def _webhook(found: Any) -> Webhook:
    return Webhook(
        id=str(found.webhook_id),
        name=str(found.name),
        url=str(found.url),
        events=tuple(str(event) for event in found.events),
        active=str(getattr(found.status, "value", found.status)).upper() == "ACTIVE",
    )
