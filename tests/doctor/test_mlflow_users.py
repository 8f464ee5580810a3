"""An MLflow server with its own sign-in: who may see and make webhooks, and that it delivers."""

from __future__ import annotations

import json

import httpx2
import pytest
from mlflow import MlflowClient

from tests.listener.test_deliveries import WEBHOOKS_HERE, receiving
from tests.models.test_webhooks import SECRET, builder
from tests.servers.mlflow import run_mlflow
from tests.waiting import HANG

ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "the admin's of the tests"}
AUTHOR = {"MLFLOW_TRACKING_USERNAME": "ana", "MLFLOW_TRACKING_PASSWORD": "the author's of the tests"}
STRANGER = {**AUTHOR, "MLFLOW_TRACKING_PASSWORD": "a guess"}


@pytest.fixture(scope="module")
def guarded(launcher, tmp_path_factory):
    """An MLflow server with users: an administrator and an author."""
    folder = tmp_path_factory.mktemp("mlflow-users")
    options = ("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--app-name", "basic-auth")
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"database_uri = sqlite:///{folder}/users.db\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environ = {
        **WEBHOOKS_HERE,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN["MLFLOW_TRACKING_PASSWORD"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-the-tests",
    }
    with run_mlflow(launcher, folder, *options, artifacts=str(folder), environ=environ) as server:
        user = {"username": AUTHOR["MLFLOW_TRACKING_USERNAME"], "password": AUTHOR["MLFLOW_TRACKING_PASSWORD"]}
        url = f"{server.uri}/api/2.0/mlflow/users/create"
        httpx2.post(url, json=user, auth=tuple(ADMIN.values()), timeout=HANG).raise_for_status()
        yield server


def sign_in(monkeypatch, user):
    """Be a user, for MLflow's client in this process."""
    for name, value in user.items():
        monkeypatch.setenv(name, value)


def test_an_administrator_makes_a_webhook_and_what_others_do_is_delivered(guarded, monkeypatch):
    with receiving() as receiver:
        code, identity, said = builder(guarded, "create", f"http://127.0.0.1:{receiver.server_address[1]}", **ADMIN)
        assert code == 0, said
        sign_in(monkeypatch, AUTHOR)
        client = MlflowClient(guarded.uri)
        client.create_registered_model("pump")
        client.create_model_version("pump", "s3://nowhere/pump", tags={"MODEL_FOLDER": "here"})
        told = json.loads(receiver.next().body)
        assert (told["entity"], told["data"]["name"]) == ("model_version", "pump")
        assert builder(guarded, "delete", identity.strip(), **ADMIN)[0] == 0


@pytest.mark.parametrize(
    ("user", "words"),
    [(AUTHOR, "only an administrator of MLflow may"), (STRANGER, "Check the credential for MLFLOW_TRACKING_URI")],
    ids=["author", "stranger"],
)
def test_others_make_no_webhooks_and_are_told_who_may(guarded, user, words):
    for arguments in ("create", "https://192.0.2.7"), ("list",):
        code, _, said = builder(guarded, *arguments, **user)
        assert code == 77, said
        assert words in said
        assert ("administrator" in said) == (user is AUTHOR)


def test_doctor_does_not_blame_the_account_of_a_sweep_for_what_only_an_administrator_sees(
    guarded, look, environ, monkeypatch
):
    environ["MLFLOW_TRACKING_URI"] = guarded.uri
    sign_in(monkeypatch, AUTHOR)
    for changes in {"WEBHOOK_SECRET": SECRET}, {"LISTENER_URL": "https://192.0.2.7"}, {}:
        found = look("webhook", **changes)
        assert (found.state, found.exit_code) == ("skipped", 0), found
        assert "only an administrator of MLflow sees them" in found.found
        assert "as an administrator" in found.remedy
    sign_in(monkeypatch, ADMIN)
    found = look("webhook", LISTENER_URL="https://192.0.2.7")
    assert (found.state, found.exit_code) == ("fail", 78), found
