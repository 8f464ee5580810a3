"""Credentials of the clouds' registries by workload identity.

The clouds themselves cannot be reached from a test: small servers on this machine speak their documented protocols.
"""

from __future__ import annotations

import base64
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from builder.clients import Registries
from builder.errors import BuilderError, ExitCode, InvalidSettings, PermissionRefused, ServiceUnavailable
from builder.http import RetryPolicy
from builder.masking import masked
from builder.oci.authn import Credential, Credentials
from builder.oci.clouds import CloudIdentity
from builder.oci.transport import Authorizer
from builder.settings import Settings
from tests.oci.test_credentials import auth, config
from tests.servers.http_server import in_thread

ECR = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
ACR = "example.azurecr.io"
GAR = "europe-west1-docker.pkg.dev"
ROLE = "arn:aws:iam::123456789012:role/publisher"
JWT = "eyJ-the-token-of-the-service-account"
QUICK = RetryPolicy(attempts=2, sleep=lambda _seconds: None)


@dataclass
class Cloud:
    """A server; `answers` maps a path to a status and a body, `asked` has the requests."""

    url: str = ""
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str], dict[str, str]]] = field(default_factory=list)
    location: str = ""

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc


@contextmanager
def running():
    cloud = Cloud()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_args):
            pass

        def do_GET(self):
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            form = {name: values[0] for name, values in parse_qs(text).items()}
            path = self.headers.get("X-Amz-Target") or form.get("Action") or self.path
            cloud.asked.append((path, dict(self.headers), form))
            status, body = cloud.answers.get(path, (404, "{}"))
            self.send_response(status)
            if status in {302, 307}:
                self.send_header("Location", cloud.location)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    cloud.url = f"http://127.0.0.1:{server.server_address[1]}"
    with in_thread(server):
        yield cloud


@pytest.fixture
def cloud():
    with running() as one:
        yield one


@pytest.fixture
def token(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"{JWT}\n")
    return str(path)


STS = f"""<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIAEXAMPLE</AccessKeyId>
<SecretAccessKey>secret-access-key-of-the-role</SecretAccessKey><SessionToken>session-token-of-the-role</SessionToken>
<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials><AssumedRoleUser><Arn>{ROLE}</Arn>
<AssumedRoleId>x:y</AssumedRoleId></AssumedRoleUser></AssumeRoleWithWebIdentityResult>
<ResponseMetadata><RequestId>1</RequestId></ResponseMetadata></AssumeRoleWithWebIdentityResponse>"""
ECR_TOKEN = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"


def ecr_answer(password: str = "password-of-ecr") -> str:
    data = {
        "authorizationToken": base64.b64encode(f"AWS:{password}".encode()).decode(),
        "expiresAt": time.time() + 43200,
        "proxyEndpoint": f"https://{ECR}",
    }
    return json.dumps({"authorizationData": [data]})


def amazon(cloud: Cloud, token: str, **more: str) -> CloudIdentity:
    variables = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": token,
        "AWS_ROLE_ARN": ROLE,
        "AWS_ENDPOINT_URL_STS": cloud.url,
        "AWS_ENDPOINT_URL_ECR": cloud.url,
        **more,
    }
    return CloudIdentity(variables=variables, policy=QUICK)


def azure(cloud: Cloud, token: str) -> CloudIdentity:
    variables = {
        "AZURE_FEDERATED_TOKEN_FILE": token,
        "AZURE_CLIENT_ID": "client",
        "AZURE_TENANT_ID": "tenant",
        "AZURE_AUTHORITY_HOST": f"{cloud.url}/",
    }
    return CloudIdentity(variables=variables, policy=QUICK, origin=lambda host: f"{cloud.url}/{host}")


def google(cloud: Cloud) -> CloudIdentity:
    return CloudIdentity(variables={"GCE_METADATA_HOST": cloud.host}, policy=QUICK)


