"""The uv.toml that RUN steps see, where uv's index variables are set."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from builder.build.engine import Network

# UV_INDEX may give an index a name, as in `name=https://…`.
_NAMED = re.compile(r"^[A-Za-z0-9._-]+=(?=[a-z]+://)")


def uv_config(network: Network) -> str:
    """Return the text of a uv.toml that names the indexes of the environment; empty where none is set.

    uv reads `/etc/uv/uv.toml` (https://docs.astral.sh/uv/concepts/configuration-files/). It has no setting for a CA
    bundle but the system's own certificates, which it is told to use.
    """
    variables = network.index_variables
    default = variables.get("UV_DEFAULT_INDEX") or variables.get("UV_INDEX_URL") or ""
    extra = [url for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL") for url in variables.get(name, "").split()]
    lines = []
    if default:
        lines.append(f"index-url = {json.dumps(_NAMED.sub('', default))}")
    if extra:
        lines.append(f"extra-index-url = {json.dumps([_NAMED.sub('', url) for url in extra])}")
    return "\n".join([*lines, "native-tls = true", ""]) if lines else ""
