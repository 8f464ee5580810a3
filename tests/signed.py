"""Requests to the listener, signed as MLflow signs them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import time
import uuid
from collections.abc import Mapping
from typing import Any

from tests.waiting import HANG


def signed(body: bytes, secret: str, *, identity: str = "", when: float | None = None) -> dict[str, str]:
    """Return the headers of a delivery as MLflow signs it."""
    identity = identity or str(uuid.uuid4())
    stamp = str(int(time.time() if when is None else when))
    whole = f"{identity}.{stamp}.".encode() + body
    signature = base64.b64encode(hmac.new(secret.encode(), whole, hashlib.sha256).digest()).decode()
    return {
        "X-MLflow-Delivery-Id": identity,
        "X-MLflow-Timestamp": stamp,
        "X-MLflow-Signature": f"v1,{signature}",
        "Content-Type": "application/json",
    }


def post(address: str, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, str]:
    """Send a request, and return the status and the text of the answer."""
    connection = http.client.HTTPConnection(address, timeout=HANG)
    try:
        connection.request("POST", path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def tag_set(name: str, version: str, key: str, value: str = "true") -> dict[str, Any]:
    """Return a delivery of MLflow's for a tag that was set."""
    data = {"name": name, "version": version, "key": key, "value": value}
    return {"entity": "model_version_tag", "action": "set", "timestamp": "2026-01-01T00:00:00+00:00", "data": data}