def test_amazon_gives_a_password_for_the_token_of_the_service_account(cloud, token):
    cloud.answers = {"AssumeRoleWithWebIdentity": (200, STS), ECR_TOKEN: (200, ecr_answer())}
    found = amazon(cloud, token).for_host(ECR)
    assert found
    assert (found.user, found.password) == ("AWS", "password-of-ecr")
    assert 11 * 3600 < found.ends - time.monotonic() < 12 * 3600
    (_, _, form), (_, headers, _) = cloud.asked
    assert (form["WebIdentityToken"], form["RoleArn"]) == (JWT, ROLE)
    assert "Credential=ASIAEXAMPLE/" in headers["Authorization"]
    assert "/eu-west-1/ecr/" in headers["Authorization"]
    assert headers["X-Amz-Security-Token"] == "session-token-of-the-role"
    for secret in (JWT, "secret-access-key-of-the-role", "session-token-of-the-role", "password-of-ecr"):
        assert secret not in masked(f"x {secret} y")


def test_the_keys_and_the_address_of_an_artifact_store_are_not_used_for_ecr(cloud, token, monkeypatch):
    cloud.answers = {"AssumeRoleWithWebIdentity": (200, STS), ECR_TOKEN: (200, ecr_answer())}
    with running() as store:
        for name, value in {
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": "store",
            "AWS_SECRET_ACCESS_KEY": "x",
        }.items():
            monkeypatch.setenv(name, value)
        assert amazon(cloud, token).for_host(ECR)
        assert store.asked == []
    assert all("Credential=store" not in headers.get("Authorization", "") for _, headers, _ in cloud.asked)


def test_amazon_gives_a_password_for_the_agent_on_the_node(cloud, tmp_path):
    keys = {"AccessKeyId": "ASIAAGENT", "SecretAccessKey": "s-of-the-agent", "Token": "t-of-the-agent"}
    cloud.answers = {
        "/v1/credentials": (200, json.dumps({**keys, "Expiration": "2099-01-01T00:00:00Z"})),
        ECR_TOKEN: (200, ecr_answer()),
    }
    (tmp_path / "agent").write_text("token-for-the-agent")
    identity = CloudIdentity(
        variables={
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{cloud.url}/v1/credentials",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(tmp_path / "agent"),
            "AWS_ENDPOINT_URL_ECR": cloud.url,
        },
        policy=QUICK,
    )
    found = identity.for_host(ECR)
    assert found
    assert found.password == "password-of-ecr"
    assert cloud.asked[0][1]["Authorization"] == "token-for-the-agent"
    assert "Credential=ASIAAGENT/" in cloud.asked[1][1]["Authorization"]


def test_azure_gives_a_refresh_token_for_the_token_of_the_service_account(cloud, token):
    exchange = f"/{ACR}/oauth2/exchange"
    cloud.answers = {
        "/tenant/oauth2/v2.0/token": (200, json.dumps({"access_token": "token-of-entra", "expires_in": 3599})),
        exchange: (200, json.dumps({"refresh_token": "refresh-token-of-acr"})),
    }
    found = azure(cloud, token).for_host(ACR)
    assert found
    assert (found.user, found.identity_token) == ("", "refresh-token-of-acr")
    (_, _, first), (path, _, second) = cloud.asked
    assert first == {
        "grant_type": "client_credentials",
        "client_id": "client",
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        "client_assertion": JWT,
        "scope": "https://containerregistry.azure.net/.default",
    }
    assert path == exchange
    assert second == {
        "grant_type": "access_token",
        "service": ACR,
        "tenant": "tenant",
        "access_token": "token-of-entra",
    }
    for secret in (JWT, "token-of-entra", "refresh-token-of-acr"):
        assert secret not in masked(f"x {secret} y")


GOOGLE_TOKEN = "/computeMetadata/v1/instance/service-accounts/default/token"


@pytest.mark.parametrize("host", [GAR, "gcr.io", "eu.gcr.io"])
def test_google_gives_a_token_of_the_metadata_server(cloud, host):
    cloud.answers = {GOOGLE_TOKEN: (200, json.dumps({"access_token": "ya29.token", "expires_in": 3000}))}
    found = google(cloud).for_host(host)
    assert found
    assert (found.user, found.password) == ("oauth2accesstoken", "ya29.token")
    assert 2600 < found.ends - time.monotonic() < 2701
    assert cloud.asked[0][1]["Metadata-Flavor"] == "Google"


