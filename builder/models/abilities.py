"""What an MLflow server can do, and lets its client do; nothing is changed to find out."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING

from builder.errors import InvalidVersion
from builder.models.errors import answering

if TYPE_CHECKING:
    from builder.models import ModelVersion
    from builder.models.catalog import MlflowCatalog

_WEB = ("http://", "https://")
_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9A-Za-z.+-]{1,40}")
# No server takes it: it is too long, and has characters that a tag's name cannot have.
_NO_TAG = "?" * 300


def server_version(catalog: MlflowCatalog) -> str:
    """Return the release that the server names; empty where it names none, as hosted ones and proxies.

    Raises:
        BuilderError: it is away; see `answering`.
    """
    if not catalog.tracking_uri.startswith(_WEB):
        return ""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    with answering("ask for the server's version", server=catalog.server):
        answer = http_request(get_default_host_creds(catalog.tracking_uri), "/version", "GET")
    text = answer.text.strip() if answer.ok else ""
    return text if _VERSION.fullmatch(text) else ""


def filters_by_tag(catalog: MlflowCatalog, tag: str) -> bool:
    """Return whether the server searches by a tag's value in any case; if not, a sweep lists every version.

    Raises:
        BuilderError: it is away, or refuses the credential.
    """
    try:
        with answering(f"search versions by the tag {tag}", server=catalog.server):
            catalog.client.search_model_versions(filter_string=f"tags.`{tag}` ILIKE 'true'", max_results=1)
    except InvalidVersion:
        return False
    return True


def check_tagging(catalog: MlflowCatalog, version: ModelVersion) -> None:
    """See whether a version's tags may be written: an impossible name is refused as such, after the permission.

    Raises:
        PermissionRefused: the credential may not write them.
        BuilderError: the server is away, or the version is gone.
    """
    with suppress(InvalidVersion), answering(f"set a tag of {version}", server=catalog.server):
        catalog.client.set_model_version_tag(version.name, version.version, _NO_TAG, "")
