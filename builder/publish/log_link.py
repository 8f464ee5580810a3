"""The address of a publish's log, as LOG_URL has it."""

from __future__ import annotations

import platform
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from builder.models import ModelVersion
    from builder.settings import Settings

# What the Job controller adds to a Job's name for a Pod of it.
_POD = re.compile(r"(?P<job>.+)-[a-z0-9]{5}")


def log_link(settings: Settings, version: ModelVersion, *, host: str = "") -> str:
    """Return the address of the log of an attempt at a version that begins now; empty where there is none.

    A pattern that names the Pod or its Job gives no address outside a Pod.

    Args:
        settings: LOG_URL is used, and whether this is a Pod.
        version: the version.
        host: the name of the machine; empty for this one's.
    """
    # A Pod's host name is its name, and neither is longer than 63 characters.
    pod = (host or platform.node()) if settings.in_pod else ""
    of_job = _POD.fullmatch(pod)
    values = {
        "model": version.name,
        "version": version.version,
        "target": settings.target,
        "pod": pod,
        "job": of_job["job"] if of_job else "",
        "attempt": settings.attempt_id,
        "started": datetime.now(tz=UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    pattern = settings.log_url
    if any(f"{{{name}}}" in pattern and not values[name] for name in ("pod", "job")):
        return ""
    return pattern.format_map({name: quote(value, safe="") for name, value in values.items()})