@pytest.mark.parametrize(
    "host",
    [
        "quay.io",
        "public.ecr.aws",
        f"{ECR}.evil.example",
        f"{ECR}:5000",
        f"evil.{GAR}",
        "pkg.dev",
        "gcr.io.evil.example",
        f"{ACR}.evil.example",
        "azurecr.io",
        "127.0.0.1:5000",
    ],
)
def test_no_other_host_gets_a_credential_or_a_question_is_asked(cloud, token, host):
    variables = {**amazon(cloud, token).variables, **azure(cloud, token).variables, **google(cloud).variables}
    assert CloudIdentity(variables=variables).for_host(host) is None
    assert cloud.asked == []


@pytest.mark.parametrize("host", [ECR, ACR, GAR])
def test_nothing_is_asked_without_the_variables_of_an_identity(host):
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AZURE_CLIENT_ID": "z", "GCE_METADATA_HOST": ""}
    assert CloudIdentity(variables=keys).for_host(host) is None


def test_what_is_configured_comes_first(cloud, tmp_path):
    configured = Credentials(
        docker_config=config(tmp_path, {"auths": {GAR: auth("configured")}}), identity=google(cloud).for_host
    )
    found = configured.for_host(GAR)
    assert found
    assert found.user == "configured"
    explicit = Credentials(explicit=GAR, credential=Credential("explicit", "pw"), identity=google(cloud).for_host)
    assert explicit.for_host(GAR) == Credential("explicit", "pw")
    assert cloud.asked == []


DENIED = """<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>Not authorized</Message></Error>
<RequestId>1</RequestId></ErrorResponse>"""


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ({"AssumeRoleWithWebIdentity": (403, DENIED)}, PermissionRefused),
        (
            {"AssumeRoleWithWebIdentity": (200, STS), ECR_TOKEN: (400, '{"__type": "AccessDeniedException"}')},
            PermissionRefused,
        ),
        ({"AssumeRoleWithWebIdentity": (200, STS), ECR_TOKEN: (200, '{"authorizationData": []}')}, ServiceUnavailable),
        (
            {"AssumeRoleWithWebIdentity": (200, STS), ECR_TOKEN: (200, ecr_answer("").replace("QVdTOg==", "x"))},
            ServiceUnavailable,
        ),
    ],
    ids=["role", "registry", "empty", "malformed"],
)
def test_what_amazon_refuses_or_does_not_know_is_told(cloud, token, answers, kind):
    cloud.answers = answers
    with pytest.raises(kind) as error:
        amazon(cloud, token).for_host(ECR)
    assert ECR in str(error.value)
    assert JWT not in str(error.value)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, "{}", PermissionRefused),
        (400, '{"error": "invalid_client"}', PermissionRefused),
        (503, "", ServiceUnavailable),
        (200, "no JSON", ServiceUnavailable),
        (200, "{}", ServiceUnavailable),
        (200, '{"access_token": "a b\\r\\nc"}', ServiceUnavailable),
    ],
)
def test_what_azure_and_google_refuse_or_do_not_know_is_told(cloud, token, status, body, kind):
    cloud.answers = {"/tenant/oauth2/v2.0/token": (status, body), GOOGLE_TOKEN: (status, body)}
    for identity, host in ((azure(cloud, token), ACR), (google(cloud), GAR)):
        with pytest.raises(kind) as error:
            identity.for_host(host)
        assert host in str(error.value)
        assert JWT not in str(error.value)


def test_a_redirect_is_not_followed_with_a_token(cloud, token):
    with running() as elsewhere:
        cloud.location = f"{elsewhere.url}/"
        cloud.answers = {"/tenant/oauth2/v2.0/token": (307, ""), GOOGLE_TOKEN: (302, "")}
        for identity, host in ((azure(cloud, token), ACR), (google(cloud), GAR)):
            with pytest.raises(PermissionRefused, match="HTTP 30"):
                identity.for_host(host)
        assert elsewhere.asked == []


