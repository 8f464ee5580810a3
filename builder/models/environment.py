"""MLflow's client, requests and boto3 take their settings from `os.environ`; this is where ours are put there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from builder.models.domino import use_domino

if TYPE_CHECKING:
    from builder.settings import CatalogSettings

# MLflow's own defaults are seven retries of 120 seconds each: a server that is away would take minutes to be away.
# With these, a refused connection is reported after some 5 seconds, a server that never answers after 90.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # Progress is ours to show, and a publisher in a cluster reports to nobody.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # Its warnings quote what servers and authors wrote: they go the way of our own log, which shows nothing hidden.
    "MLFLOW_CONFIGURE_LOGGING": "false",
    # Standard output is for what a command has to say.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def quiet_client() -> None:
    """Set what MLflow's client should do by itself, unless the user has set it.

    Raises:
        InvalidSettings: as `domino.use_domino`.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    use_domino()


def export(settings: CatalogSettings) -> None:
    """Put into `os.environ` what MLflow's client, requests and boto3 read there.

    That is MLFLOW_TRACKING_URI; every MLFLOW_, AWS_, AZURE_ and DATABRICKS_ variable that the settings hold, from the
    environment or from SECRETS_DIR; Domino's two; SSL_CERT_FILE, also as REQUESTS_CA_BUNDLE and AWS_CA_BUNDLE unless
    they are set, since neither requests nor boto3 knows it by that name; and the proxies.
    """
    values = {name: secret.get_secret_value() for name, secret in settings.mlflow_variables.items()}
    values["MLFLOW_TRACKING_URI"] = settings.mlflow_tracking_uri
    values.update(settings.proxies)
    if settings.domino_user_api_key:
        values["DOMINO_USER_API_KEY"] = settings.domino_user_api_key.get_secret_value()
    if settings.domino_run_id:
        values["DOMINO_RUN_ID"] = settings.domino_run_id.get_secret_value()
    os.environ.update(values)
    if settings.ssl_cert_file:
        bundle = str(settings.ssl_cert_file)
        os.environ["SSL_CERT_FILE"] = bundle
        os.environ.setdefault("REQUESTS_CA_BUNDLE", bundle)
        os.environ.setdefault("AWS_CA_BUNDLE", bundle)
    quiet_client()
