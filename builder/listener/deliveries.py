"""Signed requests: verified, taken once, and read. What MLflow delivers is filtered before any work is done for it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from builder.models import INPUT_TAGS, selects

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from builder.settings import ListenSettings

# `publish` was asked for by its tag, `look` after a change of a version that may carry it, `ended` when its Job has,
# `warm` before it has the tag.
Kind = Literal["publish", "look", "ended", "warm"]

# The headers of Standard Webhooks, and MLflow's names for them.
_HEADERS = {
    "webhook-id": "x-mlflow-delivery-id",
    "webhook-timestamp": "x-mlflow-timestamp",
    "webhook-signature": "x-mlflow-signature",
}
_LONGEST_ID = 256
# Seconds for which an id is remembered: a signature is valid for five minutes before and after its time.
_REMEMBERED = 660.0
_MOST_IDS = 100_000
# A version by which MLflow shows what it would deliver; a real one may be called the same.
_EXAMPLE, _EXAMPLE_TAG = ("example_model", "1"), ("example_key", "example_value")
_DEFAULT_WORKSPACE = "default"


class Refused(Exception):
    """A request that is answered with 4xx; the caller does not learn why.

    Args:
        status: the HTTP status.
        why: for the log.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


class Unsigned(Refused):
    """A request without a signature: a stranger's, or MLflow's for a webhook that was made without a secret."""


class Verifier:
    """Verifies signatures by Standard Webhooks, and takes each request once. Thread-safe.

    Args:
        secrets: those that are accepted, as text; empty if none is configured.
        clock: seconds that only grow.
    """

    def __init__(self, secrets: Sequence[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        from standardwebhooks.webhooks import Webhook

        # As bytes: a text would be taken for base64, and MLflow signs with the secret as it is.
        self._webhooks = [Webhook(secret.encode()) for secret in secrets]
        self._clock = clock
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether any secret is configured."""
        return bool(self._webhooks)

    def verify(self, headers: Mapping[str, str], body: bytes) -> str:
        """Return the id of a request whose signature is right and that was not taken before; it is taken now.

        Args:
            headers: the request's, by lower-case names.
            body: the request's.

        Raises:
            Refused: 401 for a signature that is missing, wrong or out of date, 409 for an id that was taken.
        """
        standard = signature_of(headers)
        identity = standard["webhook-id"]
        if not any(self._is_signed(webhook, standard, body) for webhook in self._webhooks):
            raise Refused(401, "its signature is wrong, or older than five minutes")
        if not self._take(identity):
            raise Refused(409, "it was taken before")
        return identity

    def release(self, identity: str) -> None:
        """Forget an id: its request could not be served, and is to be sent again."""
        with self._lock:
            self._seen.pop(identity, None)

    @staticmethod
    def _is_signed(webhook: Any, headers: Mapping[str, str], body: bytes) -> bool:
        from standardwebhooks.webhooks import WebhookVerificationError

        try:
            webhook.verify(body, dict(headers), json_parse=False)
        except (WebhookVerificationError, ValueError, OverflowError, OSError):
            # Signatures that are no base64, times that are no numbers or in no calendar, bodies that are no text.
            return False
        return True

    def _take(self, identity: str) -> bool:
        now = self._clock()
        with self._lock:
            while self._seen and (len(self._seen) >= _MOST_IDS or next(iter(self._seen.values())) < now - _REMEMBERED):
                self._seen.popitem(last=False)
            if identity in self._seen:
                return False
            self._seen[identity] = now
            return True


def signature_of(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of a signature, under the names of Standard Webhooks.

    Raises:
        Unsigned: one is missing, or is no such header's.
    """
    found = {name: headers.get(name) or headers.get(other) or "" for name, other in _HEADERS.items()}
    if not all(found.values()) or len(found["webhook-id"]) > _LONGEST_ID:
        raise Unsigned(401, "it is not signed")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that may have to be done for a version.

    Attributes:
        kind: what.
        name: the registered model.
        version: its number.
        again: whether somebody has just asked for it: it is tried although it has failed before.
    """

    kind: Kind
    name: str
    version: str
    again: bool = field(default=False)

    @property
    def key(self) -> tuple[bool, str, str]:
        """What is done once however many events ask for it."""
        return self.kind == "warm", self.name, self.version


# MLflow's own bound is 256 characters.
Name = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Number = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]


class _Data(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    name: Name
    version: Number
    key: str = ""
    value: str | None = None
    tags: dict[str, str | None] | None = None


class _Delivery(BaseModel):
    entity: str
    action: str
    data: dict[str, Any]
    workspace: str | None = None


def event_of(settings: ListenSettings, body: bytes) -> Event | None:
    """Return what a delivery of MLflow's asks for; None if nothing is to be done.

    Nine of ten deliveries are about the publisher's own tags, so that nothing is looked up here.

    Args:
        settings: the target tag, the workspace, and WARM_ON_CREATE.
        body: the delivery's.

    Raises:
        Refused: 400 for what MLflow does not send.
    """
    try:
        delivery = _Delivery.model_validate_json(body)
        if delivery.workspace and delivery.workspace != _workspace(settings):
            return None
        what = (delivery.entity, delivery.action)
        if what not in {("model_version_tag", "set"), ("model_version", "created")}:
            return None
        data = _Data.model_validate(delivery.data)
    except ValidationError as error:
        raise Refused(400, f"it is malformed: {error.errors()[0]['type']}") from error
    tags = (data.tags or {}).items() if what[0] == "model_version" else [(data.key, data.value)]
    if (data.name, data.version) == _EXAMPLE and list(tags) == [_EXAMPLE_TAG]:
        return None
    if what[0] == "model_version_tag":
        return _of_tag(settings, data)
    if selects((data.tags or {}).get(settings.target_tag) or ""):
        return Event(kind="publish", name=data.name, version=data.version)
    return Event(kind="warm", name=data.name, version=data.version) if settings.warm_on_create else None


def _of_tag(settings: ListenSettings, data: _Data) -> Event | None:
    if data.key == settings.target_tag:
        selected = selects(data.value or "")
        return Event(kind="publish", name=data.name, version=data.version, again=True) if selected else None
    # A selected version that gets another entry point is another source.
    return Event(kind="look", name=data.name, version=data.version) if data.key in INPUT_TAGS else None


def _workspace(settings: ListenSettings) -> str:
    named = settings.mlflow_variables.get("MLFLOW_WORKSPACE")
    return named.get_secret_value() if named else _DEFAULT_WORKSPACE
