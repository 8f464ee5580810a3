"""Webhook and listener: what makes a publish begin seconds after the tag."""

from __future__ import annotations

import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

from builder.doctor import Finding, ok, skipped, warn
from builder.errors import BuilderError, InvalidSettings, PermissionRefused, ServiceUnavailable
from builder.http import Client, Retry, ServerKind
from builder.masking import one_line
from builder.models.webhooks import EVENTS, Webhook, Webhooks, address_of

if TYPE_CHECKING:
    from builder.doctor.surroundings import Surroundings
    from builder.settings import DoctorSettings

_SWEEP = "The sweep publishes without one, at its next turn."
_CREATE = "Make one: builder webhook create URL."
_AGAIN = "Make it again: builder webhook delete ID, then builder webhook create URL."
_LISTENER = ServerKind(
    name="listener",
    unreachable="See whether its Pods run: kubectl -n builder get pods -l app.kubernetes.io/component=listener.",
    unexpected="Check LISTENER_URL.",
    plain="Write LISTENER_URL with http.",
)
_SECONDS = 10


def webhook(around: Surroundings) -> Finding:
    """See whether MLflow has a webhook that leads to the listener."""
    settings = around.settings
    wanted = address_of(settings.listener_url) if settings.listener_url else ""
    try:
        there = list(Webhooks(around.catalog).all())
    except PermissionRefused:
        what = f"MLflow does not show its webhooks to this user: only an administrator of MLflow sees them. {_SWEEP}"
        return skipped(what, "Run `builder webhook list` as an administrator.")
    except BuilderError as error:
        if wanted or settings.webhook_secret:
            raise
        return skipped(f"Webhooks are not seen: {error.what} {_SWEEP}", error.remedy)
    ours = [hook for hook in there if (hook.url == wanted if wanted else hook.url.endswith("/webhook"))]
    if ours:
        found = _judged(ours)
        if wanted or found.state != "ok":
            return found
        return warn(f"{found.found} LISTENER_URL is not set, so it may be another listener.", "Set LISTENER_URL.")
    if wanted or settings.webhook_secret:
        message = f"MLflow has no webhook to {_shown(wanted) if wanted else 'a listener (…/webhook)'}."
        raise InvalidSettings(message, remedy=_CREATE)
    return skipped(f"MLflow has no webhook to a listener. {_SWEEP}", _CREATE)


def _judged(hooks: Sequence[Webhook]) -> Finding:
    """Return what is wrong with webhooks that lead to the listener; one that is right is enough."""
    right = [hook for hook in hooks if hook.active and set(EVENTS) <= set(hook.events)]
    if right:
        return ok(f"MLflow delivers to {_shown(right[0].url)}. `builder webhook test {right[0].id}` tries it.")
    hook = next((each for each in hooks if each.active), hooks[0])
    if not hook.active:
        message = f"MLflow's webhook to {_shown(hook.url)} ({hook.id}) is disabled: nothing is delivered."
        raise InvalidSettings(message, remedy=_AGAIN)
    lacking = ", ".join(sorted(set(EVENTS) - set(hook.events)))
    what = f"MLflow's webhook to {_shown(hook.url)} ({hook.id}) does not deliver {lacking}."
    if "model_version_tag.set" in hook.events:
        return warn(f"{what} A version that is registered with its tag waits for the sweep.", _AGAIN)
    raise InvalidSettings(what, remedy=_AGAIN)


def _shown(url: str) -> str:
    return one_line(url, 200)


def listener(around: Surroundings) -> Finding:
    """See whether the listener answers, and takes deliveries: one that is not signed is refused without any work."""
    settings = around.settings
    if around.in_pod and not settings.listener_url:
        return _own_listener(settings)
    if not settings.listener_url:
        why = "LISTENER_URL is not set, so it is not known where a listener is."
        return skipped(why, "Set LISTENER_URL." if settings.webhook_secret else "")
    url = address_of(settings.listener_url)
    status = _status(settings, "POST", url)
    if status == HTTPStatus.UNAUTHORIZED:
        return ok(f"The listener at {_shown(url)} answers, and refuses what is not signed.")
    if status == HTTPStatus.NOT_FOUND:
        message = f"{_shown(url)} was answered 404: no listener is there, or it has no WEBHOOK_SECRET."
        raise InvalidSettings(message, remedy="Check LISTENER_URL, and the Secret builder-listener.")
    message = f"{_shown(url)} was answered {status}, as no listener does."
    raise ServiceUnavailable(message, remedy="Check LISTENER_URL, and what is between here and there.")


def _own_listener(settings: DoctorSettings) -> Finding:
    """See whether the listener of this Pod is ready, if this is the Pod of one."""
    try:
        status = _status(settings, "GET", f"http://127.0.0.1:{settings.metrics_port}/readyz")
    except ServiceUnavailable:
        return skipped("No listener is in this Pod, and LISTENER_URL is not set.")
    if status != HTTPStatus.OK:
        message = f"The listener of this Pod is not ready ({status})."
        raise ServiceUnavailable(message, remedy="Its log says why. It has to list Jobs before it is ready.")
    if not settings.webhook_secret:
        remedy = "Set it in the Secret builder-listener, as docs/kubernetes.md says, and restart the listener."
        return warn("The listener of this Pod is ready, and takes no deliveries: WEBHOOK_SECRET is not set.", remedy)
    return ok("The listener of this Pod is ready, and has WEBHOOK_SECRET.")


def _status(settings: DoctorSettings, method: str, url: str) -> int:
    """Return the status of the answer to an empty request.

    Raises:
        ServiceUnavailable: there was none.
    """
    with Client(_LISTENER, ca_bundle=settings.ssl_cert_file, proxies=settings.proxies) as client:
        try:
            body = b"" if method == "POST" else None
            with client.send(method, url, until=time.monotonic() + _SECONDS, body=body) as response:
                return response.status
        except Retry as failure:
            what = f"The listener at {_shown(url)}"
            raise failure.error(what) from failure.__cause__
