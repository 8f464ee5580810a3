"""Write docs/settings.md from the settings themselves; with --check, compare it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from builder.settings import (
    BuildSettings,
    CatalogSettings,
    CommonSettings,
    HookSettings,
    ListenerAddress,
    ListenSettings,
    RemoteSettings,
    Settings,
    WebhookSettings,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """\
# Settings

<!-- Made by `python -m scripts.settings_table` from builder/settings.py; `make lint` compares it with the code. -->

Settings are environment variables, read once when a command starts. All missing and malformed ones are reported
together, with exit code 78. Each can come from a file of its name in SECRETS_DIR, such as a mounted Kubernetes
Secret; the environment wins. An empty variable counts as not set.

"""
GROUPS: tuple[tuple[str, type[CommonSettings], str], ...] = (
    ("What to publish, and where", Settings, "Read by `publish`, `plan`, `fetch`, `push`, `sweep` and `download`."),
    ("The listener", ListenSettings, "Read by `listen`, beside the others."),
    ("MLflow's webhook", WebhookSettings, "Read by `listen` and `webhook`."),
    ("Where the listener is", ListenerAddress, "Read by `doctor`, `submit --via`, `hook` and `domino`."),
    ("The listener's callers", RemoteSettings, "Read by `submit --via`, `hook` and `domino`."),
    ("Domino", HookSettings, "Read by `hook` and `domino`; Domino sets most of them in a run."),
    ("MLflow and the versions on it", CatalogSettings, "Read by the same commands, and by `register`."),
    ("How a Dockerfile is run", BuildSettings, "Read by `publish`, `sweep` and `build`."),
    ("Everywhere", CommonSettings, "Read by every command."),
)
TAIL = """\
## Passed on

| variable | to |
|---|---|
| `MLFLOW_…`, `AWS_…`, `AZURE_…`, `DATABRICKS_…`, `GOOGLE_APPLICATION_CREDENTIALS` | MLflow's client and the artifact store's, under their own names; from SECRETS_DIR too |
| `PIP_INDEX_URL`, `PIP_EXTRA_INDEX_URL`, `PIP_TRUSTED_HOST`, `UV_INDEX`, `UV_DEFAULT_INDEX`, `UV_INDEX_URL`, `UV_EXTRA_INDEX_URL` | RUN steps, as configuration files that are not in the image |
| `HTTP_PROXY`, `HTTPS_PROXY`, `NO_PROXY` (lower case too) | every connection, and RUN steps |
| `DOCKER_HOST`, `DOCKER_TLS_VERIFY`, `DOCKER_CERT_PATH` | Docker's client, for the smoke test |
| `NO_COLOR` | the log on a terminal |
"""  # noqa: E501 - a table's row is one line


def page() -> str:
    """Return the page's text."""
    parts = [HEAD]
    for title, kind, readers in GROUPS:
        inherited = {name for base in kind.__bases__ for name in getattr(base, "model_fields", {})}
        rows = [
            f"| `{field.validation_alias}` | {field.description} | {shown(field)} |"
            for name, field in kind.model_fields.items()
            if name not in inherited and field.validation_alias
        ]
        parts.append(f"## {title}\n\n{readers}\n\n| variable | meaning | default |\n|---|---|---|\n")
        parts.append("\n".join(rows) + "\n\n")
    return "".join([*parts, TAIL])


def shown(field: Any) -> str:
    """Return a setting's default as the table shows it."""
    extra = field.json_schema_extra or {}
    if extra.get("shown"):
        return str(extra["shown"])
    if field.is_required():
        return "required"
    if field.default is None or field.default == "" or isinstance(field.default, SecretStr):
        return "none"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default}`"


def main() -> int:
    """Write the page, or compare it."""
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text)
        return 0
    if PAGE.is_file() and PAGE.read_text() == text:
        return 0
    print("docs/settings.md is outdated. Run 'python -m scripts.settings_table'.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