@pytest.mark.parametrize(
    ("variables", "host", "named"),
    [
        ({"AWS_WEB_IDENTITY_TOKEN_FILE": "/nonexistent", "AWS_ROLE_ARN": ROLE}, ECR, "AWS_WEB_IDENTITY_TOKEN_FILE"),
        ({"AWS_WEB_IDENTITY_TOKEN_FILE": "/nonexistent"}, ECR, "AWS_ROLE_ARN"),
        ({"AZURE_FEDERATED_TOKEN_FILE": "/nonexistent"}, ACR, "AZURE_TENANT_ID"),
        (
            {
                "AZURE_FEDERATED_TOKEN_FILE": "/x",
                "AZURE_TENANT_ID": "t",
                "AZURE_AUTHORITY_HOST": "http://login.example.com",
            },
            ACR,
            "AZURE_AUTHORITY_HOST",
        ),
        ({"GCE_METADATA_HOST": "user@host/path"}, GAR, "GCE_METADATA_HOST"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(variables, host, named):
    with pytest.raises(InvalidSettings, match=named) as error:
        CloudIdentity(variables=variables, policy=QUICK).for_host(host)
    assert error.value.exit_code == ExitCode.CONFIG


def test_a_service_that_is_away_is_told(token, dead_port):
    cloud = Cloud(url=f"http://127.0.0.1:{dead_port}")
    for one, host in ((amazon(cloud, token), ECR), (azure(cloud, token), ACR)):
        with pytest.raises(BuilderError) as error:
            one.for_host(host)
        assert error.value.exit_code == ExitCode.UNAVAILABLE


def test_a_credential_that_has_ended_is_asked_for_again():
    given = [Credential("one", "password-one", ends=time.monotonic() + 1000), Credential("two", "password-two")]
    asked = []

    def find() -> Credential:
        asked.append(given[len(asked)])
        return asked[-1]

    authorizer = Authorizer("a.example", credential=find, allowed=lambda _url: True, send=None)
    first = authorizer.answer(['Basic realm="x"'], frozenset(), None)
    assert authorizer.header(frozenset()) == first == given[0].basic
    object.__setattr__(given[0], "ends", time.monotonic())
    assert authorizer.header(frozenset()) == given[1].basic
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("environ", "served"),
    [
        ({"REGISTRY_URL": f"{GAR}/project/models"}, {GAR}),
        ({"BASE_IMAGE": f"{GAR}/project/python:{{python_version}}"}, {GAR}),
        ({"ALLOWED_BASE_IMAGES": f"{GAR}/project/*"}, {GAR}),
        ({}, set()),
        ({"REGISTRY_URL": f"{GAR}/project/models", "GCE_METADATA_HOST": ""}, set()),
    ],
)
def test_an_identity_is_used_at_the_hosts_that_the_settings_name(cloud, environ, served):
    """An author's FROM may name any registry: it gets no token, and nobody is asked for one."""
    cloud.answers = {GOOGLE_TOKEN: (200, json.dumps({"access_token": "ya29.token", "expires_in": 3000}))}
    settings = Settings.from_environ(
        {
            "MLFLOW_TRACKING_URI": "https://mlflow.test",
            "REGISTRY_URL": "registry.test/models",
            "GCE_METADATA_HOST": cloud.host,
            **environ,
        }
    )
    with Registries.from_settings(settings) as registries:
        find = registries._credentials.for_host
        assert {host for host in (GAR, "us-docker.pkg.dev", "gcr.io") if find(host)} == served
    assert len(cloud.asked) == len(served)


def test_an_image_under_test_is_not_beside_an_identity_that_every_container_is_served():
    environ = {
        "MLFLOW_TRACKING_URI": "https://mlflow.test",
        "REGISTRY_URL": "registry.test/models",
        "GCE_METADATA_HOST": "metadata.test",
        "SMOKE_TEST_CANDIDATE": "registry.test/models/candidates:pod",
    }
    with pytest.raises(InvalidSettings, match="SMOKE_TEST_CANDIDATE"):
        Settings.from_environ(environ)
